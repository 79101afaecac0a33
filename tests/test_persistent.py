"""LSTM on the persistent backend, and with recomputed gates, against torch.nn.LSTM: layers of one program."""

import pytest
import torch
from tolerance import assert_as_accurate

import fused_lstm


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


OPTIONS = {
    "peephole_zoneout": {"peephole": True, "zoneout": (0.2, 0.1), "recurrent_dropout": 0.25},
    "gates": {"layer_norm": "gates", "bidirectional": True},
    "projections": {"layer_norm": "projections", "zoneout": 0.1, "recompute": True},
    "projections_cell": {"layer_norm": "projections_cell", "peephole": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_equal_the_reference(options, device):
    """Under the same seed: the draws are the same on every backend and in every dtype of a CPU."""
    torch.manual_seed(2)
    reset = None if "bidirectional" in options else torch.rand(8, 48, device=device) < 0.3
    found = []
    for backend, dtype in (("persistent", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        module = fused_lstm.LSTM(8, 24, 2, device=device, backend=backend, **options).to(dtype)
        input = torch.randn(8, 48, 8, device=device).to(dtype).requires_grad_()
        torch.manual_seed(1)
        output, (h_n, c_n) = module(input, reset=reset)
        loss = (output**2).sum() + h_n.sum() + (c_n**3).sum()
        gradients = torch.autograd.grad(loss, [input, *module.parameters()])
        found.append([output, h_n, c_n, *gradients])
    for actual, same_dtype, true in zip(*found, strict=True):
        assert_as_accurate(actual, same_dtype, true)
