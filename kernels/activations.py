"""The activations of a gate, in the dtype they are given (float32 or float64).

APPROX asks for the hardware's tanh, one instruction, good to 2**-11: enough where the result is rounded to bfloat16.
"""

import triton
import triton.language as tl

from fused_lstm.kernels.interpretation import INTERPRETED

_PTX = tl.constexpr(not INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)

# The hardware's two instructions as they are, each good to 2 units in the last place. What Triton makes of exp and /
# also handles denormal numbers: twice the instructions, for values that a sum with 1 swallows anyway.


@triton.jit
def _exp(x):
    if _PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * _LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def _reciprocal(x):
    if _PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def sigmoid(x, APPROX: tl.constexpr = False):
    if APPROX and _PTX:
        return 0.5 * tanh(0.5 * x, APPROX) + 0.5
    return _reciprocal(1.0 + _exp(-x))  # 0 where exp overflows to inf


@triton.jit
def tanh(x, APPROX: tl.constexpr = False):
    if APPROX and _PTX:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    # By e <= 1 on both sides of 0: never inf / inf, and a quarter of the error of 2 * sigmoid(2 * x) - 1, which loses
    # the last two bits of sigmoid near 0.
    e = _exp(-2.0 * tl.abs(x))
    y = (1.0 - e) * _reciprocal(1.0 + e)
    return tl.where(x < 0, -y, y)
