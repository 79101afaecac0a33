"""The two opaque operators of a layer, and what they run a time step."""

import collections
import itertools

import pytest
import torch
from runs import randn, run, twin
from tolerance import assert_same_float64
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lstm import _ops, lstm_layer
from fused_lstm.kernels import stepwise

STEPS, ROWS, INPUT, HIDDEN, PROJECTED = 3, 2, 4, 5, 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "stepwise"])


def forward_arguments(
    device, backend, projection=False, biases=(True, True), lengths=False, reverse=False, save=True, recompute=False
):
    size = PROJECTED if projection else HIDDEN
    shapes = [(STEPS, ROWS, INPUT), (ROWS, size), (ROWS, HIDDEN), (4 * HIDDEN, INPUT), (4 * HIDDEN, size)]
    shapes += [(4 * HIDDEN,) if there else None for there in biases]
    shapes += [(PROJECTED, HIDDEN) if projection else None]
    tensors = [None if s is None else randn(*s, seed=i, device=device) for i, s in enumerate(shapes)]
    tensors.append(torch.tensor([2, 3], device=device) if lengths else None)
    return (*tensors, reverse, backend, save, recompute)


def backward_arguments(forward, there=(True, True, True), needs=(True,) * 7):
    input, h0, _c0, *weights, lengths, reverse, backend, _save, _recompute = forward
    output, h_n, c_n, gates, c = _ops.layer_forward(*forward)
    d_results = [torch.ones_like(r) if given else None for r, given in zip((output, h_n, c_n), there, strict=True)]
    return (
        *d_results,
        input,
        h0,
        *weights,
        lengths,
        output,
        gates,
        c,
        reverse,
        backend,
        [*needs],
    )


CASES = {
    "plain": {},
    "no_save": {"save": False},
    "no_bias": {"biases": (False, False)},
    "bias_ih": {"biases": (True, False)},
    "bias_hh": {"biases": (False, True)},
    "reverse": {"reverse": True},
    "projection": {"projection": True},
    "lengths": {"lengths": True},
    "lengths_no_save": {"lengths": True, "save": False},
    "recompute": {"recompute": True},
    "recompute_reverse_no_bias": {"recompute": True, "reverse": True, "biases": (False, False)},
    "all": {"projection": True, "lengths": True, "biases": (False, False), "recompute": True},
}


@BACKENDS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_forward(case, backend, device):
    torch.library.opcheck(_ops.layer_forward, forward_arguments(device, backend, **case))


@BACKENDS
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.get("save", True)], ids=[c for c in CASES if "save" not in c]
)
def test_opcheck_backward(case, backend, device):
    torch.library.opcheck(_ops.layer_backward, backward_arguments(forward_arguments(device, backend, **case)))


@BACKENDS
@pytest.mark.parametrize("there", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_opcheck_backward_of_a_subset(there, backend, device):
    forward = forward_arguments(device, backend, lengths=True)
    torch.library.opcheck(_ops.layer_backward, backward_arguments(forward, there))


@BACKENDS
@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.get("save", True)], ids=[c for c in CASES if "save" not in c]
)
def test_recomputed_gates_give_the_same_gradients(case, backend, device):
    keep, again = (forward_arguments(device, backend, **{**case, "recompute": r}) for r in (False, True))
    assert _ops.layer_forward(*again)[3].numel() == 0
    expected = _ops.layer_backward(*backward_arguments(keep))
    for gradient, same in zip(_ops.layer_backward(*backward_arguments(again)), expected, strict=True):
        assert_same_float64(gradient, same)


@BACKENDS
@pytest.mark.parametrize("wanted", range(7))
def test_only_wanted_gradients(wanted, backend, device):
    """What is not asked for comes back empty, and what is asked for does not depend on the rest."""
    forward = forward_arguments(device, backend, projection=True)
    needs = [index == wanted for index in range(7)]
    all_of_them = _ops.layer_backward(*backward_arguments(forward))
    arguments = backward_arguments(forward, needs=needs)
    torch.library.opcheck(_ops.layer_backward, arguments)
    for index, gradient in enumerate(_ops.layer_backward(*arguments)):
        assert torch.equal(gradient, all_of_them[index]) if index == wanted else gradient.shape == (0,)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_saved(dtype, backend, device):
    """The gates in the input's dtype, c in float32 or better; nothing where nobody asks for it."""
    arguments = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in forward_arguments(device, backend)]
    output, h_n, c_n, gates, c = _ops.layer_forward(*arguments)
    assert {t.dtype for t in (output, h_n, c_n, gates)} == {dtype}
    assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gates.shape == (STEPS, ROWS, 4 * HIDDEN)
    assert c.shape == (STEPS + 1, ROWS, HIDDEN)
    assert [t.numel() for t in _ops.layer_forward(*arguments[:-2], False, False)[3:]] == [0, 0]


def saved_bytes(layer) -> int:
    """Bytes that autograd keeps for the backward of a layer, each storage once."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer()
    return sum(sizes.values())


@BACKENDS
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("dtype", "gates", "rest"), [(torch.bfloat16, 8, 4 + 2), (torch.float32, 16, 4 + 4)], ids=str)
def test_bytes_saved_a_unit(dtype, gates, rest, recompute, backend, device):
    """As the operator's docstring says: gates, c and output, per (step, row, unit)."""
    expected = rest if recompute else gates + rest

    def saved(steps):
        weights = [randn(4 * 64, size, dtype=dtype, device=device, requires_grad=True) for size in (1, 64)]
        state = [torch.zeros(2, 64, dtype=dtype, device=device) for _ in range(2)]
        input = randn(steps, 2, 1, dtype=dtype, device=device)
        return (
            saved_bytes(lambda: lstm_layer(input, state, *weights, recompute=recompute, backend=backend)) - input.nbytes
        )

    assert saved(5) - saved(3) == 2 * 2 * 64 * expected


class CountOps(TorchDispatchMode):
    """How often each torch operation was called."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Kernel launches, counted and left out: the interpreter would call torch for its own ends."""
    counted = collections.Counter()

    def launcher(kernel, *_):
        def launch(*_):
            counted[kernel.__name__] += 1

        return launch

    monkeypatch.setattr(stepwise, "_step_launcher", launcher)
    monkeypatch.setattr(stepwise, "_accumulate_on_cpu", torch.Tensor.addmm_)  # what a GPU is asked for
    return counted


def forward_calls(steps, projection, reverse, save, device):
    size = PROJECTED if projection else HIDDEN
    weight_hr = randn(PROJECTED, HIDDEN, device=device) if projection else None
    tensors = [randn(*s, device=device) for s in ((steps, ROWS, 4 * HIDDEN), (ROWS, size), (ROWS, HIDDEN))]
    with CountOps() as counted:
        stepwise.recurrence_forward(*tensors, randn(4 * HIDDEN, size, device=device), weight_hr, reverse, save)
    return counted.calls


@pytest.mark.parametrize("save", [True, False], ids=["save", "no_save"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_forward_of_a_step(projection, reverse, save, launches, device):
    """One product onto the gates and one kernel a step, a second product with a projection; no allocation."""
    few = forward_calls(3, projection, reverse, save, device)
    assert launches == {"cell_forward_kernel": 3}
    many = forward_calls(8, projection, reverse, save, device)
    assert launches == {"cell_forward_kernel": 11}
    assert many - few == {"aten.addmm_.default": 5, **({"aten.mm.out": 5} if projection else {})}
    assert not few - many


def backward_calls(steps, projection, reverse, lengths, there, device):
    size = PROJECTED if projection else HIDDEN
    weight_hr = randn(PROJECTED, HIDDEN, device=device) if projection else None
    shapes = ((steps, ROWS, size), (ROWS, size), (ROWS, HIDDEN))
    d_results = [randn(*s, device=device) if given else None for s, given in zip(shapes, there, strict=True)]
    saved = [randn(*s, device=device) for s in ((steps, ROWS, 4 * HIDDEN), (steps + 1, ROWS, HIDDEN))]
    lengths = torch.tensor([2, steps], device=device) if lengths else None
    weight_hh = randn(4 * HIDDEN, size, device=device)
    with CountOps() as counted:
        stepwise.recurrence_backward(*d_results, *saved, weight_hh, weight_hr, lengths, reverse)
    return counted.calls


@pytest.mark.parametrize("there", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reverse", "lengths"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_backward_of_a_step(projection, mode, there, launches, device):
    """One kernel and one product a step, two products with a projection; no allocation."""
    arguments = (projection, mode == "reverse", mode == "lengths", there, device)
    few = backward_calls(3, *arguments)
    assert launches == {"cell_backward_kernel": 3}
    many = backward_calls(8, *arguments)
    assert launches == {"cell_backward_kernel": 11}
    assert many - few == {"aten.mm.out": 5, **({"aten.addmm_.default": 5} if projection else {})}
    assert not few - many


SECOND = {
    "plain": ({}, None),
    "bidirectional": ({"bidirectional": True, "num_layers": 2}, None),
    "projection": ({"proj_size": PROJECTED}, None),
    "no_bias": ({"bias": False}, None),
    "lengths": ({"bidirectional": True}, [2, 3]),
}


@BACKENDS
@pytest.mark.parametrize(("options", "lengths"), SECOND.values(), ids=SECOND)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_second_derivative(options, lengths, backend, device):
    """A penalty on the gradient, as torch.nn.LSTM on a CPU computes it."""

    def derivatives(module, packed):
        where = module.weight_ih_l0.device
        input = randn(STEPS, ROWS, INPUT, device=where, requires_grad=True)
        if lengths is None:
            output, (h_n, c_n) = module(input)
        elif packed:
            given = torch.nn.utils.rnn.pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=False)
            (output, *_), (h_n, c_n) = module(given)
        else:
            output, (h_n, c_n) = module(input, lengths=torch.tensor(lengths, device=where))
        loss = (output**2).sum() + h_n.sum() + (c_n**3).sum()
        (first,) = torch.autograd.grad(loss, [input], create_graph=True)
        leaves = [input, *module.parameters()]
        return [first, *torch.autograd.grad((first**2).sum(), leaves, allow_unused=True, materialize_grads=True)]

    torch.manual_seed(0)
    module = torch.nn.LSTM(INPUT, HIDDEN, dtype=torch.float64, **options)
    expected = derivatives(module, packed=True)
    actual = derivatives(twin(module, backend).to(device), packed=False)
    for a, e in zip(actual, expected, strict=True):
        assert_same_float64(a.detach().cpu(), e.detach())


@BACKENDS
def test_no_autocast_inside(backend, device):
    """The operators compute in their arguments' dtype under somebody's autocast, which the caller has heeded."""
    arguments = [a.float() if isinstance(a, torch.Tensor) else a for a in forward_arguments(device, backend)]
    expected = _ops.layer_forward(*arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = _ops.layer_forward(*arguments)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("used", range(3), ids=["output", "h_n", "c_n"])
def test_unused_results_have_no_gradient(used, monkeypatch, device):
    """Not one of zeros, which would cost memory and time."""
    given = []
    layer_backward = _ops.layer_backward
    monkeypatch.setattr(_ops, "layer_backward", lambda *args: (given.append(args[:3]), layer_backward(*args))[1])
    input, h_0, c_0, *weights = forward_arguments(device, "reference")[:7]
    output, state = lstm_layer(input.requires_grad_(), (h_0, c_0), *weights, backend="reference")
    (output, *state)[used].sum().backward()
    assert [d is not None for d in given[0]] == [index == used for index in range(3)]


@BACKENDS
def test_gradients_end_at_the_layer(backend, device):
    """With a graph of them too, where one argument was made from another: what leads there counts once."""
    leaf, h_0, c_0, *weights = forward_arguments(device, backend)[:7]
    leaf.requires_grad_()
    output, (h_n, _) = lstm_layer(leaf, (leaf.sum(0)[:, :1] * h_0, leaf[0, :, :1] * c_0), *weights, backend=backend)
    loss = (output**2).sum() + h_n.sum()
    (expected,) = torch.autograd.grad(loss, [leaf], retain_graph=True)
    (actual,) = torch.autograd.grad(loss, [leaf], create_graph=True)
    assert_same_float64(actual.detach(), expected)


def test_run_is_deterministic(device):
    """Two runs, the same bits."""
    module = torch.nn.LSTM(INPUT, HIDDEN, bidirectional=True, device=device)
    found = []
    for _ in range(2):
        input = randn(STEPS, ROWS, INPUT, dtype=torch.float32, device=device, requires_grad=True)
        found.append(run(twin(module, "stepwise"), input))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] if found[0][name] is not None)
