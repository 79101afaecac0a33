"""What the persistent kernels' launchers share: which device, how the grid is cut, and the cooperative launch."""

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels.devices import Device, cuda_device
from fused_lstm.kernels.interpretation import INTERPRETED
from fused_lstm.kernels.persistent_configs import Burden, DoesNotFit, PersistentConfig, persistent_config

# Triton 3.5's tl.range can be told to hoist nothing.
_CAN_KEEP_LOOPS = "disable_licm" in inspect.signature(tl.range).parameters
# The interpreter has no multiprocessors to run out of.
INTERPRETER = Device("Triton's interpreter", 90, 1_000_000, 232_448)


def compile_options(device: Device, layer_norm: str | None) -> dict[str, int]:
    """What the compiler is told of a persistent kernel beside its warps."""
    options = {"num_stages": 1}
    if device.capability == 100 or layer_norm is not None:
        # All registers: a program has its multiprocessor to itself. Left alone, the assembler saves some of these for a
        # second program, and spills for it; told so of the others, it spills in some large ones where it had not.
        options["maxnreg"] = 255
    return options


def config_for(
    tensor: Tensor, hidden_size: int, batch_size: int, directions: int = 1, burden: Burden = "none"
) -> PersistentConfig:
    """The grid for a layer on tensor's device in its dtype; all else as `persistent_config` takes it.

    Raises:
        DoesNotFit: no grid fits the device at once
    """
    device, element_size = _device(tensor.device), tensor.element_size()
    return persistent_config(device, element_size, hidden_size, batch_size, directions, burden)


def obstacle(
    device: torch.device, dtype: torch.dtype, hidden_size: int, batch_size: int, burden: Burden = "none"
) -> str | None:
    """Why a layer's steps cannot run in one launch on device, or None if they can.

    Args:
        burden: as `persistent_config` takes it
    """
    if dtype == torch.float64:
        return "its products are the matrix units', which take no float64"
    if not _CAN_KEEP_LOOPS:
        return f"it needs Triton 3.5 or newer, got {triton.__version__}"
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        config = persistent_config(_device(device), dtype.itemsize, hidden_size, batch_size, 1, burden)
    except DoesNotFit as reason:
        return str(reason)
    if INTERPRETED and config.programs > 1:
        return f"Triton's interpreter runs one program after another, and {config.programs} would wait for each other"
    return None


def is_masked(config: PersistentConfig, hidden_size: int, batch_size: int) -> bool:
    """Do the tiles reach beyond (N, H)?"""
    return batch_size % config.rows != 0 or hidden_size != config.units * config.programs


def _device(device: torch.device) -> Device:
    if INTERPRETED:
        return INTERPRETER
    return cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def in_turn(config: PersistentConfig, directions: int) -> list[slice]:
    """Which of a walk's directions are in one launch, launch after launch."""
    return [slice(start, start + config.directions) for start in range(0, directions, config.directions)]


def of_directions(buffers: Any, which: slice) -> Any:
    """A `fused_lstm.recurrence` Walk or Gradients of some of the directions: views of its buffers."""

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, (Tensor, tuple)):
            return value
        return value[:, :, which] if name in ("output", "d_output") else value[which]

    return buffers._replace(**{name: part(name, value) for name, value in buffers._asdict().items()})


def launch(
    kernel: Any, config: PersistentConfig, tensors: list[Tensor], sizes: tuple[int, ...], constants: dict
) -> None:
    """Run kernel's grid, all programs at once.

    Cooperatively: the driver refuses a grid that is not resident at once, rather than let it wait for ever.
    """
    grid = (config.programs, config.batch_tiles, config.directions)
    if INTERPRETED:
        if config.programs > 1:
            raise RuntimeError("Triton's interpreter runs one program after another; these wait for each other")
        kernel[grid](*tensors, *sizes, **constants)
        return
    device = _device(next(tensor.device for tensor in tensors if tensor is not None))
    kernel[grid](
        *tensors,
        *sizes,
        **constants,
        num_warps=config.num_warps,
        launch_cooperative_grid=True,
        **compile_options(device, constants["LAYER_NORM"]),
    )
