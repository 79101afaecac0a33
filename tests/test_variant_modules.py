"""LSTM, LSTMCell, lstm_layer and lstm_cell with options, as modules and functions of torch's: parameters, checkpoints,
copies, dtypes, errors."""

import copy
import io
import pickle
import re

import pytest
import torch
import variants
from runs import randn
from variants import (
    BACKENDS,
    DRAWING,
    NORMS,
    VARIANTS,
    H,
    assert_near,
    assert_same,
    assert_start,
    build,
    cell_of,
    make_call,
    scramble,
    torchs,
)

import fused_lstm
from fused_lstm import convert

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EACH_NORM = pytest.mark.parametrize("layer_norm", NORMS)
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
DEEP = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
SUFFIXES = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
LSTM_ONLY = ("recurrent_dropout", "weight_dropout", "locked_dropout", "recompute")
NO_BIAS = "forget_bias needs bias=True, or layer_norm='gates' with its own biases"


# Parameters


@EACH_NORM
@pytest.mark.parametrize("peephole", [False, True])
def test_parameters_of_lstm(peephole, layer_norm):
    """Their names, sizes and start; torch's own come first, and start as torch's under the same seed."""
    torch.manual_seed(0)
    theirs = torchs(**DEEP)
    torch.manual_seed(0)
    module = fused_lstm.LSTM(**variants.SIZES, **DEEP, layer_norm=layer_norm, peephole=peephole, dtype=torch.float64)
    sizes = {**NORMS[layer_norm], **({"weight_ph": 3 * H} if peephole else {})}
    expected = {name + suffix: (size,) for suffix in SUFFIXES for name, size in sizes.items()}
    names = [name for name, _ in module.named_parameters()]
    torch_names = [name for name, _ in theirs.named_parameters()]
    assert names[: len(torch_names)] == torch_names
    assert list(module.state_dict()) == names
    assert {name: p.shape for name, p in module.named_parameters() if name not in torch_names} == expected
    assert all(torch.equal(getattr(module, name), value) for name, value in theirs.named_parameters())
    assert_start(module, expected)
    assert [[id(p) for p in layer] for layer in module.all_weights] == [
        [id(getattr(module, name)) for name in layer] for layer in theirs._all_weights
    ]
    assert [id(p) for p in module._flat_weights] == [id(getattr(module, name)) for name in torch_names]
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in module.parameters())
    assert all(p.dtype == torch.float64 for p in module.parameters())


@EACH_NORM
@pytest.mark.parametrize("peephole", [False, True])
def test_parameters_of_cell(peephole, layer_norm):
    """The same, without a suffix."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTMCell(3, H)
    torch.manual_seed(0)
    cell = fused_lstm.LSTMCell(3, H, layer_norm=layer_norm, peephole=peephole)
    sizes = {**NORMS[layer_norm], **({"weight_ph": 3 * H} if peephole else {})}
    torch_names = [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in cell.named_parameters()][: len(torch_names)] == torch_names
    ours = {name: p.shape for name, p in cell.named_parameters() if name not in torch_names}
    assert ours == {name: (size,) for name, size in sizes.items()}
    assert all(torch.equal(getattr(cell, name), value) for name, value in theirs.named_parameters())
    assert_start(cell, sizes)


@EACH_NORM
@pytest.mark.parametrize("module_type", [fused_lstm.LSTM, fused_lstm.LSTMCell])
def test_reset_parameters(module_type, layer_norm):
    """Everything starts anew, torch's own as torch's reset_parameters under the same seed."""
    torch.manual_seed(0)
    module = scramble(module_type(3, H, layer_norm=layer_norm, peephole=True))
    names = dict(module.named_parameters()).keys()
    theirs = {fused_lstm.LSTM: torch.nn.LSTM, fused_lstm.LSTMCell: torch.nn.LSTMCell}[module_type](3, H)
    torch.manual_seed(1)
    theirs.reset_parameters()
    torch.manual_seed(1)
    module.reset_parameters()
    assert dict(module.named_parameters()).keys() == names
    assert all(torch.equal(getattr(module, name), value) for name, value in theirs.named_parameters())
    assert_start(module, names - dict(theirs.named_parameters()).keys())


def test_peepholes_differ_by_layer():
    module = fused_lstm.LSTM(**variants.SIZES, **DEEP, peephole=True)
    drawn = torch.stack([getattr(module, f"weight_ph{suffix}") for suffix in SUFFIXES])
    assert drawn.unique().numel() == 4 * 3 * H
    wide = fused_lstm.LSTM(1, 400, peephole=True).weight_ph_l0
    assert abs(wide.mean().item()) < 5 * (0.05 / 3**0.5) / 1200**0.5
    assert 0.049 < wide.abs().max().item() <= 0.05


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forget_bias", [1.0, 2, -0.5, 0.0])
@EACH_NORM
def test_forget_bias(layer_norm, forget_bias, bias):
    """Of bias_ih, where bias_hh's slice is zero; under "gates" of the norm's bias, and torch's biases stay torch's."""
    options = {**DEEP, "bias": bias, "layer_norm": layer_norm, "dtype": torch.float64}
    if not bias and layer_norm != "gates":
        with pytest.raises(ValueError, match=f"^{NO_BIAS}$"):
            fused_lstm.LSTM(**variants.SIZES, **options, forget_bias=forget_bias)
        with pytest.raises(ValueError, match=f"^{NO_BIAS}$"):
            fused_lstm.LSTMCell(3, H, bias=False, layer_norm=layer_norm, forget_bias=forget_bias)
        return
    torch.manual_seed(0)
    plain = fused_lstm.LSTM(**variants.SIZES, **options)
    torch.manual_seed(0)
    module = fused_lstm.LSTM(**variants.SIZES, **options, forget_bias=forget_bias)
    cell = fused_lstm.LSTMCell(3, H, bias=bias, layer_norm=layer_norm, forget_bias=forget_bias)
    forget = slice(H, 2 * H)
    for _ in range(2):
        for found, suffix in ((module, "_l0"), (module, "_l1_reverse"), (cell, "")):
            if layer_norm == "gates":
                start = torch.zeros(4 * H)
                start[forget] = forget_bias
                assert torch.equal(getattr(found, f"norm_gates_bias{suffix}").float(), start)
            else:
                assert (getattr(found, f"bias_ih{suffix}")[forget] == forget_bias).all()
                assert (getattr(found, f"bias_hh{suffix}")[forget] == 0).all()
        for name, value in plain.named_parameters():
            if "bias" in name:
                others = torch.ones(value.numel(), dtype=torch.bool)
                others[forget] = name.startswith("bias") and layer_norm == "gates"
                assert torch.equal(getattr(module, name)[others[: value.numel()]], value[others[: value.numel()]])
            else:
                assert torch.equal(getattr(module, name), value)
        torch.manual_seed(3)
        module.reset_parameters()
        torch.manual_seed(3)
        plain.reset_parameters()
        cell.reset_parameters()


def test_default_forget_bias_is_torchs():
    torch.manual_seed(0)
    theirs = torchs()
    torch.manual_seed(0)
    module = fused_lstm.LSTM(**variants.SIZES, layer_norm="gates", dtype=torch.float64)
    assert torch.equal(module.bias_ih_l0, theirs.bias_ih_l0)
    assert not module.norm_gates_bias_l0.any()


# Checkpoints, copies, representations


@EACH_VARIANT
def test_state_dict_round_trip(variant, device):
    module, other = build(device, **variant).eval(), build(device, **variant, seed=1).eval()
    call = make_call(module)
    expected = variants.run(module, call)
    assert not torch.equal(variants.run(other, call)["output"], expected["output"])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(value, variants.run(other, call)[name]) for name, value in expected.items())


def test_plain_checkpoint_into_a_module_with_options():
    """torch's own error, which names what is missing; not strictly, the rest is loaded."""
    theirs = torchs()
    module = fused_lstm.LSTM(**variants.SIZES, layer_norm="gates", peephole=True, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Missing key") as raised:
        module.load_state_dict(theirs.state_dict())
    ours = ["norm_gates_weight_l0", "norm_gates_bias_l0", "norm_cell_weight_l0", "norm_cell_bias_l0", "weight_ph_l0"]
    assert all(f'"{name}"' in str(raised.value) for name in ours)
    result = module.load_state_dict(theirs.state_dict(), strict=False)
    assert sorted(result.missing_keys) == sorted(ours)
    assert result.unexpected_keys == []
    assert torch.equal(module.weight_hh_l0, theirs.weight_hh_l0)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        theirs.load_state_dict(module.state_dict())


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EACH_VARIANT
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded]
)
def test_copies(make_copy, variant, device):
    module = build(device, **variant)
    call = make_call(module)
    expected = variants.run(module, call)
    copied = make_copy(module)
    assert repr(copied) == repr(module)
    scramble(module, seed=1)
    assert all(torch.equal(value, variants.run(copied, call)[name]) for name, value in expected.items())


@EACH_VARIANT
def test_copies_of_cells(variant, device):
    cell = cell_of(variant, device)
    x = randn(2, 3, device=device)
    torch.manual_seed(1)
    expected = cell(x)
    for copied in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell)), saved_and_loaded(cell)):
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(copied(x), expected, strict=True))
        assert repr(copied) == repr(cell)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@EACH_VARIANT
@EACH_BACKEND
def test_dtypes(backend, variant, dtype, device):
    """.to(dtype): every parameter, and results in that dtype that are near the exact ones."""
    exact = build(device, **variant).eval()
    expected = variants.run(exact, make_call(exact))
    module = build(device, **variant, backend=backend).eval().to(dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    call = make_call(module)
    found = variants.run(module, call)
    assert {value.dtype for value in found.values()} == {dtype}
    assert_near(found, expected, 60 * torch.finfo(dtype).eps)
    h, c = module.states(call.input, call.hx)
    assert h.dtype == c.dtype == dtype


@EACH_BACKEND
@pytest.mark.parametrize("name", ["gates", "projections", "projections_cell"])
def test_statistics_of_norms_have_room(name, backend, device):
    """Sums of 200 and more, whose squares float16 cannot hold: they are taken in float32."""
    exact = build(device, layer_norm=name)
    with torch.no_grad():
        for weight in (exact.weight_ih_l0, exact.weight_hh_l0):
            weight.mul_(400)
    module = build(device, layer_norm=name, dtype=torch.float16, backend=backend)
    module.load_state_dict(exact.state_dict())
    assert module.weight_ih_l0.abs().max() > 256  # 65536 is more than float16 holds
    expected, found = (m(make_call(m).input)[0].double() for m in (exact, module))
    assert (found - expected).abs().max() < 0.02


def test_half_and_back(device):
    module = build(device, **VARIANTS["all_gates"])
    assert all(p.dtype == torch.float16 for p in module.half().parameters())
    assert all(p.dtype == torch.float32 for p in module.float().parameters())


@EACH_VARIANT
def test_from_meta(variant, device):
    """Made without memory, then filled; or given memory and started there."""
    module = build(device, **variant).eval()
    options = {**variants.SIZES, **variant, "dtype": torch.float64}
    empty = fused_lstm.LSTM(**options, device="meta").to_empty(device=device).eval()
    empty.load_state_dict(module.state_dict())
    call = make_call(module)
    assert torch.equal(empty(call.input)[0], module(call.input)[0])
    torch.manual_seed(0)
    started = fused_lstm.LSTM(**options, device="meta").to_empty(device=device)
    started.reset_parameters()
    assert not any(p.isnan().any() for p in started.parameters())


REPRESENTATIONS = {
    "": {},
    ", layer_norm='gates'": {"layer_norm": "gates"},
    ", peephole=True, forget_bias=1.0": {"forget_bias": 1.0, "peephole": True},
    ", zoneout=0.1": {"zoneout": 0.1},
    ", zoneout=(0.1, 0.2), recurrent_dropout=0.3, weight_dropout=0.4": {
        **{"weight_dropout": 0.4, "recurrent_dropout": 0.3, "zoneout": (0.1, 0.2)}
    },
    ", recompute=True, backend='reference'": {"backend": "reference", "recompute": True},
    ", num_layers=2, dropout=0.5, bidirectional=True, locked_dropout=True": {
        **{"locked_dropout": True, "num_layers": 2, "dropout": 0.5, "bidirectional": True}
    },
}


@pytest.mark.parametrize(("text", "options"), REPRESENTATIONS.items(), ids=REPRESENTATIONS)
def test_repr(text, options):
    """What was given, as the constructor takes it: it evaluates to the same module."""
    module = fused_lstm.LSTM(3, 4, **options)
    assert repr(module) == f"LSTM(3, 4{text})"
    assert repr(eval(f"fused_lstm.{module!r}")) == repr(module)
    if not any(name in LSTM_ONLY or name == "num_layers" for name in options):
        assert repr(fused_lstm.LSTMCell(3, 4, **options)) == f"LSTMCell(3, 4{text})"


@EACH_BACKEND
def test_rates_may_be_set_on_the_module(backend, device):
    """They are plain attributes, read at each forward, as torch's dropout is; a wrong one is refused there."""
    module, other = build(device, backend=backend), build(device, **DRAWING, backend=backend)
    call = make_call(module)
    for name, value in DRAWING.items():
        setattr(module, name, value)
    expected = variants.run(other, call)
    found = variants.run(module, call)
    assert all(torch.equal(found[name], expected[name]) for name in variants.RESULTS)
    for name in DRAWING:
        for value in (1.5, -0.1, "0.1"):
            module = build(device, backend=backend)
            setattr(module, name, value)
            with pytest.raises(ValueError, match=f"^{name} should be a number in range"):
                module(call.input)


def test_training_with_an_optimiser(device):
    """Every parameter of every option moves, and the loss falls."""
    torch.manual_seed(0)
    module = build(device, **VARIANTS["all_projections_cell"])
    module.dropout = 0.1
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    x, target = randn(6, 8, 3, device=device), 0.5 * randn(6, 8, 2, seed=1, device=device).tanh()

    def loss():
        return ((module(x)[0] - target) ** 2).mean()

    start = loss().item()
    for _ in range(40):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert all((p != before[name]).all() for name, p in module.named_parameters())
    assert loss().item() < 0.8 * start


# Errors

RATES = [-0.1, 1.1, float("nan"), "0.5", True, None, [0.5, 0.5, 0.5]]
WRONG = {
    "layer_norm": ([True, 1, "", "batch", "Gates", ["gates"]], ValueError, "layer_norm should be one of None, 'gates'"),
    "peephole": ([1, 0, "yes", None], TypeError, "peephole should be of type bool, got: "),
    "zoneout": (
        [*RATES, (0.5,), (), (0.1, 0.2, 0.3), (0.5, 1.5), (-0.1, 0.5), (0.1, None), (True, 0.1)],
        *(ValueError, "zoneout"),
    ),
    "recurrent_dropout": (
        [*RATES, (0.1, 0.1)],
        ValueError,
        "recurrent_dropout should be a number in range [0, 1], got ",
    ),
    "weight_dropout": ([*RATES, (0.1, 0.1)], ValueError, "weight_dropout should be a number in range [0, 1], got "),
    "forget_bias": (["1", True, [1.0], (1.0,)], ValueError, "forget_bias should be a number or None, got "),
    "locked_dropout": ([1, None, "no"], TypeError, "locked_dropout should be of type bool, got: "),
    "recompute": ([1, None, "no"], TypeError, "recompute should be of type bool, got: "),
    "backend": (["cudnn", None, 1], ValueError, "backend should be one of 'auto'"),
}
EACH_WRONG = pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [(name, value, kind, message) for name, (values, kind, message) in WRONG.items() for value in values],
    ids=lambda value: repr(value)[:24],
)


def assert_wrong(call, kind, message) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}"):
        call()


@EACH_WRONG
def test_wrong_values_of_modules(name, value, kind, message):
    assert_wrong(lambda: fused_lstm.LSTM(3, 4, **{name: value}), kind, message)
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.LSTMCell(3, 4))
    assert_wrong(lambda: convert(model, **{name: value}), kind, message)
    assert [type(module) for module in model] == [torch.nn.LSTM, torch.nn.LSTMCell]
    if name in LSTM_ONLY:
        message = "LSTMCell.__init__() got an unexpected keyword argument"
        assert_wrong(lambda: fused_lstm.LSTMCell(3, 4, **{name: 0.5}), TypeError, message)
    else:
        assert_wrong(lambda: fused_lstm.LSTMCell(3, 4, **{name: value}), kind, message)


@EACH_WRONG
def test_wrong_values_of_functions(name, value, kind, message):
    x, h, weights = torch.zeros(5, 2, 3), torch.zeros(2, 4), (torch.zeros(16, 3), torch.zeros(16, 4))
    if name in ("forget_bias", "locked_dropout"):
        kind, message = TypeError, "lstm_layer() got an unexpected keyword argument"
    elif name == "peephole" and value is None:
        return
    assert_wrong(lambda: fused_lstm.lstm_layer(x, (h, h), *weights, **{name: value}), kind, message)
    if name in (*LSTM_ONLY, "forget_bias"):
        kind, message = TypeError, "lstm_cell() got an unexpected keyword argument"
    assert_wrong(lambda: fused_lstm.lstm_cell(x[0], (h, h), *weights, **{name: value}), kind, message)


def test_options_are_keywords():
    """torch's constructors take as many positional arguments as before."""
    with pytest.raises(TypeError):
        fused_lstm.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, "gates")
    with pytest.raises(TypeError):
        fused_lstm.LSTMCell(3, 4, True, None, None, "gates")


def test_edges_of_rates():
    for rate in (0, 1, 0.0, 1.0):
        fused_lstm.LSTM(3, 4, zoneout=(rate, rate), recurrent_dropout=rate, weight_dropout=rate)
    assert fused_lstm.LSTM(3, 4, zoneout=[0.1, 0.2])(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)


FUNCTION_ERRORS = {
    "lacking": ({"layer_norm": "gates"}, "layer_norm='gates' and peephole=False need a norm_gates_weight"),
    "lacking_cell": (
        {"layer_norm": "gates", "norm_gates_weight": 16, "norm_gates_bias": 16},
        "layer_norm='gates' and peephole=False need a norm_cell_weight",
    ),
    "too_many": ({"norm_cell_bias": 4}, "layer_norm=None and peephole=False take no norm_cell_bias"),
    "of_another": (
        {"layer_norm": "projections", "norm_ih_weight": 16, "norm_ih_bias": 16},
        "layer_norm='projections' and peephole=False take no norm_ih_bias",
    ),
    "no_peepholes": ({"peephole": True}, "layer_norm=None and peephole=True need a weight_ph"),
    "no_peephole": ({"peephole": False, "weight_ph": 12}, "layer_norm=None and peephole=False take no weight_ph"),
    "size": ({"weight_ph": 16}, "Expected weight_ph size (12,), got (16,)"),
    "one": ({"weight_ph": 1}, "Expected weight_ph size (12,), got (1,)"),
}


@pytest.mark.parametrize(("given", "message"), FUNCTION_ERRORS.values(), ids=FUNCTION_ERRORS)
def test_parameters_that_a_function_needs(given, message):
    """Just those of the options, of the right size."""
    x, h, weights = torch.zeros(5, 2, 3), torch.zeros(2, 4), (torch.zeros(16, 3), torch.zeros(16, 4))
    given = {name: torch.ones(v) if type(v) is int else v for name, v in given.items()}
    assert_wrong(lambda: fused_lstm.lstm_layer(x, (h, h), *weights, **given), ValueError, message)
    assert_wrong(lambda: fused_lstm.lstm_cell(x[0], (h, h), *weights, **given), ValueError, message)


@pytest.mark.parametrize(("options", "words"), [
    ({"layer_norm": "gates"}, "layer_norm"),
    ({"peephole": True}, "peephole"),
    ({"zoneout": 0.1}, "zoneout"),
    ({"recurrent_dropout": 0.1}, "recurrent_dropout"),
    ({"weight_dropout": 0.1, "peephole": True}, "peephole, weight_dropout"),
    ({"num_layers": 2, "dropout": 0.1, "locked_dropout": True}, "locked_dropout"),
], ids=str)  # fmt: skip
def test_backend_that_cannot(options, words):
    """torch's own says what it does not know; it serves where the option is off in evaluation."""
    module = fused_lstm.LSTM(3, 4, **options, backend="torch")
    with pytest.raises(ValueError, match=f"^backend 'torch' cannot run this: torch.nn.LSTM knows no {words}$"):
        module(torch.zeros(2, 1, 3))
    if not options.keys() & {"layer_norm", "peephole", "zoneout"}:
        module.eval()(torch.zeros(2, 1, 3))
    assert convert(module, backend="auto").train()(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)


# One cell in four shapes


@EACH_BACKEND
@EACH_NORM
@pytest.mark.parametrize("bias", [True, False])
def test_cell_and_functions_are_the_layer(bias, layer_norm, backend, device):
    """LSTMCell and lstm_cell step by step, lstm_layer at once, an LSTM of one layer: the same numbers and gradients."""
    options = {"layer_norm": layer_norm, "peephole": True, "zoneout": (0.3, 0.2), "bias": bias, "backend": backend}
    module = build(device, **options).eval()
    own = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    cell = fused_lstm.LSTMCell(3, H, **options, device=device, dtype=torch.float64).eval()
    for name, parameter in own.items():
        setattr(cell, name, parameter)
    call = make_call(module)
    expected = variants.run(module, call)
    rates = {"layer_norm": layer_norm, "zoneout": (0.3, 0.2), "backend": backend}
    functional = {re.sub("^(w|b)(eight|ias)_(ih|hh)$", r"\1_\3", name): p for name, p in own.items()}

    def by_cells(step):
        state, outputs = (call.hx[0][0], call.hx[1][0]), []
        for x in call.input:
            state = step(x, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def row_by_row(x, state):
        rows = [cell(*row) for row in zip(x, zip(*state, strict=True), strict=True)]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    ways = [
        by_cells(cell),
        by_cells(lambda x, state: fused_lstm.lstm_cell(x, state, **functional, **rates)),
        by_cells(row_by_row),
        fused_lstm.lstm_layer(call.input, (call.hx[0][0], call.hx[1][0]), **own, **rates),
    ]
    for output, (h_n, c_n) in ways:
        found = {"output": output, "h_n": h_n[None], "c_n": c_n[None]}
        assert_same(found | variants.gradients(list(found.values()), call.leaves(module)), expected)


@EACH_BACKEND
@EACH_NORM
def test_one_step_draws_the_same(layer_norm, backend, device):
    """In training, of one step, under one seed."""
    options = {"layer_norm": layer_norm, "zoneout": (0.5, 0.5)}
    module = build(device, **options, backend=backend)
    own = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    cell = cell_of(options, device, backend=backend)
    cell.load_state_dict({name: p.detach() for name, p in own.items()})
    call = make_call(module, steps=1)
    state = (call.hx[0][0], call.hx[1][0])
    torch.manual_seed(4)
    expected = module(call.input, call.hx)[1]
    torch.manual_seed(4)
    found = cell(call.input[0], state)
    torch.manual_seed(4)
    layer = fused_lstm.lstm_layer(call.input, state, **own, **options, training=True, backend=backend)[1]
    names = {re.sub("^(w|b)(eight|ias)_(ih|hh)$", r"\1_\3", name): p for name, p in own.items()}
    torch.manual_seed(4)
    step = fused_lstm.lstm_cell(call.input[0], state, **names, **options, training=True, backend=backend)
    for states in (found, layer, step):
        assert all(torch.equal(a, b[0]) for a, b in zip(states, expected, strict=True))


@EACH_BACKEND
@EACH_NORM
def test_cell_without_a_state_and_unbatched(layer_norm, backend, device):
    cell = cell_of({"layer_norm": layer_norm, "peephole": True, "zoneout": 0.3}, device, backend=backend).eval()
    x = randn(3, 3, device=device)
    expected = cell(x, (torch.zeros(3, H, device=device).double(),) * 2)
    assert all(torch.equal(a, b) for a, b in zip(cell(x), expected, strict=True))
    for n in range(3):
        assert_same(dict(zip("hc", cell(x[n]), strict=True)), {"h": expected[0][n], "c": expected[1][n]})


@EACH_BACKEND
def test_norms_in_another_dtype(backend, device):
    """In lstm_layer norm and peephole parameters have a dtype of their own, which their gradients keep."""
    module = build(device, layer_norm="gates", peephole=True)
    own = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    low = {n: p.detach().to(torch.float32 if "norm" in n or "ph" in n else torch.bfloat16) for n, p in own.items()}
    for value in low.values():
        value.requires_grad_()
    call = make_call(module)
    hx = [state[0].detach().bfloat16() for state in call.hx]
    output, _ = fused_lstm.lstm_layer(call.input.bfloat16(), hx, **low, layer_norm="gates", backend=backend)
    assert output.dtype == torch.bfloat16
    assert (output.double() - module(call.input, call.hx)[0]).abs().max() < 0.05
    gradients = torch.autograd.grad(output.sum(), list(low.values()))
    assert all(d.dtype == value.dtype for d, value in zip(gradients, low.values(), strict=True))
