"""All time steps of a layer backward in one launch: the mirror of persistent_forward.py.

The product of a step, d_h^T[H, ROWS] = W^T[H, 4H] d_gates^T, is 4H long, so it is split by units into SLICES. Outputs
lie in tiles of OUTPUTS; slice s holds the four gates of the s-th UNITS units of every tile. Program (s, m) of a batch
tile keeps W^T's tile [OUTPUTS, 4 * units of a slice] on chip: rows m, columns s; and it owns, for the pointwise part,
the UNITS units that lie in both. A step waits twice, each time for a few programs only: the ones of its slice, for
d_gates; then the ones of its tile of outputs, for SLICES partial sums, which it adds in a fixed order.

What an option does, the program that owns the units does to them; one that a layer has not is a pointer that is None,
and costs nothing. A layer norm needs sums over all units of a row: they travel between all programs of a batch tile,
twice in each step (persistent_sums.py tells which).

Who waits at a counter is who arrives there: were they others, a program that the waiting ones do not hold back could
arrive a second time before a slow one's first, and the sum of arrivals would say what is not so.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels import persistent_launch
from fused_lstm.kernels.persistent_configs import PersistentConfig, starts
from fused_lstm.kernels.persistent_options import backward_burden, options_of
from fused_lstm.kernels.persistent_recall import recalled, recalled_through_norms
from fused_lstm.kernels.persistent_sums import (
    CELL_SUMS,
    GATE_SUMS,
    LANES,
    add_programs,
    along_and_across,
    store_sums,
    sums_of_units,
    through_each,
    through_norm,
)
from fused_lstm.kernels.persistent_tiles import (
    add_four,
    load_four,
    load_gates,
    load_peepholes,
    multiply_four,
    product,
    store_gates,
)
from fused_lstm.kernels.synchronization import arrive, wait


@triton.jit
def split_kept(d, KIND: tl.constexpr, zoned, rate):
    """A state's gradient: the new value's part, and the old value's."""
    if KIND == "mask":
        return tl.where(zoned != 0, 0.0, d), tl.where(zoned != 0, d, 0.0)
    return (1.0 - rate) * d, rate * d


@triton.jit
def store_totals(ptrs, H: tl.constexpr, parts, inside):
    """The sums over a batch tile's rows of tiles [UNITS, ROWS]; ptrs: of the units, each part H behind the last."""
    for k in tl.static_range(len(parts)):
        tl.store(ptrs + k * H, tl.sum(parts[k], 1), mask=inside)


# One compilation serves every value of these, and moments of a direction wherever they lie.
@triton.jit(do_not_specialize=["steps", "batch_size", "backwards"], do_not_specialize_on_alignment=["moments_ptr"])
def backward_kernel(
    d_output_ptr,  # (T, N, D, H), rows D_OUTPUT_PITCH apart; or None
    d_c_all_ptr,  # (D, T, N, H) float32, or None
    d_h_ptr,  # (D, N, H) float32: what arrives from behind the last step; that of h0 on return
    d_c_ptr,  # (D, N, H) float32: likewise
    gates_ptr,  # (D, T, N, 4H), activated; as the forward left it, where there are norms
    c_ptr,  # (D, T + 1, N, H) float32
    weight_ptr,  # (4H, H): of the first direction
    second_weight_ptr,  # (4H, H): of the second, or None
    d_product_ptr,  # (D, T, N, 4H): written, of W_hh h
    exchange_ptr,  # (D, 2, SLICES, batch tiles * ROWS, K): d_gates of a step, K = 4 * units of a slice, gate by gate
    partial_ptr,  # (D, 2, SLICES, batch tiles * ROWS, OUTPUTS * tiles of outputs) float32: partial sums of a step
    d_gates_counter_ptr,  # (D, batch tiles, SLICES) int32 zeros
    partial_counter_ptr,  # (D, batch tiles, tiles of outputs) int32 zeros
    # of the options, each None where it is not:
    weight_ph_ptr,  # (D, 3H)
    recurrent_mask_ptr,  # (D, N, H)
    zoneout_h_ptr,  # (D, T, N, H) uint8
    zoneout_c_ptr,  # (D, T, N, H) uint8
    reset_ptr,  # (T, N) uint8
    reset_c_ptr,  # (N, H)
    norm_weight_ptr,  # (D, 4H): under "gates" norm_gates_weight, under "projections…" norm_ih_weight
    norm_hh_weight_ptr,  # (D, 4H): under "projections…"
    norm_bias_ptr,  # (D, 4H): all that is added behind the norms
    norm_cell_weight_ptr,  # (D, H)
    norm_cell_bias_ptr,  # (D, H)
    product_ptr,  # (D, T, N, 4H): W_hh h, under "projections…"
    d_input_ptr,  # (D, T, N, 4H): written, of W_ih x, under "projections…"; else it is the same as of W_hh h
    moments_ptr,  # (D, T, N, .) float32
    cell_sums_ptr,  # (D, batch tiles, ROWS, programs, CELL_SUMS) float32
    gate_sums_ptr,  # (D, batch tiles, ROWS, programs, GATE_SUMS) float32
    sums_counter_ptr,  # (D, batch tiles) int32 zeros
    # written: sums over the steps (of resets, and None where not wanted); and over a batch tile's rows too
    d_reset_h_ptr,  # (D, N, H) float32
    d_reset_c_ptr,  # (D, N, H) float32
    d_weight_ph_ptr,  # (D, batch tiles, 3H) float32
    d_norm_weight_ptr,  # (D, batch tiles, 4H) float32
    d_norm_hh_weight_ptr,  # (D, batch tiles, 4H) float32
    d_norm_bias_ptr,  # (D, batch tiles, 4H) float32
    d_norm_cell_weight_ptr,  # (D, batch tiles, H) float32
    d_norm_cell_bias_ptr,  # (D, batch tiles, H) float32
    steps,
    batch_size,
    backwards,  # bit d: direction d walks from the last step to the first
    zoneout_h_rate: "fp32",  # noqa: F821 a type's name
    zoneout_c_rate: "fp32",  # noqa: F821
    D_OUTPUT_PITCH: tl.constexpr,
    H: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUTPUT_TILES: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    K_SIZES: tl.constexpr,
    K_STARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASKED: tl.constexpr,  # the tiles do not divide N and H
    ZONEOUT_H: tl.constexpr,  # None, "mask" or "rate"
    ZONEOUT_C: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    CELL_SUMS: tl.constexpr,
    GATE_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
    HOIST: tl.constexpr,  # as in the forward
):
    tile = tl.program_id(0)
    batch_tile = tl.program_id(1)
    direction = tl.full((), 0, tl.int32) if second_weight_ptr is None else tl.program_id(2)
    slice_index = tile // OUTPUT_TILES
    output_tile = tile % OUTPUT_TILES
    SLICE_UNITS: tl.constexpr = OUTPUT_TILES * UNITS
    K: tl.constexpr = 4 * SLICE_UNITS
    WIDTH: tl.constexpr = OUTPUT_TILES * OUTPUTS
    PROGRAMS: tl.constexpr = SLICES * OUTPUT_TILES
    unit = output_tile * OUTPUTS + slice_index * UNITS + tl.arange(0, UNITS)
    row = batch_tile * ROWS + tl.arange(0, ROWS)
    mask = None  # without one, no predicate is computed and no register cleared
    other = None
    if MASKED:
        mask = (unit < H)[:, None] & (row < batch_size)[None, :]
        other = 0.0

    if second_weight_ptr is not None:
        weight_ptr = tl.where(direction == 0, weight_ptr, second_weight_ptr)
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    w = ()
    for k in tl.static_range(len(K_SIZES)):
        column = K_STARTS[k] + tl.arange(0, K_SIZES[k])  # gate by gate, within the slice
        place = column % SLICE_UNITS  # among the slice's units, tile after tile
        column_unit = place // UNITS * OUTPUTS + slice_index * UNITS + place % UNITS
        inside = (output < H)[:, None] & (column_unit < H)[None, :]
        ptrs = weight_ptr + ((column // SLICE_UNITS) * H + column_unit)[None, :] * H + output[:, None]
        w = w + (tl.load(ptrs, mask=inside, other=0.0),)  # noqa: RUF005

    # from the walk's last step on; int64: step * batch_size * 4 * H can pass 2**31
    back = (backwards >> direction) & 1
    last = ((1 - back) * (steps - 1)).to(tl.int64) * batch_size
    start = (direction * steps).to(tl.int64) * batch_size + last
    rows_ahead = tl.where(back == 1, batch_size, -batch_size)  # int32: then one instruction moves a pointer
    state = row[None, :] * H + unit[:, None]
    gate_state = row[None, :] * (4 * H) + unit[:, None]
    gate_ptrs = gates_ptr + start * (4 * H) + gate_state
    d_product_ptrs = d_product_ptr + start * (4 * H) + gate_state
    c_ptrs = c_ptr + (start + (direction + back) * batch_size) * H + state  # before the step
    if d_output_ptr is not None:
        d_output_ptrs = (
            d_output_ptr + last * D_OUTPUT_PITCH + direction * H + row[None, :] * D_OUTPUT_PITCH + unit[:, None]
        )
    if d_c_all_ptr is not None:
        d_c_all_ptrs = d_c_all_ptr + start * H + state
    d_h_ptrs = d_h_ptr + direction * batch_size * H + state
    d_c_ptrs = d_c_ptr + direction * batch_size * H + state
    padded_rows = tl.num_programs(1) * ROWS
    exchange_size = padded_rows * K * SLICES
    partial_slice = padded_rows * WIDTH
    x_ptrs = exchange_ptr + direction * 2 * exchange_size + slice_index * padded_rows * K + row[None, :] * K
    x_out_ptrs = x_ptrs + (output_tile * UNITS + tl.arange(0, UNITS))[:, None]
    partial_ptrs = partial_ptr + direction * 2 * SLICES * partial_slice + row[None, :] * WIDTH + unit[:, None]
    partial_out_ptrs = (
        partial_ptr + (direction * 2 * SLICES + slice_index) * partial_slice + row[None, :] * WIDTH + output[:, None]
    )
    batch_tile += direction * tl.num_programs(1)
    d_gates_counter = d_gates_counter_ptr + batch_tile * SLICES + slice_index
    partial_counter = partial_counter_ptr + batch_tile * OUTPUT_TILES + output_tile

    zoned_h = None
    zoned_c = None
    HIDES_C: tl.constexpr = ZONEOUT_C is not None
    own = None  # which of the units there are
    if MASKED:
        own = (unit < H)[:, None]
    peep = load_peepholes(weight_ph_ptr, direction, unit[:, None], own, other, H)
    if weight_ph_ptr is not None:
        d_peep_i = tl.zeros((UNITS, ROWS), tl.float32)
        d_peep_f = tl.zeros((UNITS, ROWS), tl.float32)
        d_peep_o = tl.zeros((UNITS, ROWS), tl.float32)
    if recurrent_mask_ptr is not None:
        recurrent_ptrs = recurrent_mask_ptr + direction * batch_size * H + state
        recurrent_mask = tl.load(recurrent_ptrs, mask=mask, other=other).to(tl.float32)
    if ZONEOUT_H == "mask":
        zoneout_h_ptrs = zoneout_h_ptr + start * H + state
    if ZONEOUT_C == "mask":
        zoneout_c_ptrs = zoneout_c_ptr + start * H + state
    rows_inside = None
    if MASKED:
        rows_inside = (row < batch_size)[None, :]
    if reset_ptr is not None:
        reset_ptrs = reset_ptr + last + row[None, :]
        reset = tl.load(reset_ptrs, mask=rows_inside, other=other) != 0
        reset_c = tl.load(reset_c_ptr + state, mask=mask, other=other).to(tl.float32)
        d_reset_h = tl.zeros((UNITS, ROWS), tl.float32)
        d_reset_c = tl.zeros((UNITS, ROWS), tl.float32)
    if LAYER_NORM is not None:
        gate_parameter = direction * 4 * H + unit[:, None]
        cell_parameter = direction * H + unit[:, None]
        weight = load_four(norm_weight_ptr + gate_parameter, H, own, other)
        hh_weight = weight
        if norm_hh_weight_ptr is not None:
            hh_weight = load_four(norm_hh_weight_ptr + gate_parameter, H, own, other)
            product_ptrs = product_ptr + start * (4 * H) + gate_state
            d_input_ptrs = d_input_ptr + start * (4 * H) + gate_state
        bias = None
        if norm_bias_ptr is not None:
            bias = load_four(norm_bias_ptr + gate_parameter, H, own, other)
        parameters = (
            weight,
            hh_weight,
            bias,
            tl.load(norm_cell_weight_ptr + cell_parameter, mask=own, other=other).to(tl.float32),
            tl.load(norm_cell_bias_ptr + cell_parameter, mask=own, other=other).to(tl.float32),
        )
        MOMENTS: tl.constexpr = 10 if LAYER_NORM == "gates" else 6
        lane = tl.arange(0, LANES)[:, None]
        moments_ptrs = moments_ptr + (start + row[None, :]) * MOMENTS + lane
        moments_inside = lane < MOMENTS
        if MASKED:
            moments_inside &= rows_inside
        if PROGRAMS > 1:
            sums_row = (direction * padded_rows + row[None, :]) * PROGRAMS
            cell_sums_ptrs = cell_sums_ptr + sums_row * CELL_SUMS
            gate_sums_ptrs = gate_sums_ptr + sums_row * GATE_SUMS
            sums_counter = sums_counter_ptr + batch_tile
        nothing = tl.zeros((UNITS, ROWS), tl.float32)
        d_weight = (nothing, nothing, nothing, nothing)
        d_hh_weight = (nothing, nothing, nothing, nothing)
        d_bias = (nothing, nothing, nothing, nothing)
        d_cell_weight = nothing
        d_cell_bias = nothing

    d_h = tl.load(d_h_ptrs, mask=mask, other=other)
    d_c = tl.load(d_c_ptrs, mask=mask, other=other)
    if d_output_ptr is not None:
        d_out = tl.load(d_output_ptrs, mask=mask, other=other)
    if d_c_all_ptr is not None:
        d_c_out = tl.load(d_c_all_ptrs, mask=mask, other=other)
    i, f, g, o = load_gates(gate_ptrs, H, mask, other)
    c_after = None
    if LAYER_NORM is None and not HIDES_C:
        c_after = tl.load(c_ptrs - rows_ahead.to(tl.int64) * H, mask=mask, other=other)
    c_before = tl.load(c_ptrs, mask=mask, other=other)
    hh = None
    if product_ptr is not None:
        hh = load_gates(product_ptrs, H, mask, other)
    if ZONEOUT_H == "mask":
        zoned_h = tl.load(zoneout_h_ptrs, mask=mask, other=other)
    if ZONEOUT_C == "mask":
        zoned_c = tl.load(zoneout_c_ptrs, mask=mask, other=other)
    if LAYER_NORM is not None:
        moments = tl.load(moments_ptrs, mask=moments_inside, other=0.0)
    c_old = tl.where(reset, reset_c, c_before) if reset_ptr is not None else c_before
    if LAYER_NORM is None:
        o_by_h, c_by_h, by, c_by_c, c = recalled(i, f, g, o, c_old, c_after, peep, HIDES_C, APPROX)
    else:
        o_by_h, c_by_h, by, c_by_c, c, normal, hh_normal, normal_c, scales = recalled_through_norms(
            (i, f, g, o), hh, c_old, moments, parameters, peep, LAYER_NORM, APPROX
        )
    slot = 0
    for done in tl.range(0, steps, disable_licm=not HOIST):
        if d_output_ptr is not None:
            d_h += d_out.to(tl.float32)
        if d_c_all_ptr is not None:
            d_c += d_c_out
        if ZONEOUT_H is not None:
            d_h, d_h_kept = split_kept(d_h, ZONEOUT_H, zoned_h, zoneout_h_rate)
        if ZONEOUT_C is not None:
            d_c, d_c_kept = split_kept(d_c, ZONEOUT_C, zoned_c, zoneout_c_rate)
        if LAYER_NORM is None:
            d_c += d_h * c_by_h
        else:
            d_o = d_h * o_by_h
            d_shown = d_h * c_by_h
            if LAYER_NORM == "projections_cell":
                d_shown += d_c
                if weight_ph_ptr is not None:
                    d_shown += d_o * peep[2]
            d_normal_c = d_shown * parameters[3]
            sums = sums_of_units((d_normal_c, d_normal_c * normal_c))
            if PROGRAMS > 1:
                store_sums(cell_sums_ptrs + tile * CELL_SUMS, sums, CELL_SUMS)
                arrive(sums_counter)
            d_carried = d_c
            if weight_ph_ptr is not None:
                d_carried += d_o * peep[2]
            if PROGRAMS > 1:
                wait(sums_counter, PROGRAMS * (2 * done + 1))
                sums = add_programs(cell_sums_ptrs, CELL_SUMS, PROGRAMS)
            d_c = through_norm((d_normal_c,), sums, 0, CELL_SUMS, (normal_c,), scales[len(scales) - 1], H)[0]
            if LAYER_NORM != "projections_cell":
                d_c += d_carried
        if LAYER_NORM is not None or weight_ph_ptr is not None:
            d_pre = (d_c * by[0], d_c * by[1], d_c * by[2], d_h * o_by_h)  # of what goes into the activations
        if LAYER_NORM is None:
            dtype = gates_ptr.dtype.element_ty  # each is rounded at once: fewer instructions come of it
            d_i, d_f, d_g = (d_c * by[0]).to(dtype), (d_c * by[1]).to(dtype), (d_c * by[2]).to(dtype)
            d_product = (d_i, d_f, d_g, (d_h * o_by_h).to(dtype))
        else:
            d_normal = multiply_four(d_pre, parameters[0])
            if LAYER_NORM == "gates":
                terms = along_and_across(d_normal[:1], normal[:1]) + along_and_across(d_normal[1:2], normal[1:2])
                terms += along_and_across(d_normal[2:3], normal[2:3]) + along_and_across(d_normal[3:4], normal[3:4])
            else:
                d_hh_normal = multiply_four(d_pre, parameters[1])
                terms = along_and_across(d_normal, normal) + along_and_across(d_hh_normal, hh_normal)
            sums = sums_of_units(terms)
            if PROGRAMS > 1:
                store_sums(gate_sums_ptrs + tile * GATE_SUMS, sums, GATE_SUMS)
                arrive(sums_counter)
                wait(sums_counter, PROGRAMS * (2 * done + 2))
                sums = add_programs(gate_sums_ptrs, GATE_SUMS, PROGRAMS)
            if LAYER_NORM == "gates":
                d_product = through_each(d_normal, sums, normal, scales, H)
            else:
                d_product = through_norm(d_hh_normal, sums, 2, GATE_SUMS, hh_normal, scales[1], 4 * H)
        d_c *= c_by_c
        # Halves of the exchange and of the partial sums take turns: who arrives at a step has read the last one's.
        store_gates(
            x_out_ptrs + slot * exchange_size, SLICE_UNITS, d_product[0], d_product[1], d_product[2], d_product[3], None
        )
        if PROGRAMS > 1:
            arrive(d_gates_counter)
        else:
            tl.debug_barrier()
        # from here to the wait nobody is kept waiting
        store_gates(d_product_ptrs, H, d_product[0], d_product[1], d_product[2], d_product[3], mask)
        d_product_ptrs += rows_ahead.to(tl.int64) * (4 * H)
        if d_input_ptr is not None:
            d_input = through_norm(d_normal, sums, 0, GATE_SUMS, normal, scales[0], 4 * H)
            store_gates(d_input_ptrs, H, d_input[0], d_input[1], d_input[2], d_input[3], mask)
            d_input_ptrs += rows_ahead.to(tl.int64) * (4 * H)
            d_hh_weight = add_four(d_hh_weight, multiply_four(d_pre, hh_normal))
        if LAYER_NORM is not None:
            d_weight = add_four(d_weight, multiply_four(d_pre, normal))
            d_bias = add_four(d_bias, d_pre)
            d_cell_weight += d_shown * normal_c
            d_cell_bias += d_shown
        if weight_ph_ptr is not None:
            d_peep_i += d_pre[0] * c_old
            d_peep_f += d_pre[1] * c_old
            d_peep_o += d_pre[3] * c
        if ZONEOUT_C is not None:
            d_c += d_c_kept
        if reset_ptr is not None:
            d_reset_c += tl.where(reset, d_c, 0.0)
            d_c = tl.where(reset, 0.0, d_c)
        ahead = tl.where(done + 1 < steps, rows_ahead, 0).to(tl.int64)  # the first step's are read again, for nothing
        if d_output_ptr is not None:
            d_output_ptrs += ahead * D_OUTPUT_PITCH
            d_out = tl.load(d_output_ptrs, mask=mask, other=other)
        if d_c_all_ptr is not None:
            d_c_all_ptrs += ahead * H
            d_c_out = tl.load(d_c_all_ptrs, mask=mask, other=other)
        gate_ptrs += ahead * (4 * H)
        i, f, g, o = load_gates(gate_ptrs, H, mask, other)
        if product_ptr is not None:
            product_ptrs += ahead * (4 * H)
            hh = load_gates(product_ptrs, H, mask, other)
        c_ptrs += ahead * H
        if LAYER_NORM is None and not HIDES_C:
            c_after = c_before
        c_before = tl.load(c_ptrs, mask=mask, other=other)
        if ZONEOUT_H == "mask":
            zoneout_h_ptrs += ahead * H
            zoned_h = tl.load(zoneout_h_ptrs, mask=mask, other=other)
        if ZONEOUT_C == "mask":
            zoneout_c_ptrs += ahead * H
            zoned_c = tl.load(zoneout_c_ptrs, mask=mask, other=other)
        if reset_ptr is not None:
            reset_ptrs += ahead
            reset_next = tl.load(reset_ptrs, mask=rows_inside, other=other) != 0
        if LAYER_NORM is not None:
            moments_ptrs += ahead * MOMENTS
            moments = tl.load(moments_ptrs, mask=moments_inside, other=0.0)
        if PROGRAMS > 1:
            wait(d_gates_counter, OUTPUT_TILES * (done + 1))
        part = product(w, x_ptrs + slot * exchange_size, K_SIZES, K_STARTS, AT_ONCE, PRECISION)
        tl.store(partial_out_ptrs + slot * SLICES * partial_slice, part)
        if PROGRAMS > 1:
            arrive(partial_counter)
        c_old = tl.where(reset_next, reset_c, c_before) if reset_ptr is not None else c_before
        if LAYER_NORM is None:
            o_by_h, c_by_h, by, c_by_c, c = recalled(i, f, g, o, c_old, c_after, peep, HIDES_C, APPROX)
        else:
            o_by_h, c_by_h, by, c_by_c, c, normal, hh_normal, normal_c, scales = recalled_through_norms(
                (i, f, g, o), hh, c_old, moments, parameters, peep, LAYER_NORM, APPROX
            )
        if PROGRAMS > 1:
            wait(partial_counter, SLICES * (done + 1))
        else:
            tl.debug_barrier()
        from_ptrs = partial_ptrs + slot * SLICES * partial_slice
        d_h = tl.load(from_ptrs, cache_modifier=".cg")
        for s in tl.static_range(1, SLICES):
            d_h += tl.load(from_ptrs + s * partial_slice, cache_modifier=".cg")
        if recurrent_mask_ptr is not None:
            d_h *= recurrent_mask
        if ZONEOUT_H is not None:
            d_h += d_h_kept
        if reset_ptr is not None:
            d_reset_h += tl.where(reset, d_h, 0.0)
            d_h = tl.where(reset, 0.0, d_h)
            reset = reset_next
        slot = 1 - slot
    end = (direction * batch_size + row)[None, :] * H + unit[:, None]
    tl.store(d_h_ptr + end, d_h, mask=mask)
    tl.store(d_c_ptr + end, d_c, mask=mask)
    if d_reset_h_ptr is not None:
        tl.store(d_reset_h_ptr + end, d_reset_h, mask=mask)
    if d_reset_c_ptr is not None:
        tl.store(d_reset_c_ptr + end, d_reset_c, mask=mask)
    if MASKED:
        own = unit < H
    if weight_ph_ptr is not None:
        store_totals(d_weight_ph_ptr + batch_tile * 3 * H + unit, H, (d_peep_i, d_peep_f, d_peep_o), own)
    if LAYER_NORM is not None:
        store_totals(d_norm_weight_ptr + batch_tile * 4 * H + unit, H, d_weight, own)
        if norm_hh_weight_ptr is not None:
            store_totals(d_norm_hh_weight_ptr + batch_tile * 4 * H + unit, H, d_hh_weight, own)
        store_totals(d_norm_bias_ptr + batch_tile * 4 * H + unit, H, d_bias, own)
        store_totals(d_norm_cell_weight_ptr + batch_tile * H + unit, H, (d_cell_weight,), own)
        store_totals(d_norm_cell_bias_ptr + batch_tile * H + unit, H, (d_cell_bias,), own)


def backward_tiling(config: PersistentConfig, hidden_size: int, masked: bool) -> dict[str, Any]:
    """The compile-time arguments of `backward_kernel` that say how the work is cut."""
    return {
        "H": hidden_size,
        "UNITS": config.units,
        "OUTPUTS": 64,
        "OUTPUT_TILES": config.tiles,
        "SLICES": config.slices,
        "ROWS": config.rows,
        "K_SIZES": config.backward_k,
        "K_STARTS": starts(config.backward_k),
        "AT_ONCE": config.at_once,
        "MASKED": masked,
        "HOIST": config.hoist,
    }


def recurrence_backward(walk: Any, gradients: Any) -> None:
    """Fills a `fused_lstm.recurrence.Gradients`, from a Walk that has been filled with save."""
    directions, _, batch_size, gate_size = walk.gates.shape
    if batch_size == 0:
        for name in _TOTALS:
            if getattr(gradients, name) is not None:
                getattr(gradients, name).zero_()
        return
    if gradients.d_output is not None:
        gradients = gradients._replace(d_output=_evenly_apart(gradients.d_output))
    config = persistent_launch.config_for(walk.gates, gate_size // 4, batch_size, directions, backward_burden(walk))
    for which in persistent_launch.in_turn(config, directions):
        _walk(persistent_launch.of_directions(walk, which), persistent_launch.of_directions(gradients, which), config)


# Of the gradients, those that are sums over the rows too.
_TOTALS = (
    "d_weight_ph",
    "d_norm_weight",
    "d_norm_hh_weight",
    "d_norm_bias",
    "d_norm_cell_weight",
    "d_norm_cell_bias",
)


def _evenly_apart(d_output: Tensor) -> Tensor:
    """d_output (T, N, D, H) with all rows as far apart as the first two; a copy only if it must be."""
    steps, batch_size, directions, hidden_size = d_output.shape
    step, row, direction, unit = d_output.stride()
    dense = (hidden_size == 1 or unit == 1) and (directions == 1 or direction == hidden_size)
    if dense and batch_size > 1 and (steps == 1 or step == batch_size * row):
        return d_output
    # anew even if contiguous: the stride of a dimension of one may be any
    return d_output.contiguous().view(-1).view(d_output.shape)


def _walk(walk: Any, gradients: Any, config: PersistentConfig) -> None:
    """One launch: all directions at once."""
    gates = walk.gates
    directions, steps, batch_size, hidden_size = *gates.shape[:3], gates.size(3) // 4
    padded_rows = config.batch_tiles * config.rows
    options = options_of(walk)
    backwards = sum(reverse << d for d, reverse in enumerate(walk.reverse))
    weights = [p.weight_hh.contiguous() for p in walk.parameters]
    totals = {name: buffer for name in _TOTALS if (buffer := getattr(gradients, name)) is not None}
    of_tiles = {name: walk.c.new_empty(directions, config.batch_tiles, total.size(1)) for name, total in totals.items()}
    tensors = options.tensors | {
        "d_output_ptr": gradients.d_output,
        "d_c_all_ptr": gradients.d_c_all,
        "d_h_ptr": gradients.d_h,
        "d_c_ptr": gradients.d_c,
        "gates_ptr": gates,
        "c_ptr": walk.c,
        "weight_ptr": weights[0],
        "second_weight_ptr": weights[1] if directions > 1 else None,
        "d_product_ptr": gradients.d_product,
        "exchange_ptr": gates.new_empty(directions, 2, config.slices, padded_rows, sum(config.backward_k)),
        "partial_ptr": walk.c.new_empty(directions, 2, config.slices, padded_rows, 64 * config.tiles),
        "d_gates_counter_ptr": gates.new_zeros(directions, config.batch_tiles, config.slices, dtype=torch.int32),
        "partial_counter_ptr": gates.new_zeros(directions, config.batch_tiles, config.tiles, dtype=torch.int32),
        "product_ptr": walk.product,
        "d_input_ptr": None if walk.product is None else gradients.d_gates,
        "moments_ptr": walk.moments,
        **_sums(walk, config),
        "d_reset_h_ptr": gradients.d_reset_h,
        "d_reset_c_ptr": gradients.d_reset_c,
        **{f"{name}_ptr": of_tiles.get(name) for name in _TOTALS},
    }
    masked = persistent_launch.is_masked(config, hidden_size, batch_size)
    constants = backward_tiling(config, hidden_size, masked) | options.constants
    constants |= {
        "D_OUTPUT_PITCH": None if gradients.d_output is None else gradients.d_output.stride(1),
        **sums_tiling(walk.layer_norm),
        "PRECISION": "tf32",
        "APPROX": gates.dtype == torch.bfloat16,
    }
    in_order = [tensors[name] for name in backward_kernel.arg_names if name.endswith("_ptr")]
    persistent_launch.launch(
        backward_kernel, config, in_order, (steps, batch_size, backwards, *options.rates), constants
    )
    for name, total in totals.items():
        torch.sum(of_tiles[name], 1, out=total)


def sums_tiling(layer_norm: str | None) -> dict[str, int | None]:
    """The compile-time arguments that say how many sums a norm's gradients take."""
    return {"CELL_SUMS": None if layer_norm is None else CELL_SUMS, "GATE_SUMS": GATE_SUMS.get(layer_norm)}


def _sums(walk: Any, config: PersistentConfig) -> dict[str, Tensor | None]:
    """Where the programs put those of a step, and the counter that tells when they have."""
    if walk.layer_norm is None or config.programs == 1:
        return {"cell_sums_ptr": None, "gate_sums_ptr": None, "sums_counter_ptr": None}
    rows = (walk.c.size(0), config.batch_tiles * config.rows, config.programs)
    return {
        "cell_sums_ptr": walk.c.new_empty(*rows, CELL_SUMS),
        "gate_sums_ptr": walk.c.new_empty(*rows, GATE_SUMS[walk.layer_norm]),
        "sums_counter_ptr": walk.c.new_zeros(walk.c.size(0), config.batch_tiles, dtype=torch.int32),
    }
