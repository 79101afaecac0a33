"""The activations of a gate, in the dtype they are given (float32 or float64).

Exp-based forms that hold at both ends: exp overflows to inf where sigmoid is 0, and 1 / inf is 0; never inf / inf.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
