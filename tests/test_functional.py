"""lstm_layer and lstm_cell: one layer and one step as functions of their weights."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from runs import randn
from tolerance import assert_same_float64

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

STEPS, ROWS, INPUT, HIDDEN, PROJECTED = 4, 3, 2, 5, 2
LENGTHS = [2, 4, 1]
BACKENDS = pytest.mark.parametrize("backend", ["auto", "torch", "reference", "stepwise"])
MODES = ["forward", "reverse", "lengths", "reverse_lengths"]
BIASES = pytest.mark.parametrize("biases", ["", "ih", "hh", "ih hh"])


def make_weights(biases, projection, device) -> dict[str, torch.Tensor]:
    size = PROJECTED if projection else HIDDEN
    shapes = {"weight_ih": (4 * HIDDEN, INPUT), "weight_hh": (4 * HIDDEN, size)}
    shapes.update({f"bias_{name}": (4 * HIDDEN,) for name in biases.split()})
    if projection:
        shapes["weight_hr"] = (PROJECTED, HIDDEN)
    weights = enumerate(shapes.items())
    return {name: randn(*shape, seed=seed, device=device, requires_grad=True) for seed, (name, shape) in weights}


def make_input(projection, device):
    """input, h_0, c_0"""
    shapes = (STEPS, ROWS, INPUT), (ROWS, PROJECTED if projection else HIDDEN), (ROWS, HIDDEN)
    return [randn(*shape, seed=10 + i, device=device, requires_grad=True) for i, shape in enumerate(shapes)]


def as_numpy(tensor) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().cpu().numpy()


@BIASES
@pytest.mark.parametrize(
    ("backend", "mode"),
    [("torch", "forward"), ("torch", "reverse"), *itertools.product(["auto", "reference", "stepwise"], MODES)],
)
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_layer(projection, mode, biases, backend, device):
    """Forward and every gradient against the oracle."""
    lengths, reverse = LENGTHS if "lengths" in mode else None, "reverse" in mode
    weights, (input, h_0, c_0) = make_weights(biases, projection, device), make_input(projection, device)
    given = {} if lengths is None else {"lengths": torch.tensor(lengths, device=device)}
    output, (h_n, c_n) = fused_lstm.lstm_layer(input, (h_0, c_0), **weights, reverse=reverse, **given, backend=backend)
    results = (output, h_n, c_n)
    d_results = [randn(*result.shape, seed=20 + i, device=device) for i, result in enumerate(results)]
    leaves = [input, h_0, c_0, *weights.values()]
    gradients = torch.autograd.grad(results, leaves, d_results)

    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    in_numpy = oracle.Weights(*(as_numpy(weights.get(name)) for name in names))
    expected = oracle.layer(*map(as_numpy, (input, h_0, c_0)), in_numpy, lengths, reverse)
    d_expected = oracle.layer_backward(expected, in_numpy, *map(as_numpy, d_results), lengths, reverse)
    d_weights = dict(zip(names, d_expected.weights, strict=True))
    exact = (*expected[:3], *d_expected[:3], *(d_weights[name] for name in weights))
    for actual, value in zip((*results, *gradients), exact, strict=True):
        assert_same_float64(actual.detach().cpu(), torch.from_numpy(value))


@BACKENDS
@BIASES
def test_cell(biases, backend, device):
    """As torch.lstm_cell, and with one bias alone as with the other one zero."""
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    weights = {names[name]: value for name, value in make_weights(biases, False, device).items()}
    input, h, c = make_input(False, device)
    found = []
    for function, options in ((fused_lstm.lstm_cell, {"backend": backend}), (torch.lstm_cell, {})):
        given = dict(weights)
        if function is torch.lstm_cell and len(biases.split()) == 1:
            for name in ("b_ih", "b_hh"):
                given.setdefault(name, torch.zeros(4 * HIDDEN, dtype=torch.float64, device=device))
        results = function(input[0], (h, c), **given, **options)
        loss = sum((randn(*r.shape, seed=20 + i, device=device) * r).sum() for i, r in enumerate(results))
        found.append([*results, *torch.autograd.grad(loss, [input, h, c, *weights.values()])])
    for actual, expected in zip(*found, strict=True):
        assert_same_float64(actual.detach(), expected.detach())


@BACKENDS
def test_layer_is_a_layer_of_the_module(backend, device):
    """The weights of a module, by position, in torch's order."""
    module = torch.nn.LSTM(INPUT, HIDDEN, proj_size=PROJECTED, device=device, dtype=torch.float64)
    input, h_0, c_0 = make_input(True, device)
    output, (h_n, c_n) = fused_lstm.lstm_layer(input, (h_0, c_0), *module.parameters(), backend=backend)
    expected, (h_e, c_e) = module(input, (h_0[None], c_0[None]))
    for actual, value in ((output, expected), (h_n[None], h_e), (c_n[None], c_e)):
        assert_same_float64(actual.detach(), value.detach())


@BACKENDS
def test_autocast(backend, device):
    """float32 arguments of a layer are cast as the module's are."""
    module = torch.nn.LSTM(INPUT, HIDDEN, device=device)
    input, h_0, c_0 = (value.detach().float() for value in make_input(False, device))
    with torch.autocast(device, dtype=torch.bfloat16):
        output, (h_n, c_n) = fused_lstm.lstm_layer(input, (h_0, c_0), *module.parameters(), backend=backend)
        expected, _ = module(input, (h_0[None], c_0[None]))
    assert output.dtype == h_n.dtype == c_n.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0, atol=2**-7)  # two units in the last place of 1
