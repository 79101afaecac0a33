"""The activations of a gate, in the dtype they are given (float32 or float64).

Exp-based forms that hold at both ends: exp overflows to inf where sigmoid is 0, and 1 / inf is 0; never inf / inf.
"""

import triton
import triton.language as tl

from fused_lstm.kernels.interpretation import INTERPRETED

_PTX = tl.constexpr(not INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x):
    if _PTX and x.dtype == tl.float32:
        # The hardware's two instructions as they are, each good to 2 units in the last place. What Triton makes of
        # exp and / also handles denormal numbers: twice the instructions, for values that 1 + e swallows anyway.
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -_LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0
