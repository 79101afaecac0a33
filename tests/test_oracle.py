"""The oracle and the tolerances themselves: what everything else is measured with."""

import numpy as np
import oracle
import pytest
import torch
from tolerance import assert_as_accurate, assert_same_float64

STEPS, ROWS, INPUT, HIDDEN, PROJECTED = 4, 3, 5, 6, 2
LENGTHS = [2, 4, 1]
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def random_case(bias: bool, projection: bool):
    """weights, [x, h0, c0], [d_output, d_h_n, d_c_n]."""
    generator = np.random.default_rng(0)
    size = PROJECTED if projection else HIDDEN
    shapes = [(4 * HIDDEN, INPUT), (4 * HIDDEN, size)]
    shapes += [(4 * HIDDEN,), (4 * HIDDEN,)] if bias else [None, None]
    shapes += [(PROJECTED, HIDDEN) if projection else None]
    weights = oracle.Weights(*(None if shape is None else generator.standard_normal(shape) for shape in shapes))
    inputs = [generator.standard_normal(shape) for shape in ((STEPS, ROWS, INPUT), (ROWS, size), (ROWS, HIDDEN))]
    d_results = [generator.standard_normal(shape) for shape in ((STEPS, ROWS, size), (ROWS, size), (ROWS, HIDDEN))]
    return weights, inputs, d_results


def test_cell_with_zero_weights_halves_c():
    weights = oracle.Weights(np.zeros((4 * HIDDEN, INPUT)), np.zeros((4 * HIDDEN, HIDDEN)))
    c = np.arange(HIDDEN, dtype=float)
    step = oracle.cell(np.ones(INPUT), np.ones(HIDDEN), c, weights)
    np.testing.assert_array_equal(step.c, c / 2)
    np.testing.assert_allclose(step.h, np.tanh(c / 2) / 2, rtol=1e-15)


def test_cell_gate_order():
    """With one gate's bias far from zero at a time, each gate does its own part, in the order i, f, g, o."""
    c = np.full(HIDDEN, 0.25)

    def run(gate: int) -> oracle.Step:
        bias = np.zeros(4 * HIDDEN)
        bias[gate * HIDDEN : (gate + 1) * HIDDEN] = 100.0
        bias[2 * HIDDEN : 3 * HIDDEN] += 1.0  # g must not be 0, or i would not show
        weights = oracle.Weights(np.zeros((4 * HIDDEN, INPUT)), np.zeros((4 * HIDDEN, HIDDEN)), bias)
        return oracle.cell(np.zeros(INPUT), np.zeros(HIDDEN), c, weights)

    np.testing.assert_allclose(run(0).c, 0.5 * c + np.tanh(1.0))
    np.testing.assert_allclose(run(1).c, c + 0.5 * np.tanh(1.0))
    np.testing.assert_allclose(run(2).c, 0.5 * c + 0.5)
    np.testing.assert_allclose(run(3).h, np.tanh(0.5 * c + 0.5 * np.tanh(1.0)))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_gradients_are_finite_differences(projection, reverse, lengths):
    weights, inputs, d_results = random_case(True, projection)

    def forward() -> oracle.Forward:
        return oracle.layer(*inputs, weights, lengths, reverse)

    def loss() -> float:
        return sum(np.vdot(d, result) for d, result in zip(d_results, forward()[:3], strict=True))

    gradients = oracle.layer_backward(forward(), weights, *d_results, lengths, reverse)
    generator = np.random.default_rng(1)
    for values, gradient in zip((*inputs, *weights), (*gradients[:3], *gradients.weights), strict=True):
        if values is None:
            assert gradient is None
            continue
        direction, kept, step = generator.standard_normal(values.shape), values.copy(), 1e-5
        values[...] = kept + step * direction
        above = loss()
        values[...] = kept - step * direction
        below = loss()
        values[...] = kept
        np.testing.assert_allclose((above - below) / (2 * step), np.vdot(gradient, direction), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_agrees_with_torch(projection, bias):
    """Both directions of torch.nn.LSTM on packed rows, forward and backward."""
    weights, inputs, d_results = random_case(bias, projection)
    size = PROJECTED if projection else 0
    module = torch.nn.LSTM(INPUT, HIDDEN, bias=bias, proj_size=size, bidirectional=True, dtype=torch.float64)
    there = {name: weight for name, weight in zip(NAMES, weights, strict=True) if weight is not None}
    with torch.no_grad():
        for suffix in ("_l0", "_l0_reverse"):
            for name, weight in there.items():
                getattr(module, name + suffix).copy_(torch.from_numpy(weight))
    x, h0, c0 = (torch.from_numpy(value).requires_grad_() for value in inputs)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False)
    output, (h_n, c_n) = module(packed, (h0.expand(2, -1, -1), c0.expand(2, -1, -1)))
    output = torch.nn.utils.rnn.pad_packed_sequence(output)[0].chunk(2, dim=2)
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        reverse = direction == 1
        expected = oracle.layer(*inputs, weights, LENGTHS, reverse)
        results = (output[direction], h_n[direction], c_n[direction])
        loss = sum((torch.from_numpy(d) * result).sum() for d, result in zip(d_results, results, strict=True))
        leaves = [x, h0, c0, *(getattr(module, name + suffix) for name in there)]
        d_leaves = torch.autograd.grad(loss, leaves, retain_graph=True)
        d_expected = oracle.layer_backward(expected, weights, *d_results, LENGTHS, reverse)
        d_weights = [d for d in d_expected.weights if d is not None]
        for actual, exact in zip((*results, *d_leaves), (*expected[:3], *d_expected[:3], *d_weights), strict=True):
            assert_same_float64(actual.detach(), torch.from_numpy(exact))


@pytest.mark.parametrize("check", [assert_as_accurate, assert_same_float64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.0 + 1e-12])
def test_tolerance_fails(check, wrong):
    good = torch.ones(3, dtype=torch.float64)
    bad = torch.tensor([1.0, wrong, 1.0], dtype=torch.float64)
    expected = (good, good) if check is assert_as_accurate else (good,)
    check(good, *expected)
    with pytest.raises(AssertionError):
        check(bad, *expected)


def test_tolerance_is_twice_the_error_of_torch():
    exact = torch.ones(3, dtype=torch.float64)
    same_dtype = torch.full((3,), 1.125, dtype=torch.bfloat16)
    assert_as_accurate(torch.full((3,), 1.25, dtype=torch.bfloat16), same_dtype, exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(torch.full((3,), 1.265625, dtype=torch.bfloat16), same_dtype, exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(same_dtype, torch.full_like(same_dtype, float("nan")), exact)
