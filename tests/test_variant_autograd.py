"""The options under autograd's further derivatives, torch.compile and autocast."""

import pytest
import torch
import variant_oracle as oracle
import variants
from runs import randn
from variants import BACKENDS, VARIANTS, H, assert_near, assert_same, build, cell_of, make_call, record

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # dynamo's own, when it traces any autograd.Function
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


SMALL = {"input_size": 2, "hidden_size": 3}


def small(device, variant, **more):
    variant = {**variant, "proj_size": 2} if "proj_size" in variant else variant
    return build(device, **{**SMALL, **variant, **more})


def on_one_vector(module, call):
    """The module as a function from all its leaves in one vector to all its results in one, with the same draws at each
    call; and the vector."""
    leaves = call.leaves(module)
    sizes = [leaf.numel() for leaf in leaves.values()]

    def run(vector):
        parts = zip(leaves.items(), vector.split(sizes), strict=True)
        given = {name: part.view(leaf.shape) for (name, leaf), part in parts}
        input, *states = (given.pop(name) for name in ("input", "h_0", "c_0", "reset_h", "reset_c"))
        keywords = {"reset": call.reset, "reset_state": states[2:]}
        torch.manual_seed(6)
        output, (h_n, c_n) = torch.func.functional_call(module, given, (input, states[:2]), keywords)
        return torch.cat([result.flatten() for result in (output, h_n, c_n)])

    return run, torch.cat([leaf.detach().flatten() for leaf in leaves.values()]).requires_grad_()


@EACH_BACKEND
@pytest.mark.parametrize(
    ("variant", "training"),
    [*((name, True) for name in VARIANTS), ("zoneout", False), ("all_projections", False)],
)
def test_gradcheck(variant, training, backend, device):
    """First and second derivatives, with resets."""
    module = small(device, VARIANTS[variant], backend=backend).train(training)
    function, vector = on_one_vector(module, make_call(module, reset=True, reset_state=True, steps=3, rows=2))
    assert torch.autograd.gradcheck(function, vector, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, vector, fast_mode=True)


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("kind", ["reset", "lengths", "packed", "states"])
def test_second_derivatives_against_the_oracle(kind, variant, backend, device, monkeypatch):
    """The gradient of a random combination of all first derivatives, as autograd has it of the oracle's loop."""
    bidirectional = kind in ("packed", "lengths")
    module = build(device, **variant, bidirectional=bidirectional, backend=backend)
    resets = {"reset": kind == "reset", "reset_state": kind == "reset"}
    call = make_call(module, kind if bidirectional else "batched", **resets, steps=4, rows=3)
    leaves = call.leaves(module)
    drawn = record(monkeypatch)
    torch.manual_seed(9)
    if kind == "states":
        results = module.states(call.input, call.hx)
    else:
        output, state = module(call.given(module), call.hx, **call.keywords())
        results = (output.data if kind == "packed" else output, *state)
    if kind == "packed":
        drawn = drawn.rows(call.given(module).unsorted_indices)
    exact = oracle.lstm(module, **call.time_major(False), drawn=drawn)
    expected = [exact[name] for name in ("hc" if kind == "states" else variants.RESULTS)]
    if kind == "packed":
        packed = torch.nn.utils.rnn.pack_padded_sequence(expected[0], call.lengths, enforce_sorted=False)
        expected[0] = packed.data
    second = []
    for values in (results, expected):
        d = [randn(*r.shape, seed=30 + i, device=device, requires_grad=True) for i, r in enumerate(values)]
        first = torch.autograd.grad(values, list(leaves.values()), d, create_graph=True, allow_unused=True)
        first = [value for value in first if value is not None and value.requires_grad]
        found = variants.gradients(first, {**leaves, **{f"d_{i}": value for i, value in enumerate(d)}}, seed=40)
        second.append({**{f"first_{i}": value for i, value in enumerate(first)}, **found})
    assert_same(*second)


@EACH_BACKEND
@pytest.mark.parametrize("layer_norm", [None, "gates", "projections", "projections_cell"])
def test_third_derivative(layer_norm, backend, device, monkeypatch):
    """And the fourth: torch's own layer_norm is wrong from the third on."""
    options = {"layer_norm": layer_norm, "peephole": True, "zoneout": (0.3, 0.3)}
    module = small(device, options, backend=backend)
    call = make_call(module, steps=2, rows=2)
    drawn = record(monkeypatch)
    found = module(call.input, call.hx)[0]
    expected = oracle.lstm(module, call.input, call.hx, drawn)["output"]
    for _ in range(4):
        found, expected = (
            torch.autograd.grad((value.tanh() * 3).pow(2).sum(), call.input, create_graph=True)[0]
            for value in (found, expected)
        )
        assert_same({"d": found}, {"d": expected})


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    *((name, True) for name in ("recurrent_dropout", "weight_dropout", "zoneout", "locked_dropout", "peephole")),
    *((name, True) for name in ("all_gates", "all_projections", "all_projections_cell")),
    *((name, False) for name in ("zoneout", "all_gates", "all_projections_cell")),
]


@pytest.mark.usefixtures("fresh_compiler")
@EACH_BACKEND
@pytest.mark.parametrize(("variant", "training"), COMPILED)
def test_compiled(variant, training, backend, device):
    """Whole, as eager mode has it, under the same seed; results and gradients, with resets and without."""
    module = build(device, **VARIANTS[variant], backend=backend).train(training)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    call = make_call(module, reset=not training, reset_state=not training)
    expected = variants.run(module, call)
    torch.manual_seed(9)
    output, (h_n, c_n) = compiled(call.input, call.hx, **call.keywords())
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    assert_same(found | variants.gradients(list(found.values()), call.leaves(module)), expected, 1e-13)


@pytest.mark.usefixtures("fresh_compiler")
@EACH_BACKEND
def test_compiled_states_and_lengths(backend, device):
    module = build(device, layer_norm="gates", zoneout=(0.3, 0.2), num_layers=2, bidirectional=True, backend=backend)
    call = make_call(module, "lengths")
    expected = variants.run(module, call, states=True)
    compiled = torch.compile(module.states, backend="aot_eager", fullgraph=True)
    torch.manual_seed(9)
    h, c = compiled(call.input, call.hx, **call.keywords())
    assert_same({"h": h, "c": c, **variants.gradients([h, c], call.leaves(module))}, expected, 1e-13)


@pytest.mark.usefixtures("fresh_compiler")
@EACH_BACKEND
def test_compiled_cell_and_functions(backend, device):
    cell = cell_of(VARIANTS["all_gates"], device, backend=backend)
    own = dict(cell.named_parameters())
    x = randn(5, 2, 3, device=device)
    h = randn(2, H, device=device)
    rates = {"layer_norm": "gates", "zoneout": 0.3, "backend": backend, "training": True}

    def all_of_them(x, h):
        h, c = cell(x[0], (h, h))
        reset = x[..., 0] > 0
        output, state = fused_lstm.lstm_layer(x, (h, c), **own, **rates, reset=reset, recurrent_dropout=0.3)
        return output, *state

    found = []
    for function in (all_of_them, torch.compile(all_of_them, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        results = function(x, h)
        found.append({**dict(zip("ohc", results, strict=True)), **variants.gradients(list(results), own)})
    assert_same(found[1], found[0], 1e-13)


# Autocast


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training, variant, backend, device):
    """bfloat16 results near the exact ones, drawn alike; gradients in the parameters' dtype."""
    exact = build(device, **variant).train(training)
    module = build(device, **variant, dtype=torch.float32, backend=backend).train(training)
    expected = variants.run(exact, make_call(exact, reset=True, reset_state=True))
    call = make_call(module, reset=True, reset_state=True)
    torch.manual_seed(9)
    with torch.autocast(device, dtype=torch.bfloat16):
        output, (h_n, c_n) = module(call.input, call.hx, **call.keywords())
        h, c = module.states(call.input, call.hx, **call.keywords())
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    assert {value.dtype for value in (*found.values(), h, c)} == {torch.bfloat16}
    gradients = variants.gradients(list(found.values()), call.leaves(module))
    assert {value.dtype for value in gradients.values()} == {torch.float32}
    assert_near(found, {name: expected[name] for name in found}, 0.05)
    assert_near(gradients, {name: expected[name] for name in gradients}, 0.2)
