"""The accuracy gate: what passes, what fails, and the numbers it says."""

import json
import math

import pytest
import torch

from fused_lstm.bench.accuracy import Gate, failed_check

EPS = torch.finfo(torch.float32).eps


def gate(torch_error=0.25):
    """Exact values up to 4, and torch's own with an error of torch_error in one element."""
    exact = {"output": torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)}
    return Gate(exact, {"output": torch.tensor([1.0 + torch_error, -4.0, 2.0])})


def check(gate, values):
    return gate.check({"output": torch.tensor(values)})


def test_numbers():
    accuracy = check(gate(), [1.0, -4.0, 2.5])
    assert accuracy == {
        "passed": True,
        "quantities": {
            "output": {
                "passed": True,
                "error": 0.5,
                "torch_error": 0.25,
                "largest": 4.0,
                "allowed": 0.5 + 4 * EPS,
            }
        },
    }


@pytest.mark.parametrize(
    ("torch_error", "values", "passed"),
    [
        (0.25, [1.0, -4.0, 2.5], True),  # twice torch's error
        (0.25, [1.0, -4.0, 2.5 + 16 * EPS], False),
        (0.0, [1.0, -4.0 + 4 * EPS, 2.0], True),  # one eps of the largest value
        (0.0, [1.0, -4.0 + 8 * EPS, 2.0], False),
        (0.25, [1.0, -4.0, math.nan], False),
        (0.25, [1.0, -4.0, math.inf], False),
        (math.nan, [1.0, -4.0, 2.0], False),  # torch itself is no measure then
    ],
)
def test_limits(torch_error, values, passed):
    accuracy = check(gate(torch_error), values)
    assert accuracy["passed"] is passed
    json.dumps(accuracy, allow_nan=False)


def test_eps_is_that_of_the_dtype():
    exact = {"h_n": torch.tensor([1.0, 0.5], dtype=torch.float64)}
    half = Gate(exact, {"h_n": torch.tensor([1.0, 0.5], dtype=torch.bfloat16)})
    assert half.check({"h_n": torch.tensor([1.0, 0.5])})["quantities"]["h_n"]["allowed"] == 2**-7


def test_every_quantity_must_pass():
    exact = {name: torch.ones(2, dtype=torch.float64) for name in ("output", "gradient of input")}
    same = {name: torch.ones(2) for name in exact}
    accuracy = Gate(exact, same).check(same | {"gradient of input": torch.tensor([1.0, 1.5])})
    assert accuracy["quantities"]["output"]["passed"]
    assert not accuracy["quantities"]["gradient of input"]["passed"]
    assert not accuracy["passed"]
    assert failed_check(accuracy) == "gradient of input: error 5.00e-01, allowed 1.19e-07, torch's own 0.00e+00"


def test_the_worst_is_told_and_not_finite_is_the_worst():
    exact = {name: torch.ones(1, dtype=torch.float64) for name in ("output", "h_n", "c_n")}
    same = {name: torch.ones(1) for name in exact}
    results = {"output": torch.tensor([2.0]), "h_n": torch.tensor([3.0]), "c_n": torch.ones(1)}
    assert failed_check(Gate(exact, same).check(results)).startswith("h_n: error 2.00e+00")
    results["c_n"] = torch.tensor([math.nan])
    assert failed_check(Gate(exact, same).check(results)).startswith("c_n: error not finite, allowed 1.19e-07")
