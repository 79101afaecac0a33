"""Every option, alone and with the others, against the oracle: all results, all gradients."""

import random

import pytest
import torch
import variant_oracle as oracle
import variants
from variants import BACKENDS, KINDS, assert_same, build, make_call, record

import fused_lstm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
LAYER_NORMS = ["gates", "projections", "projections_cell"]

SINGLE = {
    **{name: {"layer_norm": name} for name in LAYER_NORMS},
    "peephole": {"peephole": True},
    "zoneout_h": {"zoneout": 0.3},
    "zoneout_c": {"zoneout": (0.0, 0.3)},
    "zoneout_both": {"zoneout": (0.3, 0.6)},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.4},
    "dropout": {"dropout": 0.4, "num_layers": 2},
    "locked_dropout": {"dropout": 0.4, "num_layers": 2, "locked_dropout": True},
    "recompute": {"recompute": True},
    "forget_bias": {"forget_bias": 1.0},
    "reset": {"reset": True},
    "reset_state": {"reset": True, "reset_state": True},
}
SHAPES = {
    "one_layer": {},
    "two_layers": {"num_layers": 2, "bidirectional": True},
    "projection": {"num_layers": 2, "proj_size": 2, "bias": False, "batch_first": True},
}
PARTS = ("reset", "reset_state", "hx", "kind")  # of a case, what is forward's


def compare(case, backend, training, device, monkeypatch, states=False) -> None:
    """The module's results and the oracle's."""
    module = build(device, **{name: value for name, value in case.items() if name not in PARTS}, backend=backend)
    module.train(training)
    call = make_call(module, **{name: case[name] for name in PARTS if name in case})
    drawn = record(monkeypatch)
    actual = variants.run(module, call, states)
    if training:
        assert len(drawn.masks) == module.num_layers * (2 if module.bidirectional else 1)
    assert_same(actual, variants.run_oracle(module, call, drawn if training else None, states))


@EACH_BACKEND
@TRAINING
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("option", SINGLE.values(), ids=SINGLE)
def test_alone(option, shape, training, backend, device, monkeypatch):
    if "reset" in option:
        shape = {**shape, "bidirectional": False}
    if "forget_bias" in option:
        shape = {**shape, "bias": True}
    compare({**shape, **option}, backend, training, device, monkeypatch)


@EACH_BACKEND
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", SINGLE.values(), ids=SINGLE)
def test_kinds_of_input(option, kind, backend, device, monkeypatch):
    """Each option on unbatched, padded and packed input, without hx."""
    bidirectional = "reset" not in option
    if not bidirectional and kind == "packed":
        kind = "lengths"
    case = {**option, "kind": kind, "hx": False, "batch_first": True, "bidirectional": bidirectional}
    compare(case, backend, True, device, monkeypatch)


ALL = {"peephole": True, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3, "proj_size": 2, "num_layers": 2}
TOGETHER = {
    "resets": {**ALL, "recompute": True, "reset": True, "reset_state": True, "kind": "lengths"},
    "resets_to_zero": {**ALL, "weight_dropout": 0.3, "reset": True, "kind": "unbatched"},
    "bidirectional": {**ALL, "bidirectional": True, "recompute": True, "kind": "lengths"},
    "packed": {**ALL, "bidirectional": True, "bias": False, "batch_first": True, "kind": "packed"},
    "dropouts": {**ALL, "weight_dropout": 0.3, "dropout": 0.3, "locked_dropout": True, "bidirectional": True},
}


@EACH_BACKEND
@TRAINING
@pytest.mark.parametrize("layer_norm", [None, *LAYER_NORMS])
@pytest.mark.parametrize("case", TOGETHER.values(), ids=TOGETHER)
def test_together(case, layer_norm, training, backend, device, monkeypatch):
    compare({**case, "layer_norm": layer_norm}, backend, training, device, monkeypatch)


def any_case(seed: int) -> dict:
    """A random value for every option and argument, so that each pair of them meets somewhere."""
    pick = random.Random(seed)
    case = {
        "layer_norm": pick.choice([None, *LAYER_NORMS]),
        "peephole": pick.random() < 0.5,
        "zoneout": pick.choice([0.0, 0.4, (0.0, 0.3), (0.3, 0.2)]),
        "recurrent_dropout": pick.choice([0.0, 0.4]),
        "weight_dropout": pick.choice([0.0, 0.4]),
        "recompute": pick.random() < 0.5,
        "num_layers": pick.choice([1, 2]),
        "bias": pick.random() < 0.7,
        "batch_first": pick.random() < 0.5,
        "bidirectional": pick.random() < 0.5,
        "proj_size": pick.choice([0, 3]),
        "kind": pick.choice(KINDS),
        "hx": pick.random() < 0.7,
    }
    if case["num_layers"] == 2:
        case |= {"dropout": pick.choice([0.0, 0.4]), "locked_dropout": pick.random() < 0.5}
    if case["kind"] != "packed" and not case["bidirectional"]:
        case |= {"reset": pick.random() < 0.6, "reset_state": pick.random() < 0.6}
    return case


@EACH_BACKEND
@pytest.mark.parametrize("seed", range(80))
def test_any(seed, backend, device, monkeypatch):
    compare(any_case(seed), backend, seed % 4 > 0, device, monkeypatch, states=seed % 5 == 0)


def test_pairs_meet():
    """Among those random cases, each value of an option has met each of another."""
    cases = [any_case(seed) for seed in range(80)]
    names = sorted(set().union(*cases) - {"reset", "reset_state", "dropout", "locked_dropout"})
    for a in names:
        for b in names:
            values = [{case[name] for case in cases} for name in (a, b)]
            met = {(case[a], case[b]) for case in cases}
            assert len(met) == len(values[0]) * (len(values[1]) if a != b else 1), (a, b)


@EACH_BACKEND
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 3, 2, 1), (2, 1, 1, 3), (7, 2, 5, 2)], ids=str)
@pytest.mark.parametrize("layer_norm", [None, *LAYER_NORMS])
def test_odd_sizes(layer_norm, sizes, backend, device, monkeypatch):
    """One step, one row, one unit, one feature."""
    steps, rows, hidden_size, input_size = sizes
    module = build(
        device,
        input_size=input_size,
        hidden_size=hidden_size,
        layer_norm=layer_norm,
        peephole=True,
        zoneout=(0.3, 0.3),
        recurrent_dropout=0.3,
        backend=backend,
    )
    call = make_call(module, reset=True, reset_state=True, steps=steps, rows=rows)
    drawn = record(monkeypatch)
    assert_same(variants.run(module, call), variants.run_oracle(module, call, drawn))


@EACH_BACKEND
@pytest.mark.parametrize("layer_norm", [None, *LAYER_NORMS])
def test_no_rows(layer_norm, backend, device):
    """N = 0: empty results, gradients of the parameters that are zero."""
    options = {**ALL, "layer_norm": layer_norm, "weight_dropout": 0.3, "dropout": 0.3, "locked_dropout": True}
    module = build(device, **options, backend=backend)
    for states in (False, True):
        found = variants.run(module, make_call(module, reset=True, reset_state=True, rows=0), states)
        assert not any(found[f"d_{name}"].any() for name, _ in module.named_parameters())
    assert found["h"].shape == (2, 5, 0, 2)
    assert found["c"].shape == (2, 5, 0, 4)


@EACH_BACKEND
@pytest.mark.parametrize("layer_norm", [None, *LAYER_NORMS])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_layer_as_a_function(reverse, layer_norm, backend, device, monkeypatch):
    """lstm_layer, whose reset also goes with reverse and with lengths."""
    module = build(device, layer_norm=layer_norm, peephole=True, proj_size=2)
    call = make_call(module, "lengths", reset=True, reset_state=True)
    own = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    rates = {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.4, "weight_dropout": 0.4}
    h0, c0, *reset_state = (state[0] for state in (*call.hx, *call.reset_state))
    drawn = record(monkeypatch)
    torch.manual_seed(3)
    for lengths in (None, call.lengths):
        for training in (True, False):
            drawn.masks.clear()
            output, (h_n, c_n) = fused_lstm.lstm_layer(
                *(call.input, (h0, c0)),
                **own,
                **rates,
                layer_norm=layer_norm,
                reset=call.reset,
                reset_state=reset_state,
                lengths=None if lengths is None else torch.tensor(lengths),
                training=training,
                reverse=reverse,
                backend=backend,
            )
            definition = oracle.Layer(own, layer_norm, **rates, masks=drawn.masks[0] if training else None)
            h, _, h_last, c_last = oracle.layer(
                *(call.input, h0, c0, definition, call.reset, reset_state, lengths, reverse)
            )
            leaves = call.leaves(module)
            assert_same(variants.gradients([output, h_n, c_n], leaves), variants.gradients([h, h_last, c_last], leaves))
            assert_same({"o": output, "h": h_n, "c": c_n}, {"o": h, "h": h_last, "c": c_last})
