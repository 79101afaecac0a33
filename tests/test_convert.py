"""convert: the LSTMs of a model swapped in place, everything else left as it was."""

import collections
import copy
import logging
import pickle
import warnings

import pytest
import torch
from runs import randn
from tolerance import assert_same_float64

import fused_lstm
from fused_lstm import convert


class Tagger(torch.nn.Module):
    """LSTMs nested, shared, in a ModuleList, in a Sequential and under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.layers = torch.nn.ModuleList([torch.nn.LSTM(8, 4), torch.nn.LSTM(4, 4)])
        self.same = self.layers[1]
        self.inner = torch.nn.ModuleDict({"block": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LSTM(4, 4))})
        self.cell = torch.nn.LSTMCell(4, 4)
        self.gru = torch.nn.GRU(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        x, _ = self.encoder(x)
        for layer in self.layers:
            x, _ = layer(x)
        x, _ = self.same(x)
        x, _ = self.inner["block"](x)
        h, _ = self.cell(x[-1])
        x, _ = self.gru(x + h)
        return self.norm(x[-1])


OPTIONS = vars(fused_lstm.LSTM(1, 1)).keys() - vars(torch.nn.LSTM(1, 1)).keys()  # what convert adds
SWAPPED = ["encoder", "layers.0", "layers.1", "inner.block.1"]


def build(device="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    return Tagger().to(device, dtype)


def facts(model):
    """All that must not change: identities, values, flags, hooks, and what else stands in each module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "order": [name for name, _ in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: id(b) for name, b in model.named_buffers()},
        "training": {name: module.training for name, module in modules.items()},
        "vars": {name: {k: v for k, v in vars(m).items() if k not in OPTIONS} for name, m in modules.items()},
    }


def assert_unchanged(model, before) -> None:
    after = facts(model)
    values = [f.pop("values") for f in (before, after)]
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    kept = [f.pop("vars") for f in (before, after)]
    assert before == after
    for name, found in kept[0].items():
        assert kept[1][name].keys() == found.keys()
        assert all(kept[1][name][key] is value or kept[1][name][key] == value for key, value in found.items())
    before.update(values=values[0], vars=kept[0])


def types(model):
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def test_everywhere(device):
    model = build(device)
    expected, before, types_before = model(randn(5, 2, 3, device=device)), facts(model), types(model)
    assert convert(model, backend="reference") is model
    assert_unchanged(model, before)
    for name, module_type in types(model).items():
        swapped = {torch.nn.LSTM: fused_lstm.LSTM, torch.nn.LSTMCell: fused_lstm.LSTMCell}
        assert module_type is swapped.get(types_before[name], types_before[name])
    assert all(model.get_submodule(name).backend == "reference" for name in [*SWAPPED, "cell"])
    assert model.same is model.layers[1]
    assert_same_float64(model(randn(5, 2, 3, device=device)).detach(), expected.detach())


def test_default_option(device):
    model = convert(build(device))
    assert model.encoder.backend == model.cell.backend == "auto"


def test_option_that_cells_lack(device):
    """It reaches the LSTMs only."""
    model = convert(build(device), recompute=True)
    assert all(model.get_submodule(name).recompute for name in SWAPPED)
    assert "recompute" not in vars(model.cell)
    assert "recompute" not in vars(convert(torch.nn.LSTMCell(3, 4), recompute=True))


@pytest.mark.parametrize("options", [{}, {"proj_size": 2, "bidirectional": True}, {"bias": False, "batch_first": True}])
def test_the_model_itself(options, device):
    module = torch.nn.LSTM(3, 4, **options, device=device)
    before = facts(module)
    assert convert(module) is module
    assert type(module) is fused_lstm.LSTM
    assert_unchanged(module, before)
    cell = torch.nn.LSTMCell(3, 4, device=device)
    assert type(convert(cell)) is fused_lstm.LSTMCell


def test_twice_is_once():
    model = convert(build(), backend="reference")
    before, types_before = facts(model), types(model)
    convert(model)
    assert types(model) == types_before
    assert model.encoder.backend == "reference"  # an option that is not given keeps its value
    convert(model, backend="stepwise")
    assert model.encoder.backend == model.cell.backend == "stepwise"
    assert_unchanged(model, before)


def test_undone():
    """Types, and every attribute, are what they were."""
    model = build()
    before, types_before = facts(model), types(model)
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    assert convert(convert(model, backend="reference"), to="torch") is model
    assert types(model) == types_before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert_unchanged(model, before)
    assert_unchanged(convert(model, to="torch"), before)


def test_undone_for_modules_that_were_made_ours():
    module = fused_lstm.LSTM(3, 4, backend="reference")
    assert type(convert(module, to="torch")) is torch.nn.LSTM
    assert not OPTIONS & vars(module).keys()
    assert repr(module) == "LSTM(3, 4)"


@pytest.mark.parametrize("training", [True, False])
def test_flags_and_extra_attributes(training):
    model = build().train(training)
    model.encoder.weight_hh_l0.requires_grad_(False)
    model.encoder.note = {"a": 1}
    model.encoder.register_buffer("scale", torch.ones(3))
    model.encoder.extra = torch.nn.Linear(2, 2)
    before = facts(model)
    convert(model)
    assert_unchanged(model, before)
    assert model.encoder.note == {"a": 1}
    assert not model.encoder.weight_hh_l0.requires_grad
    assert model.encoder.training is training
    assert "encoder.scale" in model.state_dict()


def test_hooks_still_fire(device):
    """Forward, full backward and state-dict hooks of every kind, those with keywords and always-call too."""
    model = build(device)
    module, calls = model.encoder, collections.Counter()

    def count(name):
        return lambda *_, **__: calls.update([name])

    module.register_forward_pre_hook(count("pre"))
    module.register_forward_pre_hook(count("pre_kwargs"), with_kwargs=True)
    module.register_forward_hook(count("forward"))
    module.register_forward_hook(count("forward_kwargs"), with_kwargs=True)
    module.register_forward_hook(count("always"), always_call=True)
    module.register_full_backward_pre_hook(count("backward_pre"))
    module.register_full_backward_hook(count("backward"))
    module.register_state_dict_pre_hook(count("state_dict_pre"))
    module.register_state_dict_post_hook(count("state_dict_post"))
    module.register_load_state_dict_pre_hook(count("load_pre"))
    module.register_load_state_dict_post_hook(count("load_post"))
    module.weight_hh_l0.register_hook(count("gradient"))

    def use():
        calls.clear()
        model(randn(5, 2, 3, device=device, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return dict(calls)

    expected = use()
    assert len(expected) == 12
    convert(model, backend="reference")
    assert use() == expected


def test_in_the_middle_of_training(device):
    """Under an optimiser made before: the losses go on as those of a model that was never converted."""
    models = [build(device), build(device)]
    optimisers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    losses = [[], []]
    for step in range(12):
        if step == 4:
            convert(models[1], backend="reference")
        if step == 9:
            convert(models[1], to="torch")
        for model, optimiser, found in zip(models, optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss = ((model(randn(5, 4, 3, seed=step, device=device)) - 1) ** 2).mean()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    assert losses[0][-1] < losses[0][0]


class Renamed(torch.nn.LSTM):
    """Somebody's own: its forward may do anything."""


class RenamedCell(torch.nn.LSTMCell):
    """Likewise."""


def test_subclasses_are_left_alone():
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4), Renamed(3, 4), torch.nn.ModuleList([RenamedCell(3, 4)]))
    with pytest.warns(UserWarning, match="left alone") as caught:
        convert(model)
    assert [str(w.message) for w in caught] == [
        f"subclasses of torch's modules were left alone: 1 ({__name__}.Renamed), 2.0 ({__name__}.RenamedCell)"
    ]
    assert caught[0].filename == __file__
    assert [type(m) for m in (model[0], model[1], model[2][0])] == [fused_lstm.LSTM, Renamed, RenamedCell]
    assert not OPTIONS & vars(model[1]).keys()


def test_subclass_as_the_model():
    with pytest.warns(UserWarning, match=r"left alone: the model itself \(.*Renamed\)"):
        convert(Renamed(3, 4))


def test_subclass_of_ours_is_nobody_elses():
    """It is ours already: no warning, and to="torch" names it."""

    class Mine(fused_lstm.LSTM):
        pass

    module = Mine(3, 4)
    assert type(convert(module)) is Mine
    with pytest.warns(UserWarning, match="left alone: the model itself"):
        convert(module, to="torch")
    assert type(module) is Mine


def test_no_lstm_no_warning():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GRU(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(model) is model


BAD = {
    "unknown": ({"speed": 11}, TypeError, "convert(to='fused_lstm') got an unexpected keyword argument 'speed'"),
    "of_torch": (
        {"backend": "auto", "to": "torch"},
        *(TypeError, "convert(to='torch') got an unexpected keyword argument 'backend'"),
    ),
    "torchs_own": (
        {"num_layers": 2},
        *(TypeError, "convert(to='fused_lstm') got an unexpected keyword argument 'num_layers'"),
    ),
    "value": ({"backend": "cudnn"}, ValueError, None),
    "to": ({"to": "keras"}, ValueError, "to should be 'fused_lstm' or 'torch', got 'keras'"),
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_options_change_nothing(options, kind, message, converted):
    model = convert(build()) if converted else build()
    before, types_before = facts(model), types(model)
    with pytest.raises(kind) as raised:
        convert(model, **options)
    if message is not None:
        assert str(raised.value) == message
    assert types(model) == types_before
    assert_unchanged(model, before)
    assert not converted or model.encoder.backend == "auto"


def test_logs_what_it_swapped(caplog):
    with caplog.at_level(logging.INFO, logger="fused_lstm"):
        model = convert(torch.nn.Sequential(torch.nn.LSTM(3, 4), torch.nn.Linear(4, 4), torch.nn.LSTMCell(4, 4)))
        convert(model)
        convert(model, to="torch")
        convert(torch.nn.LSTM(3, 4))
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        ("fused_lstm", logging.INFO, "swapped 2 modules for fused_lstm's: 0, 2"),
        ("fused_lstm", logging.INFO, "swapped 0 modules for fused_lstm's: none"),
        ("fused_lstm", logging.INFO, "swapped 2 modules for torch's: 0, 2"),
        ("fused_lstm", logging.INFO, "swapped 1 modules for fused_lstm's: LSTM"),
    ]


def test_parametrized(device):
    """The class that a parametrization has put over a module's own stays over it, of this module alone."""

    def normed():
        torch.manual_seed(0)
        module = torch.nn.LSTM(3, 4, device=device, dtype=torch.float64)
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
        return module

    module, other = normed(), normed()
    twin = copy.deepcopy(module)  # whose class is the same object
    x = randn(5, 2, 3, device=device)
    expected = module(x)[0].detach()
    convert(module, backend="reference")
    assert isinstance(module, fused_lstm.LSTM)
    assert torch.nn.utils.parametrize.is_parametrized(module, "weight_hh_l0")
    assert_same_float64(module(x)[0].detach(), expected)
    for untouched in (twin, other):
        assert not isinstance(untouched, fused_lstm.LSTM)
        assert torch.equal(untouched(x)[0], other(x)[0])
    assert isinstance(convert(twin), fused_lstm.LSTM)
    assert not isinstance(convert(module, to="torch"), fused_lstm.LSTM)
    assert_same_float64(module(x)[0].detach(), expected)
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is torch.nn.LSTM
    assert_same_float64(module(x)[0].detach(), expected)


def test_parametrization_removed_after_converting(device):
    module = torch.nn.LSTM(3, 4, device=device, dtype=torch.float64)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = randn(5, 2, 3, device=device)
    expected = module(x)[0].detach()
    convert(module, backend="reference")
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fused_lstm.LSTM
    assert_same_float64(module(x)[0].detach(), expected)


def test_parametrized_after_converting(device):
    module = convert(torch.nn.LSTM(3, 4, device=device, dtype=torch.float64), backend="reference")
    x = randn(5, 2, 3, device=device)
    expected = module(x)[0].detach()
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert isinstance(module, fused_lstm.LSTM)
    assert_same_float64(module(x)[0].detach(), expected)
    convert(module, backend="stepwise")
    assert module.backend == "stepwise"


def test_converted_model_is_copied_and_pickled(device):
    model = convert(build(device), backend="reference")
    x = randn(5, 2, 3, device=device)
    expected = model(x).detach()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert types(copied) == types(model)
        assert torch.equal(copied(x).detach(), expected)


def test_half_of_a_model_on_meta():
    """Nothing is computed and no parameter is touched: meta tensors will do."""
    with torch.device("meta"):
        model = build("meta")
    assert type(convert(model).encoder) is fused_lstm.LSTM
    assert model.encoder.weight_hh_l0.is_meta


def test_no_random_number_is_drawn():
    """In the middle of a training, dropout goes on where it was."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    convert(torch.nn.Identity(), backend="reference")
    assert torch.equal(torch.rand(3), expected)
