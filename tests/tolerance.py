"""How near is near enough: to the error that torch itself makes, never to a fixed large number."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """|actual - exact| <= 2 * max|same_dtype - exact| + eps(dtype) * max|exact|, elementwise; NaN fails.

    Args:
        actual: what is tested, in the dtype whose eps counts
        same_dtype: torch's result in that dtype
        exact: the result in float64, from the same inputs
    """
    assert actual.shape == same_dtype.shape == exact.shape
    assert actual.dtype == same_dtype.dtype
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (same_dtype.double() - exact).abs().max().item() + torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed < float("inf"), f"error {error:.3e}, allowed {allowed:.3e}"


def assert_same_float64(actual: Tensor, expected: Tensor) -> None:
    """Two ways to compute the same in float64: |actual - expected| <= 1e-13 * max(1, max|expected|); NaN fails."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float64
    if expected.numel() == 0:
        return
    error = (actual - expected).abs().max().item()
    allowed = 1e-13 * max(1.0, expected.abs().max().item())
    assert error <= allowed < float("inf"), f"error {error:.3e}, allowed {allowed:.3e}"
