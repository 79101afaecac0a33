"""The two opaque operators of a layer, and what they run a time step."""

import collections
import itertools

import pytest
import torch
import walks
from runs import randn, run, twin
from tolerance import assert_same_float64
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lstm import _ops, lstm_layer
from fused_lstm._options import parameter_sizes
from fused_lstm._ragged import Ragged
from fused_lstm.kernels import stepwise, stepwise_backward, stepwise_forward
from fused_lstm.reference import LAYER_NORMS, Parameters

STEPS, ROWS, INPUT, HIDDEN, PROJECTED = 3, 2, 4, 5, 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "stepwise"])


PLAIN = dict.fromkeys(("reset", "reset_h", "reset_c"))


def forward_arguments(
    device,
    backend,
    projection=False,
    biases=(True, True),
    lengths=False,
    reverse=False,
    save=True,
    recompute=False,
    directions=1,
    layer_norm=None,
    options=False,
    zoneout="masks",
    states=False,
    dtype=torch.float64,
) -> dict:
    """The forward operator's arguments by name; options: peepholes, a recurrent mask, zoneout, and resets where they
    may be."""
    size = PROJECTED if projection else HIDDEN
    seeds = itertools.count()

    def make(*shape):
        return randn(*shape, seed=next(seeds), device=device, dtype=dtype)

    def mask(*shape):
        return make(*shape) > 0

    input, h0, c0 = (make(*s) for s in ((STEPS, ROWS, INPUT), (directions, ROWS, size), (directions, ROWS, HIDDEN)))
    flat, masks = [], []
    for _ in range(directions):
        sizes = parameter_sizes(HIDDEN, layer_norm, options)
        own = Parameters(
            make(4 * HIDDEN, INPUT),
            make(4 * HIDDEN, size),
            *(make(4 * HIDDEN) if there else None for there in biases),
            make(PROJECTED, HIDDEN) if projection else None,
            **{name: make(length) for name, length in sizes.items()},
        )
        flat += own
        zoneouts = options and zoneout == "masks"
        masks += [
            2.0 * mask(ROWS, size).to(dtype) if options else None,
            mask(STEPS, ROWS, size) if zoneouts else None,
            mask(STEPS, ROWS, HIDDEN) if zoneouts else None,
        ]
    resets = dict(PLAIN)
    if options and directions == 1:
        resets = {"reset": mask(STEPS, ROWS), "reset_h": make(ROWS, size), "reset_c": make(ROWS, HIDDEN)}
    ragged = Ragged.from_lengths(torch.tensor([2, 3]), STEPS, input.device) if lengths else None
    return {
        "input": input,
        "h0": h0,
        "c0": c0,
        "parameters": flat,
        **resets,
        "masks": masks,
        "rates": [0.25, 0.5] if options and zoneout == "rates" else [0.0, 0.0],
        "lengths": None if ragged is None else ragged.lengths,
        "flip": None if ragged is None else ragged.flip,
        "layer_norm": layer_norm,
        "reverse": reverse,
        "backend": backend,
        "save": save,
        "recompute": recompute,
        "states": states,
    }


def needs_of(forward, wanted=None) -> list[bool]:
    """Every gradient that there is, or the one at a place of the operator's list."""
    resets = forward["reset"] is not None
    needs = [True, True, True, resets, resets]
    norm = forward["layer_norm"]
    for own in _ops.unflatten(forward["parameters"]):
        there = {
            **dict.fromkeys(("weight_ih", "weight_hh"), True),
            "bias": norm in (None, "gates") and (own.bias_ih is not None or own.bias_hh is not None),
            "weight_hr": own.weight_hr is not None,
            "weight_ph": own.weight_ph is not None,
            "norm_hh_weight": own.norm_hh_weight is not None,
            **dict.fromkeys(("norm_weight", "norm_bias", "norm_cell_weight", "norm_cell_bias"), norm is not None),
        }
        needs += [there[name] for name in _ops.GRADIENTS]
    return needs if wanted is None else [need and index == wanted for index, need in enumerate(needs)]


def backward_arguments(forward, there=(True, True, True), wanted=None) -> dict:
    output, h_n, c_n, c_all, *saved = _ops.layer_forward(**forward)
    d_results = [
        torch.ones_like(r).masked_fill(past_ends(forward, r), 0) if given else None
        for r, given in zip((output, h_n, c_n, c_all), (*there, forward["states"]), strict=True)
    ]
    unused = ("c0", "save", "recompute", "states")
    return {
        **dict(zip(("d_output", "d_h_n", "d_c_n", "d_c_all"), d_results, strict=True)),
        **{name: value for name, value in forward.items() if name not in unused},
        **dict(zip(("output", "gates", "product", "entered", "moments", "c"), (output, *saved), strict=True)),
        "needs": needs_of(forward, wanted),
    }


def past_ends(forward, result) -> torch.Tensor:
    """Where a result lies past a row's end, and its gradient is zero."""
    if forward["lengths"] is None or result.shape[-3] != STEPS:
        return torch.zeros((), dtype=torch.bool, device=result.device)
    return (torch.arange(STEPS, device=result.device)[:, None] >= forward["lengths"])[:, :, None]


def flat(results) -> list[torch.Tensor]:
    return [*results[:-1], *results[-1]]


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
    "two_directions": {"directions": 2},
    "two_directions_lengths": {"directions": 2, "lengths": True, "states": True, "recompute": True},
    "options": {"options": True, "states": True},
    "options_recompute": {"options": True, "recompute": True, "projection": True, "lengths": True},
    "options_two_directions": {"options": True, "directions": 2, "zoneout": "rates", "recompute": True},
    "options_no_save": {"options": True, "save": False},
    **{f"norm_{name}": {"layer_norm": name} for name in LAYER_NORMS},
    **{f"norm_{name}_all": {"layer_norm": name, "options": True, "recompute": True} for name in LAYER_NORMS},
    "norm_reverse_lengths": {"layer_norm": "projections", "reverse": True, "lengths": True, "biases": (False, False)},
    "norm_two_directions": {"layer_norm": "gates", "directions": 2, "options": True, "recompute": True},
}
SAVING = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.get("save", True)], ids=[name for name in CASES if "save" not in name]
)


@BACKENDS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_forward(case, backend, device):
    torch.library.opcheck(_ops.layer_forward, (), forward_arguments(device, backend, **case))


@BACKENDS
@SAVING
def test_opcheck_backward(case, backend, device):
    torch.library.opcheck(_ops.layer_backward, (), backward_arguments(forward_arguments(device, backend, **case)))


@BACKENDS
@pytest.mark.parametrize("there", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_opcheck_backward_of_a_subset(there, backend, device):
    forward = forward_arguments(device, backend, lengths=True, directions=2)
    torch.library.opcheck(_ops.layer_backward, (), backward_arguments(forward, there))


@BACKENDS
@SAVING
def test_recomputed_gates_give_the_same_gradients(case, backend, device):
    keep, again = (forward_arguments(device, backend, **{**case, "recompute": r}) for r in (False, True))
    assert [saved.numel() for saved in _ops.layer_forward(**again)[4:7]] == [0, 0, 0]
    expected = flat(_ops.layer_backward(**backward_arguments(keep)))
    for gradient, same in zip(flat(_ops.layer_backward(**backward_arguments(again))), expected, strict=True):
        assert_same_float64(gradient, same)


@BACKENDS
@pytest.mark.parametrize("layer_norm", [None, "projections"])
@pytest.mark.parametrize("wanted", range(5 + len(_ops.GRADIENTS)))
def test_only_wanted_gradients(wanted, layer_norm, backend, device):
    """What is not asked for comes back empty, and what is asked for does not depend on the rest."""
    forward = forward_arguments(device, backend, projection=True, options=True, layer_norm=layer_norm)
    all_of_them = flat(_ops.layer_backward(**backward_arguments(forward)))
    arguments = backward_arguments(forward, wanted=wanted)
    torch.library.opcheck(_ops.layer_backward, (), arguments)
    for index, gradient in enumerate(flat(_ops.layer_backward(**arguments))):
        assert torch.equal(gradient, all_of_them[index]) if index == wanted else gradient.shape == (0,)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_saved(dtype, backend, device):
    """The gates in the input's dtype, c in float32 or better; nothing where nobody asks for it."""
    arguments = forward_arguments(device, backend, dtype=dtype)
    output, h_n, c_n, c_all, gates, product, entered, moments, c = _ops.layer_forward(**arguments)
    assert {t.dtype for t in (output, h_n, c_n, gates)} == {dtype}
    assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gates.shape == (1, STEPS, ROWS, 4 * HIDDEN)
    assert c.shape == (1, STEPS + 1, ROWS, HIDDEN)
    assert [t.numel() for t in (c_all, product, entered, moments)] == [0, 0, 0, 0]
    assert [t.numel() for t in _ops.layer_forward(**{**arguments, "save": False})[3:]] == [0] * 6


@BACKENDS
@pytest.mark.parametrize(("layer_norm", "count"), [("gates", 10), ("projections", 6), ("projections_cell", 6)])
@pytest.mark.parametrize("recompute", [False, True])
def test_moments_of_norms_are_saved(recompute, layer_norm, count, backend, device):
    """Also where gates are computed again: of the input product, of the sums, and of c, by the definition."""
    arguments = forward_arguments(device, backend, layer_norm=layer_norm, recompute=recompute)
    moments = _ops.layer_forward(**arguments)[7]
    assert moments.shape == (1, STEPS, ROWS, count)
    gates, product, c = (_ops.layer_forward(**{**arguments, "recompute": False})[i] for i in (4, 5, 8))
    normed = gates.unflatten(3, (4, HIDDEN)) if layer_norm == "gates" else torch.stack((gates, product), 3)
    scale = (normed.var(4, correction=0) + 1e-5).rsqrt()
    assert_same_float64(moments[..., : count - 2], torch.cat((normed.mean(4), scale), 3))
    if layer_norm != "projections_cell":  # which hands on the c that its norm made
        assert_same_float64(moments[..., -2], c[:, 1:].mean(3))
        assert_same_float64(moments[..., -1], (c[:, 1:].var(3, correction=0) + 1e-5).rsqrt())


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

    for module in (stepwise_forward, stepwise_backward):
        monkeypatch.setattr(module, "step_launcher", launcher)
        monkeypatch.setattr(module, "accumulate_for", lambda _: torch.Tensor.addmm_)  # what a GPU is asked for
    return counted


def inputs_of(steps, projection, reverse, device) -> walks.Inputs:
    variant = walks.Variant(projection=projection)
    return walks.make_inputs(
        steps, ROWS, HIDDEN, variant, reverse=(reverse,), dtype=torch.float64, device=device, output_size=PROJECTED
    )


def forward_calls(steps, projection, reverse, save, device):
    walk = walks.walk_of(inputs_of(steps, projection, reverse, device), save)
    with CountOps() as counted:
        stepwise.recurrence_forward(walk)
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


def backward_calls(steps, projection, reverse, there, device):
    inputs = inputs_of(steps, projection, reverse, device)
    inputs = inputs._replace(
        **{name: None for name, given in zip(("d_output", "d_c_all"), there, strict=True) if not given}
    )
    walk = walks.walk_of(inputs)
    gradients = walks.gradients_of(walk, inputs)
    with CountOps() as counted:
        stepwise.recurrence_backward(walk, gradients)
    return counted.calls


@pytest.mark.parametrize("there", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_backward_of_a_step(projection, reverse, there, launches, device):
    """One kernel and one product a step, two products with a projection; no allocation."""
    few = backward_calls(3, projection, reverse, there, device)
    assert launches == {"cell_backward_kernel": 3}
    many = backward_calls(8, projection, reverse, there, device)
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
    arguments = forward_arguments(device, backend, dtype=torch.float32)
    expected = _ops.layer_forward(**arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = _ops.layer_forward(**arguments)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def layer_arguments(device) -> list[torch.Tensor]:
    """input, h_0, c_0, two weights, two biases, as lstm_layer takes them."""
    arguments = forward_arguments(device, "reference")
    return [arguments["input"], arguments["h0"][0], arguments["c0"][0], *arguments["parameters"][:4]]


@pytest.mark.parametrize("used", range(3), ids=["output", "h_n", "c_n"])
def test_unused_results_have_no_gradient(used, monkeypatch, device):
    """Not one of zeros, which would cost memory and time."""
    given = []
    layer_backward = _ops.layer_backward
    monkeypatch.setattr(_ops, "layer_backward", lambda *args: (given.append(args[:3]), layer_backward(*args))[1])
    input, h_0, c_0, *weights = layer_arguments(device)
    output, state = lstm_layer(input.requires_grad_(), (h_0, c_0), *weights, backend="reference")
    (output, *state)[used].sum().backward()
    assert [d is not None for d in given[0]] == [index == used for index in range(3)]


@BACKENDS
def test_gradients_end_at_the_layer(backend, device):
    """With a graph of them too, where one argument was made from another: what leads there counts once."""
    leaf, h_0, c_0, *weights = layer_arguments(device)
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
