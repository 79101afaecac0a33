"""LSTMCell against torch.nn.LSTMCell."""

import copy
import pickle

import pytest
import torch
from runs import randn, twin
from tolerance import assert_as_accurate, assert_same_float64

import fused_lstm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference", "stepwise"])
INPUT, HIDDEN = 3, 5


def build(device, dtype=torch.float64, bias=True, sizes=(INPUT, HIDDEN)) -> torch.nn.LSTMCell:
    torch.manual_seed(0)
    return torch.nn.LSTMCell(*sizes, bias=bias, device=device, dtype=dtype)


def make_input(cell, rows=(2,), has_hx=True):
    options = {"device": cell.weight_ih.device, "dtype": cell.weight_ih.dtype, "requires_grad": True}
    hx = tuple(randn(*rows, cell.hidden_size, seed=seed, **options) for seed in (2, 3))
    return randn(*rows, cell.input_size, seed=1, **options), hx if has_hx else None


def run(cell, input, hx):
    """h, c, and the gradients of everything, None included."""
    results = cell(input, hx)
    d_results = [randn(*r.shape, seed=7 + i, dtype=r.dtype, device=r.device) for i, r in enumerate(results)]
    leaves = {"input": input, **dict(cell.named_parameters())}
    if hx is not None:
        leaves.update(h=hx[0], c=hx[1])
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(results, list(wanted.values()), d_results)
    found = {"h_1": results[0].detach(), "c_1": results[1].detach()}
    return {**found, **{f"d_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}}


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


@BACKENDS
@pytest.mark.parametrize("rows", [(), (1,), (4,), (0,)], ids=str)
@pytest.mark.parametrize("has_hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_parity(bias, has_hx, rows, backend, device):
    cell = build(device, bias=bias)
    expected = run(cell, *make_input(cell, rows, has_hx))
    assert_same(run(twin(cell, backend), *make_input(cell, rows, has_hx)), expected)


@BACKENDS
@pytest.mark.parametrize("frozen", ["input", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_leaves_without_gradient(frozen, backend, device):
    cell = build(device)
    input, hx = make_input(cell)
    {"input": input, "h": hx[0], "c": hx[1], **dict(cell.named_parameters())}[frozen].requires_grad_(False)
    expected = run(cell, input, hx)
    assert f"d_{frozen}" not in expected
    assert_same(run(twin(cell, backend), input, hx), expected)


@BACKENDS
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_result(used, backend, device):
    """The other one gives nothing, and so does what reaches it alone."""
    cell = build(device)
    found = []
    for candidate in (cell, twin(cell, backend)):
        input, hx = make_input(cell)
        result = candidate(input, hx)[used]
        found.append(torch.autograd.grad(result.sum(), [input, *hx, *candidate.parameters()]))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_same_float64(actual, expected)


@BACKENDS
def test_loop(backend, device):
    """Steps in a Python loop, state handed on, are what torch's loop gives."""
    cell = build(device)
    inputs = randn(4, 2, INPUT, device=device)
    found = []
    for candidate in (cell, twin(cell, backend)):
        state = None
        for step in inputs:
            state = candidate(step, state)
        found.append([*state, *torch.autograd.grad((state[0] ** 2).sum(), list(candidate.parameters()))])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_same_float64(actual.detach(), expected.detach())


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype, backend, device):
    cell = build(device, dtype, sizes=(7, 65))
    input, hx = make_input(cell)
    same_dtype, actual = run(cell, input, hx), run(twin(cell, backend), input, hx)
    exact_hx = [state.detach().double().requires_grad_() for state in hx]
    exact = run(cell.double(), input.detach().double().requires_grad_(), exact_hx)
    for name, value in exact.items():
        assert_as_accurate(actual[name], same_dtype[name], value)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
def test_autocast(backend, device):
    """Computed and returned in autocast's dtype (torch's own, on a CPU, promotes the result to float32 again)."""
    cell = build(device, torch.float32, sizes=(7, 65))
    input, hx = make_input(cell)
    with torch.autocast(device, dtype=torch.bfloat16):
        same_dtype, actual = run(cell, input, hx), run(twin(cell, backend), input, hx)
    exact_hx = [state.detach().double().requires_grad_() for state in hx]
    exact = run(cell.double(), input.detach().double().requires_grad_(), exact_hx)
    for name, value in exact.items():
        assert actual[name].dtype == (torch.float32 if name.startswith("d_") else torch.bfloat16)
        assert_as_accurate(actual[name].bfloat16(), same_dtype[name].bfloat16(), value)


def test_as_a_module(device):
    """Made, printed, copied, saved and loaded like torch's."""
    cell = build(device)
    torch.manual_seed(0)
    ours = fused_lstm.LSTMCell(INPUT, HIDDEN, device=device, dtype=torch.float64, backend="reference")
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in cell.state_dict().items())
    assert repr(ours) == repr(cell)[:-1] + ", backend='reference')"
    assert repr(fused_lstm.LSTMCell(INPUT, HIDDEN, bias=False)) == repr(torch.nn.LSTMCell(INPUT, HIDDEN, bias=False))
    expected = run(cell, *make_input(cell))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fused_lstm.LSTMCell
        assert copied.backend == "reference"
        assert_same(run(copied, *make_input(cell)), expected)
    with torch.no_grad():
        ours.weight_hh.mul_(2)
    cell.load_state_dict(ours.state_dict())
    assert_same(run(ours, *make_input(cell)), run(cell, *make_input(cell)))


def test_parametrized(device):
    cell, ours = build(device), twin(build(device), "reference")
    for module in (cell, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
    assert_same(run(ours, *make_input(cell)), run(cell, *make_input(cell)))
