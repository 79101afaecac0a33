"""All time steps of a layer in one launch: every program keeps its rows of W_hh on chip and computes its units' steps.

A program owns UNITS units of one batch tile of ROWS rows. It computes gates^T[4 * UNITS, ROWS] = W[4 * UNITS, H] h^T,
where row 4 * u + k of its tile is gate k of unit u, so that the four gates of a unit meet in one thread; in memory all
is in torch's own order. Each step it writes its h into an exchange buffer that all programs of the batch tile read.

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
    if weight_ph_ptr is not None:
        weight_ph_ptrs = weight_ph_ptr + direction * 3 * H + unit[:, None]
        peep_i = tl.load(weight_ph_ptrs, mask=(unit < H)[:, None], other=0.0).to(tl.float32)
        peep_f = tl.load(weight_ph_ptrs + H, mask=(unit < H)[:, None], other=0.0).to(tl.float32)
        peep_o = tl.load(weight_ph_ptrs + 2 * H, mask=(unit < H)[:, None], other=0.0).to(tl.float32)
    if recurrent_mask_ptr is not None:
        recurrent_ptrs = recurrent_mask_ptr + direction * batch_size * H + state
        recurrent_mask = tl.load(recurrent_ptrs, mask=mask, other=other).to(tl.float32)
    if reset_ptr is not None:
        reset_ptrs = reset_ptr + first + row[None, :]
        reset_mask = (row < batch_size)[None, :]
        reset = tl.load(reset_ptrs, mask=reset_mask, other=0) != 0  # in this step; one step ahead, for the next
        reset_ptrs += tl.where(steps > 1, ahead, 0)
        reset_next = tl.load(reset_ptrs, mask=reset_mask, other=0) != 0
        reset_h = tl.load(reset_h_ptr + state, mask=mask, other=other)
        reset_c = tl.load(reset_c_ptr + state, mask=mask, other=other).to(tl.float32)
        if ZONEOUT_H is not None:
            h_old = tl.where(reset, reset_h, h_old)

    c = tl.load(c_ptrs, mask=mask, other=other)
    i_in, f_in, g_in, o_in = load_gates(gate_ptrs, H, mask, other)
    slot = 0  # of the two halves of the exchange, the one that this step reads
    for step in tl.range(0, steps, disable_licm=not HOIST):
        gates = product(w, x_ptrs + slot * exchange_size, K_SIZES, K_STARTS, AT_ONCE, PRECISION)
        i, f, g, o = split_gates(gates, UNITS, ROWS)
        if reset_ptr is not None:
            c = tl.where(reset, reset_c, c)
        i_in, f_in, g_in, o_in = i_in.to(tl.float32), f_in.to(tl.float32), g_in.to(tl.float32), o_in.to(tl.float32)
        if weight_ph_ptr is not None:
            i_in, f_in = i_in + peep_i * c, f_in + peep_f * c
        i = sigmoid(i + i_in, APPROX)
        f = sigmoid(f + f_in, APPROX)
        g = tanh(g + g_in, APPROX)
        c_new = f * c + i * g
        if weight_ph_ptr is not None:
            o_in += peep_o * c_new
        o = sigmoid(o + o_in, APPROX)
        h = (o * tanh(c_new, APPROX)).to(output_ptr.dtype.element_ty)
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
            store_gates(gate_ptrs, H, i, f, g, o, mask)
        gate_ptrs += tl.where(
            step + 1 < steps, 4 * step_size, 0
        )  # after the last step it is read once more, for nothing
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
            reset_next = tl.load(reset_ptrs, mask=reset_mask, other=0) != 0
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
    gates, parameters, conditions = walk.gates, walk.parameters, walk.conditions
    directions, steps, batch_size, hidden_size = *gates.shape[:3], gates.size(3) // 4
    entered = walk.h0
    reset, reset_h, reset_c = conditions[0].reset, conditions[0].reset_h, conditions[0].reset_c
    if reset is not None:
        at_first = torch.stack([reset[-1 if reverse else 0] for reverse in walk.reverse])
        entered = torch.where(at_first[:, :, None], reset_h, entered)
    recurrent_mask = _stacked([c.recurrent_mask for c in conditions])
    if recurrent_mask is not None:
        entered = entered * recurrent_mask
    exchange = gates.new_zeros(directions, 2, config.batch_tiles * config.rows, sum(config.forward_k))
    exchange[:, 0, :batch_size, :hidden_size].copy_(entered)
    zoneouts = [_zoneout([getattr(c, name) for c in conditions]) for name in ("zoneout_h", "zoneout_c")]
    (zoneout_h, zoneout_h_mask, zoneout_h_rate), (zoneout_c, zoneout_c_mask, zoneout_c_rate) = zoneouts
    weights = [p.weight_hh.contiguous() for p in parameters]
    tensors = {
        "gates_ptr": gates,
        "weight_ptr": weights[0],
        "second_weight_ptr": weights[1] if directions > 1 else None,
        "exchange_ptr": exchange,
        "output_ptr": walk.output,
        "c_ptr": walk.c,
        "counter_ptr": gates.new_zeros(config.batch_tiles, directions, dtype=torch.int32),
        "h0_ptr": walk.h0 if zoneout_h is not None else None,
        "weight_ph_ptr": _stacked([p.weight_ph for p in parameters]),
        "recurrent_mask_ptr": recurrent_mask,
        "zoneout_h_ptr": zoneout_h_mask,
        "zoneout_c_ptr": zoneout_c_mask,
        "reset_ptr": None if reset is None else reset.contiguous().view(torch.uint8),
        "reset_h_ptr": None if reset is None else reset_h.contiguous(),
        "reset_c_ptr": None if reset is None else reset_c.contiguous(),
        "entered_ptr": walk.entered if walk.save else None,
    }
    backwards = sum(reverse << d for d, reverse in enumerate(walk.reverse))
    masked = persistent_launch.is_masked(config, hidden_size, batch_size)
    constants = forward_tiling(config, hidden_size, masked) | {
        "OUTPUT_PITCH": walk.output.stride(1),
        "SAVE": walk.save,
        "ZONEOUT_H": zoneout_h,
        "ZONEOUT_C": zoneout_c,
        "PRECISION": "tf32",
        "APPROX": gates.dtype == torch.bfloat16,
    }
    in_order = [tensors[name] for name in forward_kernel.arg_names if name.endswith("_ptr")]
    sizes = (steps, batch_size, backwards, zoneout_h_rate, zoneout_c_rate)
    persistent_launch.launch(forward_kernel, config, in_order, sizes, constants)


def _stacked(of_each: list[Tensor | None]) -> Tensor | None:
    """(D, ...), contiguous; None where the directions have none."""
    if of_each[0] is None:
        return None
    return of_each[0].contiguous()[None] if len(of_each) == 1 else torch.stack(of_each)


def _zoneout(of_each: list[Tensor | float | None]) -> tuple[str | None, Tensor | None, float]:
    """The kernel's flag, the masks (D, T, N, H) in bytes, and the rate, which is the same in all directions."""
    if isinstance(of_each[0], Tensor):
        return "mask", _stacked(of_each).view(torch.uint8), 0.0
    return (None, None, 0.0) if of_each[0] is None else ("rate", None, of_each[0])
