"""How a layer stands in a graph: any subset of results and leaves, twice, in place, under checkpointing."""

import itertools

import pytest
import torch
from runs import randn, run, twin
from tolerance import assert_same_float64

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.parametrize("backend", ["reference", "stepwise"]),
]

RESULTS = ("output", "h_n", "c_n")
LEAVES = ("input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0")
UNSORTED = [2, 3]


def build(device, **options) -> torch.nn.LSTM:
    torch.manual_seed(0)
    return torch.nn.LSTM(3, 5, device=device, dtype=torch.float64, **options)


def make_input(module, steps=3, rows=2):
    """input, (h_0, c_0), leaves that want gradients."""
    options = {"device": module.weight_ih_l0.device, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    h_0 = randn(count, rows, module.proj_size or 5, seed=2, **options)
    return randn(steps, rows, 3, seed=1, **options), (h_0, randn(count, rows, 5, seed=3, **options))


def assert_same(actual, expected) -> None:
    """Where one of the two gives no gradient, the other's is zero."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        there = [v for v in (actual[name], value) if v is not None]
        if len(there) == 2:
            assert_same_float64(*there)
        else:
            assert not any(v.any() for v in there)


@pytest.mark.parametrize("results", [s for n in (1, 2) for s in itertools.combinations(RESULTS, n)], ids="+".join)
@pytest.mark.parametrize("pack", [None, "unsorted"])
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_subset_of_results(options, pack, results, backend, device):
    module = build(device, **options)
    given = {"lengths": UNSORTED, "pack": pack, "results": results} if pack else {"results": results}
    expected = run(module, *make_input(module), **given)
    assert_same(run(twin(module, backend), *make_input(module), **given), expected)


@pytest.mark.parametrize(
    "frozen", [*[(leaf,) for leaf in LEAVES], LEAVES[:3], LEAVES[3:], LEAVES[:5], LEAVES[1:]], ids=str
)
def test_leaves_without_gradient(frozen, backend, device):
    """None where no gradient was asked for, the same numbers elsewhere."""
    module = build(device, proj_size=2)
    input, hx = make_input(module)
    for name, leaf in {"input": input, "h_0": hx[0], "c_0": hx[1], **dict(module.named_parameters())}.items():
        leaf.requires_grad_(name not in frozen)
    expected, actual = run(module, input, hx), run(twin(module, backend), input, hx)
    for name in LEAVES:
        assert (actual["d_" + name] is None) == (expected["d_" + name] is None) == (name in frozen)
    assert_same(actual, expected)


def test_nothing_wants_a_gradient(backend, device):
    module = build(device, bidirectional=True).requires_grad_(False)
    input, hx = make_input(module)
    output, (h_n, c_n) = twin(module, backend)(input.detach(), (hx[0].detach(), hx[1].detach()))
    expected, expected_state = module(input.detach(), (hx[0].detach(), hx[1].detach()))
    for actual, value in zip((output, h_n, c_n), (expected, *expected_state), strict=True):
        assert not actual.requires_grad
        assert_same_float64(actual, value)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(grad_mode, options, backend, device):
    """The forward that keeps nothing gives the same numbers."""
    module = twin(build(device, **options), backend)
    expected = run(module, *make_input(module))
    with grad_mode():
        output, (h_n, c_n) = module(*make_input(module))
    assert not output.requires_grad
    for name, value in {"output": output, "h_n": h_n, "c_n": c_n}.items():
        assert_same_float64(value.clone(), expected[name])


def test_gradient_of_a_sum(backend, device):
    """The gradient of a sum is expanded: all its strides are 0."""
    gradients = []
    module = build(device, bidirectional=True)
    for candidate in (module, twin(module, backend)):
        input, hx = make_input(module)
        output, (h_n, c_n) = candidate(input, hx)
        (output.sum() + h_n.sum() + c_n.sum()).backward()
        gradients.append(
            {"input": input.grad, "h_0": hx[0].grad, **{n: p.grad for n, p in candidate.named_parameters()}}
        )
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}], ids=str)
def test_backward_twice(options, backend, device):
    module = build(device, **options)
    ours = twin(module, backend)
    input, hx = make_input(module)
    output, (h_n, c_n) = ours(input, hx)
    loss = (output * output).sum() + h_n.sum() + (c_n * c_n).sum()
    leaves = [input, *hx, *ours.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    output, (h_n, c_n) = module(input, hx)
    loss = (output * output).sum() + h_n.sum() + (c_n * c_n).sum()
    for actual, expected in zip(second, torch.autograd.grad(loss, [input, *hx, *module.parameters()]), strict=True):
        assert_same_float64(actual, expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_one_module_twice_in_a_graph(backend, device):
    module = build(device)
    gradients = []
    for candidate in (module, twin(module, backend)):
        input, hx = make_input(module)
        _, state = candidate(input, hx)
        output, _ = candidate(input.flip(0), state)
        gradients.append(torch.autograd.grad((output**2).sum(), [input, *hx, *candidate.parameters()]))
    for actual, expected in zip(*gradients[::-1], strict=True):
        assert_same_float64(actual, expected)


@pytest.mark.parametrize("lengths", [None, UNSORTED], ids=["full", "lengths"])
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"bidirectional": True}], ids=str)
def test_state_changed_in_place(options, lengths, backend, device):
    """h_n and c_n belong to the caller: what he writes there reaches neither output nor any gradient but their own."""
    module = twin(build(device, **options), backend)
    input, hx = make_input(module)
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    leaves = [input, *hx, *module.parameters()]
    output, (h_n, c_n) = module(input, hx, lengths=lengths)
    kept = output.detach().clone()
    expected = torch.autograd.grad((output**2).sum() + (3 * h_n).sum() + (5 * c_n).sum(), leaves)
    output, (h_n, c_n) = module(input, hx, lengths=lengths)
    h_n.mul_(3)
    c_n.mul_(5)
    assert torch.equal(output, kept)
    actual = torch.autograd.grad((output**2).sum() + h_n.sum() + c_n.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_layer_state_changed_in_place(backend, device):
    """The same for one layer as a function, whose results come from the operator as they are."""
    module = build(device)
    input, (h_0, c_0) = make_input(module)
    leaves = [input, h_0, c_0, *module.parameters()]

    def layer():
        output, (h_n, c_n) = fused_lstm.lstm_layer(input, (h_0[0], c_0[0]), *module.parameters(), backend=backend)
        return output, h_n, c_n

    output, h_n, c_n = layer()
    expected = torch.autograd.grad((output**2).sum() + (3 * h_n).sum() + (5 * c_n).sum(), leaves)
    output, h_n, c_n = layer()
    kept = output.detach().clone()
    h_n.mul_(3)
    c_n.mul_(5)
    assert torch.equal(output, kept)
    actual = torch.autograd.grad((output**2).sum() + h_n.sum() + c_n.sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("place", ["output", "input", "weight_hh_l0"])
def test_saved_tensor_changed_in_place(place, bidirectional, backend, device):
    """Autograd notices, as for torch's own operations: no wrong gradient comes out."""
    module = twin(build(device, bidirectional=bidirectional), backend)
    input, hx = make_input(module)
    output, _ = module(input, hx)
    with torch.no_grad():
        {"output": output, "input": input, **dict(module.named_parameters())}[place].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output**2).sum().backward()


def test_checkpointing(backend, device):
    module = twin(build(device, num_layers=2), backend)
    input, hx = make_input(module)
    leaves = [input, *hx, *module.parameters()]
    output, _ = module(input, hx)
    expected = torch.autograd.grad((output**2).sum(), leaves)
    output, _ = torch.utils.checkpoint.checkpoint(module, input, hx, use_reentrant=False)
    actual = torch.autograd.grad((output**2).sum(), leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_functional_gradient(backend, device):
    """torch.func.grad of a functional_call."""
    module = twin(build(device), backend)
    input, hx = make_input(module)

    def loss(parameters):
        output, _ = torch.func.functional_call(module, parameters, (input.detach(), (hx[0].detach(), hx[1].detach())))
        return (output**2).sum()

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    actual = torch.func.grad(loss)(parameters)
    output, _ = module(input, hx)
    expected = torch.autograd.grad((output**2).sum(), list(module.parameters()))
    for a, e in zip(actual.values(), expected, strict=True):
        assert_same_float64(a, e)
