"""Which backend runs a case, and why."""

import os
from typing import NamedTuple

import torch

BACKENDS = ("stepwise", "torch", "reference")
ENVIRONMENT_VARIABLE = "FUSED_LSTM_BACKEND"

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class BackendChoice(NamedTuple):
    """name: one of `BACKENDS`; reason: why, in words for a person."""

    name: str
    reason: str


def check_backend_name(backend: str, source: str = "backend") -> None:
    """ValueError unless backend is "auto" or one of `BACKENDS`; source names where it came from."""
    if backend not in ("auto", *BACKENDS):
        expected = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"{source} should be one of {expected}, got {backend!r}")


def select_backend(
    backend: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    hidden_size: int,
    batch_size: int,
    lengths: bool = False,
    compiling: bool = False,
) -> BackendChoice:
    """The backend that a layer would run on.

    An argument other than "auto" decides; else the environment variable FUSED_LSTM_BACKEND, if it is set; else a rule.

    Args:
        backend: "auto" or one of `BACKENDS`
        device, dtype: of the input (under autocast, the dtype it casts to)
        hidden_size: H, units of the layer
        batch_size: N, rows of the batch
        lengths: is there a length a row?
        compiling: under torch.compile?

    Raises:
        ValueError: the name is unknown, or the backend that was asked for cannot run the case; it says why
    """
    check_backend_name(backend)
    device = torch.device(device)
    source = "asked for by backend="
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        check_backend_name(backend, ENVIRONMENT_VARIABLE)
        source = f"asked for by {ENVIRONMENT_VARIABLE}"
    if backend != "auto":
        obstacle = _obstacle(backend, device, dtype, lengths, compiling)
        if obstacle is not None:
            raise ValueError(f"backend {backend!r} cannot run this: {obstacle}")
        return BackendChoice(backend, source)
    return _automatic(device, dtype, hidden_size, batch_size, lengths, compiling)


def _automatic(
    device: torch.device, dtype: torch.dtype, hidden_size: int, batch_size: int, lengths: bool, compiling: bool
) -> BackendChoice:
    no_torch = _obstacle("torch", device, dtype, lengths, compiling)
    if no_torch is None:
        if device.type == "cuda":
            return BackendChoice(
                "torch",
                f"cuDNN: no measurement yet says that ours is faster for H={hidden_size}, N={batch_size} in {dtype}",
            )
        return BackendChoice("torch", f"torch's own kernels, on {device.type}")
    if _obstacle("stepwise", device, dtype, lengths, compiling) is None and device.type == "cuda":
        return BackendChoice("stepwise", f"torch's own cannot: {no_torch}")
    return BackendChoice("reference", f"torch's own cannot: {no_torch}; Triton's kernels need a CUDA device")


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, lengths: bool, compiling: bool) -> str | None:
    """Why backend cannot run the case, or None if it can."""
    if backend == "torch":
        if lengths:
            return "torch.nn.LSTM takes no lengths (pack the sequence, or use another backend)"
        if compiling:
            return "torch.compile cannot trace torch.nn.LSTM"
        return None
    if dtype not in _DTYPES:
        return f"it computes in {', '.join(str(d) for d in _DTYPES)}, got {dtype}"
    if backend == "stepwise":
        return _triton_obstacle(device)
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    try:
        from fused_lstm.kernels.interpretation import INTERPRETED
    except ImportError as error:
        return f"it needs Triton, and importing that failed: {error}"
    if INTERPRETED:  # the kernels run in Python, on any device
        return None
    if device.type != "cuda":
        return (
            f"it needs a CUDA device, and the input is on {device.type} "
            "(for a test without a GPU, set TRITON_INTERPRET=1 before the first import)"
        )
    return None
