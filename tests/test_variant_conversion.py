"""convert with options: what they add is started, what is no longer needed goes, nothing else changes."""

import copy
import re

import pytest
import torch
import variants
from runs import randn
from variants import DRAWING, NORMS, H, assert_start, build, make_call, scramble, torchs

import fused_lstm
from fused_lstm import convert

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

EACH_NORM = pytest.mark.parametrize("layer_norm", NORMS)
DEEP = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
SUFFIXES = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
LSTM_ONLY = ("recurrent_dropout", "weight_dropout", "locked_dropout", "recompute")
NO_BIAS = "forget_bias needs bias=True, or layer_norm='gates' with its own biases"


class Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        options = {"device": device, "dtype": torch.float64}
        self.encoder = torch.nn.LSTM(3, H, num_layers=2, bidirectional=True, proj_size=2, **options)
        self.other = torch.nn.Sequential(torch.nn.Linear(4, 4, **options), torch.nn.LSTM(4, H, bias=False, **options))
        self.cell = torch.nn.LSTMCell(4, H, **options)

    def forward(self, x):
        x, _ = self.encoder(x)
        x, _ = self.other(x)
        return self.cell(x[-1])[0]


@pytest.fixture
def model(device):
    torch.manual_seed(0)
    return Model(device)


def snapshot(model):
    """Every parameter, as an object and by value; types and attributes of all modules."""
    return (
        {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
        {name: (type(module), set(vars(module))) for name, module in model.named_modules()},
    )


def assert_unchanged(model, before) -> None:
    parameters, modules = snapshot(model)
    assert modules == before[1]
    assert list(parameters) == list(before[0])
    assert all(parameters[n][0] == i and torch.equal(parameters[n][1], v) for n, (i, v) in before[0].items())


@EACH_NORM
@pytest.mark.parametrize("training", [True, False])
def test_convert_adds(training, layer_norm, model, device):
    """What the options add, started as the constructor does; nothing else changes, the forget gate's bias neither."""
    model.train(training)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    options = {"layer_norm": layer_norm, "peephole": True, "zoneout": (0.1, 0.2), **dict.fromkeys(LSTM_ONLY[:2], 0.3)}
    assert convert(model, **options, locked_dropout=True, recompute=True) is model
    for name, (identity, value) in before.items():
        assert id(model.get_parameter(name)) == identity
        assert torch.equal(model.get_parameter(name), value)
    sizes = {**NORMS[layer_norm], "weight_ph": 3 * H}
    for path, suffixes in {"encoder": SUFFIXES, "other.1": ["_l0"], "cell": [""]}.items():
        module = model.get_submodule(path)
        added = {n: p for n, p in module.named_parameters() if f"{path}.{n}" not in before}
        assert {n: p.numel() for n, p in added.items()} == {n + s: size for s in suffixes for n, size in sizes.items()}
        assert {(p.dtype, p.device.type) for p in added.values()} == {(torch.float64, torch.device(device).type)}
        assert_start(module, added)
        assert module.training is training
        assert vars(module).keys() >= {"layer_norm", "peephole", "zoneout", "forget_bias", "backend"}
        assert all((name in vars(module)) == (path != "cell") for name in LSTM_ONLY)
        assert [name for name, _ in module.named_parameters()][-len(added) :] == list(added)
    model(randn(5, 2, 3, device=device)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@EACH_NORM
def test_converted_is_as_if_made(layer_norm):
    """A module of ours with the same parameters gives the same numbers."""
    options = {"layer_norm": layer_norm, "peephole": True, **DRAWING, "recompute": True, "backend": "reference"}
    module = scramble(convert(torchs(**DEEP), **options))
    made = build(**DEEP, **options)
    assert module.state_dict().keys() == made.state_dict().keys()
    made.load_state_dict(module.state_dict())
    assert repr(module) == repr(made)
    call = make_call(module)
    expected = variants.run(made, make_call(made))
    assert all(torch.equal(value, expected[name]) for name, value in variants.run(module, call).items())


def test_convert_starts_the_forget_bias_it_adds(model):
    """Under "gates" it is a new parameter's; else it would change one that exists."""
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if "bias" in name}
    convert(model, forget_bias=1.0, layer_norm="gates")
    start = torch.zeros(4 * H).double()
    start[H : 2 * H] = 1
    for suffix in SUFFIXES:
        assert torch.equal(getattr(model.encoder, f"norm_gates_bias{suffix}"), start)
    assert torch.equal(model.other[1].norm_gates_bias_l0, start)
    assert torch.equal(model.cell.norm_gates_bias, start)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in biases.items())
    assert model.encoder.forget_bias == model.cell.forget_bias == 1.0


def test_convert_keeps_a_forget_bias_for_reset_parameters():
    module = torch.nn.LSTM(3, H)
    before = module.bias_ih_l0.detach().clone()
    convert(module, forget_bias=2.0)
    assert torch.equal(module.bias_ih_l0, before)
    module.reset_parameters()
    assert (module.bias_ih_l0[H : 2 * H] == 2).all()


def test_second_call_adds_and_removes(model):
    """Step by step from one set of options to another; what both have stays as it is."""
    plain = snapshot(model)[0]
    convert(model, layer_norm="gates", peephole=True)
    scramble(model)
    kept = dict(model.named_parameters())
    convert(model, layer_norm="projections_cell")
    assert model.encoder.peephole
    names = dict(model.named_parameters())
    assert not any("norm_gates" in name for name in names)
    for name, parameter in names.items():
        if name in kept:
            assert parameter is kept[name]
        else:
            assert "norm_ih" in name or "norm_hh" in name
            assert (parameter == (1 if "weight" in name else 0)).all()
    convert(model, layer_norm="projections", peephole=False)
    own = {re.sub(r".*\.|_l\d.*", "", name) for name in dict(model.named_parameters()) if name not in plain}
    assert own == set(NORMS["projections"])
    convert(model, layer_norm=None)
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(n, i) for n, (i, _) in plain.items()]
    convert(model, to="torch")
    assert not any(isinstance(module, (fused_lstm.LSTM, fused_lstm.LSTMCell)) for module in model.modules())


def test_second_call_without_options_keeps_them(model):
    convert(model, layer_norm="gates", peephole=True, zoneout=0.1, weight_dropout=0.1, forget_bias=1.0)
    scramble(model)
    before = snapshot(model)
    convert(model, backend="reference")
    convert(model, layer_norm="gates", peephole=True)
    assert_unchanged(model, before)
    assert (model.encoder.zoneout, model.encoder.weight_dropout, model.cell.zoneout) == (0.1, 0.1, 0.1)


IN_USE = {
    "layer_norm": {"layer_norm": "projections"},
    "peephole": {"peephole": True},
    "zoneout": {"zoneout": (0.0, 0.1)},
    "recurrent_dropout": {"recurrent_dropout": 0.1},
    "weight_dropout": {"weight_dropout": 0.1},
    "locked_dropout": {"locked_dropout": True},
    "layer_norm, zoneout, weight_dropout": {"layer_norm": "gates", "zoneout": 0.1, "weight_dropout": 1},
}


@pytest.mark.parametrize(("names", "options"), IN_USE.items(), ids=IN_USE)
@pytest.mark.parametrize("training", [True, False])
def test_back_to_torch_with_options_in_use(training, names, options, model):
    """Refused, in evaluation too, and nothing is swapped; once they are off, it goes."""
    plain = snapshot(model)
    convert(model.train(training))
    convert(model.other[1], **options)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"^other\.1 cannot become torch's: {names}$"):
        convert(model, to="torch")
    assert_unchanged(model, before)
    off = dict.fromkeys(DRAWING, 0)
    convert(model, layer_norm=None, peephole=False, locked_dropout=False, **off)
    convert(model, to="torch")
    assert_unchanged(model, plain)


def test_back_to_torch_with_a_cells_options():
    cell = convert(torch.nn.LSTMCell(3, 4), zoneout=0.1)
    with pytest.raises(ValueError, match=r"^the model itself cannot become torch's: zoneout$"):
        convert(cell, to="torch")
    assert type(cell) is fused_lstm.LSTMCell


def test_back_to_torch_with_options_that_change_no_number(model):
    """recompute, the backend, and where a bias once started."""
    plain = snapshot(model)
    convert(model, recompute=True, backend="reference", zoneout=(0, 0.0))
    convert(model.encoder, forget_bias=1.0)
    convert(model, to="torch")
    assert_unchanged(model, plain)


def test_forget_bias_of_a_module_that_has_no_bias(model):
    """other.1 has none: refused as a whole, and nothing changes."""
    for prepared in (model, convert(copy.deepcopy(model))):
        before = snapshot(prepared)
        for options in ({}, {"layer_norm": "projections"}):
            with pytest.raises(ValueError, match=f"^{NO_BIAS}$"):
                convert(prepared, forget_bias=1.0, **options)
            assert_unchanged(prepared, before)
    convert(model, forget_bias=1.0, layer_norm="gates")
    assert model.other[1].forget_bias == 1.0


def test_norm_taken_away_under_a_forget_bias(model):
    """The only biases of other.1 are those of its norm: without them, its forget_bias has no place."""
    convert(model, forget_bias=1.0, layer_norm="gates")
    before = snapshot(model)
    for layer_norm in (None, "projections"):
        with pytest.raises(ValueError, match=f"^{NO_BIAS}$"):
            convert(model, layer_norm=layer_norm)
        assert_unchanged(model, before)
    convert(model, layer_norm=None, forget_bias=None)
    model.other[1].reset_parameters()


def test_convert_where_a_weight_is_computed(device):
    """Parametrized, or replaced by a plain tensor: what is added has the weights' dtype and device."""
    parametrized = torchs().to(device)
    torch.nn.utils.parametrizations.weight_norm(parametrized, "weight_ih_l0")
    replaced = torchs().to(device)
    weight = replaced.weight_ih_l0.detach()
    del replaced.weight_ih_l0
    replaced.weight_ih_l0 = weight
    for module in (parametrized, replaced):
        names = dict(module.named_parameters()).keys()
        convert(module, layer_norm="gates", peephole=True)
        added = {n: p for n, p in module.named_parameters() if n not in names}
        assert {n: p.numel() for n, p in added.items()} == {
            **{f"{n}_l0": size for n, size in NORMS["gates"].items()},
            "weight_ph_l0": 3 * H,
        }
        assert all(p.dtype == torch.float64 and p.device.type == device for p in added.values())
        output, _ = module(randn(5, 2, 3, device=device))
        output.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        convert(convert(module, layer_norm=None, peephole=False), to="torch")
        assert dict(module.named_parameters()).keys() == names


def test_convert_on_meta():
    with torch.device("meta"):
        model = Model("meta")
    convert(model, layer_norm="gates", peephole=True, forget_bias=1.0)
    assert all(p.is_meta for p in model.parameters())


def test_convert_draws_for_peepholes_alone(model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    convert(model, layer_norm="gates", forget_bias=1.0, zoneout=0.1, weight_dropout=0.2)
    assert torch.equal(torch.rand(3), expected)


def test_optimiser_made_after_converting_sees_all(model, device):
    convert(model, layer_norm="projections_cell", peephole=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
    (model(randn(5, 2, 3, device=device)) ** 2).sum().backward()
    optimiser.step()
    assert all((p != before[name]).any() for name, p in model.encoder.named_parameters())
