"""The stepwise backend's forward: a product and a fused kernel a step."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels.activations import sigmoid, tanh
from fused_lstm.kernels.configs import cell_config, pointwise_config
from fused_lstm.kernels.norms import normalize, normalize_both, normalize_each
from fused_lstm.kernels.stepwise_launch import (
    Launch,
    accumulate_for,
    h_entering,
    one_direction,
    pack_parameters,
    peephole_slot,
    rows_arguments,
    slices,
    step_launcher,
    steps_of,
)
from fused_lstm.kernels.stepwise_steps import (
    BIAS,
    CELL_BIAS,
    CELL_WEIGHT,
    HH_WEIGHT,
    keep,
    load_four,
    row_offset,
    store_four,
)


@triton.jit
def _load_c(c_ptr, c_from, reset_ptr, reset_c_ptr, step_row, row, unit, mask, batch_size, hidden_size):
    """The c that enters a step, after its reset."""
    c = tl.load(c_ptr + (c_from.to(tl.int64) * batch_size + row) * hidden_size + unit, mask=mask, other=0.0)
    if reset_ptr is not None:
        reset = tl.load(reset_ptr + step_row) != 0
        c = tl.where(reset, tl.load(reset_c_ptr + row * hidden_size + unit, mask=mask, other=0.0), c)
    return c


@triton.jit
def _hand_on(
    h,
    h_ptrs,
    h_old_ptr,
    entered_ptr,
    reset_ptr,
    reset_h_ptr,
    recurrent_mask_ptr,
    zoneout_h_ptr,
    step_row,  # step * N + row
    after_row,  # the same of the step after
    goes_on,  # is there one?
    row,
    unit,
    mask,
    width,
    SAVE: tl.constexpr,
):
    """Store a step's h, zoned out; and what it is where it enters the step after, whose reset comes first."""
    dtype = h.dtype
    state = row * width + unit
    if zoneout_h_ptr is not None:
        h_old = tl.load(h_old_ptr + state, mask=mask, other=0.0).to(dtype)
        h = keep(h_old, h, zoneout_h_ptr, step_row * width + unit, mask)
    after = h
    if reset_h_ptr is not None:
        reset = tl.load(reset_ptr + after_row) != 0
        after = tl.where(reset, tl.load(reset_h_ptr + state, mask=mask, other=0.0).to(dtype), after)
    entered = after
    if recurrent_mask_ptr is not None:
        entered *= tl.load(recurrent_mask_ptr + state, mask=mask, other=0.0).to(dtype)
    tl.store(h_ptrs, h, mask=mask)
    if zoneout_h_ptr is not None:
        tl.store(h_old_ptr + state, after, mask=mask)
    if entered_ptr is not None:
        there = after_row * width + unit if SAVE else state
        tl.store(entered_ptr + there, entered, mask=mask & goes_on)


@triton.jit
def _store_moments(ptr, row, moments):
    place = tl.arange(0, 16)
    row_of_them = tl.zeros((16,), ptr.dtype.element_ty)
    for k in tl.static_range(len(moments)):
        row_of_them = tl.where(place == k, moments[k], row_of_them)
    tl.store(ptr + row * len(moments) + place, row_of_them, mask=place < len(moments))


_RUNTIME = ["step", "step_after", "c_from", "c_to", "h_to", "batch_size", "h_step_stride", "h_row_stride"]


# A direction's moments may lie anywhere: on their alignment no other code should depend.
@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["moments_ptr"])
def cell_forward_kernel(
    gates_ptr,  # (T, N, 4H): before the activations; without a norm, after them on return, if SAVE
    product_ptr,  # (T, N, 4H), or (1, N, 4H) unless SAVE: W_hh h, under "projections…"; else None
    c_ptr,  # (., N, H), float32 or float64: read at c_from, written at c_to, which may be the same
    h_ptr,  # (., N, H), rows may lie apart: written at h_to
    h_old_ptr,  # (N, H): the h that entered this step; the one that enters the next on return; or None
    entered_ptr,  # (T, N, H), or (1, N, H) unless SAVE: written at step_after, what W_hh is to multiply; or None
    moments_ptr,  # (T, N, .), dtype of c: written, as `fused_lstm.recurrence.Walk` tells; or None
    reset_ptr,  # (T, N), 0 or 1; or None
    reset_h_ptr,  # (N, H)
    reset_c_ptr,  # (N, H), dtype of c
    recurrent_mask_ptr,  # (N, H) or None
    zoneout_h_ptr,  # (T, N, H), 0 or 1; or one number, dtype of c; or None
    zoneout_c_ptr,  # likewise
    parameters_ptr,  # (slots, H), dtype of c; or None
    step,  # index of time into gates, reset and zoneout masks
    c_from,
    c_to,
    h_to,
    batch_size,
    hidden_size,
    step_after,  # of the step that is walked next; the last one's own
    h_step_stride,
    h_row_stride,
    LAYER_NORM: tl.constexpr,  # as in lstm_cell; if there is one, BLOCK holds all of H
    PEEPHOLE: tl.constexpr,  # slot of the peepholes in parameters, or None
    SAVE: tl.constexpr,
    H_APART: tl.constexpr,  # see rows_arguments
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: step * batch_size * 4 * hidden_size can pass 2**31
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < hidden_size
    step_row = step.to(tl.int64) * batch_size + row
    gate_ptrs = gates_ptr + step_row * 4 * hidden_size + unit
    dtype = c_ptr.dtype.element_ty
    if LAYER_NORM is None and PEEPHOLE is None:  # in this order: the assembler makes fewer instructions of it
        i = sigmoid(tl.load(gate_ptrs, mask=mask, other=0.0).to(dtype))
        f = sigmoid(tl.load(gate_ptrs + hidden_size, mask=mask, other=0.0).to(dtype))
        g = tanh(tl.load(gate_ptrs + 2 * hidden_size, mask=mask, other=0.0).to(dtype))
        o = sigmoid(tl.load(gate_ptrs + 3 * hidden_size, mask=mask, other=0.0).to(dtype))
        c_old = _load_c(c_ptr, c_from, reset_ptr, reset_c_ptr, step_row, row, unit, mask, batch_size, hidden_size)
    else:
        i, f, g, o = load_four(gate_ptrs, mask, hidden_size, dtype)
        c_old = _load_c(c_ptr, c_from, reset_ptr, reset_c_ptr, step_row, row, unit, mask, batch_size, hidden_size)
        parameter_ptrs = parameters_ptr + unit
        if PEEPHOLE is not None:
            peephole_ptrs = parameter_ptrs + PEEPHOLE * hidden_size
            i_peephole = tl.load(peephole_ptrs, mask=mask, other=0.0)
            f_peephole = tl.load(peephole_ptrs + hidden_size, mask=mask, other=0.0)
            o_peephole = tl.load(peephole_ptrs + 2 * hidden_size, mask=mask, other=0.0)
        if LAYER_NORM is not None:
            share = 1.0 / tl.cast(hidden_size, dtype)
            cell_weight = tl.load(parameter_ptrs + CELL_WEIGHT * hidden_size, mask=mask, other=0.0)
            cell_bias = tl.load(parameter_ptrs + CELL_BIAS * hidden_size, mask=mask, other=0.0)
            i_weight, f_weight, g_weight, o_weight = load_four(parameter_ptrs, mask, hidden_size, dtype)
            i_bias, f_bias, g_bias, o_bias = load_four(parameter_ptrs + BIAS * hidden_size, mask, hidden_size, dtype)
            if LAYER_NORM == "gates":
                i, f, g, o, means, scales = normalize_each(i, f, g, o, mask, share)
            else:
                product_ptrs = product_ptr + (step_row if SAVE else row) * 4 * hidden_size + unit
                i_h, f_h, g_h, o_h = load_four(product_ptrs, mask, hidden_size, dtype)
                i_hh, f_hh, g_hh, o_hh = load_four(parameter_ptrs + HH_WEIGHT * hidden_size, mask, hidden_size, dtype)
                i, f, g, o, i_h, f_h, g_h, o_h, means, scales = normalize_both(
                    i, f, g, o, i_h, f_h, g_h, o_h, mask, share
                )
                i_bias, f_bias = i_bias + i_h * i_hh, f_bias + f_h * f_hh
                g_bias, o_bias = g_bias + g_h * g_hh, o_bias + o_h * o_hh
            i, f, g, o = i * i_weight + i_bias, f * f_weight + f_bias, g * g_weight + g_bias, o * o_weight + o_bias
        if PEEPHOLE is not None:
            i, f = i + i_peephole * c_old, f + f_peephole * c_old
        i, f, g = sigmoid(i), sigmoid(f), tanh(g)
    c = f * c_old + i * g
    shown = c
    if LAYER_NORM is not None:
        shown, c_mean, c_scale = normalize(c, mask, share)
        shown = shown * cell_weight + cell_bias
        if moments_ptr is not None:
            _store_moments(moments_ptr, step_row, means + scales + (c_mean, c_scale))
    if LAYER_NORM == "projections_cell":
        c = shown
    if PEEPHOLE is not None:
        o += o_peephole * c
    if LAYER_NORM is not None or PEEPHOLE is not None:
        o = sigmoid(o)
    h = o * tanh(shown)
    if zoneout_c_ptr is not None:
        c = keep(c_old, c, zoneout_c_ptr, step_row * hidden_size + unit, mask)

    h_ptrs = h_ptr + row_offset(h_to, row, batch_size, hidden_size, h_step_stride, h_row_stride, H_APART) + unit
    after_row = step_after.to(tl.int64) * batch_size + row
    _hand_on(
        h, h_ptrs, h_old_ptr, entered_ptr, reset_ptr, reset_h_ptr, recurrent_mask_ptr, zoneout_h_ptr,
        step_row, after_row, step_after != step, row, unit, mask, hidden_size, SAVE,
    )  # fmt: skip
    tl.store(c_ptr + (c_to.to(tl.int64) * batch_size + row) * hidden_size + unit, c, mask=mask)
    if SAVE and LAYER_NORM is None:
        store_four(gate_ptrs, i, f, g, o, mask, hidden_size)


@triton.jit(do_not_specialize=["step", "step_after", "batch_size", "h_step_stride", "h_row_stride"])
def projected_forward_kernel(
    h_ptr,  # (T, N, P), rows may lie apart: as it came out of the projection; zoned out on return
    h_old_ptr,  # (N, P); this and all else as in cell_forward_kernel
    entered_ptr,
    reset_ptr,
    reset_h_ptr,
    recurrent_mask_ptr,
    zoneout_h_ptr,
    step,
    batch_size,
    output_size,
    step_after,
    h_step_stride,
    h_row_stride,
    SAVE: tl.constexpr,
    H_APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < output_size
    dtype = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    h_ptrs = h_ptr + row_offset(step, row, batch_size, output_size, h_step_stride, h_row_stride, H_APART) + unit
    h = tl.load(h_ptrs, mask=mask, other=0.0).to(dtype)
    step_row = step.to(tl.int64) * batch_size + row
    after_row = step_after.to(tl.int64) * batch_size + row
    _hand_on(
        h, h_ptrs, h_old_ptr, entered_ptr, reset_ptr, reset_h_ptr, recurrent_mask_ptr, zoneout_h_ptr,
        step_row, after_row, step_after != step, row, unit, mask, output_size, SAVE,
    )  # fmt: skip


def recurrence_forward(walk: Any) -> None:
    """Fills the buffers of walk, a `fused_lstm.recurrence.Walk`."""
    for d in range(walk.gates.size(0)):
        _walk_forward(one_direction(walk, d))


def _walk_forward(walk: Any) -> None:
    launch_cell, hand_on, hidden = _launchers(walk)
    weight_hh_t = walk.parameters.weight_hh.t()
    weight_hr_t = None if hidden is None else walk.parameters.weight_hr.t()
    count = walk.gates.size(0)
    gates, products, outputs, entered = (
        slices(buffer, count) for buffer in (walk.gates, walk.product, walk.output, walk.entered)
    )
    accumulate = accumulate_for(walk.gates)
    h = walk.h0
    for t, then, c_from, c_to in steps_of(walk):
        if entered[t] is not None:
            h = entered[t]
        if products[t] is None:
            accumulate(gates[t], h, weight_hh_t)
        else:
            torch.mm(h, weight_hh_t, out=products[t])
        h = outputs[t]
        if hidden is None:
            launch_cell(then, t, c_from, c_to, t)
            continue
        launch_cell(then, t, c_from, c_to, 0)
        torch.mm(hidden, weight_hr_t, out=h)
        if hand_on is not None:
            hand_on(then, t)


def _launchers(walk: Any) -> tuple[Launch, Launch | None, Tensor | None]:
    """Of the cell's kernel; with a projection, of the one after it, if it needs one; and what is projected."""
    conditions = walk.conditions
    sizes, layer_norm = (walk.gates.size(1), walk.gates.size(2) // 4), walk.layer_norm
    h_old = h_entering(walk)
    if walk.entered is not None:
        first = walk.entered[-1 if walk.reverse else 0]
        first.copy_(h_old if conditions.recurrent_mask is None else h_old * conditions.recurrent_mask)
    of_h = rows_arguments("h", walk.output) | {
        "h_old_ptr": None if conditions.zoneout_h is None else h_old.clone(),
        "entered_ptr": walk.entered,
        "reset_h_ptr": conditions.reset_h,
        "recurrent_mask_ptr": conditions.recurrent_mask,
        "zoneout_h_ptr": conditions.zoneout_h,
    }
    of_both = {"reset_ptr": conditions.reset, "SAVE": walk.save}
    of_cell = {
        "gates_ptr": walk.gates,
        "product_ptr": walk.product,
        "moments_ptr": walk.moments,
        "c_ptr": walk.c,
        "reset_c_ptr": conditions.reset_c,
        "zoneout_c_ptr": conditions.zoneout_c,
        "parameters_ptr": pack_parameters(walk),
        "LAYER_NORM": layer_norm,
        "PEEPHOLE": peephole_slot(walk),
    }
    config = cell_config(layer_norm, sizes[1])
    if walk.parameters.weight_hr is None:
        return step_launcher(cell_forward_kernel, sizes, config, of_h | of_both | of_cell), None, None
    hidden = walk.gates.new_empty(1, *sizes)
    launch_cell = step_launcher(cell_forward_kernel, sizes, config, rows_arguments("h", hidden) | of_both | of_cell)
    hand_on = None
    if conditions.zoneout_h is not None or walk.entered is not None:
        output_size = walk.h0.size(1)
        config = pointwise_config(output_size)
        hand_on = step_launcher(projected_forward_kernel, (sizes[0], output_size), config, of_h | of_both)
    return launch_cell, hand_on, hidden[0]
