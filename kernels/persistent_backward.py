"""All time steps of a layer backward in one launch: the mirror of persistent_forward.py.

The product of a step, d_h^T[H, ROWS] = W^T[H, 4H] d_gates^T, is 4H long, so it is split by units into SLICES. Outputs
lie in tiles of OUTPUTS; slice s holds the four gates of the s-th UNITS units of every tile. Program (s, m) of a batch
tile keeps W^T's tile [OUTPUTS, 4 * units of a slice] on chip: rows m, columns s; and it owns, for the pointwise part,
the UNITS units that lie in both. A step waits twice, each time for a few programs only: the ones of its slice, for
d_gates; then the ones of its tile of outputs, for SLICES partial sums, which it adds in a fixed order.

Who waits at a counter is who arrives there: were they others, a program that the waiting ones do not hold back could
arrive a second time before a slow one's first, and the sum of arrivals would say what is not so.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels import persistent_launch
from fused_lstm.kernels.activations import tanh
from fused_lstm.kernels.persistent_configs import PersistentConfig, starts
from fused_lstm.kernels.persistent_forward import load_gates, product, store_gates
from fused_lstm.kernels.synchronization import arrive, wait


@triton.jit
def derivatives(i, f, g, o, c_before, c, APPROX: tl.constexpr):
    """What a step's gradients are multiples of: c's and o's of d_h; i's, f's, g's and the c's before of d_c."""
    i = i.to(tl.float32)
    f = f.to(tl.float32)
    g = g.to(tl.float32)
    o = o.to(tl.float32)
    tanh_c = tanh(c, APPROX)
    c_by_h = o * (1.0 - tanh_c * tanh_c)
    o_by_h = tanh_c * o * (1.0 - o)
    i_by_c = g * i * (1.0 - i)
    f_by_c = c_before * f * (1.0 - f)
    g_by_c = i * (1.0 - g * g)
    return c_by_h, o_by_h, i_by_c, f_by_c, g_by_c, f


@triton.jit(do_not_specialize=["steps", "batch_size", "backwards"])  # one compilation serves every value of these
def backward_kernel(
    d_output_ptr,  # (T, N, D, H), rows D_OUTPUT_PITCH apart; or None
    d_c_all_ptr,  # (D, T, N, H) float32, or None
    d_h_ptr,  # (D, N, H) float32: what arrives from behind the last step; that of h0 on return
    d_c_ptr,  # (D, N, H) float32: likewise
    gates_ptr,  # (D, T, N, 4H), activated
    c_ptr,  # (D, T + 1, N, H) float32
    weight_ptr,  # (4H, H): of the first direction
    second_weight_ptr,  # (4H, H): of the second, or None
    d_gates_ptr,  # (D, T, N, 4H): written
    exchange_ptr,  # (D, 2, SLICES, batch tiles * ROWS, K): d_gates of a step, K = 4 * units of a slice, gate by gate
    partial_ptr,  # (D, 2, SLICES, batch tiles * ROWS, OUTPUTS * tiles of outputs) float32: partial sums of a step
    d_gates_counter_ptr,  # (D, batch tiles, SLICES) int32 zeros
    partial_counter_ptr,  # (D, batch tiles, tiles of outputs) int32 zeros
    steps,
    batch_size,
    backwards,  # bit d: direction d walks from the last step to the first
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
    d_gate_ptrs = d_gates_ptr + start * (4 * H) + gate_state
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

    d_h = tl.load(d_h_ptrs, mask=mask, other=other)
    d_c = tl.load(d_c_ptrs, mask=mask, other=other)
    if d_output_ptr is not None:
        d_out = tl.load(d_output_ptrs, mask=mask, other=other)
    if d_c_all_ptr is not None:
        d_c_out = tl.load(d_c_all_ptrs, mask=mask, other=other)
    i, f, g, o = load_gates(gate_ptrs, H, mask, other)
    c_after = tl.load(c_ptrs - rows_ahead.to(tl.int64) * H, mask=mask, other=other)
    c_before = tl.load(c_ptrs, mask=mask, other=other)
    c_by_h, o_by_h, i_by_c, f_by_c, g_by_c, c_by_c = derivatives(i, f, g, o, c_before, c_after, APPROX)
    slot = 0
    for done in tl.range(0, steps, disable_licm=not HOIST):
        if d_output_ptr is not None:
            d_h += d_out.to(tl.float32)
        if d_c_all_ptr is not None:
            d_c += d_c_out
        d_c += d_h * c_by_h
        d_i = (d_c * i_by_c).to(gates_ptr.dtype.element_ty)
        d_f = (d_c * f_by_c).to(gates_ptr.dtype.element_ty)
        d_g = (d_c * g_by_c).to(gates_ptr.dtype.element_ty)
        d_o = (d_h * o_by_h).to(gates_ptr.dtype.element_ty)
        d_c *= c_by_c
        # Halves of the exchange and of the partial sums take turns: who arrives at a step has read the last one's.
        store_gates(x_out_ptrs + slot * exchange_size, SLICE_UNITS, d_i, d_f, d_g, d_o, None)
        if PROGRAMS > 1:
            arrive(d_gates_counter)
        else:
            tl.debug_barrier()
        # from here to the wait nobody is kept waiting
        store_gates(d_gate_ptrs, H, d_i, d_f, d_g, d_o, mask)
        d_gate_ptrs += rows_ahead.to(tl.int64) * (4 * H)
        ahead = tl.where(done + 1 < steps, rows_ahead, 0).to(tl.int64)  # the first step's are read again, for nothing
        if d_output_ptr is not None:
            d_output_ptrs += ahead * D_OUTPUT_PITCH
            d_out = tl.load(d_output_ptrs, mask=mask, other=other)
        if d_c_all_ptr is not None:
            d_c_all_ptrs += ahead * H
            d_c_out = tl.load(d_c_all_ptrs, mask=mask, other=other)
        gate_ptrs += ahead * (4 * H)
        i, f, g, o = load_gates(gate_ptrs, H, mask, other)
        c_ptrs += ahead * H
        c_after = c_before
        c_before = tl.load(c_ptrs, mask=mask, other=other)
        if PROGRAMS > 1:
            wait(d_gates_counter, OUTPUT_TILES * (done + 1))
        part = product(w, x_ptrs + slot * exchange_size, K_SIZES, K_STARTS, AT_ONCE, PRECISION)
        tl.store(partial_out_ptrs + slot * SLICES * partial_slice, part)
        if PROGRAMS > 1:
            arrive(partial_counter)
        c_by_h, o_by_h, i_by_c, f_by_c, g_by_c, c_by_c = derivatives(i, f, g, o, c_before, c_after, APPROX)
        if PROGRAMS > 1:
            wait(partial_counter, SLICES * (done + 1))
        else:
            tl.debug_barrier()
        from_ptrs = partial_ptrs + slot * SLICES * partial_slice
        d_h = tl.load(from_ptrs, cache_modifier=".cg")
        for s in tl.static_range(1, SLICES):
            d_h += tl.load(from_ptrs + s * partial_slice, cache_modifier=".cg")
        slot = 1 - slot
    end = (direction * batch_size + row)[None, :] * H + unit[:, None]
    tl.store(d_h_ptr + end, d_h, mask=mask)
    tl.store(d_c_ptr + end, d_c, mask=mask)


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
        return
    if gradients.d_output is not None:
        gradients = gradients._replace(d_output=_evenly_apart(gradients.d_output))
    config = persistent_launch.config_for(walk.gates, gate_size // 4, batch_size, directions)
    for which in persistent_launch.in_turn(config, directions):
        _walk(persistent_launch.of_directions(walk, which), persistent_launch.of_directions(gradients, which), config)


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
    weights = [p.weight_hh.contiguous() for p in walk.parameters]
    tensors = {
        "d_output_ptr": gradients.d_output,
        "d_c_all_ptr": gradients.d_c_all,
        "d_h_ptr": gradients.d_h,
        "d_c_ptr": gradients.d_c,
        "gates_ptr": gates,
        "c_ptr": walk.c,
        "weight_ptr": weights[0],
        "second_weight_ptr": weights[1] if directions > 1 else None,
        "d_gates_ptr": gradients.d_gates,
        "exchange_ptr": gates.new_empty(directions, 2, config.slices, padded_rows, sum(config.backward_k)),
        "partial_ptr": walk.c.new_empty(directions, 2, config.slices, padded_rows, 64 * config.tiles),
        "d_gates_counter_ptr": gates.new_zeros(directions, config.batch_tiles, config.slices, dtype=torch.int32),
        "partial_counter_ptr": gates.new_zeros(directions, config.batch_tiles, config.tiles, dtype=torch.int32),
    }
    backwards = sum(reverse << d for d, reverse in enumerate(walk.reverse))
    masked = persistent_launch.is_masked(config, hidden_size, batch_size)
    constants = backward_tiling(config, hidden_size, masked) | {
        "D_OUTPUT_PITCH": None if gradients.d_output is None else gradients.d_output.stride(1),
        "PRECISION": "tf32",
        "APPROX": gates.dtype == torch.bfloat16,
    }
    in_order = [tensors[name] for name in backward_kernel.arg_names if name.endswith("_ptr")]
    persistent_launch.launch(backward_kernel, config, in_order, (steps, batch_size, backwards), constants)
