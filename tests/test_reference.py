"""reference.py, the definition that all kernels are held to, against the NumPy oracle; and against itself, derived."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from tolerance import assert_same_float64

from fused_lstm import lstm_layer, recurrence, reference, reference_recurrence
from fused_lstm.reference import Parameters

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# steps, rows, input features, units, projected features or None
SIZES = [(1, 1, 1, 1, None), (2, 3, 4, 17, None), (5, 3, 2, 6, None), (1, 3, 2, 5, 3), (5, 2, 3, 17, 4)]
BIASES = [(True, True), (True, False), (False, True), (False, False)]
BIAS_IDS = ["two_biases", "bias_ih", "bias_hh", "no_bias"]


def random_case(sizes, biases=(True, True)):
    """weights, [x, h0, c0], [d_output, d_h_n, d_c_n]; in NumPy."""
    steps, rows, input_size, hidden_size, proj_size = sizes
    output_size = proj_size or hidden_size
    generator = np.random.default_rng(0)
    shapes = [
        (4 * hidden_size, input_size),
        (4 * hidden_size, output_size),
        *((4 * hidden_size,) if there else None for there in biases),
        (proj_size, hidden_size) if proj_size else None,
    ]
    weights = oracle.Weights(*(None if shape is None else generator.standard_normal(shape) for shape in shapes))
    shapes = [(steps, rows, input_size), (rows, output_size), (rows, hidden_size)]
    inputs = [generator.standard_normal(shape) for shape in shapes]
    d_results = [generator.standard_normal((steps, rows, output_size))]
    d_results += [generator.standard_normal(shape) for shape in shapes[1:]]
    return weights, inputs, d_results


def row_lengths(sizes) -> list[int]:
    steps, rows = sizes[:2]
    return [1 + (3 * row + steps // 2) % steps for row in range(rows)]


def tensors(arrays, device, requires_grad=False):
    return [None if a is None else torch.tensor(a, device=device, requires_grad=requires_grad) for a in arrays]


def assert_same(actual, expected) -> None:
    """Tensors against NumPy arrays."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_same_float64(a.detach().cpu(), torch.from_numpy(np.ascontiguousarray(e)))


@pytest.mark.parametrize("biases", BIASES, ids=BIAS_IDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lstm_cell(sizes, biases, device):
    weights, (x, h0, c0), _ = random_case(sizes, biases)
    rows = [oracle.cell(*row, weights) for row in zip(x[0], h0, c0, strict=True)]
    parameters = Parameters(*tensors(weights, device))
    actual = reference.lstm_cell(*tensors((x[0],), device), tensors((h0, c0), device), parameters)
    assert_same(actual, ([row.h for row in rows], [row.c for row in rows]))


@pytest.mark.parametrize("biases", BIASES, ids=BIAS_IDS)
@pytest.mark.parametrize("mode", ["forward", "reverse", "lengths"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lstm_layer(sizes, mode, biases, device):
    weights, inputs, d_results = random_case(sizes, biases)
    lengths, reverse = row_lengths(sizes) if mode == "lengths" else None, mode == "reverse"
    expected = oracle.layer(*inputs, weights, lengths, reverse)
    if lengths is not None:  # what lies past an end is the caller's to discard
        d_results[0] = d_results[0] * (np.arange(sizes[0])[:, None] < lengths)[:, :, None]
    d_expected = oracle.layer_backward(expected, weights, *d_results, lengths, reverse)

    leaves = tensors((*inputs, *weights), device, requires_grad=True)
    ends = None if lengths is None else torch.tensor(lengths, device=device)
    output, h_n, c_n, c_all = reference.lstm_layer(*leaves[:3], Parameters(*leaves[3:]), lengths=ends, reverse=reverse)
    loss = sum((d * r).sum() for d, r in zip(tensors(d_results, device), (output, h_n, c_n), strict=True))
    gradients = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))
    d_leaves = [None if leaf is None else next(gradients) for leaf in leaves]

    if lengths is not None:
        output = output * (torch.arange(sizes[0], device=device)[:, None] < ends)[:, :, None]
    assert_same((output, h_n, c_n), expected[:3])
    if lengths is None:
        assert_same((c_all,), (stacked(expected, "c"),))
    assert_same(d_leaves, (*d_expected[:3], *d_expected.weights))


def stacked(forward: oracle.Forward, name: str) -> np.ndarray:
    """One vector of each step, (T, N, ·)."""
    return np.stack([[getattr(step, name) for step in row] for row in forward.steps], axis=1)


def walk_of(gates, h0, c0, weight_hh, weight_hr=None, reverse=False, save=True):
    """One direction's walk, from what stands in its buffers without the dimension of directions."""
    parameters = Parameters(weight_ih=gates, weight_hh=weight_hh, weight_hr=weight_hr)
    output = gates.new_empty(*gates.shape[:2], 1, h0.size(1))
    rest = (parameters,), (reference.NOTHING,), None, (reverse,), save
    return recurrence.new_walk(gates[None], output, h0[None], c0[None], *rest)


@pytest.mark.parametrize("save", [True, False], ids=["save", "no_save"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_recurrence_forward(sizes, reverse, save, device):
    weights, (x, h0, c0), _ = random_case(sizes)
    expected = oracle.layer(x, h0, c0, weights, reverse=reverse)
    gates = x @ weights.ih.T + weights.b_ih + weights.b_hh
    walk = walk_of(*tensors((gates, h0, c0, weights.hh, weights.hr), device), reverse, save)
    reference_recurrence.recurrence_forward(walk)
    assert_same((walk.output[:, :, 0],), (expected.output,))
    if not save:
        assert_same((walk.c[0],), (expected.c_n[None],))
        return
    states = [c0[None], stacked(expected, "c")]
    assert_same((walk.c[0],), (np.concatenate(states[:: -1 if reverse else 1]),))
    assert_same((walk.gates[0],), (np.concatenate([stacked(expected, gate) for gate in "ifgo"], axis=2),))


@pytest.mark.parametrize("subset", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_recurrence_backward(sizes, reverse, subset, device):
    """subset: which of d_output, d_h_n and d_c_n there are; the others are None, which stands for zeros."""
    weights, (x, h0, c0), d_results = random_case(sizes)
    walked = oracle.layer(x, h0, c0, weights, reverse=reverse)
    d_there = [d * there for d, there in zip(d_results, subset, strict=True)]
    expected = oracle.layer_backward(walked, weights, *d_there, reverse=reverse)

    gates = x @ weights.ih.T + weights.b_ih + weights.b_hh
    walk = walk_of(*tensors((gates, h0, c0, weights.hh, weights.hr), device), reverse)
    reference_recurrence.recurrence_forward(walk)
    d_output, d_h_n, d_c_n = (d if there else None for d, there in zip(tensors(d_results, device), subset, strict=True))
    d_h_n, d_c_n = (None if d is None else d[None] for d in (d_h_n, d_c_n))
    d_output = None if d_output is None else d_output[:, :, None]
    gradients = recurrence.new_gradients(walk, d_output, None, d_h_n, d_c_n, False)
    reference_recurrence.recurrence_backward(walk, gradients)
    found = (gradients.d_gates[0], gradients.d_h[0], gradients.d_c[0])
    assert_same(found, (expected.gates, expected.h0, expected.c0))
    if weights.hr is None:
        assert gradients.d_projected is gradients.hidden is None
    else:  # the caller's product over both is the gradient of weight_hr
        product = torch.einsum("dtnp,dtnh->ph", gradients.d_projected, gradients.hidden)
        assert_same((product,), (expected.weights.hr,))
        assert_same((gradients.hidden[0],), (stacked(walked, "hidden"),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cell_state_is_float32(dtype, device):
    """c is carried in float32 from step to step, and rounded to the input's dtype once, at the end."""
    gates = torch.full((300, 1, 4), -30.0, dtype=dtype, device=device)  # i and o are 0
    gates[:, :, 1] = 8.0  # f is 0.99966, which bfloat16 and float16 round to 1
    h0, c0 = torch.zeros(1, 1, dtype=dtype, device=device), torch.ones(1, 1, dtype=dtype, device=device)
    walk = walk_of(gates, h0, c0, torch.zeros(4, 1, dtype=dtype, device=device))
    reference_recurrence.recurrence_forward(walk)
    exact = torch.sigmoid(torch.tensor(8.0, dtype=torch.float64)) ** 300
    assert walk.c.dtype == torch.float32
    torch.testing.assert_close(walk.c[0, -1].double().cpu().squeeze(), exact, rtol=1e-5, atol=0)


DERIVED = {
    "plain": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": [3, 1]},
    "reverse_lengths": {"reverse": True, "lengths": [3, 1]},
    "projection": {"sizes": (3, 2, 2, 3, 2)},
    "projection_lengths": {"sizes": (3, 2, 2, 3, 2), "lengths": [2, 3]},
    "no_bias": {"biases": (False, False)},
    "bias_ih": {"biases": (True, False)},
    "bias_hh": {"biases": (False, True)},
}


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("case", DERIVED.values(), ids=DERIVED.keys())
def test_derivatives(case, check, device):
    """The hand-written backward against finite differences, and its derivative likewise."""
    case = dict(case)
    weights, inputs, _ = random_case(case.pop("sizes", (3, 2, 2, 3, None)), case.pop("biases", (True, True)))
    leaves = tensors((*inputs, *weights), device, requires_grad=True)
    there = [leaf is not None for leaf in leaves]
    if "lengths" in case:
        case["lengths"] = torch.tensor(case["lengths"], device=device)

    def layer(*given):
        given = iter(given)
        x, h0, c0, *rest = (next(given) if t else None for t in there)
        output, (h_n, c_n) = lstm_layer(x, (h0, c0), *rest, **case, backend="reference")
        return output, h_n, c_n

    assert check(layer, [leaf for leaf in leaves if leaf is not None])
