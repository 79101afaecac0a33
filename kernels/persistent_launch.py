"""What the persistent kernels' launchers share: which device, how the grid is cut, and the cooperative launch."""

import functools
from typing import Any

import torch
from torch import Tensor

from fused_lstm.kernels.interpretation import INTERPRETED
from fused_lstm.kernels.persistent_configs import Device, PersistentConfig, persistent_config

# The interpreter has no multiprocessors to run out of.
INTERPRETER = Device("Triton's interpreter", 90, 1_000_000, 232_448)


def config_for(tensor: Tensor, hidden_size: int, batch_size: int) -> PersistentConfig:
    """The grid for a layer on tensor's device in its dtype.

    Raises:
        DoesNotFit: no grid fits the device at once
    """
    device = INTERPRETER if INTERPRETED else _device(tensor.device.index)
    return persistent_config(device, tensor.element_size(), hidden_size, batch_size)


def is_masked(config: PersistentConfig, hidden_size: int, batch_size: int) -> bool:
    """Do the tiles reach beyond (N, H)?"""
    return batch_size % config.rows != 0 or hidden_size != config.units * config.programs


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def launch(
    kernel: Any, config: PersistentConfig, tensors: list[Tensor], sizes: tuple[int, int], constants: dict
) -> None:
    """Run kernel's grid, all programs at once.

    Cooperatively: the driver refuses a grid that is not resident at once, rather than let it wait for ever.
    """
    grid = (config.programs, config.batch_tiles, 1)
    if INTERPRETED:
        if config.programs > 1:
            raise RuntimeError("Triton's interpreter runs one program after another; these wait for each other")
        kernel[grid](*tensors, *sizes, **constants)
        return
    kernel[grid](*tensors, *sizes, **constants, num_warps=config.num_warps, num_stages=1, launch_cooperative_grid=True)
