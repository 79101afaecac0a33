"""Launch configurations: pure functions of sizes, no device is asked. Each number stands with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PointwiseConfig:
    """block: units of one batch row that a program handles; num_warps: warps of that program."""

    block: int
    num_warps: int


def pointwise_config(hidden_size: int) -> PointwiseConfig:
    """How the per-step cell kernels cut (N, H) into programs: one row and `block` units each.

    A step's kernel is bound by latency, so it should reach as many multiprocessors as it can: one warp and 4 units a
    thread (8 bytes of bf16, 16 of float32: the widest load of each is one instruction) up to 512 units a row. Beyond
    that the grid is wide enough, and four warps a program halve the number of programs to schedule.
    """
    if hidden_size > 512:
        return PointwiseConfig(block=512, num_warps=4)
    block = 32
    while block < min(hidden_size, 128):
        block *= 2
    return PointwiseConfig(block=block, num_warps=1)


def cell_config(layer_norm: str | None, hidden_size: int) -> PointwiseConfig:
    """How a step's kernel cuts (N, H) into programs: as `pointwise_config`, but with a norm a whole row each.

    So its sums stay in a program: 4 units a thread, more where that would be more than 32 warps. Any H goes; beyond
    2048 registers spill, but there the product reads 100 MB of weights in each step, and takes ten times as long.
    """
    if layer_norm is None:
        return pointwise_config(hidden_size)
    block = 32
    while block < hidden_size:
        block *= 2
    return PointwiseConfig(block=block, num_warps=max(1, min(32, block // 128)))
