"""The statistics of a forward step's layer norms: of a program's own units, and joined over all programs of a row."""

import triton
import triton.language as tl

from fused_lstm.kernels.norms import EPS


@triton.jit
def sum_units(x, own):
    """[1, ROWS]: over the units of a program, or over those of them that own says are there."""
    return tl.sum(x if own is None else tl.where(own, x, 0.0), 0, keep_dims=True)


@triton.jit
def moments(x, own, share):
    """Over the units of a program, [1, ROWS]: the mean and the sum of squared deviations. share: 1 / their number.

    In two passes over registers: from a mean of squares the variance of a row with a large mean would come out wild.
    """
    mean = sum_units(x, own) * share
    x -= mean
    return mean, sum_units(x * x, own)


@triton.jit
def moments_together(i, f, g, o, own, share):
    """Likewise over all four gates of the units."""
    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    mean = sum_units((i + f) + (g + o), own) * (share / 4)
    i, f, g, o = i - mean, f - mean, g - mean, o - mean
    return mean, sum_units((i * i + f * f) + (g * g + o * o), own)


@triton.jit
def store_moments(ptrs, mine, mean, squares, SIZE: tl.constexpr):
    """Into the place that mine [UNITS, 1] says, of the UNITS behind ptrs [UNITS, ROWS].

    So, as a tile of the very shape that c has, they are stored and loaded from the threads that computed them.
    """
    tl.store(ptrs, tl.broadcast_to(mean, ptrs.shape), mask=mine)
    tl.store(ptrs + SIZE, tl.broadcast_to(squares, ptrs.shape), mask=mine)


@triton.jit
def join_moments(ptrs, shares, UNITS: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """All programs' moments, UNITS by UNITS: mean and reciprocal deviation [1, ROWS] of the COUNT numbers they are of.

    shares: of each program in these numbers.
    """
    means = ()
    squares = ()
    for k in tl.static_range(len(shares)):
        means = means + (tl.load(ptrs + k * UNITS, cache_modifier=".cg"),)  # noqa: RUF005
        squares = squares + (tl.load(ptrs + SIZE + k * UNITS, cache_modifier=".cg"),)  # noqa: RUF005
    total = means[0] * shares[0]
    for k in tl.static_range(1, len(shares)):
        total += means[k] * shares[k]
    mean = tl.sum(total, 0, keep_dims=True)
    deviation = means[0] - mean
    total = deviation * deviation * shares[0] + squares[0] * (1.0 / COUNT)
    for k in tl.static_range(1, len(shares)):
        deviation = means[k] - mean
        total += deviation * deviation * shares[k] + squares[k] * (1.0 / COUNT)
    return mean, tl.rsqrt(tl.sum(total, 0, keep_dims=True) + EPS)
