"""The LSTMs that are compared, each built from the same weights and given the same training step."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import fused_lstm
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.workload import Case, Workload

TORCH = "torch.nn.LSTM"
CELL_LOOP = "LSTMCell loop"

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class CannotRun(Exception):
    """A contender does not do this case; its text says why."""


class Model(NamedTuple):
    """What a contender computes.

    Attributes:
        forward: input (T, N, I), h_0 and c_0 (L * D, N, H) to output (T, N, D * H), h_n and c_n (L * D, N, H)
        parameters: what it needs gradients of, by torch.nn.LSTM's names
        backend: which one runs and why, if it is ours
    """

    forward: Forward
    parameters: Mapping[str, Tensor]
    backend: fused_lstm.BackendChoice | None = None


@dataclass(frozen=True)
class Contender:
    """
    Attributes:
        name: for tables and records
        build: makes its model from a workload; raises CannotRun
        ours: is it this library's?
        graph: is its step replayed from a CUDA graph, see `GraphStep`?
    """

    name: str
    build: Callable[[Workload], Model]
    ours: bool = False
    graph: bool = False


class Step:
    """One training step of one layer stack: forward, and backward to the input, the initial states and all weights."""

    def __init__(self, model: Model, workload: Workload) -> None:
        self.backend = model.backend
        self._forward = model.forward
        self._workload = workload
        self._leaves = (*workload.leaves, *model.parameters.values())
        gradients = ("input", "h_0", "c_0", *model.parameters)
        self.names = ("output", "h_n", "c_n", *(f"gradient of {name}" for name in gradients))

    def __call__(self) -> tuple[Tensor, ...]:
        """The results, in the order of `names`."""
        outputs = self._forward(*self._workload.leaves)
        # not backward(): that would add to .grad, which costs a pass over each weight and is no part of an LSTM
        gradients = torch.autograd.grad(outputs, self._leaves, self._workload.upstream)
        return (*outputs, *gradients)

    def checked(self) -> dict[str, Tensor]:
        """The results by name, computed in memory that has held NaN: what is left unwritten shows."""
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self()]
        # into the blocks that the results have just given back to the allocator, and back to it
        poison = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape, dtype, device in shapes]
        del poison
        return dict(zip(self.names, self(), strict=True))


class GraphStep:
    """A step captured in a CUDA graph. It reads the workload's tensors: refill them for other numbers."""

    def __init__(self, step: Step) -> None:
        self.names = step.names
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # what runs once only (handles, tuning, compilation) cannot be captured
            for _ in range(3):
                step()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            results = step()
        self._results = tuple(tensor.detach() for tensor in results)

    def __call__(self) -> tuple[Tensor, ...]:
        """The results, in the order of `names`, in the same memory every time."""
        self._graph.replay()
        return self._results

    def checked(self) -> dict[str, Tensor]:
        """The results by name, written over NaN: what is left unwritten shows."""
        for tensor in self._results:
            tensor.fill_(torch.nan)
        return dict(zip(self.names, self(), strict=True))


def chosen_backends(names: Sequence[str] | None, device: torch.device | str) -> list[str]:
    """names, or if there are none ours that are worth timing: those with kernels on CUDA, the plain one elsewhere.

    Raises:
        UserError: there is no backend of such a name
    """
    known = ("auto", *fused_lstm.BACKENDS)
    for name in names or ():
        if name not in known:
            raise UserError(f"--backend is {name!r}", "give one of " + ", ".join(known))
    if names:
        return list(dict.fromkeys(names))
    if torch.device(device).type != "cuda":
        return ["reference"]
    return [name for name in fused_lstm.BACKENDS if name not in ("torch", "reference")]


def contenders_for(
    case: Case,
    backends: Sequence[str],
    *,
    graphs: bool = True,
    loop: bool = True,
    compile_loop: bool = False,
    others: bool = True,
) -> list[Contender]:
    """Who takes part, torch.nn.LSTM first, ours next.

    Args:
        case: the sizes and the device
        backends: of ours
        graphs: torch's and ours from a CUDA graph too, on CUDA
        loop: the Python loop of torch.nn.LSTMCell
        compile_loop: that loop under torch.compile, which unrolls it: minutes for hundreds of steps
        others: the libraries that are installed beside, on CUDA
    """
    contenders = [Contender(TORCH, _torch_lstm)]
    contenders += [Contender(f"fused_lstm {name}", _fused_lstm(name), ours=True) for name in backends]
    if graphs and case.on_cuda:
        contenders += [
            Contender(f"{contender.name} graph", contender.build, contender.ours, graph=True)
            for contender in contenders
        ]
    if loop:
        contenders.append(Contender(CELL_LOOP, _cell_loop))
    if compile_loop:
        contenders.append(Contender(f"{CELL_LOOP} compiled", _compiled_cell_loop))
    if others and case.on_cuda:
        contenders += [
            Contender(name, build)
            for name, package, build in (("FlashRNN", "flashrnn", _flashrnn), ("TorchRL Triton", "torchrl", _torchrl))
            if importlib.util.find_spec(package) is not None
        ]
    return contenders


def exact_step(workload: Workload, device: torch.device | str) -> Step:
    """torch.nn.LSTM's step in float64 on device, to which the others are held."""
    workload = workload.as_float64(device)
    return Step(_torch_lstm(workload), workload)


def _of_module(module: torch.nn.LSTM, weights: Mapping[str, Tensor]) -> Model:
    module.load_state_dict(weights)

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = module(input, (h_0, c_0))
        return output, h_n, c_n

    return Model(forward, dict(module.named_parameters()))


def _torch_lstm(workload: Workload) -> Model:
    return _of_module(workload.case.lstm(), workload.weights)


def _fused_lstm(backend: str) -> Callable[[Workload], Model]:
    def build(workload: Workload) -> Model:
        case = workload.case
        try:
            choice = fused_lstm.select_backend(
                backend,
                device=case.device,
                dtype=case.torch_dtype,
                hidden_size=case.hidden_size,
                batch_size=case.batch_size,
            )
        except ValueError as error:
            raise CannotRun(str(error)) from error
        return _of_module(case.lstm(fused_lstm.LSTM, backend=backend), workload.weights)._replace(backend=choice)

    return build


def _cell_loop(workload: Workload) -> Model:
    case = workload.case
    suffixes = [
        (f"_l{layer}{direction}", direction)
        for layer in range(case.layers)
        for direction in ("", "_reverse")[: case.directions]
    ]
    cells = []
    parameters = {}
    for suffix, _ in suffixes:
        weights = {name.removesuffix(suffix): w for name, w in workload.weights.items() if name.endswith(suffix)}
        cell = torch.nn.LSTMCell(
            weights["weight_ih"].size(1), case.hidden_size, device=case.device, dtype=case.torch_dtype
        )
        cell.load_state_dict(weights)
        cells.append(cell)
        parameters |= {name + suffix: parameter for name, parameter in cell.named_parameters()}

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h_n, c_n, outputs = [], [], []
        for index, (cell, (_, reverse)) in enumerate(zip(cells, suffixes, strict=True)):
            h, c = h_0[index], c_0[index]
            hs = []
            for x in reversed(input.unbind(0)) if reverse else input.unbind(0):
                h, c = cell(x, (h, c))
                hs.append(h)
            h_n.append(h)
            c_n.append(c)
            outputs.append(torch.stack(hs[::-1] if reverse else hs))
            if len(outputs) == case.directions:
                input = outputs[0] if case.directions == 1 else torch.cat(outputs, dim=2)
                outputs = []
        return input, torch.stack(h_n), torch.stack(c_n)

    return Model(forward, parameters)


def _compiled_cell_loop(workload: Workload) -> Model:
    model = _cell_loop(workload)
    return Model(torch.compile(model.forward), model.parameters)


def _one_direction(workload: Workload, library: str) -> dict[str, Tensor]:
    """The four parameters of a case that has no more, by torch.nn.LSTM's names."""
    if workload.case.layers > 1 or workload.case.bidirectional:
        raise CannotRun(f"{library} is compared in one layer and direction only")
    return {name: weight.clone().requires_grad_() for name, weight in workload.weights.items()}


def _flashrnn(workload: Workload) -> Model:
    parameters = _one_direction(workload, "FlashRNN")
    from flashrnn.flashrnn import flashrnn

    size, dtype = workload.case.hidden_size, workload.case.dtype
    weight_ih, weight_hh, bias_ih, bias_hh = parameters.values()

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # theirs: gates (N, T, 4, heads, H), states (2, N, T, heads, H), all with one head
        gates = torch.nn.functional.linear(input, weight_ih).unflatten(2, (4, 1, size)).transpose(0, 1)
        states = torch.stack((h_0[0], c_0[0]))[:, :, None, None]
        bias = (bias_ih + bias_hh).view(4, 1, size)
        recurrent = weight_hh.view(4, 1, size, size)
        states, last = flashrnn(gates, recurrent, bias, states=states, function="lstm", dtype=dtype)
        h_n, c_n = last[:, None, :, 0, 0]
        return states[0, :, :, 0].transpose(0, 1), h_n, c_n

    return Model(forward, parameters)


def _torchrl(workload: Workload) -> Model:
    parameters = _one_direction(workload, "TorchRL")
    from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

    case = workload.case
    resets = torch.zeros(case.batch_size, case.steps, dtype=torch.bool, device=case.device)

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # theirs: batch first, and a state for each step, of which only the first is read without resets
        h, c = (torch.nn.functional.pad(s[0][:, None], (0, 0, 0, case.steps - 1)) for s in (h_0, c_0))
        output, _, h_n, c_n = lstm_triton(
            input.transpose(0, 1).contiguous(),
            h,
            c,
            *parameters.values(),
            resets,
            compute_dtype=case.torch_dtype,
            input_precision="tf32" if case.tf32 else "ieee",
        )
        return output.transpose(0, 1), h_n[None], c_n[None]

    return Model(forward, parameters)
