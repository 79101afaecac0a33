"""What the kernels of a step share: where things lie, and what zoneout does to a state."""

import triton
import triton.language as tl

# First slots of the parameters (slots, H), and of their gradients (N, slots, H): pack_parameters tells of what.
BIAS, CELL_WEIGHT, CELL_BIAS, HH_WEIGHT = (tl.constexpr(slot) for slot in (4, 8, 9, 10))


@triton.jit
def row_offset(step, row, batch_size, width, step_stride, row_stride, APART: tl.constexpr):
    """Of a tensor (T, N, width) whose rows may lie apart, as `rows_arguments` tells; row is int64."""
    if APART == 0:
        return (step.to(tl.int64) * batch_size + row) * width
    return tl.multiple_of(step.to(tl.int64) * step_stride + row * row_stride, APART)


@triton.jit
def load_four(ptrs, mask, hidden_size, dtype: tl.constexpr):
    """Of i, f, g and o, which lie side by side."""
    i = tl.load(ptrs, mask=mask, other=0.0).to(dtype)
    f = tl.load(ptrs + hidden_size, mask=mask, other=0.0).to(dtype)
    g = tl.load(ptrs + 2 * hidden_size, mask=mask, other=0.0).to(dtype)
    o = tl.load(ptrs + 3 * hidden_size, mask=mask, other=0.0).to(dtype)
    return i, f, g, o


@triton.jit
def store_four(ptrs, i, f, g, o, mask, hidden_size):
    tl.store(ptrs, i, mask=mask)
    tl.store(ptrs + hidden_size, f, mask=mask)
    tl.store(ptrs + 2 * hidden_size, g, mask=mask)
    tl.store(ptrs + 3 * hidden_size, o, mask=mask)


# zoneout_ptr: either masks, as bytes, of which a step's begin at offset; or one number, the old value's part in a mix.


@triton.jit
def keep(old, new, zoneout_ptr, offset, mask):
    """A state after zoneout."""
    if zoneout_ptr.dtype.element_ty == tl.uint8:
        return tl.where(tl.load(zoneout_ptr + offset, mask=mask, other=0) != 0, old, new)
    rate = tl.load(zoneout_ptr)
    return rate * old + (1.0 - rate) * new


@triton.jit
def keep_backward(d, zoneout_ptr, offset, mask):
    """The gradient of a state after zoneout: the new value's part, and the old one's."""
    if zoneout_ptr.dtype.element_ty == tl.uint8:
        kept = tl.load(zoneout_ptr + offset, mask=mask, other=0) != 0
        return tl.where(kept, 0.0, d), tl.where(kept, d, 0.0)
    rate = tl.load(zoneout_ptr)
    return (1.0 - rate) * d, rate * d
