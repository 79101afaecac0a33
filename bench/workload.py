"""What every contender computes: one case of sizes, and the random numbers to compute it on."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_lstm
from fused_lstm.bench.textbook import Conditions
from fused_lstm.bench.variants import PLAIN, VARIANTS

_SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}

# Not float64: that is what the accuracy of the others is measured against.
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Case:
    """The sizes of a training step.

    Attributes:
        hidden_size: H, units
        batch_size: N, rows of the batch
        steps: T, time steps
        input_size: I, input features; None: H
        layers, bidirectional: of the stack
        dtype: of weights, inputs and gradients, one of `DTYPES`
        device: what `torch.device` takes
        tf32: may float32 products use TF32? On CUDA; elsewhere, and in another dtype, it changes nothing
        variant: of the cell, one of `VARIANTS`
    """

    hidden_size: int
    batch_size: int
    steps: int
    input_size: int | None = None
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    tf32: bool = True
    variant: str = PLAIN

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def label(self) -> str:
        """The case in a few words, for a table."""
        dtype = _SHORT_DTYPES[self.dtype]
        if self.dtype == "float32" and self.on_cuda:
            dtype = "tf32" if self.tf32 else "fp32 (no TF32)"
        words = [dtype, f"H={self.hidden_size}", f"N={self.batch_size}", f"T={self.steps}"]
        if self.input_size not in (None, self.hidden_size):
            words.append(f"I={self.input_size}")
        if self.layers > 1:
            words.append(f"{self.layers} layers")
        if self.bidirectional:
            words.append("bidirectional")
        if self.variant != PLAIN:
            words.append(self.variant)
        return " ".join(words)

    def lstm(self, cls: type[torch.nn.LSTM] = torch.nn.LSTM, **options) -> torch.nn.LSTM:
        """An LSTM of these sizes on the case's device and in its dtype, of another class or with more options."""
        options = {"device": self.device, "dtype": self.torch_dtype} | options
        input_size = self.hidden_size if self.input_size is None else self.input_size
        return cls(input_size, self.hidden_size, self.layers, bidirectional=self.bidirectional, **options)


@dataclass(frozen=True)
class Workload:
    """A case with its numbers: all contenders read the same tensors, so `refill` gives all of them fresh ones.

    Attributes:
        case: the sizes; L layers, D directions
        input: (T, N, I), requires a gradient, as do h_0 and c_0
        h_0, c_0: (L * D, N, H)
        d_output: (T, N, D * H), the gradient that the training step starts from
        d_h_n, d_c_n: (L * D, N, H), likewise
        weights: the state_dict of a torch.nn.LSTM, and after it what `fused_lstm.LSTM` has more for the variant
        reset: (T, N) bool, for the variant that is given one: one element in 20 and one at least
        lengths: (N,) int64, likewise: from 1 to T, the first row's T
        host_lengths: the same on the CPU, where torch wants them
    """

    case: Case
    input: Tensor
    h_0: Tensor
    c_0: Tensor
    d_output: Tensor
    d_h_n: Tensor
    d_c_n: Tensor
    weights: Mapping[str, Tensor]
    reset: Tensor | None = None
    lengths: Tensor | None = None
    host_lengths: Tensor | None = None

    @classmethod
    def draw(cls, case: Case, seed: int) -> "Workload":
        """Weights as torch.nn.LSTM draws them, U(±1/√H), those of norms around 1; and normally distributed inputs."""
        variant = VARIANTS[case.variant]
        state = case.layers * case.directions, case.batch_size, case.hidden_size
        features = case.hidden_size if case.input_size is None else case.input_size
        shapes = {
            "input": (case.steps, case.batch_size, features),
            "h_0": state,
            "c_0": state,
            "d_output": (case.steps, case.batch_size, case.directions * case.hidden_size),
            "d_h_n": state,
            "d_c_n": state,
        }
        tensors = {
            name: torch.empty(shape, dtype=case.torch_dtype, device=case.device) for name, shape in shapes.items()
        }
        if variant.given == "reset":
            tensors["reset"] = torch.empty(case.steps, case.batch_size, dtype=torch.bool, device=case.device)
        if variant.given == "lengths":
            tensors["lengths"] = torch.empty(case.batch_size, dtype=torch.int64, device=case.device)
            tensors["host_lengths"] = torch.empty(case.batch_size, dtype=torch.int64)
        lstm = case.lstm() if case.variant == PLAIN else case.lstm(fused_lstm.LSTM, **variant.options)
        weights = {name: weight.detach() for name, weight in lstm.state_dict().items()}
        workload = cls(case, **tensors, weights=weights)
        generator = torch.Generator(case.device).manual_seed(seed)
        bound = case.hidden_size**-0.5
        for name, weight in weights.items():
            weight.uniform_(-bound, bound, generator=generator)
            if name.startswith("norm") and "_weight_" in name:
                weight += 1
        for leaf in workload.leaves:
            leaf.requires_grad_()
        workload._fill(generator)
        return workload

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input, self.h_0, self.c_0

    @property
    def upstream(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.d_output, self.d_h_n, self.d_c_n

    @property
    def conditions(self) -> Conditions:
        return Conditions(self.reset, self.lengths)

    def refill(self, seed: int) -> None:
        """Other numbers in the same tensors, which is where a captured CUDA graph reads; the weights stay."""
        self._fill(torch.Generator(self.case.device).manual_seed(seed))

    @torch.no_grad()
    def _fill(self, generator: torch.Generator) -> None:
        for tensor in (*self.leaves, *self.upstream):
            tensor.normal_(generator=generator)
        if self.reset is not None:
            self.reset.bernoulli_(0.05, generator=generator)
            self.reset[-1, -1] = True
        if self.lengths is not None:
            self.lengths.random_(1, self.case.steps + 1, generator=generator)
            self.lengths[0] = self.case.steps
            self.host_lengths.copy_(self.lengths)

    def as_float64(self, device: torch.device | str) -> "Workload":
        """The same numbers in float64 on device."""

        def convert(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, torch.float64).requires_grad_(tensor.requires_grad)

        case = Case(**{**vars(self.case), "dtype": "float64", "device": str(device)})
        weights = {name: convert(weight) for name, weight in self.weights.items()}
        given = {
            "reset": None if self.reset is None else self.reset.to(device),
            "lengths": None if self.lengths is None else self.lengths.to(device),
            "host_lengths": self.host_lengths,
        }
        return Workload(case, *map(convert, (*self.leaves, *self.upstream)), weights=weights, **given)


def fresh_seed() -> int:
    """A seed that nobody has tuned for."""
    return secrets.randbits(31)
