"""What a layer norm must know of its rows, for all time steps at once: where they do not depend on h."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels.norms import EPS


@triton.jit
def row_statistics_kernel(
    x_ptr,  # (rows, SIZE)
    mean_ptr,  # (rows,) float32: written
    scale_ptr,  # (rows,) float32: written
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: row * SIZE can pass 2**31
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x) / SIZE
    x = tl.where(inside, x - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, tl.rsqrt(tl.sum(x * x) / SIZE + EPS))


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal of the deviation over the last dimension of x, contiguous, in float32."""
    mean, scale = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if mean.numel() > 0:
        size = x.size(-1)
        block = triton.next_power_of_2(size)
        row_statistics_kernel[(mean.numel(),)](x, mean, scale, size, block, num_warps=4 if block <= 2048 else 8)
    return mean, scale
