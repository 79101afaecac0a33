"""All time steps of a layer in one launch: every program keeps its rows of W_hh on chip and computes its units' steps.

A program owns UNITS units of one batch tile of ROWS rows. It computes gates^T[4 * UNITS, ROWS] = W[4 * UNITS, H] h^T,
where row 4 * u + k of its tile is gate k of unit u, so that the four gates of a unit meet in one thread; in memory all
is in torch's own order. Each step it writes its h into an exchange buffer that all programs of the batch tile read.

A layer norm needs the statistics of a row over all programs: each writes the mean of its own units and the sum of their
squared deviations, waits for the others, and joins all in the same order as they do. So a step with norms waits three
times: for the gates' statistics, for the cell's, and for h. Who waits is who arrives, so that one counter serves all.
Means and deviations are kept for the way back.

What changes the h that enters a product (resets, recurrent masks) is done by the one program that writes it, not by the
many that read it. An option that a layer has not is a pointer that is None, and costs nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels import persistent_launch
from fused_lstm.kernels.activations import sigmoid, tanh
from fused_lstm.kernels.norms import EPS
from fused_lstm.kernels.persistent_configs import PersistentConfig, starts
from fused_lstm.kernels.persistent_moments import join_moments, moments, moments_together, store_moments
from fused_lstm.kernels.persistent_options import forward_burden, options_of
from fused_lstm.kernels.persistent_tiles import (
    laid_out_as,
    load_four,
    load_gates,
    load_peepholes,
    product,
    split_gates,
    store_gates,
)
from fused_lstm.kernels.synchronization import arrive, wait


# One compilation serves every value of these, and moments of a direction wherever they lie.
@triton.jit(do_not_specialize=["steps", "batch_size", "backwards"], do_not_specialize_on_alignment=["moments_ptr"])
def forward_kernel(
    gates_ptr,  # (D, T, N, 4H): the input product; on return, if SAVE, what Walk says
    weight_ptr,  # (4H, H): of the first direction
    second_weight_ptr,  # (4H, H): of the second, or None
    exchange_ptr,  # (D, 2, batch tiles * ROWS, K): h that enters a step, zero beyond N and H; [:, 0] holds h0
    output_ptr,  # (T, N, D, H), rows OUTPUT_PITCH apart: written
    c_ptr,  # (D, T + 1, N, H), or (D, 1, N, H) if not SAVE: float32; c0 where the walk starts
    counter_ptr,  # (batch tiles, D) int32 zeros
    # of the options, each None where it is not:
    h0_ptr,  # (D, N, H), for zoneout_h
    weight_ph_ptr,  # (D, 3H)
    recurrent_mask_ptr,  # (D, N, H)
    zoneout_h_ptr,  # (D, T, N, H) uint8
    zoneout_c_ptr,  # (D, T, N, H) uint8
    reset_ptr,  # (T, N) uint8
    reset_h_ptr,  # (N, H)
    reset_c_ptr,  # (N, H)
    entered_ptr,  # (D, T, N, H): written
    # of the norms: under "gates" norm_gates_*; under "projections..." norm_ih_*, and all biases in one
    norm_weight_ptr,  # (D, 4H)
    norm_hh_weight_ptr,  # (D, 4H)
    norm_bias_ptr,  # (D, 4H)
    norm_cell_weight_ptr,  # (D, H)
    norm_cell_bias_ptr,  # (D, H)
    product_ptr,  # (D, T, N, 4H): W_hh h under "projections...", written
    moments_ptr,  # (D, T, N, .) float32: written, if SAVE
    statistics_ptr,  # (D, batch tiles, moments, ROWS, programs) float32 zeros, where there are several programs
    steps,
    batch_size,
    backwards,  # bit d: direction d walks from the last step to the first
    zoneout_h_rate: "fp32",  # noqa: F821 a type's name
    zoneout_c_rate: "fp32",  # noqa: F821
    H: tl.constexpr,
    OUTPUT_PITCH: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    K_SIZES: tl.constexpr,
    K_STARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASKED: tl.constexpr,  # the tiles do not divide N and H
    SAVE: tl.constexpr,
    ZONEOUT_H: tl.constexpr,  # None, "mask" or "rate"
    ZONEOUT_C: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
    HOIST: tl.constexpr,  # keep what does not change over the steps in registers, which are then full of descriptors
):
    tile = tl.program_id(0)
    batch_tile = tl.program_id(1)
    direction = tl.program_id(2)
    K: tl.constexpr = K_STARTS[len(K_SIZES) - 1] + K_SIZES[len(K_SIZES) - 1]
    PROGRAMS: tl.constexpr = K // UNITS
    unit = tile * UNITS + tl.arange(0, UNITS)
    row = batch_tile * ROWS + tl.arange(0, ROWS)
    mask = None  # without one, no predicate is computed and no register cleared
    other = None
    if MASKED:
        mask = (unit < H)[:, None] & (row < batch_size)[None, :]
        other = 0.0

    if second_weight_ptr is not None:
        weight_ptr = tl.where(direction == 0, weight_ptr, second_weight_ptr)
    gate_row = tl.arange(0, 4 * UNITS)
    weight_unit = tile * UNITS + gate_row // 4
    weight_row = (gate_row % 4) * H + weight_unit
    w = ()
    for k in tl.static_range(len(K_SIZES)):
        column = K_STARTS[k] + tl.arange(0, K_SIZES[k])
        inside = (weight_unit < H)[:, None] & (column < H)[None, :]
        ptrs = weight_ptr + weight_row[:, None] * H + column[None, :]
        w = w + (tl.load(ptrs, mask=inside, other=0.0),)  # noqa: RUF005

    # int64: step * batch_size * 4 * H can pass 2**31
    back = (backwards >> direction) & 1
    first = (back * (steps - 1)).to(tl.int64) * batch_size
    start = (direction * steps).to(tl.int64) * batch_size + first
    gates_ptr += start * (4 * H)
    output_ptr += first * OUTPUT_PITCH + direction * H
    if SAVE:
        c_ptr += (start + (direction + back) * batch_size) * H
    else:
        c_ptr += direction * batch_size * H
    ahead = tl.where(back == 1, -batch_size, batch_size)  # int32 as far as here: then one instruction moves a pointer
    step_size = ahead.to(tl.int64) * H
    output_step = ahead.to(tl.int64) * OUTPUT_PITCH
    state = row[None, :] * H + unit[:, None]
    gate_ptrs = gates_ptr + row[None, :] * (4 * H) + unit[:, None]
    output_ptrs = output_ptr + row[None, :] * OUTPUT_PITCH + unit[:, None]
    c_ptrs = c_ptr + state
    exchange_size = tl.num_programs(1) * ROWS * K
    x_ptrs = exchange_ptr + direction * 2 * exchange_size + row[None, :] * K
    h_ptrs = x_ptrs + unit[:, None]
    counter = counter_ptr + batch_tile * tl.num_programs(2) + direction

    inside = (unit < H)[:, None]
    row_inside = (row < batch_size)[None, :]
    if entered_ptr is not None:
        entered_ptrs = entered_ptr + start * H + state
        entered = tl.load(h_ptrs)
    if ZONEOUT_H == "mask":
        zoneout_h_ptrs = zoneout_h_ptr + start * H + state
        zoned_h = tl.load(zoneout_h_ptrs, mask=mask, other=other)
    if ZONEOUT_C == "mask":
        zoneout_c_ptrs = zoneout_c_ptr + start * H + state
        zoned_c = tl.load(zoneout_c_ptrs, mask=mask, other=other)
    if ZONEOUT_H is not None:
        h_old = tl.load(h0_ptr + direction * batch_size * H + state, mask=mask, other=other)
    peep = load_peepholes(weight_ph_ptr, direction, unit[:, None], inside, 0.0, H)
    if recurrent_mask_ptr is not None:
        recurrent_ptrs = recurrent_mask_ptr + direction * batch_size * H + state
        recurrent_mask = tl.load(recurrent_ptrs, mask=mask, other=other).to(tl.float32)
    if reset_ptr is not None:
        reset_ptrs = reset_ptr + first + row[None, :]
        reset = tl.load(reset_ptrs, mask=row_inside, other=0) != 0  # of this step, for c; of the next, for h
        reset_ptrs += tl.where(steps > 1, ahead, 0)
        reset_next = tl.load(reset_ptrs, mask=row_inside, other=0) != 0
        reset_h = tl.load(reset_h_ptr + state, mask=mask, other=other)
        reset_c = tl.load(reset_c_ptr + state, mask=mask, other=other).to(tl.float32)
        if ZONEOUT_H is not None:
            h_old = tl.where(reset, reset_h, h_old)

    PROJECTIONS: tl.constexpr = LAYER_NORM == "projections" or LAYER_NORM == "projections_cell"
    WAITS: tl.constexpr = 1 if LAYER_NORM is None else 3  # in a step
    if LAYER_NORM is not None:
        own = None  # which of the units there are, or None for all
        share = 1.0 / UNITS
        if H < K:
            own = inside
            share = 1.0 / tl.minimum(tl.maximum(H - tile * UNITS, 1), UNITS)
        vector = direction * 4 * H + unit[:, None]
        weight_i, weight_f, weight_g, weight_o = load_four(norm_weight_ptr + vector, H, inside, 0.0)
        if norm_bias_ptr is not None:
            bias_i, bias_f, bias_g, bias_o = load_four(norm_bias_ptr + vector, H, inside, 0.0)
        if PROJECTIONS:
            hh_weight_i, hh_weight_f, hh_weight_g, hh_weight_o = load_four(norm_hh_weight_ptr + vector, H, inside, 0.0)
            if SAVE:
                product_ptrs = product_ptr + start * (4 * H) + row[None, :] * (4 * H) + unit[:, None]
        cell_vector = direction * H + unit[:, None]
        cell_weight = tl.load(norm_cell_weight_ptr + cell_vector, mask=inside, other=0.0).to(tl.float32)
        cell_bias = tl.load(norm_cell_bias_ptr + cell_vector, mask=inside, other=0.0).to(tl.float32)
        place = tl.arange(0, UNITS)[:, None]
        if SAVE:
            MOMENTS: tl.constexpr = 6 if PROJECTIONS else 10
            moments_ptrs = moments_ptr + (start + row[None, :]) * MOMENTS + place
            moments_mask = (place < MOMENTS) & (tile == 0) & (row < batch_size)[None, :]
    if LAYER_NORM is not None and PROGRAMS > 1:
        # One buffer serves all steps: who writes a step's moments has waited for the last one's h, and all programs had
        # read the last one's moments before they arrived at that.
        GATE_MOMENTS: tl.constexpr = 4 if PROJECTIONS else 8
        CHUNKS: tl.constexpr = (PROGRAMS + UNITS - 1) // UNITS
        SIZE: tl.constexpr = ROWS * CHUNKS * UNITS  # of one moment of all programs
        mine = place == tile % UNITS
        pair = direction * tl.num_programs(1) + batch_tile
        gate_moments = statistics_ptr + pair * (GATE_MOMENTS + 2) * SIZE
        gate_moments += tl.arange(0, ROWS)[None, :] * (CHUNKS * UNITS) + place
        cell_moments = gate_moments + GATE_MOMENTS * SIZE
        my_gate_moments = gate_moments + tile // UNITS * UNITS
        my_cell_moments = cell_moments + tile // UNITS * UNITS
        shares = ()
        for k in tl.static_range(CHUNKS):
            if H == UNITS * UNITS * CHUNKS:
                shares = shares + (1.0 / PROGRAMS,)  # noqa: RUF005
            else:
                units = tl.minimum(tl.maximum(H - (k * UNITS + place) * UNITS, 0), UNITS)
                shares = shares + (units.to(tl.float32) / H,)  # noqa: RUF005

    c = tl.load(c_ptrs, mask=mask, other=other)
    i_in, f_in, g_in, o_in = load_gates(gate_ptrs, H, mask, other)
    if PROJECTIONS:
        input_mean, input_squares = moments_together(i_in, f_in, g_in, o_in, own, share)
    slot = 0  # of the two halves of the exchange, the one that this step reads
    for step in tl.range(0, steps, disable_licm=not HOIST):
        gates = product(w, x_ptrs + slot * exchange_size, K_SIZES, K_STARTS, AT_ONCE, PRECISION)
        i, f, g, o = split_gates(gates, UNITS, ROWS)
        i_in, f_in, g_in, o_in = i_in.to(tl.float32), f_in.to(tl.float32), g_in.to(tl.float32), o_in.to(tl.float32)
        if PROJECTIONS:
            i, f, g, o = laid_out_as(i, i_in), laid_out_as(f, f_in), laid_out_as(g, g_in), laid_out_as(o, o_in)
        else:
            i, f, g, o = i + i_in, f + f_in, g + g_in, o + o_in
        if LAYER_NORM == "gates":
            i_mean, i_squares = moments(i, own, share)
            f_mean, f_squares = moments(f, own, share)
            g_mean, g_squares = moments(g, own, share)
            o_mean, o_squares = moments(o, own, share)
            if PROGRAMS > 1:
                store_moments(my_gate_moments, mine, i_mean, i_squares, SIZE)
                store_moments(my_gate_moments + 2 * SIZE, mine, f_mean, f_squares, SIZE)
                store_moments(my_gate_moments + 4 * SIZE, mine, g_mean, g_squares, SIZE)
                store_moments(my_gate_moments + 6 * SIZE, mine, o_mean, o_squares, SIZE)
                arrive(counter)
            if SAVE:
                store_gates(gate_ptrs, H, i, f, g, o, mask)
            if PROGRAMS > 1:
                wait(counter, (WAITS * step + 1) * PROGRAMS)
                i_mean, i_scale = join_moments(gate_moments, shares, UNITS, SIZE, H)
                f_mean, f_scale = join_moments(gate_moments + 2 * SIZE, shares, UNITS, SIZE, H)
                g_mean, g_scale = join_moments(gate_moments + 4 * SIZE, shares, UNITS, SIZE, H)
                o_mean, o_scale = join_moments(gate_moments + 6 * SIZE, shares, UNITS, SIZE, H)
            else:
                i_scale = tl.rsqrt(i_squares / H + EPS)
                f_scale = tl.rsqrt(f_squares / H + EPS)
                g_scale = tl.rsqrt(g_squares / H + EPS)
                o_scale = tl.rsqrt(o_squares / H + EPS)
            i = (i - i_mean) * i_scale * weight_i + bias_i
            f = (f - f_mean) * f_scale * weight_f + bias_f
            g = (g - g_mean) * g_scale * weight_g + bias_g
            o = (o - o_mean) * o_scale * weight_o + bias_o
            kept = (i_mean, f_mean, g_mean, o_mean, i_scale, f_scale, g_scale, o_scale)
        if PROJECTIONS:
            mean, squares = moments_together(i, f, g, o, own, share)
            if PROGRAMS > 1:
                store_moments(my_gate_moments, mine, mean, squares, SIZE)
                store_moments(my_gate_moments + 2 * SIZE, mine, input_mean, input_squares, SIZE)
                arrive(counter)
            if SAVE:
                store_gates(product_ptrs, H, i, f, g, o, mask)
                product_ptrs += 4 * step_size
            if PROGRAMS > 1:
                wait(counter, (WAITS * step + 1) * PROGRAMS)
                mean, scale = join_moments(gate_moments, shares, UNITS, SIZE, 4 * H)
                input_mean, input_scale = join_moments(gate_moments + 2 * SIZE, shares, UNITS, SIZE, 4 * H)
            else:
                scale = tl.rsqrt(squares / (4 * H) + EPS)
                input_scale = tl.rsqrt(input_squares / (4 * H) + EPS)
            i_in = (i_in - input_mean) * input_scale * weight_i
            f_in = (f_in - input_mean) * input_scale * weight_f
            g_in = (g_in - input_mean) * input_scale * weight_g
            o_in = (o_in - input_mean) * input_scale * weight_o
            if norm_bias_ptr is not None:
                i_in, f_in, g_in, o_in = i_in + bias_i, f_in + bias_f, g_in + bias_g, o_in + bias_o
            kept = (input_mean, mean, input_scale, scale)
            i = (i - mean) * scale * hh_weight_i + i_in
            f = (f - mean) * scale * hh_weight_f + f_in
            g = (g - mean) * scale * hh_weight_g + g_in
            o = (o - mean) * scale * hh_weight_o + o_in
        if reset_ptr is not None:
            c = tl.where(reset, reset_c, c)
        if weight_ph_ptr is not None:
            i += peep[0] * c
            f += peep[1] * c
        i = sigmoid(i, APPROX)
        f = sigmoid(f, APPROX)
        g = tanh(g, APPROX)
        c_new = f * c + i * g
        shown = c_new
        if LAYER_NORM is not None:
            mean, squares = moments(c_new, own, share)
            if PROGRAMS > 1:
                store_moments(my_cell_moments, mine, mean, squares, SIZE)
                arrive(counter)
                wait(counter, (WAITS * step + 2) * PROGRAMS)
                mean, scale = join_moments(cell_moments, shares, UNITS, SIZE, H)
            else:
                scale = tl.rsqrt(squares / H + EPS)
            shown = (c_new - mean) * scale * cell_weight + cell_bias
            kept = kept + (mean, scale)  # noqa: RUF005
        if LAYER_NORM == "projections_cell":
            c_new = shown
        if weight_ph_ptr is not None:
            o += peep[2] * c_new
        o = sigmoid(o, APPROX)
        h = (o * tanh(shown, APPROX)).to(output_ptr.dtype.element_ty)
        if ZONEOUT_H == "mask":
            h = tl.where(zoned_h != 0, h_old, h)
        elif ZONEOUT_H == "rate":
            h = (zoneout_h_rate * h_old.to(tl.float32) + (1.0 - zoneout_h_rate) * h.to(tl.float32)).to(h.dtype)
        x = h  # as it enters the next step
        if reset_ptr is not None:
            x = tl.where(reset_next, reset_h, h)
        if ZONEOUT_H is not None:
            h_old = x
        if recurrent_mask_ptr is not None:
            x = (x.to(tl.float32) * recurrent_mask).to(h.dtype)
        # Nobody still reads the half that is written now: whoever has arrived at this step's h had read the last one's.
        slot = 1 - slot
        tl.store(h_ptrs + slot * exchange_size, x)
        if PROGRAMS > 1:
            arrive(counter)
        else:
            tl.debug_barrier()
        # from here to the wait nobody is kept waiting
        tl.store(output_ptrs, h, mask=mask)
        output_ptrs += output_step
        if entered_ptr is not None:
            tl.store(entered_ptrs, entered, mask=mask)
            entered_ptrs += step_size
            entered = x
        if ZONEOUT_C == "mask":
            c = tl.where(zoned_c != 0, c, c_new)
        elif ZONEOUT_C == "rate":
            c = zoneout_c_rate * c + (1.0 - zoneout_c_rate) * c_new
        else:
            c = c_new
        if SAVE:
            c_ptrs += step_size
            tl.store(c_ptrs, c, mask=mask)
            if LAYER_NORM is None:
                store_gates(gate_ptrs, H, i, f, g, o, mask)
            else:
                of_rows = tl.zeros((UNITS, ROWS), tl.float32)
                for k in tl.static_range(MOMENTS):
                    of_rows = tl.where(place == k, kept[k], of_rows)
                tl.store(moments_ptrs, of_rows, mask=moments_mask)
                moments_ptrs += ahead.to(tl.int64) * MOMENTS
        # what the next step needs; after the last one its own once more, for nothing
        gate_ptrs += tl.where(step + 1 < steps, 4 * step_size, 0)
        i_in, f_in, g_in, o_in = load_gates(gate_ptrs, H, mask, other)
        if ZONEOUT_H == "mask":
            zoneout_h_ptrs += tl.where(step + 1 < steps, step_size, 0)
            zoned_h = tl.load(zoneout_h_ptrs, mask=mask, other=other)
        if ZONEOUT_C == "mask":
            zoneout_c_ptrs += tl.where(step + 1 < steps, step_size, 0)
            zoned_c = tl.load(zoneout_c_ptrs, mask=mask, other=other)
        if reset_ptr is not None:
            reset = reset_next
            reset_ptrs += tl.where(step + 2 < steps, ahead, 0)
            reset_next = tl.load(reset_ptrs, mask=row_inside, other=0) != 0
        if PROJECTIONS:
            input_mean, input_squares = moments_together(i_in, f_in, g_in, o_in, own, share)
        if PROGRAMS > 1 and step + 1 < steps:
            wait(counter, WAITS * (step + 1) * PROGRAMS)
    if not SAVE:
        tl.store(c_ptrs, c, mask=mask)


def forward_tiling(config: PersistentConfig, hidden_size: int, masked: bool) -> dict[str, Any]:
    """The compile-time arguments of `forward_kernel` that say how the work is cut."""
    return {
        "H": hidden_size,
        "UNITS": config.units,
        "ROWS": config.rows,
        "K_SIZES": config.forward_k,
        "K_STARTS": starts(config.forward_k),
        "AT_ONCE": config.at_once,
        "MASKED": masked,
        "HOIST": config.hoist,
    }


def recurrence_forward(walk: Any) -> None:
    """Fills the buffers of a `fused_lstm.recurrence.Walk`."""
    directions, _, batch_size, gate_size = walk.gates.shape
    if batch_size == 0:
        return
    config = persistent_launch.config_for(walk.gates, gate_size // 4, batch_size, directions, forward_burden(walk))
    for which in persistent_launch.in_turn(config, directions):
        _walk(persistent_launch.of_directions(walk, which), config)


def _walk(walk: Any, config: PersistentConfig) -> None:
    """One launch: all directions at once."""
    gates, conditions = walk.gates, walk.conditions[0]
    directions, steps, batch_size, hidden_size = *gates.shape[:3], gates.size(3) // 4
    options = options_of(walk)
    entered = walk.h0
    if conditions.reset is not None:
        at_first = torch.stack([conditions.reset[-1 if reverse else 0] for reverse in walk.reverse])
        entered = torch.where(at_first[:, :, None], conditions.reset_h, entered)
    if conditions.recurrent_mask is not None:
        entered = entered * options.tensors["recurrent_mask_ptr"]
    exchange = gates.new_zeros(directions, 2, config.batch_tiles * config.rows, sum(config.forward_k))
    exchange[:, 0, :batch_size, :hidden_size].copy_(entered)
    weights = [p.weight_hh.contiguous() for p in walk.parameters]
    tensors = options.tensors | {
        "gates_ptr": gates,
        "weight_ptr": weights[0],
        "second_weight_ptr": weights[1] if directions > 1 else None,
        "exchange_ptr": exchange,
        "output_ptr": walk.output,
        "c_ptr": walk.c,
        "counter_ptr": gates.new_zeros(config.batch_tiles, directions, dtype=torch.int32),
        "h0_ptr": None if conditions.zoneout_h is None else walk.h0,
        "entered_ptr": walk.entered if walk.save else None,
        "product_ptr": walk.product if walk.save else None,
        "moments_ptr": walk.moments,
        "statistics_ptr": _statistics(walk, config),
    }
    backwards = sum(reverse << d for d, reverse in enumerate(walk.reverse))
    masked = persistent_launch.is_masked(config, hidden_size, batch_size)
    constants = forward_tiling(config, hidden_size, masked) | options.constants
    constants |= {
        "OUTPUT_PITCH": walk.output.stride(1),
        "SAVE": walk.save,
        "PRECISION": "tf32",
        "APPROX": gates.dtype == torch.bfloat16,
    }
    in_order = [tensors[name] for name in forward_kernel.arg_names if name.endswith("_ptr")]
    persistent_launch.launch(
        forward_kernel, config, in_order, (steps, batch_size, backwards, *options.rates), constants
    )


def _statistics(walk: Any, config: PersistentConfig) -> Tensor | None:
    """Where the programs put those of a step."""
    if walk.layer_norm is None or config.programs == 1:
        return None
    places = -(-config.programs // config.units) * config.units
    count = 10 if walk.layer_norm == "gates" else 6
    shape = (walk.gates.size(0), config.batch_tiles, count, config.rows, places)
    return walk.gates.new_zeros(shape, dtype=torch.float32)
