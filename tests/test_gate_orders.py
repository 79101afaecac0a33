"""Weights of LSTMs whose gates lie in another order: loaded, they compute what they did at home, in NumPy float64."""

import itertools

import numpy as np
import pytest
import torch
from runs import randn
from tolerance import assert_same_float64

import fused_lstm
from fused_lstm.gate_orders import load_weights, reorder_gates

STEPS, ROWS, INPUT, HIDDEN, PROJ = 6, 3, 5, 4, 2
ORDERS = ["".join(order) for order in itertools.permutations("ifgo")]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numbers(*shape, seed):
    return randn(*shape, seed=seed).numpy()


def walk(gates_of, x, hidden_size=HIDDEN, project=None):
    """All steps (T, N, ·) from zeros: h_t of i, f, g, o = gates_of(x_t, h), each before its activation."""
    h = np.zeros((x.shape[1], hidden_size if project is None else project.shape[0]))
    c = np.zeros((x.shape[1], hidden_size))
    output = []
    for x_t in x:
        i, f, g, o = gates_of(x_t, h)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        h = h if project is None else h @ project.T
        output.append(h)
    return np.stack(output)


def keras(x):
    """x @ kernel + h @ recurrent_kernel + bias, split as i, f, c, o; the ones of unit_forget_bias are in the bias."""
    kernel, recurrent_kernel = numbers(INPUT, 4 * HIDDEN, seed=1), numbers(HIDDEN, 4 * HIDDEN, seed=2)
    bias = np.zeros(4 * HIDDEN)
    bias[HIDDEN : 2 * HIDDEN] = 1

    def gates(x, h):
        i, f, c, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        return i, f, c, o

    return [kernel, recurrent_kernel, bias], {"order": "ifgo", "transposed": True}, walk(gates, x)


def haste(x):
    """The same layout in the order i, g, f, o."""
    kernel, recurrent_kernel = numbers(INPUT, 4 * HIDDEN, seed=1), numbers(HIDDEN, 4 * HIDDEN, seed=2)
    bias = numbers(4 * HIDDEN, seed=3)

    def gates(x, h):
        i, g, f, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        return i, f, g, o

    return [kernel, recurrent_kernel, bias], {"order": "igfo", "transposed": True}, walk(gates, x)


def two_linears(x):
    """i2h and h2h, each with weight and bias of its own, cut as i, f, o, g."""
    i2h, h2h = numbers(4 * HIDDEN, INPUT, seed=1), numbers(4 * HIDDEN, HIDDEN, seed=2)
    b_i2h, b_h2h = numbers(4 * HIDDEN, seed=3), numbers(4 * HIDDEN, seed=4)

    def gates(x, h):
        i, f, o, g = np.split((x @ i2h.T + b_i2h) + (h @ h2h.T + b_h2h), 4, axis=1)
        return i, f, g, o

    return [i2h, h2h, b_i2h, b_h2h], {"order": "ifog"}, walk(gates, x)


def onnx(x):
    """W, R (4H, ·) and two biases, cut as i, o, f, c."""
    w, r = numbers(4 * HIDDEN, INPUT, seed=1), numbers(4 * HIDDEN, HIDDEN, seed=2)
    biases = numbers(8 * HIDDEN, seed=3)
    wb, rb = np.split(biases, 2)

    def gates(x, h):
        i, o, f, c = np.split(x @ w.T + h @ r.T + wb + rb, 4, axis=1)
        return i, f, c, o

    return [w, r, wb, rb], {"order": "iofg"}, walk(gates, x)


def without_bias(x):
    w, r = numbers(4 * HIDDEN, INPUT, seed=1), numbers(4 * HIDDEN, HIDDEN, seed=2)

    def gates(x, h):
        o, g, f, i = np.split(x @ w.T + h @ r.T, 4, axis=1)
        return i, f, g, o

    return [w, r], {"order": "ogfi"}, walk(gates, x)


def recurrent_bias_alone(x):
    arrays, options, output = haste(x)
    return [*arrays[:2], None, arrays[2]], options, output


def projected(x):
    """Transposed like all the rest: the projection is hidden @ (H, P)."""
    kernel, recurrent_kernel = numbers(INPUT, 4 * HIDDEN, seed=1), numbers(PROJ, 4 * HIDDEN, seed=2)
    bias, project = numbers(4 * HIDDEN, seed=3), numbers(HIDDEN, PROJ, seed=4)

    def gates(x, h):
        i, g, f, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        return i, f, g, o

    output = walk(gates, x, project=project.T)
    return [kernel, recurrent_kernel, bias, None, project], {"order": "igfo", "transposed": True}, output


LIBRARIES = [keras, haste, two_linears, onnx, without_bias, recurrent_bias_alone]


def make(module_type, *sizes, **options):
    """With weights that are all NaN: whatever is not loaded shows."""
    module = module_type(*sizes, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    return module


def assert_computes(module, x, expected) -> None:
    assert_same_float64(module(torch.from_numpy(x))[0].detach(), torch.from_numpy(expected))


@pytest.mark.parametrize("module_type", [torch.nn.LSTM, fused_lstm.LSTM])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_layer(library, module_type):
    x = numbers(STEPS, ROWS, INPUT, seed=9)
    arrays, options, expected = library(x)
    module = make(module_type, INPUT, HIDDEN)
    assert load_weights(module, *arrays, **options) is module
    assert_computes(module, x, expected)


@pytest.mark.parametrize("module_type", [torch.nn.LSTMCell, fused_lstm.LSTMCell])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_cell(library, module_type):
    x = numbers(STEPS, ROWS, INPUT, seed=9)
    arrays, options, expected = library(x)
    cell, state = load_weights(make(module_type, INPUT, HIDDEN), *arrays, **options), None
    for x_t, h_t in zip(torch.from_numpy(x), torch.from_numpy(expected), strict=True):
        state = cell(x_t, state)
        assert_same_float64(state[0].detach(), h_t)


def test_a_projection():
    x = numbers(STEPS, ROWS, INPUT, seed=9)
    arrays, options, expected = projected(x)
    assert_computes(load_weights(make(torch.nn.LSTM, INPUT, HIDDEN, proj_size=PROJ), *arrays, **options), x, expected)


def test_a_module_without_bias():
    x = numbers(STEPS, ROWS, INPUT, seed=9)
    arrays, options, expected = without_bias(x)
    assert_computes(load_weights(make(torch.nn.LSTM, INPUT, HIDDEN, bias=False), *arrays, **options), x, expected)


def test_layers_and_directions():
    """Two layers, both directions; the second layer's input is both outputs of the first, as everywhere."""
    x = numbers(STEPS, ROWS, INPUT, seed=9)
    module = make(torch.nn.LSTM, INPUT, HIDDEN, num_layers=2, bidirectional=True)
    expected = x
    for layer in range(2):
        outputs = []
        for reverse in (False, True):
            seed = 10 * layer + 5 * reverse
            w, r = numbers(4 * HIDDEN, expected.shape[2], seed=seed), numbers(4 * HIDDEN, HIDDEN, seed=seed + 1)
            load_weights(module, w, r, order="fogi", layer=layer, reverse=reverse)

            def gates(x, h, w=w, r=r):
                f, o, g, i = np.split(x @ w.T + h @ r.T, 4, axis=1)
                return i, f, g, o

            step = -1 if reverse else 1
            outputs.append(walk(gates, expected[::step])[::step])
        expected = np.concatenate(outputs, axis=2)
    assert_computes(module, x, expected)


def test_one_bias_is_the_inputs():
    module = make(torch.nn.LSTMCell, INPUT, HIDDEN)
    arrays, options, _ = haste(numbers(STEPS, ROWS, INPUT, seed=9))
    load_weights(module, *arrays, **options)
    i, g, f, o = np.split(arrays[2], 4)
    np.testing.assert_array_equal(module.bias_ih.detach().numpy(), np.concatenate([i, f, g, o]))
    assert module.bias_hh.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_cast_and_parameters_stay_themselves(dtype):
    module = torch.nn.LSTMCell(INPUT, HIDDEN, dtype=dtype)
    before = dict(module.named_parameters())
    arrays, options, _ = two_linears(numbers(STEPS, ROWS, INPUT, seed=9))
    load_weights(module, *arrays, **options)
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert module.weight_ih.equal(reorder_gates(torch.from_numpy(arrays[0]), "ifog").to(dtype))


@pytest.mark.parametrize(
    "given",
    [
        lambda array: torch.nn.Parameter(torch.from_numpy(array)),
        lambda array: array.tolist(),
        lambda array: np.broadcast_to(array, array.shape),  # which cannot be written to
        lambda array: np.ascontiguousarray(array.T).T,
        lambda array: array.astype(np.float32),
    ],
    ids=["parameter", "list", "read only", "strided", "float32"],
)
def test_what_weights_may_be(given):
    module = torch.nn.LSTMCell(INPUT, HIDDEN)
    arrays, options, _ = two_linears(numbers(STEPS, ROWS, INPUT, seed=9))
    load_weights(module, *map(given, arrays), **options)
    expected = [reorder_gates(torch.from_numpy(array).float(), "ifog") for array in arrays]
    for found, array in zip(module.parameters(), expected, strict=True):
        assert found.equal(array)


def test_a_modules_own_weights():
    module = torch.nn.LSTMCell(INPUT, HIDDEN)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    load_weights(module, *module.parameters(), order="gofi")
    for found, weight in zip(module.parameters(), before, strict=True):
        assert found.equal(reorder_gates(weight, "gofi"))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("order", ORDERS)
def test_reorder_gates(order, dim):
    """By name: the block that was called so is called so."""
    tensor = randn(12, 8)
    for to in ORDERS:
        found = reorder_gates(tensor, order, to, dim)
        assert found.shape == tensor.shape
        size = tensor.size(dim) // 4
        for gate in "ifgo":
            was = tensor.narrow(dim, size * order.index(gate), size)
            assert found.narrow(dim, size * to.index(gate), size).equal(was)
    assert reorder_gates(tensor, order, dim=dim).equal(reorder_gates(tensor, order, "ifgo", dim))


def test_reorder_gates_returns_a_new_tensor():
    tensor = torch.zeros(8)
    reorder_gates(tensor, "ifgo", "ifgo").fill_(1)
    assert tensor.eq(0).all()


def test_reorder_gates_is_differentiable():
    x = randn(8, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reorder_gates(x, "igfo", "ofgi") ** 2, x)


BAD_ORDERS = ["", "ifg", "ifgoi", "iifo", "ifco", "IFGO", ["i", "f", "g", "o"], None, 3]


@pytest.mark.parametrize("order", BAD_ORDERS, ids=repr)
def test_bad_orders(order):
    message = r"^Expected an order of the gates i, f, g, o, such as 'ifog', got "
    with pytest.raises(ValueError, match=message):
        reorder_gates(torch.ones(4), order)
    with pytest.raises(ValueError, match=message):
        reorder_gates(torch.ones(4), "ifgo", order)
    with pytest.raises(ValueError, match=message):
        load_weights(torch.nn.LSTMCell(1, 1), torch.ones(4, 1), torch.ones(4, 1), order=order)


@pytest.mark.parametrize(
    ("shape", "dim", "message"),
    [
        ((6, 4), 0, "^Expected a size divisible by 4 along dim 0, got 6$"),
        ((4, 6), -1, "^Expected a size divisible by 4 along dim -1, got 6$"),
        ((4, 4), 2, "^Expected a tensor that has dim 2, got a 2D one$"),
        ((4, 4), -3, "^Expected a tensor that has dim -3, got a 2D one$"),
        ((), 0, "^Expected a tensor that has dim 0, got a 0D one$"),
    ],
)
def test_reorder_gates_refuses(shape, dim, message):
    with pytest.raises(ValueError, match=message):
        reorder_gates(torch.ones(shape), "ifog", dim=dim)


W_IH, W_HH, BIAS, W_HR = (numbers(*shape, seed=0) for shape in ((16, 5), (16, 4), (16,), (2, 4)))
GOOD = {"weight_ih": W_IH, "weight_hh": W_HH, "bias_ih": BIAS, "bias_hh": BIAS, "order": "ifog"}
BAD_CALLS = {
    "weight_ih transposed": ({}, {"weight_ih": W_IH.T}, "Expected weight_ih of shape (16, 5), got (5, 16)"),
    "all but one transposed": ({}, {"transposed": True}, "Expected weight_ih of shape (5, 16), got (16, 5)"),
    "weight_hh": ({}, {"weight_hh": W_IH}, "Expected weight_hh of shape (16, 4), got (16, 5)"),
    "bias_ih": ({}, {"bias_ih": BIAS[:4]}, "Expected bias_ih of shape (16,), got (4,)"),
    "bias_hh that broadcasts": ({}, {"bias_hh": BIAS[:1]}, "Expected bias_hh of shape (16,), got (1,)"),
    "no weight": ({}, {"weight_hh": None}, "Expected weight_hh of shape (16, 4), got None"),
    "a bias too many": ({"bias": False}, {"bias_hh": None}, "LSTM.bias_ih_l0 is missing"),
    "a projection too many": ({}, {"weight_hr": W_HR}, "LSTM.weight_hr_l0 is missing"),
    "a projection too few": (
        {"proj_size": 2},
        {"weight_hh": W_HH[:, :2]},
        "Expected weight_hr of shape (2, 4), got None",
    ),
    "layer": ({"num_layers": 2}, {"layer": 2}, "Expected layer to be in [0, 2), got 2"),
    "negative layer": ({}, {"layer": -1}, "Expected layer to be in [0, 1), got -1"),
    "reverse": ({}, {"reverse": True}, "Expected a bidirectional LSTM for reverse=True"),
}


@pytest.mark.parametrize(("options", "bad", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_change_nothing(options, bad, message):
    module = torch.nn.LSTM(INPUT, HIDDEN, dtype=torch.float64, **options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 the whole message is compared
        load_weights(module, **{**GOOD, **bad})
    assert str(raised.value) == message
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "values", [np.ones((16, 4), dtype=int), np.ones((16, 4), dtype=complex)], ids=["int", "complex"]
)
def test_other_numbers_are_refused(values):
    with pytest.raises(TypeError, match=r"^Expected weight_hh of a floating dtype, got torch\.(int64|complex128)$"):
        load_weights(torch.nn.LSTMCell(INPUT, HIDDEN), **{**GOOD, "weight_hh": values})


@pytest.mark.parametrize("other", [{"layer": 1}, {"reverse": True}], ids=str)
def test_a_cell_is_one_layer(other):
    with pytest.raises(ValueError, match=r"^Expected layer 0 and no reverse for a cell, got layer "):
        load_weights(torch.nn.LSTMCell(INPUT, HIDDEN), **GOOD, **other)


@pytest.mark.parametrize("module", [torch.nn.GRU(INPUT, HIDDEN), torch.nn.GRUCell(INPUT, HIDDEN), None], ids=repr)
def test_only_lstms(module):
    message = f"^module should be a torch.nn.LSTM or torch.nn.LSTMCell, got: {type(module).__name__}$"
    with pytest.raises(TypeError, match=message):
        load_weights(module, **GOOD)


def test_a_computed_weight_is_not_copied_into():
    """The copy would be lost at the next forward."""
    module = torch.nn.LSTM(INPUT, HIDDEN)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    before = module.weight_ih_l0.detach().clone()
    with pytest.raises(ValueError, match=r"LSTM\.weight_hh_l0 is computed, not a parameter to be copied into$"):
        load_weights(module, **GOOD)
    assert module.weight_ih_l0.equal(before)
