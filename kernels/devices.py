"""What the rules that cut a grid must know of a GPU: by name without having it, or asked of the one at hand."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """capability: 90 for compute capability 9.0; shared_memory: bytes that one block may have."""

    name: str
    capability: int
    multiprocessors: int
    shared_memory: int


KNOWN_DEVICES = {
    "a100": Device("A100", 80, 108, 166_912),
    "l40s": Device("L40S", 89, 142, 101_376),
    "rtx4090": Device("RTX 4090", 89, 128, 101_376),
    "h100": Device("H100", 90, 132, 232_448),
    "h200": Device("H200", 90, 132, 232_448),
    "b200": Device("B200", 100, 148, 232_448),
    "rtx5090": Device("RTX 5090", 120, 170, 101_376),
}


@functools.cache
def cuda_device(index: int) -> Device:
    """The CUDA device of that index, which is asked once."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )
