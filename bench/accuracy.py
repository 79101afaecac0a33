"""The accuracy gate: no speed-up is reported beside a result that is less accurate than torch's own."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Gate:
    """Holds results to the exact ones by the errors that torch makes in the same dtype.

    A result passes where its largest error is at most twice torch's plus one eps of the dtype times the largest exact
    value: the first for the rounding that any order of summation has, the second for where torch happens to be exact.

    Args:
        exact: results in float64, by name
        same_dtype: torch.nn.LSTM's results in the dtype that is tested
    """

    def __init__(self, exact: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor]) -> None:
        self._exact = exact
        self._limits = {}
        for name, values in exact.items():
            largest = values.abs().max().item()
            torch_error = _error(same_dtype[name], values)
            eps = torch.finfo(same_dtype[name].dtype).eps
            self._limits[name] = {
                "torch_error": torch_error,
                "largest": largest,
                "allowed": 2 * torch_error + eps * largest,
            }

    def check(self, results: Mapping[str, Tensor]) -> dict:
        """Whether results pass, and the numbers that say so.

        Returns:
            JSON-ready: `passed`, and by name in `quantities`: `passed`, `error` (the largest), `torch_error`, `largest`
            (exact value) and `allowed` (the largest error that passes). A number that is not finite is null.
        """
        quantities = {}
        for name, limits in self._limits.items():
            numbers = {"error": _error(results[name], self._exact[name]), **limits}
            finite = all(map(math.isfinite, numbers.values()))
            quantities[name] = {
                "passed": finite and numbers["error"] <= numbers["allowed"],
                **{key: number if math.isfinite(number) else None for key, number in numbers.items()},
            }
        return {"passed": all(entry["passed"] for entry in quantities.values()), "quantities": quantities}


def failed_check(accuracy: dict) -> str:
    """Of a failed check, the quantity that is furthest over what is allowed, with its numbers."""

    def excess(entry: dict) -> float:
        if entry["error"] is None or entry["allowed"] is None:
            return math.inf
        return entry["error"] / entry["allowed"] if entry["allowed"] else math.inf

    failed = {name: entry for name, entry in accuracy["quantities"].items() if not entry["passed"]}
    name = max(failed, key=lambda name: excess(failed[name]))
    numbers = {
        key: "not finite" if failed[name][key] is None else f"{failed[name][key]:.2e}"
        for key in ("error", "allowed", "torch_error")
    }
    return f"{name}: error {numbers['error']}, allowed {numbers['allowed']}, torch's own {numbers['torch_error']}"


def _error(actual: Tensor, exact: Tensor) -> float:
    # max propagates NaN, so one unwritten element is enough to fail
    return (actual.detach().to(exact.device, torch.float64) - exact).abs().max().item()
