"""LSTM and LSTMCell: torch's modules with another engine."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_lstm._backends import check_backend_name
from fused_lstm._compile import let_dynamo_trace
from fused_lstm._ragged import Packing, Ragged, check_lengths
from fused_lstm.functional import check_two_states, is_autocast_enabled, lstm_cell, run_layer, select_layer_backend

Weights = tuple[Tensor | None, ...]  # weight_ih, weight_hh, bias_ih, bias_hh, weight_hr


class LSTM(torch.nn.LSTM):
    """A `torch.nn.LSTM` that trains faster: same arguments, parameters, results, errors and checkpoints.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as torch.nn.LSTM's
        recompute: keep h and c only for the backward, which computes the gates again, for all steps in one product:
            6 bytes per step, row and unit in a 2-byte dtype instead of 14
        backend: "auto", which also listens to the environment variable FUSED_LSTM_BACKEND, or one of
            `fused_lstm.BACKENDS`

    Inputs: input, hx, lengths
        * **input**: (T, N, I), (N, T, I) with batch_first, (T, I) unbatched, or a PackedSequence
        * **hx**: h_0 (num_layers * D, N, P) and c_0 (num_layers * D, N, H), or (num_layers * D, ·) unbatched; zeros
          if None; D is 2 if bidirectional, else 1; P is proj_size, or H without
        * **lengths**: (N,) int32 or int64, 1 <= length <= T: the steps of each row of a padded input. Computed as if
          packed, without sorting; nothing that lies in the padding has an effect

    Outputs: output, (h_n, c_n)
        * **output**: (T, N, D * P) in input's layout, zero past each length
        * **h_n**, **c_n**: shaped as hx, each row's after its last step

    Raises:
        ValueError, RuntimeError: in the cases and words of torch.nn.LSTM; ValueError for lengths that do not fit, and
            for a backend that cannot run the case, which says why
    """

    def __init__(self, *args, recompute: bool = False, backend: str = "auto", **kwargs) -> None:
        check_backend_name(backend)
        if not isinstance(recompute, bool):
            raise TypeError(f"recompute should be of type bool, got: {type(recompute).__name__}")
        let_dynamo_trace(LSTM)
        super().__init__(*args, **kwargs)
        self.recompute = recompute
        self.backend = backend

    def extra_repr(self) -> str:
        recompute = ", recompute=True" if self.recompute else ""
        return super().extra_repr() + recompute + _extra_repr(self)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        let_dynamo_trace(LSTM)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        if not packed and data.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {data.dim()}D instead")
        batch_size = self._batch_size(input)
        self._check_lengths(input, lengths, batch_size)
        if not data.dtype.is_floating_point:  # no backend takes it: torch says so in terms of the weights
            self._check_input(data, data.dim(), self._layer_weights(self._all_weights[0])[0])
        name = select_layer_backend(
            self.backend,
            data,
            self.hidden_size,
            batch_size,
            projection=self.proj_size > 0,
            lengths=lengths is not None,
            recompute=self.recompute,
        )
        if name == "torch":
            return super().forward(input, hx)
        if hx is not None:
            check_two_states(hx, "lstm")
        weights = [self._layer_weights(names) for names in self._all_weights]
        if packed:
            return self._forward_packed(input, hx, weights, name)
        return self._forward_padded(input, hx, lengths, weights, name)

    def _batch_size(self, input: Tensor | PackedSequence) -> int:
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0])
        return 1 if input.dim() == 2 else input.size(0 if self.batch_first else 1)

    def _check_lengths(self, input: Tensor | PackedSequence, lengths: Tensor | None, batch_size: int) -> None:
        if lengths is None:
            return
        if isinstance(input, PackedSequence):
            raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
        if input.dim() == 2:
            raise ValueError("lengths needs a batched input, got a 2D one")
        check_lengths(lengths, batch_size, input.size(1 if self.batch_first else 0))

    def _check_input(self, input: Tensor, dim: int, weight: Tensor) -> None:
        if input.dtype != weight.dtype and not is_autocast_enabled(input.device):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )
        if input.device != weight.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {weight.device}"
            )

    def _state(self, hx: tuple[Tensor, Tensor] | None, input: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """h_0 and c_0, checked, or zeros."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        h_size = (count, batch_size, self.proj_size or self.hidden_size)
        c_size = (count, batch_size, self.hidden_size)
        if hx is None:
            return input.new_zeros(h_size), input.new_zeros(c_size)
        h0, c0 = hx[0], hx[1]
        self.check_hidden_size(h0, h_size, "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(c0, c_size, "Expected hidden[1] size {}, got {}")
        if not is_autocast_enabled(input.device):
            for state in (h0, c0):
                if state.device != input.device:
                    raise RuntimeError(
                        "Input and hidden tensors are not at the same device, found input tensor at "
                        f"{input.device} and hidden tensor at {state.device}"
                    )
                if state.dtype != input.dtype:
                    raise RuntimeError(
                        "Input and hidden tensors are not the same dtype, found input tensor with "
                        f"{input.dtype} and hidden tensor with {state.dtype}"
                    )
        return h0, c0

    def _forward_padded(self, input, hx, lengths, weights, backend):
        batched = input.dim() == 3
        if hx is not None and any(state.dim() != input.dim() for state in hx):
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should "
                f"also be {input.dim()}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if not batched:
            input = input[:, None]
            hx = None if hx is None else (hx[0][:, None], hx[1][:, None])
        elif self.batch_first:
            input = input.transpose(0, 1)
        self._check_input(input, 3, weights[0][0])
        h0, c0 = self._state(hx, input, input.size(1))
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        ragged = None
        if lengths is not None:
            ragged = Ragged.from_lengths(lengths, input.size(0), input.device)
            input = ragged.clear(input)
        output, h_n, c_n = self._run_layers(input, h0, c0, weights, ragged, None, backend)
        if not batched:
            return output[:, 0], (h_n[:, 0], c_n[:, 0])
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def _forward_packed(self, input, hx, weights, backend):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_input(data, 2, weights[0][0])
        packing, ragged = Packing.from_batch_sizes(batch_sizes, data.device)
        h0, c0 = self.permute_hidden(self._state(hx, data, packing.batch_size), sorted_indices)
        output, h_n, c_n = self._run_layers(packing.pad(data), h0, c0, weights, ragged, packing, backend)
        output = PackedSequence(packing.pack(output), batch_sizes, sorted_indices, unsorted_indices)
        return output, self.permute_hidden((h_n, c_n), unsorted_indices)

    def _run_layers(
        self,
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        weights: list[Weights],
        ragged: Ragged | None,
        packing: Packing | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """input (T, N, I) -> output (T, N, D * P), h_n and c_n (num_layers * D, N, ·)."""
        directions = 2 if self.bidirectional else 1
        h_n, c_n = [], []
        for index, layer in enumerate(weights):
            reverse = index % directions == 1
            output, h, c = run_layer(input, h0[index], c0[index], layer, ragged, reverse, backend, self.recompute)
            h_n.append(h)
            c_n.append(c)
            if directions == 2:
                if index % 2 == 0:
                    first = output
                    continue
                output = torch.cat((first, output), dim=2)
            input = output if index + 1 == len(weights) else self._dropout(output, packing)
        return input, torch.stack(h_n), torch.stack(c_n)

    def _layer_weights(self, names: list[str]) -> Weights:
        """Read at each forward: they may be parametrized or replaced."""
        weights = [getattr(self, name) for name in names]
        if not self.bias:
            weights[2:2] = [None, None]
        return (*weights, None) if len(weights) == 4 else tuple(weights)

    def _dropout(self, output: Tensor, packing: Packing | None) -> Tensor:
        """Between layers; drawn on the packed rows where the input was packed, as torch's own LSTM does."""
        if self.dropout == 0 or not self.training:
            return output
        if packing is None:
            return torch.nn.functional.dropout(output, self.dropout)
        return packing.pad(torch.nn.functional.dropout(packing.pack(output), self.dropout))


class LSTMCell(torch.nn.LSTMCell):
    """A `torch.nn.LSTMCell` with another engine: same arguments, parameters, results, errors and checkpoints.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell's
        backend: "auto", which also listens to the environment variable FUSED_LSTM_BACKEND, or one of
            `fused_lstm.BACKENDS`

    Inputs: input (N, I) or (I), hx: h and c, each (N, H) or (H), zeros if None

    Outputs: the next h and c, each (N, H) or (H)

    Raises:
        ValueError, RuntimeError: in the cases and words of torch.nn.LSTMCell; ValueError for a backend that cannot run
            the case, which says why
    """

    def __init__(self, *args, backend: str = "auto", **kwargs) -> None:
        check_backend_name(backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra_repr(self)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batch_size = input.size(0) if input.dim() == 2 else 1
        name = select_layer_backend(self.backend, input, self.hidden_size, batch_size)
        if name == "torch":
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        for index, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
        check_two_states(hx, "lstm_cell")
        self._check_sizes(input, hx)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if input.dim() == 2:
            return lstm_cell(input, hx, *weights, backend=name)
        h, c = lstm_cell(input[None], (hx[0][None], hx[1][None]), *weights, backend=name)
        return h[0], c[0]

    def _check_sizes(self, input: Tensor, hx: tuple[Tensor, Tensor]) -> None:
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {self.input_size}")
        batch_size = input.size(0) if input.dim() == 2 else 1
        for index, state in enumerate(hx):
            batched = state if input.dim() == 2 else state[None]
            if batched.size(0) != batch_size:
                raise RuntimeError(
                    f"Input batch size {batch_size} doesn't match hidden{index} batch size {batched.size(0)}"
                )
            if batched.shape[1:] != (self.hidden_size,):
                got = batched.size(1) if batched.dim() > 1 else batched.size(0)
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {got}, expected {self.hidden_size}"
                )


def _extra_repr(module: LSTM | LSTMCell) -> str:
    return "" if module.backend == "auto" else f", backend={module.backend!r}"
