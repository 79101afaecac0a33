"""All time steps of a layer in one launch: every program keeps its rows of W_hh on chip and computes its units' steps.

A program owns UNITS units of one batch tile of ROWS rows. It computes gates^T[4 * UNITS, ROWS] = W[4 * UNITS, H] h^T,
where row 4 * u + k of its tile is gate k of unit u, so that the four gates of a unit meet in one thread; in memory all
is in torch's own order. Each step it writes its h into an exchange buffer that all programs of the batch tile read.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fused_lstm.kernels import persistent_launch
from fused_lstm.kernels.activations import sigmoid, tanh
from fused_lstm.kernels.interpretation import INTERPRETED
from fused_lstm.kernels.persistent_configs import PersistentConfig, starts
from fused_lstm.kernels.synchronization import arrive, wait

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def load_gates(ptrs, H: tl.constexpr, mask, other):
    """Four [UNITS, ROWS] tiles of a (N, 4H) step."""
    i = tl.load(ptrs, mask=mask, other=other)
    f = tl.load(ptrs + H, mask=mask, other=other)
    g = tl.load(ptrs + 2 * H, mask=mask, other=other)
    o = tl.load(ptrs + 3 * H, mask=mask, other=other)
    return i, f, g, o


@triton.jit
def store_gates(ptrs, H: tl.constexpr, i, f, g, o, mask):
    dtype = ptrs.dtype.element_ty
    tl.store(ptrs, i.to(dtype), mask=mask)
    tl.store(ptrs + H, f.to(dtype), mask=mask)
    tl.store(ptrs + 2 * H, g.to(dtype), mask=mask)
    tl.store(ptrs + 3 * H, o.to(dtype), mask=mask)


@triton.jit
def split_gates(gates, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """[4 * UNITS, ROWS], rows 4 * u + k -> i, f, g, o, each [UNITS, ROWS]."""
    gates = tl.permute(tl.reshape(gates, (UNITS, 2, 2, ROWS)), (0, 3, 2, 1))
    i_f, g_o = tl.split(gates)
    i, f = tl.split(i_f)
    g, o = tl.split(g_o)
    return i, f, g, o


@triton.jit
def load_chunk(ptrs, START: tl.constexpr, SIZE: tl.constexpr):
    """[SIZE, ROWS] of the exchange, from L2 (.cg), as other programs wrote it a moment ago."""
    return tl.load(ptrs + (START + tl.arange(0, SIZE))[:, None], cache_modifier=".cg")


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    if _INTERPRETED and a.dtype == tl.bfloat16:  # which the interpreter would multiply as the integers it holds
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def product(w, ptrs, K_SIZES: tl.constexpr, K_STARTS: tl.constexpr, AT_ONCE: tl.constexpr, PRECISION: tl.constexpr):
    """The chunks [M, k] of w times the chunks [k, ROWS] behind ptrs ([1, ROWS] pointers), summed: [M, ROWS] in float32.

    AT_ONCE: all loads come before the first product, so that their latencies overlap; else chunk after chunk, which
    needs shared memory for one. Each product has an accumulator of its own: of a chain of products Triton lays all
    warps along M, where 64 rows are work for four.
    """
    x = ()
    for k in tl.static_range(len(K_SIZES)):
        if AT_ONCE or k == 0:
            x = x + (load_chunk(ptrs, K_STARTS[k], K_SIZES[k]),)  # noqa: RUF005
    acc = multiply(w[0], x[0], PRECISION)
    for k in tl.static_range(1, len(K_SIZES)):
        if AT_ONCE:
            part = multiply(w[k], x[k], PRECISION)
        else:
            part = multiply(w[k], load_chunk(ptrs, K_STARTS[k], K_SIZES[k]), PRECISION)
        acc = tl.fma(acc, 1.0, part)  # not +, which would be folded into the product's accumulator
    return acc


@triton.jit(do_not_specialize=["steps", "batch_size", "backwards"])  # one compilation serves every value of these
def forward_kernel(
    gates_ptr,  # (D, T, N, 4H): the input product; the activated gates on return, if SAVE
    weight_ptr,  # (4H, H): of the first direction
    second_weight_ptr,  # (4H, H): of the second, or None
    exchange_ptr,  # (D, 2, batch tiles * ROWS, K): h that enters a step, zero beyond N and H; [:, 0] holds h0
    output_ptr,  # (T, N, D, H), rows OUTPUT_PITCH apart: written
    c_ptr,  # (D, T + 1, N, H), or (D, 1, N, H) if not SAVE: float32; c0 where the walk starts
    counter_ptr,  # (batch tiles, D) int32 zeros
    steps,
    batch_size,
    backwards,  # bit d: direction d walks from the last step to the first
    H: tl.constexpr,
    OUTPUT_PITCH: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    K_SIZES: tl.constexpr,
    K_STARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    MASKED: tl.constexpr,  # the tiles do not divide N and H
    SAVE: tl.constexpr,
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

    c = tl.load(c_ptrs, mask=mask, other=other)
    i_in, f_in, g_in, o_in = load_gates(gate_ptrs, H, mask, other)
    slot = 0  # of the two halves of the exchange, the one that this step reads
    for step in tl.range(0, steps, disable_licm=not HOIST):
        gates = product(w, x_ptrs + slot * exchange_size, K_SIZES, K_STARTS, AT_ONCE, PRECISION)
        i, f, g, o = split_gates(gates, UNITS, ROWS)
        i = sigmoid(i + i_in.to(tl.float32), APPROX)
        f = sigmoid(f + f_in.to(tl.float32), APPROX)
        g = tanh(g + g_in.to(tl.float32), APPROX)
        o = sigmoid(o + o_in.to(tl.float32), APPROX)
        c = f * c + i * g
        h = (o * tanh(c, APPROX)).to(output_ptr.dtype.element_ty)
        # Nobody still reads the half that is written now: whoever has arrived at this step's h had read the last one's.
        slot = 1 - slot
        tl.store(h_ptrs + slot * exchange_size, h)
        if PROGRAMS > 1:
            arrive(counter)
        else:
            tl.debug_barrier()
        # from here to the wait nobody is kept waiting
        tl.store(output_ptrs, h, mask=mask)
        output_ptrs += output_step
        if SAVE:
            c_ptrs += step_size
            tl.store(c_ptrs, c, mask=mask)
            store_gates(gate_ptrs, H, i, f, g, o, mask)
        gate_ptrs += tl.where(
            step + 1 < steps, 4 * step_size, 0
        )  # after the last step it is read once more, for nothing
        i_in, f_in, g_in, o_in = load_gates(gate_ptrs, H, mask, other)
        if PROGRAMS > 1 and step + 1 < steps:
            wait(counter, (step + 1) * PROGRAMS)
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
    config = persistent_launch.config_for(walk.gates, gate_size // 4, batch_size, directions)
    for which in persistent_launch.in_turn(config, directions):
        _walk(persistent_launch.of_directions(walk, which), config)


def _walk(walk: Any, config: PersistentConfig) -> None:
    """One launch: all directions at once."""
    gates, parameters = walk.gates, walk.parameters
    directions, steps, batch_size, hidden_size = *gates.shape[:3], gates.size(3) // 4
    exchange = gates.new_zeros(directions, 2, config.batch_tiles * config.rows, sum(config.forward_k))
    exchange[:, 0, :batch_size, :hidden_size].copy_(walk.h0)
    counters = gates.new_zeros(config.batch_tiles, directions, dtype=torch.int32)
    weights = [p.weight_hh.contiguous() for p in parameters]
    masked = persistent_launch.is_masked(config, hidden_size, batch_size)
    constants = forward_tiling(config, hidden_size, masked) | {
        "OUTPUT_PITCH": walk.output.stride(1),
        "SAVE": walk.save,
        "PRECISION": "tf32",
        "APPROX": gates.dtype == torch.bfloat16,
    }
    tensors = [gates, weights[0], weights[1] if directions > 1 else None, exchange, walk.output, walk.c, counters]
    backwards = sum(reverse << d for d, reverse in enumerate(walk.reverse))
    persistent_launch.launch(forward_kernel, config, tensors, (steps, batch_size, backwards), constants)
