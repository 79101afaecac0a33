"""The LSTMs that are compared, each built from the same weights and given the same training step."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_lstm
from fused_lstm.bench import textbook
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.textbook import Cell, Draws
from fused_lstm.bench.variants import PLAIN, VARIANTS
from fused_lstm.bench.workload import Case, Workload

TORCH = "torch.nn.LSTM"
CELL_LOOP = "LSTMCell loop"
TEXTBOOK_LOOP = "textbook loop"

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
        yardstick: does it compute the plain cell beside a variant: timed, but nothing to check?
    """

    name: str
    build: Callable[[Workload], Model]
    ours: bool = False
    graph: bool = False
    yardstick: bool = False


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

    def checked(self, seed: int = 0) -> dict[str, Tensor]:
        """The results by name, computed in memory that has held NaN: what is left unwritten shows.

        Args:
            seed: of what the step draws
        """
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self()]
        # into the blocks that the results have just given back to the allocator, and back to it
        poison = [torch.full(shape, torch.nan, dtype=dtype, device=device) for shape, dtype, device in shapes]
        del poison
        torch.manual_seed(seed)
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

    def checked(self, seed: int = 0) -> dict[str, Tensor]:
        """The results by name, written over NaN: what is left unwritten shows; seed as `Step.checked`'s."""
        for tensor in self._results:
            tensor.fill_(torch.nan)
        torch.manual_seed(seed)
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


def plain_of(name: str) -> str:
    """What a contender is called where it computes the plain cell beside a variant."""
    return f"{name} plain"


def standard_of(variant: str) -> str:
    """The contender whose error is the measure of the others' in a variant's cases."""
    return TORCH if variant == PLAIN else TEXTBOOK_LOOP


def choose_backend(name: str, case: Case) -> fused_lstm.BackendChoice:
    """
    Raises:
        ValueError: the backend cannot run the case
    """
    variant = VARIANTS[case.variant]
    return fused_lstm.select_backend(
        name,
        device=case.device,
        dtype=case.torch_dtype,
        hidden_size=case.hidden_size,
        batch_size=case.batch_size,
        lengths=variant.given == "lengths",
        recompute=variant.options.get("recompute", False),
        layer_norm=variant.options.get("layer_norm"),
        options=variant.differences,
    )


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

    In a variant's case these two compute the plain cell, as yardsticks; then come torch.nn.LSTM where it has a way to
    compute the variant, ours, and the loop; beside recompute also one that saves memory as it does.

    Args:
        case: the sizes and the device
        backends: of ours
        graphs: torch's and ours from a CUDA graph too, on CUDA
        loop: the Python loop of torch.nn.LSTMCell; a variant's always takes part
        compile_loop: that loop under torch.compile, which unrolls it: minutes for hundreds of steps
        others: the libraries that are installed beside, on CUDA; they know the plain cell only
    """
    if case.variant != PLAIN:
        return _variant_contenders(case, backends, graphs, compile_loop)
    contenders = [Contender(TORCH, _torch_lstm)]
    contenders += [Contender(f"fused_lstm {name}", _fused_lstm(name), ours=True) for name in backends]
    if graphs and case.on_cuda:
        contenders += [_in_graph(contender) for contender in contenders]
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


def exact_step(workload: Workload, device: torch.device | str, seed: int = 0) -> Step:
    """The step in float64 on device to which the others are held: torch.nn.LSTM's, or a variant's textbook loop.

    Args:
        seed: it computes on what the others draw under this one, in their own dtype
    """
    exact = workload.as_float64(device)
    if workload.case.variant == PLAIN:
        return Step(_torch_lstm(exact), exact)
    torch.manual_seed(seed)
    factors = [
        Draws(*(_as_exact(tensor, device) for tensor in _draw(workload, torch.ones_like(weights["weight_hh"]))))
        for weights in textbook.by_layer(workload.weights).values()
    ]
    return Step(_textbook_loop(exact, factors), exact)


def _variant_contenders(case: Case, backends: Sequence[str], graphs: bool, compile_loop: bool) -> list[Contender]:
    ours = [Contender(f"fused_lstm {name}", _fused_lstm(name), ours=True) for name in backends]
    yardsticks = [Contender(TORCH, _torch_lstm)]
    yardsticks += [Contender(f"fused_lstm {name}", _fused_lstm(name, PLAIN), ours=True) for name in backends]
    if graphs and case.on_cuda:
        ours += [_in_graph(contender) for contender in ours]
        yardsticks += [_in_graph(contender) for contender in yardsticks]
    contenders = [replace(each, name=plain_of(each.name), yardstick=True) for each in yardsticks]
    if case.variant in _TORCHS_OWN:
        contenders.append(Contender(TORCH, _TORCHS_OWN[case.variant]))
    contenders += [*ours, Contender(TEXTBOOK_LOOP, _textbook_loop)]
    if "recompute" in VARIANTS[case.variant].options:
        contenders.append(Contender(f"{TEXTBOOK_LOOP} checkpointed", _checkpointed_loop))
    if compile_loop:
        contenders.append(Contender(f"{TEXTBOOK_LOOP} compiled", _compiled_textbook_loop))
    return contenders


def _in_graph(contender: Contender) -> Contender:
    return replace(contender, name=f"{contender.name} graph", graph=True)


def _of_module(module: torch.nn.LSTM, weights: Mapping[str, Tensor], **given: Tensor) -> Model:
    """Of the weights, those that the module has; given: to its forward, beside input and state."""
    module.load_state_dict({name: weights[name] for name in module.state_dict()})

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = module(input, (h_0, c_0), **given)
        return output, h_n, c_n

    return Model(forward, dict(module.named_parameters()))


def _torch_lstm(workload: Workload) -> Model:
    return _of_module(workload.case.lstm(), workload.weights)


def _fused_lstm(backend: str, variant: str | None = None) -> Callable[[Workload], Model]:
    """variant: another than the case's."""

    def build(workload: Workload) -> Model:
        case = workload.case if variant is None else replace(workload.case, variant=variant)
        try:
            choice = choose_backend(backend, case)
        except ValueError as error:
            raise CannotRun(str(error)) from error
        module = case.lstm(fused_lstm.LSTM, backend=backend, **VARIANTS[case.variant].options)
        name = VARIANTS[case.variant].given
        given = {} if name is None else {name: getattr(workload, name)}
        return _of_module(module, workload.weights, **given)._replace(backend=choice)

    return build


def _packed_torch_lstm(workload: Workload) -> Model:
    """lengths as torch knows them: pack, run, pad."""
    module = workload.case.lstm()
    module.load_state_dict(workload.weights)

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = pack_padded_sequence(input, workload.host_lengths, enforce_sorted=False)
        output, (h_n, c_n) = module(packed, (h_0, c_0))
        return pad_packed_sequence(output)[0], h_n, c_n  # the first row is as long as the input

    return Model(forward, dict(module.named_parameters()))


def _weight_dropped_torch_lstm(workload: Workload) -> Model:
    """AWD-LSTM's weight drop: torch's LSTM on a W_hh that has been dropped out."""
    case = workload.case
    parameters = _leaves(workload.weights)
    rate = VARIANTS[case.variant].options["weight_dropout"]

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = [
            torch.nn.functional.dropout(weight, rate) if name.startswith("weight_hh") else weight
            for name, weight in parameters.items()
        ]
        with warnings.catch_warnings():
            # cuDNN copies weights that do not lie one behind the other, and says so
            warnings.simplefilter("ignore", UserWarning)
            return torch.lstm(input, (h_0, c_0), weights, True, case.layers, 0.0, True, case.bidirectional, False)

    return Model(forward, parameters)


# What torch.nn.LSTM can compute all the same.
_TORCHS_OWN = {"lengths": _packed_torch_lstm, "weight_dropout": _weight_dropped_torch_lstm}


def _leaves(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone().requires_grad_() for name, weight in weights.items()}


def _draw(workload: Workload, weight_hh: Tensor) -> Draws:
    options = VARIANTS[workload.case.variant].options
    return textbook.draw(options, weight_hh, workload.case.steps, workload.h_0[0].detach())


def _as_exact(drawn: Tensor | None, device: torch.device | str) -> Tensor | None:
    if drawn is None:
        return None
    return drawn.to(device) if drawn.dtype == torch.bool else drawn.to(device, torch.float64)


def _textbook_loop(
    workload: Workload, factors: Sequence[Draws] | None = None, compiled: bool = False, cell: Cell | None = None
) -> Model:
    """
    Args:
        factors: for each layer and direction, what was drawn, weight_hh being a factor; None: each call draws anew
        compiled: all but the drawing, which torch.compile would do in another way
        cell: in place of the variant's
    """
    cell = cell or VARIANTS[workload.case.variant].cell
    parameters = _leaves(workload.weights)
    layers = textbook.by_layer(parameters)
    walk = torch.compile(textbook.walk) if compiled else textbook.walk

    def forward(input: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if factors is None:
            draws = [_draw(workload, weights["weight_hh"]) for weights in layers.values()]
        else:
            draws = [
                drawn if drawn.weight_hh is None else drawn._replace(weight_hh=weights["weight_hh"] * drawn.weight_hh)
                for weights, drawn in zip(layers.values(), factors, strict=True)
            ]
        return walk(cell, layers, draws, workload.conditions, input, h_0, c_0)

    return Model(forward, parameters)


def _compiled_textbook_loop(workload: Workload) -> Model:
    return _textbook_loop(workload, compiled=True)


def _checkpointed_loop(workload: Workload) -> Model:
    return _textbook_loop(workload, cell=textbook.checkpointed_cell)


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
