"""A step of the cell again, on the way back, and what its gradients are multiples of: elementwise, on [UNITS, ROWS].

A tuple of four is of the gates i, f, g, o; peepholes are of i, f, o, or None.
"""

import triton
import triton.language as tl

from fused_lstm.kernels.activations import sigmoid, tanh
from fused_lstm.kernels.persistent_sums import pick


@triton.jit
def normalized(x, means, scales):
    """Four gates, each with its own mean and scale, or with one for all."""
    normal = ()
    for k in tl.static_range(4):
        normal = normal + ((x[k] - means[k % len(means)]) * scales[k % len(means)],)  # noqa: RUF005
    return normal


@triton.jit
def before_activation(normal, hh_normal, weight, hh_weight, bias, LAYER_NORM: tl.constexpr):
    pre = ()
    for k in tl.static_range(4):
        each = normal[k] * weight[k]
        if bias is not None:
            each += bias[k]
        if LAYER_NORM != "gates":
            each += hh_normal[k] * hh_weight[k]
        pre = pre + (each,)  # noqa: RUF005
    return pre


@triton.jit
def activated(pre, c_before, peep, APPROX: tl.constexpr):
    """i, f, g and the new c, before any norm of it; peep: of i, f, o, or None."""
    pre_i, pre_f = pre[0], pre[1]
    if peep is not None:
        pre_i += peep[0] * c_before
        pre_f += peep[1] * c_before
    i = sigmoid(pre_i, APPROX)
    f = sigmoid(pre_f, APPROX)
    g = tanh(pre[2], APPROX)
    return i, f, g, f * c_before + i * g


@triton.jit
def by_c(i, f, g, c_before):
    """What the gradients of the sums of i, f, g are multiples of: of that of c."""
    return g * i * (1.0 - i), c_before * f * (1.0 - f), i * (1.0 - g * g)


@triton.jit
def recalled(i, f, g, o, c_before, c, peep, HIDES_C: tl.constexpr, APPROX: tl.constexpr):
    """What a step's gradients are multiples of: o's of d_h, and c's; those of i, f, g and of c_before, of c's. And c.

    HIDES_C: the c given is not the one that h was made from.
    """
    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    if HIDES_C:
        c = f * c_before + i * g
    tanh_c = tanh(c, APPROX)
    c_by_h = o * (1.0 - tanh_c * tanh_c)
    o_by_h = tanh_c * o * (1.0 - o)
    by = by_c(i, f, g, c_before)
    c_by_c = f
    if peep is not None:
        c_by_h += peep[2] * o_by_h
        c_by_c += peep[0] * by[0] + peep[1] * by[1]
    return o_by_h, c_by_h, by, c_by_c, c


@triton.jit
def recalled_through_norms(
    x,  # four gates: their sums before the norm, or W_ih x
    hh,  # four gates: W_hh h, or None
    c_before,
    moments,  # [LANES, ROWS], in the order of `fused_lstm.recurrence.Walk`
    parameters,  # weight, hh_weight (if there is one), bias: of four gates; cell_weight, cell_bias
    peep,
    LAYER_NORM: tl.constexpr,
    APPROX: tl.constexpr,
):
    """A step again, and what its gradients are multiples of: o's of d_h, and those of the c that is shown; those of
    i, f, g and of c_before, of the new c's. Then the c that went on, what is normalised, and the scales."""
    if LAYER_NORM == "gates":
        means = (pick(moments, 0), pick(moments, 1), pick(moments, 2), pick(moments, 3))
        scales = (pick(moments, 4), pick(moments, 5), pick(moments, 6), pick(moments, 7), pick(moments, 9))
        c_mean = pick(moments, 8)
        normal = normalized(x, means, scales)
        hh_normal = normal  # there is none, and nobody asks
    else:
        means = (pick(moments, 0), pick(moments, 1))
        scales = (pick(moments, 2), pick(moments, 3), pick(moments, 5))
        c_mean = pick(moments, 4)
        normal = normalized(x, means[:1], scales[:1])
        hh_normal = normalized(hh, means[1:], scales[1:2])
    pre = before_activation(normal, hh_normal, parameters[0], parameters[1], parameters[2], LAYER_NORM)
    i, f, g, c = activated(pre, c_before, peep, APPROX)
    normal_c = (c - c_mean) * scales[len(scales) - 1]
    shown = normal_c * parameters[3] + parameters[4]
    if LAYER_NORM == "projections_cell":
        c = shown
    pre_o = pre[3]
    if peep is not None:
        pre_o += peep[2] * c
    o = sigmoid(pre_o, APPROX)
    tanh_c = tanh(shown, APPROX)
    o_by_h = tanh_c * o * (1.0 - o)
    shown_by_h = o * (1.0 - tanh_c * tanh_c)
    by = by_c(i, f, g, c_before)
    c_by_c = f
    if peep is not None:
        c_by_c += peep[0] * by[0] + peep[1] * by[1]
    return o_by_h, shown_by_h, by, c_by_c, c, normal, hh_normal, normal_c, scales
