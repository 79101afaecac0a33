"""The stepwise backend's backward: a fused kernel and a product a step."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels.activations import sigmoid, tanh
from fused_lstm.kernels.configs import cell_config, pointwise_config
from fused_lstm.kernels.norms import (
    normalize,
    normalize_backward,
    normalize_both,
    normalize_both_backward,
    normalize_each,
    normalize_each_backward,
)
from fused_lstm.kernels.stepwise_launch import (
    Launch,
    accumulate_for,
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
    keep_backward,
    load_four,
    row_offset,
    store_four,
)


@triton.jit
def _arrive(
    d_h_ptr,
    d_h_old_ptr,
    d_reset_h_ptr,
    d_output_ptr,
    d_output_offset,
    reset_ptr,
    recurrent_mask_ptr,
    zoneout_h_ptr,
    step_row,  # step * N + row
    after_row,  # the same of the step after
    goes_on,  # is there one?
    row,
    unit,
    mask,
    width,
    dtype: tl.constexpr,
):
    """The gradient of the h that a step makes: from the step after it, and from the output.

    And what `_leave` takes: a store in here would hold up all loads behind it.
    """
    state = row * width + unit
    d_h = tl.load(d_h_ptr + state, mask=mask, other=0.0).to(dtype)
    if recurrent_mask_ptr is not None:
        factor = tl.load(recurrent_mask_ptr + state, mask=mask, other=0.0).to(dtype)
        d_h = tl.where(goes_on, d_h * factor, d_h)  # behind the last step there is no product
    if zoneout_h_ptr is not None:
        d_h += tl.load(d_h_old_ptr + state, mask=mask, other=0.0)
    d_h_old, d_reset_h, reset = d_h, d_h, goes_on  # stored only where they are made below
    if reset_ptr is not None:
        reset = (tl.load(reset_ptr + after_row) != 0) & goes_on
        if d_reset_h_ptr is not None:
            d_reset_h += tl.load(d_reset_h_ptr + state, mask=mask, other=0.0)
        d_h = tl.where(reset, 0.0, d_h)
    if d_output_ptr is not None:
        d_h += tl.load(d_output_ptr + d_output_offset + unit, mask=mask, other=0.0).to(dtype)
    if zoneout_h_ptr is not None:
        offset = step_row * width + unit
        d_h, d_h_old = keep_backward(d_h, zoneout_h_ptr, offset, mask)
    return d_h, d_h_old, d_reset_h, reset


@triton.jit
def _leave(d_h_old_ptr, d_reset_h_ptr, d_h_old, d_reset_h, reset, state, mask):
    """Store what zoneout leads past this step, and where the step after was reset, the reset state's gradient."""
    if d_h_old_ptr is not None:
        tl.store(d_h_old_ptr + state, d_h_old, mask=mask)
    if d_reset_h_ptr is not None:
        tl.store(d_reset_h_ptr + state, d_reset_h, mask=mask & reset)


@triton.jit
def _put(ptrs, x, mask, STORE: tl.constexpr):
    """x, stored where it is made: the assembler wants fewest registers and instructions so."""
    if STORE:
        tl.store(ptrs, x, mask=mask)
    return x


_RUNTIME = ["step", "c_from", "c_to", "batch_size", "step_after", "d_output_step_stride", "d_output_row_stride"]


@triton.jit(do_not_specialize=_RUNTIME)
def cell_backward_kernel(
    d_output_ptr,  # (T, N, H), rows may lie apart; or None
    d_h_ptr,  # (N, H): what arrives from the step after
    d_c_ptr,  # (N, H), dtype of c: what arrives from the step after; what leaves for the one before on return
    gates_ptr,  # (T, N, 4H): as the forward left it
    c_ptr,  # (T + 1, N, H), float32 or float64
    d_gates_ptr,  # (T, N, 4H): written
    hidden_ptr,  # (T, N, H): h before a projection, written; or None
    product_ptr,  # (T, N, 4H): W_hh h, under "projections…"; else None
    d_product_ptr,  # (T, N, 4H): written, likewise
    d_c_all_ptr,  # (T, N, H), dtype of c; or None
    d_h_old_ptr,  # (N, H), dtype of c: what zoneout leads past the step after; past this one on return; or None
    reset_ptr,  # (T, N), 0 or 1; or None
    reset_c_ptr,  # (N, H), dtype of c
    d_reset_h_ptr,  # (N, H), dtype of c: added to; or None
    d_reset_c_ptr,  # (N, H), likewise
    recurrent_mask_ptr,  # (N, H) or None
    zoneout_h_ptr,  # (T, N, H), 0 or 1; or one number, dtype of c; or None
    zoneout_c_ptr,  # likewise
    parameters_ptr,  # (slots, H), dtype of c; or None
    d_parameters_ptr,  # (N, slots, H), dtype of c: added to
    step,  # index of time into all with a T
    c_from,  # index into c of the state that entered the step
    c_to,  # and of the one that left it
    batch_size,
    hidden_size,
    step_after,  # of the step that was walked next; the last one's own
    d_output_step_stride,
    d_output_row_stride,
    LAYER_NORM: tl.constexpr,  # as in lstm_cell; if there is one, BLOCK holds all of H
    PEEPHOLE: tl.constexpr,  # slot of the peepholes in parameters, or None
    SLOTS: tl.constexpr,
    D_OUTPUT_APART: tl.constexpr,  # see rows_arguments
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: step * batch_size * 4 * hidden_size can pass 2**31
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < hidden_size
    state = row * hidden_size + unit
    step_row = step.to(tl.int64) * batch_size + row
    gates = step_row * 4 * hidden_size + unit
    dtype = c_ptr.dtype.element_ty
    i, f, g, o = load_four(gates_ptr + gates, mask, hidden_size, dtype)
    c_old = tl.load(c_ptr + (c_from.to(tl.int64) * batch_size + row) * hidden_size + unit, mask=mask, other=0.0)
    if reset_ptr is not None:
        reset = tl.load(reset_ptr + step_row) != 0
        c_old = tl.where(reset, tl.load(reset_c_ptr + state, mask=mask, other=0.0), c_old)
    if LAYER_NORM is None and zoneout_c_ptr is None:
        c = tl.load(c_ptr + (c_to.to(tl.int64) * batch_size + row) * hidden_size + unit, mask=mask, other=0.0)
    strides = (d_output_step_stride, d_output_row_stride)
    d_output = row_offset(step, row, batch_size, hidden_size, *strides, D_OUTPUT_APART)
    after_row = step_after.to(tl.int64) * batch_size + row
    reset_of_h_ptr = reset_ptr if hidden_ptr is None else None  # with a projection, h's gradient has been reset
    d_h, d_h_old, d_reset_h, reset_after = _arrive(
        d_h_ptr, d_h_old_ptr, d_reset_h_ptr, d_output_ptr, d_output, reset_of_h_ptr, recurrent_mask_ptr,
        zoneout_h_ptr, step_row, after_row, step_after != step, row, unit, mask, hidden_size, dtype,
    )  # fmt: skip
    d_c = tl.load(d_c_ptr + state, mask=mask, other=0.0)
    if d_c_all_ptr is not None:
        d_c += tl.load(d_c_all_ptr + step_row * hidden_size + unit, mask=mask, other=0.0)
    if zoneout_c_ptr is not None:
        offset = step_row * hidden_size + unit
        d_c, d_c_old = keep_backward(d_c, zoneout_c_ptr, offset, mask)
    if d_reset_c_ptr is not None:
        d_reset_c = tl.load(d_reset_c_ptr + state, mask=mask, other=0.0)
    if PEEPHOLE is not None:
        peepholes = parameters_ptr + PEEPHOLE * hidden_size + unit
        i_peephole = tl.load(peepholes, mask=mask, other=0.0)
        f_peephole = tl.load(peepholes + hidden_size, mask=mask, other=0.0)
        o_peephole = tl.load(peepholes + 2 * hidden_size, mask=mask, other=0.0)
        d_peepholes = d_parameters_ptr + (row * SLOTS + PEEPHOLE) * hidden_size + unit
        d_i_peephole = tl.load(d_peepholes, mask=mask, other=0.0)
        d_f_peephole = tl.load(d_peepholes + hidden_size, mask=mask, other=0.0)
        d_o_peephole = tl.load(d_peepholes + 2 * hidden_size, mask=mask, other=0.0)

    if LAYER_NORM is not None:
        share = 1.0 / tl.cast(hidden_size, dtype)
        parameters, d_parameters = parameters_ptr + unit, d_parameters_ptr + row * SLOTS * hidden_size + unit
        cell_weight = tl.load(parameters + CELL_WEIGHT * hidden_size, mask=mask, other=0.0)
        cell_bias = tl.load(parameters + CELL_BIAS * hidden_size, mask=mask, other=0.0)
        i_weight, f_weight, g_weight, o_weight = load_four(parameters, mask, hidden_size, dtype)
        i_bias, f_bias, g_bias, o_bias = load_four(parameters + BIAS * hidden_size, mask, hidden_size, dtype)
        if LAYER_NORM == "gates":
            n_i, n_f, n_g, n_o, _, scales = normalize_each(i, f, g, o, mask, share)
        else:
            i_h, f_h, g_h, o_h = load_four(product_ptr + gates, mask, hidden_size, dtype)
            i_hh, f_hh, g_hh, o_hh = load_four(parameters + HH_WEIGHT * hidden_size, mask, hidden_size, dtype)
            n_i, n_f, n_g, n_o, i_h, f_h, g_h, o_h, _, scales = normalize_both(
                i, f, g, o, i_h, f_h, g_h, o_h, mask, share
            )
            i_bias, f_bias = i_bias + i_h * i_hh, f_bias + f_h * f_hh
            g_bias, o_bias = g_bias + g_h * g_hh, o_bias + o_h * o_hh
        i, f, g, o = n_i * i_weight + i_bias, n_f * f_weight + f_bias, n_g * g_weight + g_bias, n_o * o_weight + o_bias
        if PEEPHOLE is not None:
            i, f = i + i_peephole * c_old, f + f_peephole * c_old
        i, f, g = sigmoid(i), sigmoid(f), tanh(g)
        c = f * c_old + i * g
        n_c, _, c_scale = normalize(c, mask, share)
        shown = n_c * cell_weight + cell_bias
        if LAYER_NORM == "projections_cell":
            c = shown
        if PEEPHOLE is not None:
            o += o_peephole * c
        o = sigmoid(o)
        tanh_c = tanh(shown)
    else:
        if zoneout_c_ptr is not None:
            c = f * c_old + i * g
        tanh_c = tanh(c)

    if LAYER_NORM == "gates" or LAYER_NORM == "projections":
        d_shown = d_h * o * (1.0 - tanh_c * tanh_c)
        d_c += normalize_backward(d_shown * cell_weight, n_c, c_scale, share)
    else:
        d_c += d_h * o * (1.0 - tanh_c * tanh_c)
    if PEEPHOLE is not None:
        d_o = d_h * tanh_c * o * (1.0 - o)
        d_c += d_o * o_peephole
    if LAYER_NORM == "projections_cell":
        d_shown = d_c
        d_c = normalize_backward(d_shown * cell_weight, n_c, c_scale, share)

    d_gate_ptrs = d_gates_ptr + gates
    BARE: tl.constexpr = LAYER_NORM is None
    d_i = _put(d_gate_ptrs, d_c * g * i * (1.0 - i), mask, BARE)
    d_f = _put(d_gate_ptrs + hidden_size, d_c * c_old * f * (1.0 - f), mask, BARE)
    d_g = _put(d_gate_ptrs + 2 * hidden_size, d_c * i * (1.0 - g * g), mask, BARE)
    d_o = _put(d_gate_ptrs + 3 * hidden_size, d_h * tanh_c * o * (1.0 - o), mask, BARE)
    d_c *= f
    if PEEPHOLE is not None:
        d_c += d_i * i_peephole + d_f * f_peephole
    if zoneout_c_ptr is not None:
        d_c += d_c_old

    if LAYER_NORM is not None:
        if LAYER_NORM == "gates":
            x_i, x_f, x_g, x_o = normalize_each_backward(
                d_i * i_weight, d_f * f_weight, d_g * g_weight, d_o * o_weight,
                n_i, n_f, n_g, n_o, scales[0], scales[1], scales[2], scales[3], share,
            )  # fmt: skip
        else:
            x_i, x_f, x_g, x_o, y_i, y_f, y_g, y_o = normalize_both_backward(
                d_i * i_weight, d_f * f_weight, d_g * g_weight, d_o * o_weight,
                d_i * i_hh, d_f * f_hh, d_g * g_hh, d_o * o_hh,
                n_i, n_f, n_g, n_o, i_h, f_h, g_h, o_h, scales[0], scales[1], share,
            )  # fmt: skip
            store_four(d_product_ptr + gates, y_i, y_f, y_g, y_o, mask, hidden_size)
        store_four(d_gate_ptrs, x_i, x_f, x_g, x_o, mask, hidden_size)
        # The parameters' gradients: this late, for the registers; all loads before the first store, to wait once.
        i_sum, f_sum, g_sum, o_sum = load_four(d_parameters, mask, hidden_size, dtype)
        i_total, f_total, g_total, o_total = load_four(d_parameters + BIAS * hidden_size, mask, hidden_size, dtype)
        cell_sum = tl.load(d_parameters + CELL_WEIGHT * hidden_size, mask=mask, other=0.0)
        cell_total = tl.load(d_parameters + CELL_BIAS * hidden_size, mask=mask, other=0.0)
        if LAYER_NORM != "gates":
            d_hh = d_parameters + HH_WEIGHT * hidden_size
            i_hh_sum, f_hh_sum, g_hh_sum, o_hh_sum = load_four(d_hh, mask, hidden_size, dtype)
            i_hh_sum, f_hh_sum = i_hh_sum + d_i * i_h, f_hh_sum + d_f * f_h
            g_hh_sum, o_hh_sum = g_hh_sum + d_g * g_h, o_hh_sum + d_o * o_h
            store_four(d_hh, i_hh_sum, f_hh_sum, g_hh_sum, o_hh_sum, mask, hidden_size)
        i_sum, f_sum, g_sum, o_sum = i_sum + d_i * n_i, f_sum + d_f * n_f, g_sum + d_g * n_g, o_sum + d_o * n_o
        store_four(d_parameters, i_sum, f_sum, g_sum, o_sum, mask, hidden_size)
        i_total, f_total, g_total, o_total = i_total + d_i, f_total + d_f, g_total + d_g, o_total + d_o
        store_four(d_parameters + BIAS * hidden_size, i_total, f_total, g_total, o_total, mask, hidden_size)
        tl.store(d_parameters + CELL_WEIGHT * hidden_size, cell_sum + d_shown * n_c, mask=mask)
        tl.store(d_parameters + CELL_BIAS * hidden_size, cell_total + d_shown, mask=mask)
    if PEEPHOLE is not None:
        tl.store(d_peepholes, d_i_peephole + d_i * c_old, mask=mask)
        tl.store(d_peepholes + hidden_size, d_f_peephole + d_f * c_old, mask=mask)
        tl.store(d_peepholes + 2 * hidden_size, d_o_peephole + d_o * c, mask=mask)
    if d_reset_c_ptr is not None:
        tl.store(d_reset_c_ptr + state, d_reset_c + d_c, mask=mask & reset)
    if reset_ptr is not None:
        d_c = tl.where(reset, 0.0, d_c)
    tl.store(d_c_ptr + state, d_c, mask=mask)
    _leave(d_h_old_ptr, d_reset_h_ptr, d_h_old, d_reset_h, reset_after, state, mask)
    if hidden_ptr is not None:
        tl.store(hidden_ptr + step_row * hidden_size + unit, o * tanh_c, mask=mask)


@triton.jit(do_not_specialize=["step", "batch_size", "step_after", "d_output_step_stride", "d_output_row_stride"])
def projected_backward_kernel(
    d_output_ptr,  # (T, N, P), rows may lie apart; or None
    d_h_ptr,  # (N, P): what arrives from the step after
    d_projected_ptr,  # (T, N, P): written, the gradient of what came out of the projection
    d_h_old_ptr,  # (N, P); this and all else as in cell_backward_kernel
    reset_ptr,
    d_reset_h_ptr,
    recurrent_mask_ptr,
    zoneout_h_ptr,
    step,
    batch_size,
    output_size,
    step_after,
    d_output_step_stride,
    d_output_row_stride,
    D_OUTPUT_APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < output_size
    dtype = tl.float64 if d_h_ptr.dtype.element_ty == tl.float64 else tl.float32
    step_row = step.to(tl.int64) * batch_size + row
    after_row = step_after.to(tl.int64) * batch_size + row
    strides = (d_output_step_stride, d_output_row_stride)
    d_output = row_offset(step, row, batch_size, output_size, *strides, D_OUTPUT_APART)
    d_h, d_h_old, d_reset_h, reset_after = _arrive(
        d_h_ptr, d_h_old_ptr, d_reset_h_ptr, d_output_ptr, d_output, reset_ptr, recurrent_mask_ptr,
        zoneout_h_ptr, step_row, after_row, step_after != step, row, unit, mask, output_size, dtype,
    )  # fmt: skip
    tl.store(d_projected_ptr + step_row * output_size + unit, d_h, mask=mask)
    _leave(d_h_old_ptr, d_reset_h_ptr, d_h_old, d_reset_h, reset_after, row * output_size + unit, mask)


def recurrence_backward(walk: Any, gradients: Any) -> None:
    """Fills the buffers of gradients, a `fused_lstm.recurrence.Gradients`, from a walk that was filled with save."""
    d_output, *others = gradients
    for d in range(walk.gates.size(0)):
        own = (None if buffer is None else buffer[d] for buffer in others)
        _walk_back(one_direction(walk, d), type(gradients)(None if d_output is None else d_output[:, :, d], *own))


def _walk_back(walk: Any, gradients: Any) -> None:
    """gradients: likewise, but for the dimension D."""
    weight_hh, weight_hr = walk.parameters.weight_hh, walk.parameters.weight_hr
    for buffer in (gradients.d_reset_h, gradients.d_reset_c):
        if buffer is not None:
            buffer.zero_()
    d_h = gradients.d_h.to(walk.gates.dtype, copy=True)
    d_h_old = None if walk.conditions.zoneout_h is None else torch.zeros_like(gradients.d_h)
    parameters = pack_parameters(walk)
    d_parameters = None if parameters is None else walk.c.new_zeros(walk.gates.size(1), *parameters.shape)
    launch_cell, arrive, d_hidden = _launchers(walk, gradients, d_h, d_h_old, parameters, d_parameters)

    steps = steps_of(walk)
    d_products, d_projected = gradients.d_product.unbind(0), gradients.d_projected
    d_projected_steps = slices(d_projected, len(steps))
    multiply, into = _multiply, [d_h] * len(steps)
    if weight_hr is not None and arrive is None:  # the products add to the output's gradients where these are wanted
        d_projected.zero_() if gradients.d_output is None else d_projected.copy_(gradients.d_output)
        d_projected[steps[-1][0]] += gradients.d_h
        d_h.zero_()
        multiply, into = accumulate_for(d_h), [d_h, *(d_projected_steps[t] for t, *_ in steps[:-1])]
    for (t, then, c_from, c_to), d_h_before in zip(reversed(steps), reversed(into), strict=True):
        if arrive is not None:
            arrive(then, t)
        if weight_hr is not None:
            torch.mm(d_projected_steps[t], weight_hr, out=d_hidden)
        launch_cell(then, t, c_from, c_to)
        multiply(d_h_before, d_products[t], weight_hh)

    _finish_h(walk, gradients, d_h, d_h_old)
    _finish_parameters(walk, gradients, d_parameters)


def _multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out=out)


def _launchers(
    walk: Any,
    gradients: Any,
    d_h: Tensor,
    d_h_old: Tensor | None,
    parameters: Tensor | None,
    d_parameters: Tensor | None,
) -> tuple[Launch, Launch | None, Tensor | None]:
    """Of the cell's kernel; with a projection, of the one before it, if it needs one; and what lies between."""
    conditions, layer_norm = walk.conditions, walk.layer_norm
    sizes = (walk.gates.size(1), walk.gates.size(2) // 4)
    of_h = rows_arguments("d_output", gradients.d_output)
    of_h |= {
        "d_h_ptr": d_h,
        "d_h_old_ptr": d_h_old,
        "d_reset_h_ptr": gradients.d_reset_h,
        "recurrent_mask_ptr": conditions.recurrent_mask,
        "zoneout_h_ptr": conditions.zoneout_h,
    }
    of_cell = {
        "d_c_ptr": gradients.d_c,
        "gates_ptr": walk.gates,
        "c_ptr": walk.c,
        "d_gates_ptr": gradients.d_gates,
        "hidden_ptr": gradients.hidden,
        "product_ptr": walk.product,
        "d_product_ptr": None if walk.product is None else gradients.d_product,
        "d_c_all_ptr": gradients.d_c_all,
        "reset_ptr": conditions.reset,
        "reset_c_ptr": conditions.reset_c,
        "d_reset_c_ptr": gradients.d_reset_c,
        "zoneout_c_ptr": conditions.zoneout_c,
        "parameters_ptr": parameters,
        "d_parameters_ptr": d_parameters,
        "LAYER_NORM": layer_norm,
        "PEEPHOLE": peephole_slot(walk),
        "SLOTS": 0 if parameters is None else parameters.size(0),
    }
    config = cell_config(layer_norm, sizes[1])
    if walk.parameters.weight_hr is None:
        return step_launcher(cell_backward_kernel, sizes, config, of_h | of_cell), None, None
    d_hidden = walk.gates.new_empty(sizes)
    of_hidden = rows_arguments("d_output", None) | {"d_h_ptr": d_hidden}
    launch_cell = step_launcher(cell_backward_kernel, sizes, config, of_hidden | of_cell)
    arrive = None
    if conditions.zoneout_h is not None or walk.entered is not None:
        of_h |= {"d_projected_ptr": gradients.d_projected, "reset_ptr": conditions.reset}
        config = pointwise_config(walk.h0.size(1))
        arrive = step_launcher(projected_backward_kernel, tuple(walk.h0.shape), config, of_h)
    return launch_cell, arrive, d_hidden


def _finish_h(walk: Any, gradients: Any, d_h: Tensor, d_h_old: Tensor | None) -> None:
    """What the first step's kernel would find: the gradient of the product's h, and so of h0."""
    conditions = walk.conditions
    d_h = d_h.to(gradients.d_h.dtype)
    if conditions.recurrent_mask is not None:
        d_h = d_h * conditions.recurrent_mask
    if d_h_old is not None:
        d_h = d_h + d_h_old
    if conditions.reset is not None:
        reset = conditions.reset[-1 if walk.reverse else 0, :, None] != 0
        if gradients.d_reset_h is not None:
            gradients.d_reset_h.add_(torch.where(reset, d_h, 0))
        d_h = torch.where(reset, 0, d_h)
    gradients.d_h.copy_(d_h)


def _finish_parameters(walk: Any, gradients: Any, d_parameters: Tensor | None) -> None:
    """The sums over all rows, each to its place."""
    if d_parameters is None:
        return
    total = d_parameters.sum(0)
    first = peephole_slot(walk)
    slots = {"d_norm_weight": 0, "d_norm_bias": 4, "d_norm_cell_weight": 8, "d_norm_cell_bias": 9}
    slots |= {"d_norm_hh_weight": 10, "d_weight_ph": first}
    for name, slot in slots.items():
        buffer = getattr(gradients, name)
        if buffer is not None:
            count = buffer.size(0) // total.size(1)
            buffer.copy_(total[slot : slot + count].flatten())
