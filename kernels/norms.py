"""Layer norm inside a kernel whose program holds a whole row of units in registers.

Statistics take two passes over the registers, the mean first: a mean of squares alone would lose the variance of a row
whose mean is large.

mask: where the row is. Past it what is to be normalised must be zero, and is zero afterwards. share: 1 / H.
d…: gradients of normalised values, before their weight; zero past the row. What is returned for them is not.
"""

import triton
import triton.language as tl

from fused_lstm.kernels.interpretation import INTERPRETED

EPS = tl.constexpr(1e-5)
# Several sums at once cross the warps together, behind the same barriers. (The interpreter would walk through such a
# reduction element by element; a plain sum it hands to NumPy.)
_TOGETHER = tl.constexpr(not INTERPRETED)


@triton.jit
def _add_2(a, b, a2, b2):
    return a + a2, b + b2


@triton.jit
def _add_4(a, b, c, d, a2, b2, c2, d2):
    return a + a2, b + b2, c + c2, d + d2


@triton.jit
def _add_8(a, b, c, d, e, f, g, h, a2, b2, c2, d2, e2, f2, g2, h2):
    return a + a2, b + b2, c + c2, d + d2, e + e2, f + f2, g + g2, h + h2


@triton.jit
def sums_of_2(a, b):
    if _TOGETHER:
        return tl.reduce((a, b), 0, _add_2)
    return tl.sum(a), tl.sum(b)


@triton.jit
def sums_of_4(a, b, c, d):
    if _TOGETHER:
        return tl.reduce((a, b, c, d), 0, _add_4)
    return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d)


@triton.jit
def sums_of_8(a, b, c, d, e, f, g, h):
    if _TOGETHER:
        return tl.reduce((a, b, c, d, e, f, g, h), 0, _add_8)
    return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d), tl.sum(e), tl.sum(f), tl.sum(g), tl.sum(h)


@triton.jit
def normalize(x, mask, share):
    """x over its H units; its mean, and the reciprocal of its deviation."""
    mean = tl.sum(x) * share
    x = tl.where(mask, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x) * share + EPS)
    return x * scale, mean, scale


@triton.jit
def normalize_backward(d, normal, scale, share):
    along, across = sums_of_2(d, d * normal)
    return (d - along * share - normal * (across * share)) * scale


@triton.jit
def normalize_each(i, f, g, o, mask, share):
    """Each of four gates over its own H units; their means; and the reciprocals of their deviations."""
    i_mean, f_mean, g_mean, o_mean = sums_of_4(i, f, g, o)
    i_mean, f_mean, g_mean, o_mean = i_mean * share, f_mean * share, g_mean * share, o_mean * share
    i = tl.where(mask, i - i_mean, 0.0)
    f = tl.where(mask, f - f_mean, 0.0)
    g = tl.where(mask, g - g_mean, 0.0)
    o = tl.where(mask, o - o_mean, 0.0)
    i_sum, f_sum, g_sum, o_sum = sums_of_4(i * i, f * f, g * g, o * o)
    i_scale = tl.rsqrt(i_sum * share + EPS)
    f_scale = tl.rsqrt(f_sum * share + EPS)
    g_scale = tl.rsqrt(g_sum * share + EPS)
    o_scale = tl.rsqrt(o_sum * share + EPS)
    means, scales = (i_mean, f_mean, g_mean, o_mean), (i_scale, f_scale, g_scale, o_scale)
    return i * i_scale, f * f_scale, g * g_scale, o * o_scale, means, scales


@triton.jit
def normalize_each_backward(
    d_i, d_f, d_g, d_o, i, f, g, o, i_scale, f_scale, g_scale, o_scale, share
):  # i, f, g, o: normalised
    i_along, f_along, g_along, o_along, i_across, f_across, g_across, o_across = sums_of_8(
        d_i, d_f, d_g, d_o, d_i * i, d_f * f, d_g * g, d_o * o
    )
    d_i = (d_i - i_along * share - i * (i_across * share)) * i_scale
    d_f = (d_f - f_along * share - f * (f_across * share)) * f_scale
    d_g = (d_g - g_along * share - g * (g_across * share)) * g_scale
    d_o = (d_o - o_along * share - o * (o_across * share)) * o_scale
    return d_i, d_f, d_g, d_o


@triton.jit
def normalize_both(x_i, x_f, x_g, x_o, y_i, y_f, y_g, y_o, mask, share):
    """x and y, each over all its 4H gates; their means; and the reciprocals of their deviations."""
    x_mean, y_mean = sums_of_2((x_i + x_f) + (x_g + x_o), (y_i + y_f) + (y_g + y_o))
    x_mean *= share / 4
    y_mean *= share / 4
    x_i, y_i = tl.where(mask, x_i - x_mean, 0.0), tl.where(mask, y_i - y_mean, 0.0)
    x_f, y_f = tl.where(mask, x_f - x_mean, 0.0), tl.where(mask, y_f - y_mean, 0.0)
    x_g, y_g = tl.where(mask, x_g - x_mean, 0.0), tl.where(mask, y_g - y_mean, 0.0)
    x_o, y_o = tl.where(mask, x_o - x_mean, 0.0), tl.where(mask, y_o - y_mean, 0.0)
    x_sum, y_sum = sums_of_2(
        (x_i * x_i + x_f * x_f) + (x_g * x_g + x_o * x_o), (y_i * y_i + y_f * y_f) + (y_g * y_g + y_o * y_o)
    )
    x_scale, y_scale = tl.rsqrt(x_sum * (share / 4) + EPS), tl.rsqrt(y_sum * (share / 4) + EPS)
    x_i, x_f, x_g, x_o = x_i * x_scale, x_f * x_scale, x_g * x_scale, x_o * x_scale
    y_i, y_f, y_g, y_o = y_i * y_scale, y_f * y_scale, y_g * y_scale, y_o * y_scale
    return x_i, x_f, x_g, x_o, y_i, y_f, y_g, y_o, (x_mean, y_mean), (x_scale, y_scale)


@triton.jit
def normalize_both_backward(
    d_x_i, d_x_f, d_x_g, d_x_o, d_y_i, d_y_f, d_y_g, d_y_o,
    x_i, x_f, x_g, x_o, y_i, y_f, y_g, y_o, x_scale, y_scale, share,
):  # fmt: skip  # x, y: normalised
    x_along, x_across, y_along, y_across = sums_of_4(
        (d_x_i + d_x_f) + (d_x_g + d_x_o),
        (d_x_i * x_i + d_x_f * x_f) + (d_x_g * x_g + d_x_o * x_o),
        (d_y_i + d_y_f) + (d_y_g + d_y_o),
        (d_y_i * y_i + d_y_f * y_f) + (d_y_g * y_g + d_y_o * y_o),
    )
    x_along, x_across, y_along, y_across = (
        x_along * (share / 4), x_across * (share / 4), y_along * (share / 4), y_across * (share / 4),
    )  # fmt: skip
    d_x_i, d_y_i = (d_x_i - x_along - x_i * x_across) * x_scale, (d_y_i - y_along - y_i * y_across) * y_scale
    d_x_f, d_y_f = (d_x_f - x_along - x_f * x_across) * x_scale, (d_y_f - y_along - y_f * y_across) * y_scale
    d_x_g, d_y_g = (d_x_g - x_along - x_g * x_across) * x_scale, (d_y_g - y_along - y_g * y_across) * y_scale
    d_x_o, d_y_o = (d_x_o - x_along - x_o * x_across) * x_scale, (d_y_o - y_along - y_o * y_across) * y_scale
    return d_x_i, d_x_f, d_x_g, d_x_o, d_y_i, d_y_f, d_y_g, d_y_o
