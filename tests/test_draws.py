"""What is random in training: reproducible, of the right rate, scaled, the same wherever it is used, off in evaluation.

That the numbers are right for the masks drawn is test_variants' matter.
"""

import itertools

import pytest
import torch
import variants
from runs import randn
from tolerance import assert_same_float64
from variants import BACKENDS, KINDS, assert_same, build, make_call, record

import fused_lstm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
DRAWING = {
    "zoneout_h": {"zoneout": 0.4},
    "zoneout_c": {"zoneout": (0.0, 0.4)},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.4},
    "dropout": {"dropout": 0.4},
    "locked_dropout": {"dropout": 0.4, "locked_dropout": True},
    "all": {
        **{"zoneout": (0.4, 0.3), "recurrent_dropout": 0.4, "weight_dropout": 0.4},
        **{"dropout": 0.4, "locked_dropout": True},
    },
}
EACH_OPTION = pytest.mark.parametrize("option", DRAWING.values(), ids=DRAWING)


def assert_equal(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def random_state(device):
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def flat(drawn) -> list[torch.Tensor]:
    """All masks of a record."""
    return [mask for masks in (*drawn.masks, drawn.between) for mask in masks if mask is not None]


def deep(device, option, **more):
    return build(device, num_layers=2, bidirectional=True, **option, **more)


@EACH_BACKEND
@EACH_OPTION
@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_result(kind, option, backend, device):
    module = deep(device, option, backend=backend)
    call = make_call(module, kind)
    first = variants.run(module, call, seed=1)
    assert_equal(variants.run(module, call, seed=1), first)
    assert not torch.equal(variants.run(module, call, seed=2)["output"], first["output"])


@EACH_OPTION
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_all_backends_draw_the_same(option, backend, device):
    found = []
    for name in ("reference", backend):
        module = deep(device, option, backend=name)
        found.append(variants.run(module, make_call(module)))
    assert_same(found[1], found[0])


@EACH_BACKEND
@EACH_OPTION
@pytest.mark.parametrize("kind", KINDS)
def test_states_draws_as_forward(kind, option, backend, device, monkeypatch):
    module = build(device, num_layers=2, **option, backend=backend)
    call = make_call(module, kind)
    drawn = [record(monkeypatch)]
    output = variants.run(module, call)["output"]
    drawn.append(record(monkeypatch))
    h = variants.run(module, call, states=True)["h"][-1]
    for a, b in zip(*map(flat, drawn), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(output[: h.size(0)], h)  # what states returns of packed rows ends with the longest one


@EACH_BACKEND
@EACH_OPTION
@pytest.mark.parametrize("layer_norm", [None, "gates", "projections", "projections_cell"])
@pytest.mark.parametrize("kind", ["batched", "lengths"])
def test_recompute_uses_the_same(kind, layer_norm, option, backend, device):
    """No gradient depends on whether the gates were kept."""
    found = []
    for recompute in (False, True):
        module = deep(device, option, layer_norm=layer_norm, peephole=True, recompute=recompute, backend=backend)
        found.append(variants.run(module, make_call(module, kind)))
        torch.manual_seed(11)  # whatever the random state at the backward, its masks are those of the forward
    for name, value in found[0].items():
        assert_same_float64(found[1][name], value)


@EACH_BACKEND
@EACH_OPTION
def test_backward_uses_the_same(option, backend, device):
    """Between forward and backward the random state may change, and the backward does not change it."""
    module = deep(device, option, backend=backend)
    call = make_call(module)
    expected = variants.run(module, call, seed=1)
    torch.manual_seed(1)
    output, (h_n, c_n) = module(call.input, call.hx)
    torch.manual_seed(77)
    before = random_state(device)
    found = variants.gradients([output, h_n, c_n], call.leaves(module))
    assert torch.equal(random_state(device), before)
    assert_equal(found, {name: expected[name] for name in found})


@EACH_BACKEND
@EACH_OPTION
def test_checkpointing_draws_the_same_again(option, backend, device):
    module = deep(device, option, backend=backend)
    call = make_call(module)
    expected = variants.run(module, call, seed=1)
    torch.manual_seed(1)
    output, (h_n, c_n) = torch.utils.checkpoint.checkpoint(module, call.input, call.hx, use_reentrant=False)
    torch.manual_seed(2)
    found = variants.gradients([output, h_n, c_n], call.leaves(module))
    assert_equal(found, {name: expected[name] for name in found})


@EACH_BACKEND
@EACH_OPTION
def test_nothing_is_drawn_in_evaluation(option, backend, device):
    """Nor is anything dropped; zoneout mixes."""
    module = deep(device, option, backend=backend).eval()
    plain = deep(device, {"zoneout": option.get("zoneout", 0.0)}, backend=backend).eval()
    call = make_call(module)
    torch.manual_seed(9)
    before = random_state(device)
    found = variants.run(module, call)
    assert torch.equal(random_state(device), before)
    assert_equal(found, variants.run(plain, call))
    torch.manual_seed(10)
    assert_equal(variants.run(module, call, seed=10), found)


@EACH_BACKEND
def test_zero_is_off(backend, device):
    """A rate of zero is no option: the same numbers, and nothing drawn."""
    rates = {"zoneout": (0, 0.0), "recurrent_dropout": 0, "weight_dropout": 0.0, "dropout": 0.0}
    module = deep(device, {**rates, "locked_dropout": True}, backend=backend)
    plain = deep(device, {}, backend=backend)
    call = make_call(module)
    torch.manual_seed(9)
    before = random_state(device)
    found = variants.run(module, call)
    assert torch.equal(random_state(device), before)
    plain.load_state_dict(module.state_dict())
    expected = variants.run(plain, make_call(plain))
    assert_equal(found, expected)


@EACH_BACKEND
@pytest.mark.parametrize("option", ["recurrent_dropout", "weight_dropout"])
def test_one_drops_everything(option, backend, device):
    """At rate 1 no h enters the product: as with a W_hh of zeros, and no gradient of it."""
    module = build(device, **{option: 1.0}, backend=backend)
    call = make_call(module)
    found = variants.run(module, call)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    setattr(module, option, 0.0)
    expected = variants.run(module, call)
    assert_equal({name: found[name] for name in variants.RESULTS}, {name: expected[name] for name in variants.RESULTS})
    assert not found["d_weight_hh_l0"].any()
    expected["d_weight_hh_l0"] = found["d_weight_hh_l0"]
    assert_same(found, expected)


@EACH_BACKEND
@pytest.mark.parametrize("locked", [False, True])
def test_one_drops_a_layers_input(locked, backend, device):
    module = build(device, num_layers=2, dropout=1.0, locked_dropout=locked, backend=backend)
    found = variants.run(module, make_call(module))
    other = make_call(module)._replace(input=randn(5, 3, 3, seed=50, device=device, requires_grad=True))
    assert torch.equal(found["output"], variants.run(module, other)["output"])
    assert not found["d_weight_ih_l1"].any()
    assert found["d_input"].isfinite().all()


@EACH_BACKEND
@pytest.mark.parametrize("training", [True, False])
def test_one_keeps_the_old_state(training, backend, device):
    """At rate 1 zoneout leaves every state what it was."""
    module = build(device, zoneout=(1.0, 1.0), backend=backend).train(training)
    call = make_call(module)
    found = variants.run(module, call)
    h_0, c_0 = call.hx
    assert torch.equal(found["output"], h_0.expand(5, -1, -1))
    assert torch.equal(found["h_n"], h_0)
    assert torch.equal(found["c_n"], c_0)
    assert not any(found[f"d_{name}"].any() for name, _ in module.named_parameters())
    assert not found["d_input"].any()


def assert_rate(kept: torch.Tensor, probability: float) -> None:
    """Within five standard deviations of what independent draws give; and not all rows, or columns, are alike."""
    count = kept.numel()
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert abs(kept.double().mean().item() - probability) < 5 * deviation
    for dim in range(kept.dim()):
        assert (kept != kept.narrow(dim, 0, 1)).any()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_rates(rate, device, monkeypatch):
    """Every mask of every layer and direction; no two are the same, but one holds for a whole sequence."""
    sizes = {"input_size": 2, "hidden_size": 24, "proj_size": 16}
    for locked in (False, True):
        rates = {"zoneout": (rate, rate / 2), "recurrent_dropout": rate, "weight_dropout": rate, "dropout": rate}
        module = deep(device, {**sizes, **rates, "locked_dropout": locked})
        drawn = record(monkeypatch)
        with torch.no_grad():
            module(make_call(module, steps=20, rows=30).input)
        assert len(drawn.masks) == 4
        for masks in drawn.masks:
            assert [mask.shape for mask in masks] == [(96, 16), (30, 16), (20, 30, 16), (20, 30, 24)]
            for mask, probability in zip(masks, (1 - rate, 1 - rate, rate, rate / 2), strict=True):
                assert_rate(mask, probability)
        for masks in zip(*drawn.masks, strict=True):
            assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
        (between,) = drawn.between
        assert between.shape == (20, 30, 32)
        assert_rate(between[0] if locked else between, 1 - rate)
        assert (between == between[0]).all() == locked


@EACH_BACKEND
def test_zoneout_is_seen_in_the_states(backend, device):
    """Of a module that draws for zoneout alone: what stayed as it was, counted; h and c apart."""
    module = build(device, input_size=2, hidden_size=30, zoneout=(0.2, 0.6), backend=backend)
    call = make_call(module, steps=20, rows=20)
    with torch.no_grad():
        states = module.states(call.input, call.hx)
    for state, start, rate in zip(states, call.hx, (0.2, 0.6), strict=True):
        before = torch.cat((start, state[0, :-1]))
        assert_rate(state[0] == before, rate)


@EACH_BACKEND
def test_recurrent_dropout_is_seen_in_the_gradient(backend, device):
    """One step: h_0 has a gradient just where it was not dropped, and c_0 everywhere."""
    module = build(device, input_size=2, hidden_size=30, recurrent_dropout=0.3, backend=backend)
    found = variants.run(module, make_call(module, steps=1, rows=40))
    assert_rate(found["d_h_0"][0] != 0, 0.7)
    assert found["d_c_0"].all()


@EACH_BACKEND
def test_scale_of_recurrent_dropout(backend, device, monkeypatch):
    """What is left of h is divided by 1 - p, so that its mean stays."""
    module = build(device, recurrent_dropout=0.25, backend=backend)
    call = make_call(module, steps=1)
    drawn = record(monkeypatch)
    dropped = variants.run(module, call)
    kept = drawn.masks[0].recurrent
    scaled = call._replace(hx=((call.hx[0] * kept / 0.75).detach().requires_grad_(), call.hx[1]))
    expected = variants.run(module.eval(), scaled)
    expected["d_h_0"] = expected["d_h_0"] * kept / 0.75
    assert_same(dropped, expected)


@EACH_BACKEND
def test_weight_dropout_reaches_the_raw_weight(backend, device, monkeypatch):
    """The dropped weights have no gradient, the others that of the dropped matrix, scaled; the parameter stays."""
    module = build(device, weight_dropout=0.25, proj_size=2, backend=backend)
    call = make_call(module)
    raw = module.weight_hh_l0.detach().clone()
    drawn = record(monkeypatch)
    found = variants.run(module, call)
    kept = drawn.masks[0].weight
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(module.weight_hh_l0, raw)
    assert ((found["d_weight_hh_l0"] != 0) == kept).all()
    assert found["d_weight_hr_l0"].all()
    with torch.no_grad():
        module.weight_hh_l0.mul_(kept).div_(0.75)
    expected = variants.run(module.eval(), call)
    expected["d_weight_hh_l0"] = expected["d_weight_hh_l0"] * kept / 0.75
    assert_same(found, expected)


def test_weight_dropout_draws_at_each_forward(device, monkeypatch):
    module = build(device, weight_dropout=0.5)
    drawn = record(monkeypatch)
    for _ in range(3):
        module(make_call(module).input)
    masks = [own.weight for own in drawn.masks]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@EACH_BACKEND
def test_weight_dropout_of_a_parametrized_weight(backend, device):
    """The gradient goes through the dropout and on to what the weight is computed from."""
    module = build(device, weight_dropout=0.25, backend=backend)
    call = make_call(module)
    expected = variants.run(module, call)

    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

        def right_inverse(self, x):
            return x / 2

    torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", Twice())
    found = variants.run(module, call)
    assert_same_float64(found["output"].detach(), expected["output"].detach())
    assert_same_float64(found["d_parametrizations.weight_hh_l0.original"], 2 * expected["d_weight_hh_l0"])


@EACH_BACKEND
@pytest.mark.parametrize("kind", ["batched", "packed"])
@pytest.mark.parametrize("locked", [False, True])
def test_dropout_lies_between_layers_only(locked, kind, backend, device):
    """Neither the input of the first layer nor the output of the last one is dropped."""
    module = build(device, num_layers=2, dropout=0.5, locked_dropout=locked, backend=backend)
    call = make_call(module, kind)
    torch.manual_seed(1)
    h, _ = module.states(call.given(module), call.hx)
    first = build(device, backend=backend)
    first.load_state_dict({name: p for name, p in module.state_dict().items() if name.endswith("l0")})
    alone, _ = first.states(call.given(module), (call.hx[0][:1], call.hx[1][:1]))
    assert torch.equal(h[0], alone[0])
    assert (h[1, 0] != 0).all()


@pytest.mark.parametrize("kind", ["batched", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_as_torch(bidirectional, kind):
    """With an option that changes no number, one seed gives what torch's LSTM gives on a CPU; cuDNN draws its own."""
    options = {"num_layers": 3, "dropout": 0.4, "bidirectional": bidirectional}
    module = build(**options, peephole=True)
    theirs = torch.nn.LSTM(**variants.SIZES, **options, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("weight_ph"):
                parameter.zero_()
    theirs.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("weight_ph")})
    call = make_call(module, kind)
    found = variants.run(module, call)
    assert_same({name: value for name, value in found.items() if "weight_ph" not in name}, variants.run(theirs, call))


def test_locked_dropout_draws_once_a_sequence(device):
    """(1, N, D * P) from torch's own dropout: the numbers that one draws by hand under the same seed."""
    module = build(device, num_layers=2, bidirectional=True, dropout=0.4, locked_dropout=True)
    call = make_call(module)
    found = variants.run(module, call, seed=4)
    layers = [build(device, bidirectional=True), build(device, bidirectional=True, input_size=8)]
    for k, layer in enumerate(layers):
        own = {n.replace(f"_l{k}", "_l0"): p for n, p in module.state_dict().items() if f"_l{k}" in n}
        layer.load_state_dict(own)
    between, _ = layers[0](call.input, [state[:2] for state in call.hx])
    torch.manual_seed(4)
    mask = torch.nn.functional.dropout(torch.ones(1, 3, 8, dtype=torch.float64, device=device), 0.4)
    output, _ = layers[1](between * mask, [state[2:] for state in call.hx])
    assert_same_float64(found["output"].detach(), output.detach())


def test_one_option_does_not_shift_anothers_draws_within_a_direction(device, monkeypatch):
    """What one draws first stays when another is added that draws after it."""
    found = []
    for more in ({}, {"zoneout": (0.3, 0.3)}):
        module = build(device, weight_dropout=0.3, recurrent_dropout=0.3, **more)
        drawn = record(monkeypatch)
        variants.run(module, make_call(module))
        found.append(drawn.masks[0])
    assert torch.equal(found[0].weight, found[1].weight)
    assert torch.equal(found[0].recurrent, found[1].recurrent)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_draw_the_same(dtype, backend, device, monkeypatch):
    """The seed decides, not the precision."""
    drawn = []
    for used in (torch.float64, dtype):
        module = deep(device, DRAWING["all"], dtype=used, backend=backend)
        drawn.append(record(monkeypatch))
        variants.run(module, make_call(module))
    for exact, rounded in zip(*map(flat, drawn), strict=True):
        assert torch.equal(exact, rounded)


def test_cell_draws_for_zoneout(device):
    """LSTMCell: at each call anew, in training alone."""
    cell = fused_lstm.LSTMCell(3, 40, zoneout=(0.3, 0.5), device=device, dtype=torch.float64)
    x, h, c = randn(30, 3, device=device), randn(30, 40, seed=1, device=device), randn(30, 40, seed=2, device=device)
    torch.manual_seed(1)
    first, second = cell(x, (h, c)), cell(x, (h, c))
    for found, state, rate in zip(first, (h, c), (0.3, 0.5), strict=True):
        assert_rate(found == state, rate)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(cell(x, (h, c)), first, strict=True))
    cell.eval()
    mixed = cell(x, (h, c))
    cell.zoneout = 0.0
    for found, state, new, rate in zip(mixed, (h, c), cell(x, (h, c)), (0.3, 0.5), strict=True):
        assert_same_float64(found.detach(), (rate * state + (1 - rate) * new).detach())
