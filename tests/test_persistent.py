"""LSTM on the persistent backend, and with recomputed gates, against torch.nn.LSTM and the reference."""

import pytest
import torch
import walks
from tolerance import assert_as_accurate
from walks import Variant

import fused_lstm
from fused_lstm import _ops
from fused_lstm.kernels import persistent, persistent_backward, persistent_launch, stepwise
from fused_lstm.kernels.persistent_options import backward_burden, forward_burden

pytest_plugins = ["persistent_grids"]


def train(module, input, lengths, hx):
    """output, h_n, c_n, then the gradients of input, hx and every parameter."""
    input = input.clone().requires_grad_()
    hx = tuple(state.clone().requires_grad_() for state in hx)
    if lengths is None:
        output, (h_n, c_n) = module(input, hx)
    elif isinstance(module, fused_lstm.LSTM):
        output, (h_n, c_n) = module(input, hx, lengths=lengths)
    else:
        packed = torch.nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
        packed, (h_n, c_n) = module(packed, hx)
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=input.size(0))
    loss = (output * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).sum()
    (loss + (h_n**2).sum() + c_n.sum()).backward()
    return [output, h_n, c_n, input.grad, *(state.grad for state in hx), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
def test_equals_torch(bidirectional, with_lengths, recompute, device):
    torch.manual_seed(0)
    steps, batch_size, input_size, hidden_size = 6, 50, 8, 40
    options = {"num_layers": 2, "bidirectional": bidirectional, "device": device}
    exact = torch.nn.LSTM(input_size, hidden_size, dtype=torch.float64, **options)
    theirs = torch.nn.LSTM(input_size, hidden_size, **options)
    ours = fused_lstm.LSTM(input_size, hidden_size, recompute=recompute, backend="persistent", **options)
    exact.load_state_dict(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(steps, batch_size, input_size, device=device)
    states = 4 if bidirectional else 2
    hx = [torch.randn(states, batch_size, hidden_size, device=device) for _ in range(2)]
    lengths = torch.randint(1, steps + 1, (batch_size,)) if with_lengths else None
    results = [
        train(module, input.to(dtype), lengths, [state.to(dtype) for state in hx])
        for module, dtype in ((ours, torch.float32), (theirs, torch.float32), (exact, torch.float64))
    ]
    for actual, same_dtype, true in zip(*results, strict=True):
        assert_as_accurate(actual, same_dtype, true)


def test_recompute_is_shown_and_kept(tmp_path):
    module = fused_lstm.LSTM(3, 4, recompute=True)
    assert repr(module) == "LSTM(3, 4, recompute=True)"
    torch.save(module, tmp_path / "module.pt")
    assert torch.load(tmp_path / "module.pt", weights_only=False).recompute
    assert fused_lstm.convert(torch.nn.LSTM(3, 4), recompute=True).recompute


def test_recompute_is_a_bool():
    with pytest.raises(TypeError, match="recompute should be of type bool, got: int"):
        fused_lstm.LSTM(3, 4, recompute=1)


OPTIONS = {  # and are there lengths?
    "recompute": ({"recompute": True, "bidirectional": True}, True),
    "peephole_zoneout": ({"peephole": True, "zoneout": (0.2, 0.1), "recurrent_dropout": 0.25}, False),
    "gates": ({"layer_norm": "gates", "zoneout": 0.2}, True),
    "gates_bidirectional": ({"layer_norm": "gates", "bidirectional": True, "recompute": True}, False),
    "projections": ({"layer_norm": "projections", "recurrent_dropout": 0.25, "recompute": True}, False),
    "projections_cell": ({"layer_norm": "projections_cell", "peephole": True}, True),
}


@pytest.mark.interpreter
@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize(("options", "with_lengths"), OPTIONS.values(), ids=OPTIONS)
def test_options_equal_the_reference(options, with_lengths, device, monkeypatch):
    """Under the same seed: the draws are the same on every backend and in every dtype of a CPU."""
    monkeypatch.setattr(persistent_launch, "obstacle", lambda *_, **__: None)  # of the interpreter, without the grids
    torch.manual_seed(3)
    reset = None if "bidirectional" in options else torch.rand(4, 16, device=device) < 0.3
    lengths = torch.randint(1, 5, (16,)) if with_lengths else None
    found = []
    for backend, dtype in (("persistent", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        module = fused_lstm.LSTM(8, 100, device=device, backend=backend, **options).to(dtype)
        input = torch.randn(4, 16, 8, device=device).to(dtype).requires_grad_()
        torch.manual_seed(1)
        output, (h_n, c_n) = module(input, reset=reset, lengths=lengths)
        loss = (output**2).sum() + h_n.sum() + (c_n**3).sum()
        gradients = torch.autograd.grad(loss, [input, *module.parameters()])
        found.append([output, h_n, c_n, *gradients])
    for actual, same_dtype, true in zip(*found, strict=True):
        assert_as_accurate(actual, same_dtype, true)


@pytest.mark.parametrize("layer_norm", [None, "gates"])
@pytest.mark.parametrize("fits", [True, False])
def test_where_norms_do_not_fit_the_way_back_is_stepwise(fits, layer_norm, device, monkeypatch):
    """The plain cell's never is: its grid is the forward's."""
    ran = []
    monkeypatch.setattr(
        persistent_launch, "obstacle", lambda *case: None if fits or case[-1] != "norms" else "too few registers"
    )
    for kernels in (persistent_backward, stepwise):
        name = kernels.__name__.rpartition(".")[2]
        monkeypatch.setattr(kernels, "recurrence_backward", lambda *_, name=name: ran.append(name))
    walk = walks.walk_of(walks.make_inputs(2, 3, 40, Variant(layer_norm=layer_norm), device=device))
    persistent.recurrence_backward(walk, None)
    assert ran == ["persistent_backward" if fits or layer_norm is None else "stepwise"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ()),
        ({"weight_dropout": 0.5}, ()),
        ({"peephole": True}, ("peephole",)),
        ({"zoneout": (0.0, 0.2)}, ("zoneout",)),
        ({"zoneout": 0.2, "recurrent_dropout": 0.2}, ("zoneout", "recurrent_dropout", "reset")),
    ],
)
@pytest.mark.parametrize("layer_norm", [None, "gates"])
def test_the_operators_choose_by_the_options_of_a_step(options, names, layer_norm, device, monkeypatch):
    """Both alike, as under torch.compile nobody has chosen before them; and the grids that the walk then takes."""
    asked, select = [], _ops.select_backend
    monkeypatch.setattr(_ops, "select_backend", lambda *args, **case: asked.append(case) or select(*args, **case))
    reset = torch.ones(2, 3, device=device) if "reset" in names else None
    module = fused_lstm.LSTM(4, 5, device=device, backend="reference", layer_norm=layer_norm, **options)
    module(torch.randn(2, 3, 4, device=device), reset=reset)[0].sum().backward()
    assert [(case["layer_norm"], case["options"]) for case in asked] == [(layer_norm, names)] * 2

    walk = walks.walk_of(walks.make_inputs(2, 3, 40, Variant(layer_norm=layer_norm), device=device))
    monkeypatch.setattr(type(walk), "options", lambda _: names)
    forward = "options" if layer_norm else ("none", "option", "options", "options")[len(names)]
    assert (forward_burden(walk), backward_burden(walk)) == (forward, "norms" if layer_norm else forward)
