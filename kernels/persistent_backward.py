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


@triton.jit(do_not_specialize=["steps", "batch_size"])  # one compilation serves every length and batch
def backward_kernel(
    d_output_ptr,  # (T, N, H), or unused
    d_h_n_ptr,  # (N, H) float32: what arrives from behind the last step; d_h0 on return
    d_c_n_ptr,  # (N, H) float32: likewise; d_c0 on return
    lengths_ptr,  # (N,) int64, or unused: d_c_n joins at each row's last step, if HAS_LENGTHS
    gates_ptr,  # (T, N, 4H), activated
    c_ptr,  # (T + 1, N, H) float32
    weight_ptr,  # (4H, H)
    d_gates_ptr,  # (T, N, 4H): written
    exchange_ptr,  # (2, SLICES, batch tiles * ROWS, K): d_gates of a step, K = 4 * units of a slice, gate by gate
    partial_ptr,  # (2, SLICES, batch tiles * ROWS, OUTPUTS * tiles of outputs) float32: partial sums of a step
    d_gates_counter_ptr,  # (batch tiles, SLICES) int32 zeros
    partial_counter_ptr,  # (batch tiles, tiles of outputs) int32 zeros
    steps,
    batch_size,
    REVERSE: tl.constexpr,
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
    HAS_D_OUTPUT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
    HOIST: tl.constexpr,  # as in the forward
):
    tile = tl.program_id(0)
    batch_tile = tl.program_id(1)
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

    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    w = ()
    for k in tl.static_range(len(K_SIZES)):
        column = K_STARTS[k] + tl.arange(0, K_SIZES[k])  # gate by gate, within the slice
        place = column % SLICE_UNITS  # among the slice's units, tile after tile
        column_unit = place // UNITS * OUTPUTS + slice_index * UNITS + place % UNITS
        inside = (output < H)[:, None] & (column_unit < H)[None, :]
        ptrs = weight_ptr + ((column // SLICE_UNITS) * H + column_unit)[None, :] * H + output[:, None]
        w = w + (tl.load(ptrs, mask=inside, other=0.0),)  # noqa: RUF005

    # int64: step * batch_size * 4 * H can pass 2**31
    step_size = batch_size.to(tl.int64) * H
    c_after_ptr = c_ptr
    if REVERSE:
        c_before_ptr = c_ptr + step_size
    else:
        d_output_ptr += (steps - 1) * step_size
        gates_ptr += (steps - 1) * 4 * step_size
        d_gates_ptr += (steps - 1) * 4 * step_size
        c_after_ptr += steps * step_size
        c_before_ptr = c_ptr + (steps - 1) * step_size
        step_size = -step_size
    state = row[None, :] * H + unit[:, None]
    gate_state = row[None, :] * (4 * H) + unit[:, None]
    d_output_ptrs = d_output_ptr + state
    c_ptrs = c_before_ptr + state
    gate_ptrs = gates_ptr + gate_state
    d_gate_ptrs = d_gates_ptr + gate_state
    padded_rows = tl.num_programs(1) * ROWS
    exchange_size = padded_rows * K * SLICES
    partial_slice = padded_rows * WIDTH
    x_ptrs = exchange_ptr + slice_index * padded_rows * K + row[None, :] * K
    x_out_ptrs = x_ptrs + (output_tile * UNITS + tl.arange(0, UNITS))[:, None]
    partial_out_ptrs = partial_ptr + slice_index * partial_slice + row[None, :] * WIDTH + output[:, None]
    partial_ptrs = partial_ptr + row[None, :] * WIDTH + unit[:, None]
    d_gates_counter = d_gates_counter_ptr + batch_tile * SLICES + slice_index
    partial_counter = partial_counter_ptr + batch_tile * OUTPUT_TILES + output_tile

    d_h = tl.load(d_h_n_ptr + state, mask=mask, other=other)
    d_c_n = tl.load(d_c_n_ptr + state, mask=mask, other=other)
    if HAS_LENGTHS:
        d_c = tl.zeros((UNITS, ROWS), tl.float32)
        last = tl.load(lengths_ptr + row, mask=row < batch_size, other=0).to(tl.int32)[None, :] - 1
    else:
        d_c = d_c_n
    if HAS_D_OUTPUT:
        d_out = tl.load(d_output_ptrs, mask=mask, other=other)
    i, f, g, o = load_gates(gate_ptrs, H, mask, other)
    c_after = tl.load(c_after_ptr + state, mask=mask, other=other)
    c_before = tl.load(c_ptrs, mask=mask, other=other)
    slot = 0
    for done in tl.range(0, steps, disable_licm=not HOIST):
        if HAS_D_OUTPUT:
            d_h += d_out.to(tl.float32)
        if HAS_LENGTHS:
            d_c += tl.where(last == steps - 1 - done, d_c_n, 0.0)
        i = i.to(tl.float32)
        f = f.to(tl.float32)
        g = g.to(tl.float32)
        o = o.to(tl.float32)
        tanh_c = tanh(c_after, APPROX)
        d_c += d_h * o * (1.0 - tanh_c * tanh_c)
        d_i = (d_c * g * i * (1.0 - i)).to(gates_ptr.dtype.element_ty)
        d_f = (d_c * c_before * f * (1.0 - f)).to(gates_ptr.dtype.element_ty)
        d_g = (d_c * i * (1.0 - g * g)).to(gates_ptr.dtype.element_ty)
        d_o = (d_h * tanh_c * o * (1.0 - o)).to(gates_ptr.dtype.element_ty)
        d_c = d_c * f
        # Halves of the exchange and of the partial sums take turns: who arrives at a step has read the last one's.
        store_gates(x_out_ptrs + slot * exchange_size, SLICE_UNITS, d_i, d_f, d_g, d_o, None)
        if PROGRAMS > 1:
            arrive(d_gates_counter)
        else:
            tl.debug_barrier()
        # from here to the wait nobody is kept waiting
        store_gates(d_gate_ptrs, H, d_i, d_f, d_g, d_o, mask)
        d_gate_ptrs += 4 * step_size
        ahead = tl.where(done + 1 < steps, step_size, 0)  # the first step's are read once more, for nothing
        if HAS_D_OUTPUT:
            d_output_ptrs += ahead
            d_out = tl.load(d_output_ptrs, mask=mask, other=other)
        gate_ptrs += 4 * ahead
        i, f, g, o = load_gates(gate_ptrs, H, mask, other)
        c_ptrs += ahead
        c_after = c_before
        c_before = tl.load(c_ptrs, mask=mask, other=other)
        if PROGRAMS > 1:
            wait(d_gates_counter, OUTPUT_TILES * (done + 1))
        part = product(w, x_ptrs + slot * exchange_size, K_SIZES, K_STARTS, AT_ONCE, PRECISION)
        tl.store(partial_out_ptrs + slot * SLICES * partial_slice, part)
        if PROGRAMS > 1:
            arrive(partial_counter)
            wait(partial_counter, SLICES * (done + 1))
        else:
            tl.debug_barrier()
        d_h = tl.zeros((UNITS, ROWS), tl.float32)
        for s in tl.static_range(SLICES):
            d_h += tl.load(partial_ptrs + (slot * SLICES + s) * partial_slice, cache_modifier=".cg")
        slot = 1 - slot
    tl.store(d_h_n_ptr + state, d_h, mask=mask)
    tl.store(d_c_n_ptr + state, d_c, mask=mask)


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


def recurrence_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `fused_lstm.reference.recurrence_backward`: shapes, order and dtypes are told there. weight_hr is None."""
    steps, batch_size, hidden_size = gates.size(0), gates.size(1), gates.size(2) // 4
    d_gates = torch.empty_like(gates)
    d_h = c.new_zeros(batch_size, hidden_size)
    d_c = c.new_zeros(batch_size, hidden_size)
    if d_c_n is not None:
        d_c.copy_(d_c_n)
    if d_h_n is not None and lengths is None:
        d_h.copy_(d_h_n)
    elif d_h_n is not None:
        # at ends that differ from row to row, h_n's gradient joins the output's
        d_output = gates.new_zeros(steps, batch_size, hidden_size) if d_output is None else d_output.clone()
        d_output[lengths - 1, torch.arange(batch_size, device=gates.device)] += d_h_n
    if batch_size == 0:
        return d_gates, d_h.to(gates.dtype), d_c, None, None
    config = persistent_launch.config_for(gates, hidden_size, batch_size)
    padded_rows = config.batch_tiles * config.rows
    exchange = gates.new_empty(2, config.slices, padded_rows, sum(config.backward_k))
    partial = c.new_empty(2, config.slices, padded_rows, 64 * config.tiles)
    counters = gates.new_zeros(config.batch_tiles * (config.slices + config.tiles), dtype=torch.int32)
    d_gates_counters, partial_counters = counters.split(
        (config.batch_tiles * config.slices, config.batch_tiles * config.tiles)
    )
    masked = persistent_launch.is_masked(config, hidden_size, batch_size)
    constants = backward_tiling(config, hidden_size, masked) | {
        "REVERSE": reverse,
        "HAS_D_OUTPUT": d_output is not None,
        "HAS_LENGTHS": lengths is not None,
        "PRECISION": "tf32",
        "APPROX": gates.dtype == torch.bfloat16,
    }
    tensors = [
        gates if d_output is None else d_output,  # never read where there is none: the flag says so
        d_h,
        d_c,
        counters if lengths is None else lengths,
        gates,
        c,
        weight_hh.contiguous(),
        d_gates,
        exchange,
        partial,
        d_gates_counters,
        partial_counters,
    ]
    persistent_launch.launch(backward_kernel, config, tensors, (steps, batch_size), constants)
    return d_gates, d_h.to(gates.dtype), d_c, None, None
