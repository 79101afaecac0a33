"""What layer norms must know of all rows before the way back: one kernel for all time steps at once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels.configs import cell_config
from fused_lstm.kernels.norms import EPS, sums_of_2, sums_of_4
from fused_lstm.kernels.persistent_recall import activated, before_activation, by_c, normalized
from fused_lstm.kernels.persistent_sums import PITCHES, along_and_across
from fused_lstm.kernels.persistent_tiles import load_four, load_peepholes


@triton.jit
def _squares(x, mean, inside):
    deviation = tl.where(inside, x - mean, 0.0)
    return deviation * deviation


@triton.jit
def _scale(squares, SIZE: tl.constexpr):
    return tl.rsqrt(squares / SIZE + EPS)


# Means and scales of rows that are zero where not inside. All sums of a pass cross the warps together.


@triton.jit
def _moments(x, inside, H: tl.constexpr):
    mean = tl.sum(x) / H
    return mean, _scale(tl.sum(_squares(x, mean, inside)), H)


@triton.jit
def _moments_of_each(x, inside, H: tl.constexpr):
    """Of four gates."""
    i, f, g, o = sums_of_4(x[0], x[1], x[2], x[3])
    means = (i / H, f / H, g / H, o / H)
    i, f, g, o = sums_of_4(
        _squares(x[0], means[0], inside),
        _squares(x[1], means[1], inside),
        _squares(x[2], means[2], inside),
        _squares(x[3], means[3], inside),
    )
    return means, (_scale(i, H), _scale(f, H), _scale(g, H), _scale(o, H))


@triton.jit
def _squares_of_all(x, mean, inside):
    return (_squares(x[0], mean, inside) + _squares(x[1], mean, inside)) + (
        _squares(x[2], mean, inside) + _squares(x[3], mean, inside)
    )


@triton.jit
def _moments_of_both(x, y, inside, H: tl.constexpr):
    """Of all four gates of x, and of y."""
    x_mean, y_mean = sums_of_2((x[0] + x[1]) + (x[2] + x[3]), (y[0] + y[1]) + (y[2] + y[3]))
    means = (x_mean / (4 * H), y_mean / (4 * H))
    x_squares, y_squares = sums_of_2(_squares_of_all(x, means[0], inside), _squares_of_all(y, means[1], inside))
    return means, (_scale(x_squares, 4 * H), _scale(y_squares, 4 * H))


@triton.jit(do_not_specialize=["rows", "batch_size", "backwards"])
def statistics_kernel(
    gates_ptr,  # (D, rows, 4H), rows = T * N
    product_ptr,  # (D, rows, 4H), or None
    c_ptr,  # (D, rows + N, H) float32
    norm_weight_ptr,  # (D, 4H)
    norm_hh_weight_ptr,  # (D, 4H), or None
    norm_bias_ptr,  # (D, 4H), or None
    weight_ph_ptr,  # (D, 3H), or None
    reset_ptr,  # (rows,) uint8, or None
    reset_c_ptr,  # (N, H), or None
    statistics_ptr,  # (D, rows, 4, PITCH) float32: written
    rows,
    batch_size,
    backwards,  # as in the walk
    H: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    BLOCK: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    APPROX: tl.constexpr,
):
    direction = tl.program_id(1).to(tl.int64)  # int64: rows * 4 * H can pass 2**31
    unit = tl.arange(0, BLOCK)
    inside = unit < H
    gate_vector = direction * 4 * H + unit
    weight = load_four(norm_weight_ptr + gate_vector, H, inside, 0.0)
    hh_weight = weight
    if norm_hh_weight_ptr is not None:
        hh_weight = load_four(norm_hh_weight_ptr + gate_vector, H, inside, 0.0)
    bias = None
    if norm_bias_ptr is not None:
        bias = load_four(norm_bias_ptr + gate_vector, H, inside, 0.0)
    peep = load_peepholes(weight_ph_ptr, direction, unit, inside, 0.0, H)
    back = (backwards >> tl.program_id(1)) & 1
    place = tl.arange(0, 4 * PITCH)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        at = direction * rows + row
        x = load_four(gates_ptr + at * (4 * H) + unit, H, inside, 0.0)
        before = direction * (rows + batch_size) + row + back * batch_size
        c_before = tl.load(c_ptr + before * H + unit, mask=inside, other=0.0)
        if reset_ptr is not None:
            reset_c = tl.load(reset_c_ptr + (row % batch_size) * H + unit, mask=inside, other=0.0).to(tl.float32)
            c_before = tl.where(tl.load(reset_ptr + row) != 0, reset_c, c_before)
        if LAYER_NORM == "gates":
            means, scales = _moments_of_each(x, inside, H)
            normal = normalized(x, means, scales)
            hh_normal = normal
        else:
            hh = load_four(product_ptr + at * (4 * H) + unit, H, inside, 0.0)
            means, scales = _moments_of_both(x, hh, inside, H)
            normal = normalized(x, means[:1], scales[:1])
            hh_normal = normalized(hh, means[1:], scales[1:])
        pre = before_activation(normal, hh_normal, weight, hh_weight, bias, LAYER_NORM)
        i, f, g, c = activated(pre, c_before, peep, APPROX)  # zero beyond H, where g is
        c_mean, c_scale = _moments(c, inside, H)
        normal_c = (c - c_mean) * c_scale
        by = by_c(i, f, g, c_before)
        if LAYER_NORM == "gates":
            moments = means + scales + (c_mean, c_scale)
            factors = (c_scale / H, scales[0] / H, scales[1] / H, scales[2] / H, scales[3] / H)
            terms = along_and_across(by[:1], weight[:1], normal[:1])
            terms = terms + along_and_across(by[1:2], weight[1:2], normal[1:2])
            terms = terms + along_and_across(by[2:], weight[2:3], normal[2:3])
        else:
            moments = (means[0], scales[0], means[1], scales[1], c_mean, c_scale)
            factors = (c_scale / H, scales[0] / (4 * H), scales[1] / (4 * H))
            terms = along_and_across(by, weight, normal) + along_and_across(by, hh_weight, hh_normal)
        statistics = tl.zeros((4 * PITCH,), tl.float32)
        for k in tl.static_range(0, len(terms), 2):
            a, b, next_a, next_b = sums_of_4(terms[k], terms[k] * normal_c, terms[k + 1], terms[k + 1] * normal_c)
            statistics = tl.where(place == 2 + k, a, statistics)
            statistics = tl.where(place == 3 + k, next_a, statistics)
            statistics = tl.where(place == PITCH + 2 + k, b, statistics)
            statistics = tl.where(place == PITCH + 3 + k, next_b, statistics)
        for k in tl.static_range(len(factors)):
            statistics = tl.where(place // 2 == PITCH + k, factors[k], statistics)
        for k in tl.static_range(len(moments)):
            statistics = tl.where(place == 3 * PITCH + k, moments[k], statistics)
        tl.store(statistics_ptr + at * (4 * PITCH) + place, statistics)


ROWS = 8  # of a program, which loads the parameters once for all of them


def walk_statistics(walk: Any, options: dict[str, Tensor | None], backwards: int) -> Tensor:
    """(D, T, N, 4, PITCH) float32: of each row what persistent_sums.py says.

    Args:
        walk: a `fused_lstm.recurrence.Walk` as its forward left it
        options: the tensors of `persistent_options.options_of`
        backwards: bit d: direction d walks from the last step to the first
    """
    directions, steps, batch_size, gate_size = walk.gates.shape
    hidden_size = gate_size // 4
    statistics = walk.c.new_empty(directions, steps, batch_size, 4, PITCHES[walk.layer_norm])
    tensors = options | {
        "gates_ptr": walk.gates,
        "product_ptr": walk.product,
        "c_ptr": walk.c,
        "statistics_ptr": statistics,
    }
    config = cell_config(walk.layer_norm, hidden_size)
    statistics_kernel[triton.cdiv(steps * batch_size, ROWS), directions](
        *(tensors[name] for name in statistics_kernel.arg_names if name.endswith("_ptr")),
        steps * batch_size,
        batch_size,
        backwards,
        H=hidden_size,
        PITCH=PITCHES[walk.layer_norm],
        ROWS=ROWS,
        BLOCK=config.block,
        LAYER_NORM=walk.layer_norm,
        APPROX=walk.gates.dtype == torch.bfloat16,
        num_warps=config.num_warps,
    )
    return statistics
