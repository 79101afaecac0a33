"""Sequences of different lengths in one padded batch, without a Python loop over rows or steps.

The kernels walk all rows to T. Rows that have ended compute on zeros, whose results nobody reads: the output is cleared
past each end, and the final states are taken at it. A row's reverse direction walks its steps in the order of `flip`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """lengths (N,) int64; mask (T, N, 1) bool, true within a row's length; flip (T * N,) int64: for each (step, row),
    the place of the same row's mirrored step. All on the input's device."""

    lengths: Tensor
    mask: Tensor
    flip: Tensor

    @staticmethod
    def from_lengths(lengths: Tensor, steps: int, device: torch.device) -> "Ragged":
        lengths = lengths.to(device, torch.int64, non_blocking=True)
        step = torch.arange(steps, device=device)[:, None]
        mask = step < lengths
        mirrored = torch.where(mask, lengths - 1 - step, step)
        row = torch.arange(lengths.size(0), device=device)
        return Ragged(lengths, mask[:, :, None], (mirrored * lengths.size(0) + row).view(-1))

    def clear(self, x: Tensor) -> Tensor:
        """x (T, N, ·), zero past each end: selected, not multiplied, so that NaN in the padding ends here."""
        return torch.where(self.mask, x, 0)

    def mirror(self, x: Tensor) -> Tensor:
        """x (T, N, ·) with each row's steps in reverse order, the padding where it was."""
        return x.reshape(-1, x.size(2)).index_select(0, self.flip).view(x.shape)


def check_lengths(lengths: Tensor, batch_size: int, steps: int) -> None:
    """ValueError unless lengths is an integer tensor (N,) with 1 <= length <= T; values are checked only where that
    needs no wait for a device."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths should be a tensor of int32 or int64, got {got}")
    if lengths.shape != (batch_size,):
        raise ValueError(f"Expected lengths size {(batch_size,)}, got {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and batch_size > 0 and not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 1 or high > steps:
            raise ValueError(f"lengths should lie in [1, {steps}], got values from {low} to {high}")


class Packing(NamedTuple):
    """Where the rows of a PackedSequence lie in a padded batch: places (sum of lengths,) int64, into T * N."""

    places: Tensor
    steps: int
    batch_size: int

    @staticmethod
    def from_batch_sizes(batch_sizes: Tensor, device: torch.device) -> tuple["Packing", Ragged]:
        """batch_sizes (T,) int64 on the CPU: rows still running at each step, as PackedSequence holds them."""
        steps, batch_size = batch_sizes.size(0), int(batch_sizes[0])
        running = torch.arange(batch_size) < batch_sizes[:, None]
        places = running.view(-1).nonzero().view(-1).to(device, non_blocking=True)
        return Packing(places, steps, batch_size), Ragged.from_lengths(running.sum(0), steps, device)

    def pad(self, data: Tensor) -> Tensor:
        """data (sum of lengths, ·) -> (T, N, ·), zero past each end."""
        padded = data.new_zeros(self.steps * self.batch_size, data.size(1)).index_copy(0, self.places, data)
        return padded.view(self.steps, self.batch_size, data.size(1))

    def pack(self, padded: Tensor) -> Tensor:
        """padded (T, N, ·) -> (sum of lengths, ·)."""
        return padded.reshape(-1, padded.size(2)).index_select(0, self.places)
