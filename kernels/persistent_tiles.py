"""What both directions of the persistent kernels do with tiles: load and store gates, and multiply by W_hh on chip."""

import triton
import triton.language as tl

from fused_lstm.kernels.interpretation import INTERPRETED

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


@triton.jit
def laid_out_as(x, loaded):
    """x, in the layout of a tile that was loaded, without reading it.

    Nothing else tells the compiler that what becomes of x meets such tiles in the end, and it would convert each result
    on its own, through shared memory.
    """
    if _INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, loaded], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_four(ptrs, H: tl.constexpr, mask, other):
    """Four parts of (…, 4H), in float32."""
    i, f, g, o = load_gates(ptrs, H, mask, other)
    return i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)


@triton.jit
def load_peepholes(weight_ph_ptr, direction, unit, mask, other, H: tl.constexpr):
    """Of i, f, o, in float32; None where there are none."""
    peep = None
    if weight_ph_ptr is not None:
        ptrs = weight_ph_ptr + direction * 3 * H + unit
        i = tl.load(ptrs, mask=mask, other=other).to(tl.float32)
        f = tl.load(ptrs + H, mask=mask, other=other).to(tl.float32)
        o = tl.load(ptrs + 2 * H, mask=mask, other=other).to(tl.float32)
        peep = (i, f, o)
    return peep


@triton.jit
def add_four(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def multiply_four(a, b):
    return a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]
