"""Which backend runs a case, and why."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fused_lstm._options import check_layer_norm
from fused_lstm._precision import tf32_allowed

ENVIRONMENT_VARIABLE = "FUSED_LSTM_BACKEND"

# Options that change nothing of what a step computes.
_OUTSIDE_STEPS = ("weight_dropout", "locked_dropout", "states")
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


class _Case(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    batch_size: int
    projection: bool
    lengths: bool
    recompute: bool
    layer_norm: str | None
    options: tuple[str, ...]
    compiling: bool


def select_backend(
    backend: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    hidden_size: int,
    batch_size: int,
    projection: bool = False,
    lengths: bool = False,
    recompute: bool = False,
    layer_norm: str | None = None,
    options: Iterable[str] = (),
    compiling: bool = False,
) -> BackendChoice:
    """The backend that a layer would run on.

    An argument other than "auto" decides; else the environment variable FUSED_LSTM_BACKEND, if it is set; else a rule.

    Args:
        backend: "auto" or one of `BACKENDS`
        device, dtype: of the input (under autocast, the dtype it casts to)
        hidden_size: H, units of the layer
        batch_size: N, rows of the batch
        projection: is there a weight_hr?
        lengths: is there a length a row?
        recompute: are the gates not to be kept for the backward?
        layer_norm: as `fused_lstm.LSTM`'s
        options: the names of all else that is in use and that torch.nn.LSTM does not have, for instance "reset"
        compiling: under torch.compile?

    Raises:
        ValueError: the name is unknown, or the backend that was asked for cannot run the case; it says why
    """
    check_backend_name(backend)
    case = _Case(
        torch.device(device),
        dtype,
        hidden_size,
        batch_size,
        projection,
        lengths,
        recompute,
        check_layer_norm(layer_norm),
        tuple(options),
        compiling,
    )
    source = "asked for by backend="
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        check_backend_name(backend, ENVIRONMENT_VARIABLE)
        source = f"asked for by {ENVIRONMENT_VARIABLE}"
    if backend == "auto":
        return _automatic(case)
    obstacle = _OBSTACLES[backend](case)
    if obstacle is not None:
        raise ValueError(f"backend {backend!r} cannot run this: {obstacle}")
    return BackendChoice(backend, source)


def _automatic(case: _Case) -> BackendChoice:
    no_torch = _torch_obstacle(case)
    if no_torch is None and case.device.type == "cuda":
        sizes = f"H={case.hidden_size}, N={case.batch_size} in {case.dtype}"
        return BackendChoice("torch", f"cuDNN: no measurement yet says that ours is faster for {sizes}")
    if no_torch is None and (case.device.type, case.dtype) == ("cpu", torch.float16):
        no_torch = "it takes float16 on few CPUs"
    if no_torch is None:
        return BackendChoice("torch", f"torch's own kernels, on {case.device.type}")
    reason = f"torch's own cannot: {no_torch}"
    for name in ("persistent", "stepwise"):
        obstacle = _OBSTACLES[name](case) if case.device.type == "cuda" else "Triton's kernels need a CUDA device"
        if obstacle is None:
            return BackendChoice(name, reason)
        reason += f"; nor {name}: {obstacle}"
    return BackendChoice("reference", reason)


# For each backend: why it cannot run a case, or None if it can.


def _torch_obstacle(case: _Case) -> str | None:
    if case.lengths:
        return "torch.nn.LSTM takes no lengths (pack the sequence, or use another backend)"
    if case.recompute:
        return "torch.nn.LSTM keeps the gates for its backward"
    options = ("layer_norm", *case.options) if case.layer_norm is not None else case.options
    if options:
        return f"torch.nn.LSTM knows no {', '.join(dict.fromkeys(options))}"
    if case.compiling:
        return "torch.compile cannot trace torch.nn.LSTM"
    return None


def _reference_obstacle(case: _Case) -> str | None:
    if case.dtype not in _DTYPES:
        return f"it computes in {', '.join(str(dtype) for dtype in _DTYPES)}, got {case.dtype}"
    return None


def _stepwise_obstacle(case: _Case) -> str | None:
    return _reference_obstacle(case) or _triton_obstacle(case.device)


def _persistent_obstacle(case: _Case) -> str | None:
    obstacle = _stepwise_obstacle(case)
    if obstacle is not None:
        return obstacle
    from fused_lstm.kernels import persistent_launch

    if case.projection:
        return "it knows no projection"
    if case.dtype == torch.float32 and case.device.type == "cuda" and not tf32_allowed():
        return "it multiplies float32 in TF32, which torch.backends.cudnn.rnn.fp32_precision does not allow"
    plain = case.layer_norm is None and all(option in _OUTSIDE_STEPS for option in case.options)
    burden = "none" if plain else "options"
    return persistent_launch.obstacle(case.device, case.dtype, case.hidden_size, case.batch_size, burden)


_OBSTACLES = {
    "persistent": _persistent_obstacle,
    "stepwise": _stepwise_obstacle,
    "torch": _torch_obstacle,
    "reference": _reference_obstacle,
}
BACKENDS = tuple(_OBSTACLES)


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
