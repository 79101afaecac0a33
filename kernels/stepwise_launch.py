"""What the stepwise backend's walks share: one direction as its kernels take it, and how they are launched."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fused_lstm.kernels.configs import PointwiseConfig
from fused_lstm.kernels.interpretation import INTERPRETED

Launch = Callable[..., None]
# How many slots of the parameters are a norm's; those of the peepholes come after them.
NORM_SLOTS = {None: 0, "gates": 10, "projections": 14, "projections_cell": 14}


def one_direction(walk: Any, d: int) -> Any:
    """Direction d of walk, a `fused_lstm.recurrence.Walk`: likewise, but for the dimension D.

    Rows of output (T, N, P) may lie apart, nothing else does. Masks are bytes; reset_c and the numbers of zoneout are
    tensors in c's dtype.
    """
    conditions = walk.conditions[d]
    reset_c = None if conditions.reset_c is None else conditions.reset_c.to(walk.c.dtype)
    buffers = {"gates": walk.gates, "product": walk.product, "entered": walk.entered, "moments": walk.moments}
    buffers |= {"c": walk.c, "h0": walk.h0}
    return walk._replace(
        **{name: None if buffer is None else buffer[d] for name, buffer in buffers.items()},
        output=walk.output[:, :, d],
        parameters=walk.parameters[d],
        conditions=type(conditions)(*(_dense(value, walk.c) for value in conditions._replace(reset_c=reset_c))),
        reverse=walk.reverse[d],
    )


def _dense(condition: Tensor | float | None, c: Tensor) -> Tensor | None:
    if condition is None:
        return None
    if not isinstance(condition, Tensor):
        return c.new_full((1,), condition)
    dense = condition.contiguous()
    return dense.view(torch.uint8) if dense.dtype == torch.bool else dense


def steps_of(walk: Any) -> list[tuple[int, int, int, int]]:
    """Of each step in the order of the walk: its time; that of the step after it, the last one's own; where c is before
    it, and after it."""
    times = range(walk.gates.size(0))[:: -1 if walk.reverse else 1]
    before, after = (1, 0) if walk.reverse else (0, 1)
    c_around = [(t + before, t + after) if walk.save else (0, 0) for t in times]
    return [(t, then, *around) for t, then, around in zip(times, [*times[1:], *times[-1:]], c_around, strict=True)]


def slices(buffer: Tensor | None, steps: int) -> list[Tensor | None]:
    """A buffer's part of each step; of a buffer without a step's dimension (1, ·), the same for all."""
    if buffer is None:
        return [None] * steps
    return list(buffer.unbind(0)) if buffer.size(0) == steps else [buffer[0]] * steps


def h_entering(walk: Any) -> Tensor:
    """The h (N, P) that enters the first step."""
    reset, reset_h = walk.conditions.reset, walk.conditions.reset_h
    if reset is None:
        return walk.h0
    return torch.where(reset[-1 if walk.reverse else 0, :, None] != 0, reset_h, walk.h0)


def peephole_slot(walk: Any) -> int | None:
    """The first slot of the peepholes, or None."""
    return None if walk.parameters.weight_ph is None else NORM_SLOTS[walk.layer_norm]


def pack_parameters(walk: Any) -> Tensor | None:
    """What a step takes beside its weights, (slots, H) in c's dtype; None if that is nothing.

    Slots are those of stepwise_steps: of a norm, its weight on the gates (on W_ih x, where W_hh h has one of its own),
    all biases after it, the cell's weight and bias; under "projections…" the weight on W_hh h; then the peepholes.
    """
    p = walk.parameters
    vectors = []
    if walk.layer_norm == "gates":
        vectors = [p.norm_gates_weight, p.norm_gates_bias, p.norm_cell_weight, p.norm_cell_bias]
    elif walk.layer_norm is not None:
        biases = [walk.c.new_zeros(walk.gates.size(2)), p.bias_ih, p.bias_hh, p.norm_ih_bias, p.norm_hh_bias]
        bias = sum(bias.to(walk.c.dtype) for bias in biases if bias is not None)
        vectors = [p.norm_ih_weight, bias, p.norm_cell_weight, p.norm_cell_bias, p.norm_hh_weight]
    if p.weight_ph is not None:
        vectors.append(p.weight_ph)
    if not vectors:
        return None
    return torch.cat([vector.to(walk.c.dtype) for vector in vectors]).view(-1, walk.gates.size(2) // 4)


def rows_arguments(name: str, rows: Tensor | None) -> dict[str, Any]:
    """A kernel's arguments for a tensor (T, N, ·) whose rows may lie apart.

    {NAME}_APART: 0 where they do not; else 16 where that divides both strides, as wide loads want it, or 1.
    """
    step_stride = row_stride = apart = 0
    if rows is not None:
        step_stride, row_stride, _ = rows.stride()
        if (step_stride, row_stride) != (rows.size(1) * rows.size(2), rows.size(2)):
            apart = 16 if step_stride % 16 == row_stride % 16 == 0 else 1
    return {
        f"{name}_ptr": rows,
        f"{name}_step_stride": step_stride,
        f"{name}_row_stride": row_stride,
        f"{name.upper()}_APART": apart,
    }


def step_launcher(kernel: Any, sizes: tuple[int, int], config: PointwiseConfig, arguments: dict[str, Any]) -> Launch:
    """A function of step_after, step and the kernel's other indices that launches it, with all else looked up once.

    A kernel takes pointers, the step and what else is an index, both sizes, step_after, and what stays as it is.

    Args:
        sizes: rows of the batch, and units (or projected features) of a row
        arguments: the kernel's, by name; a pointer without one is None
    """
    batch_size, width = sizes
    grid = (batch_size, triton.cdiv(width, config.block), 1)
    if batch_size == 0:  # an empty grid is an error
        return lambda *_: None
    names = kernel.arg_names
    first, after = names.index("step"), names.index("step_after")
    given = {**arguments, "BLOCK": config.block}
    pointers = [given.get(name) for name in names[:first]]
    others = [given[name] for name in names[after + 1 :]]
    if INTERPRETED:
        return lambda step_after, *indices: kernel[grid](*pointers, *indices, *sizes, step_after, *others)
    indices = [0] * (after - first - 2)
    compiled = kernel.warmup(*pointers, *indices, *sizes, 0, *others, grid=grid, num_warps=config.num_warps)
    launch = compiled[grid]
    stream = torch.cuda.current_stream(next(p.device for p in pointers if p is not None)).cuda_stream
    # Of a tensor Triton asks the address, and the driver what lies there, in every launch; of a number nothing.
    addresses = [None if pointer is None else pointer.data_ptr() for pointer in pointers]

    def launch_step(step_after: int, *indices: int) -> None:
        launch(*addresses, *indices, batch_size, width, step_after, *others, stream=stream)

    launch_step.tensors = pointers  # an address keeps nothing alive
    return launch_step


def accumulate_for(tensor: Tensor) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """c += a b: a CPU's addmm_ rounds after each term at the size of the sum; cuBLAS adds c once, as we do here."""
    return Tensor.addmm_ if tensor.is_cuda else lambda c, a, b: c.add_(a @ b)
