"""The sums over a row of units that layer norms need on the way back: of a program, and of all of them.

A norm's gradient needs two sums over a row of units, which no program has. The cell's norm and the gates' would be two
exchanges in each step, one after the other: the gates' sums need c's gradient, and that the cell's sums. But they need
it linearly. With y the part of d_c that is known without the cell's sums S and T,

    d_c = y - scale / H * (S + T * normal_c)          sum(d_c * a) = sum(y * a) - scale / H * (S * A + T * B)

where A = sum(a) and B = sum(a * normal_c) are known from the forward's values alone: so all sums travel at once, and
the statistics kernel computes the A and B of all steps before the walk.

The sums of a row lie beside each other, S and T first; then two for each gate's norm, in the order i, f, g, o, or two
for each projection's, W_ih x before W_hh h. In each pair the first is the sum of gradients, the second of gradients
times normalised values. They take PITCH places. The statistics of a row are four times as many floats: A; B; by what a
sum is multiplied in the end, scale / size; and means and scales (one over a deviation): of the four gates four means
and four scales, or of both projections one of each in turn; then the cell's mean and scale. In the walk they lie in
tiles [LANES, ROWS], in lane after lane of a warp, twice where PITCH is half of LANES.

Everything else is elementwise, on tiles [UNITS, ROWS] in the walk and on rows of units before it: the same functions
serve both. A tuple of four is of the gates i, f, g, o.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(16)  # as many as a program has units, so that a tile of sums lies as one of units
PITCHES = {"gates": 16, "projections": 8, "projections_cell": 8}


@triton.jit
def along_and_across(d, weight, normal):
    """Summed over some gates: the gradients of the normalised values; and those times the normalised values."""
    weighted = d[0] * weight[0]
    along = weighted
    across = weighted * normal[0]
    for k in tl.static_range(1, len(d)):
        weighted = d[k] * weight[k]
        along += weighted
        across += weighted * normal[k]
    return along, across


@triton.jit
def pick(tile, lane: tl.constexpr):
    """[1, ROWS]: one lane of a tile [LANES, ROWS], for all to have."""
    if tile.shape[1] == 16:  # a row's lanes are neighbours in a warp: one shuffle
        picked = tl.gather(tile, tl.full((1, tile.shape[1]), lane, tl.int32), 0)
    else:
        picked = tl.sum(tl.where(tl.arange(0, tile.shape[0])[:, None] == lane, tile, 0.0), 0, keep_dims=True)
    return picked


@triton.jit
def sums_of_row(
    y,  # [UNITS, ROWS]
    d_o,
    d_normal_c,
    by,
    normal,
    hh_normal,
    normal_c,
    parameters,
    LAYER_NORM: tl.constexpr,
    PITCH: tl.constexpr,
):
    """Over the units of a program: [LANES, ROWS]."""
    d = (y * by[0], y * by[1], y * by[2], d_o)
    terms = (d_normal_c, d_normal_c * normal_c)
    if LAYER_NORM == "gates":
        for k in tl.static_range(4):
            terms = terms + along_and_across((d[k],), (parameters[0][k],), (normal[k],))
    else:
        terms = terms + along_and_across(d, parameters[0], normal) + along_and_across(d, parameters[1], hh_normal)
    lane = tl.arange(0, LANES)[:, None]
    if y.shape[0] == LANES and y.shape[1] == 16:
        sums = _folded(_folded(_folded(_folded(terms, lane, 1), lane, 2), lane, 4), lane, 8)[0]
    else:
        sums = tl.zeros((LANES, y.shape[1]), tl.float32)
        for k in tl.static_range(len(terms)):
            sums = tl.where(lane % PITCH == k, tl.sum(terms[k], 0, keep_dims=True), sums)
    return sums


@triton.jit
def _folded(terms, lane, BIT: tl.constexpr):
    """Half as many: of each two terms, the lanes whose numbers lack BIT go on with the first, the others with the
    second, each with the sum of what it has and what the lane has whose number differs in BIT."""
    partner = tl.broadcast_to(lane ^ BIT, terms[0].shape)
    sums = ()
    for k in tl.static_range((len(terms) + 1) // 2):
        if 2 * k + 1 < len(terms):
            second = (lane & BIT) != 0
            kept = tl.where(second, terms[2 * k + 1], terms[2 * k])
            given = tl.where(second, terms[2 * k], terms[2 * k + 1])
        else:
            kept = terms[2 * k]
            given = kept
        sums = sums + (kept + tl.gather(given, partner, 0),)  # noqa: RUF005
    return sums


@triton.jit
def store_sums(ptrs, sums, PITCH: tl.constexpr):
    """ptrs: [LANES, ROWS], the same ones for lanes that hold the same."""
    if PITCH < LANES:
        tl.store(ptrs, sums, mask=tl.arange(0, LANES)[:, None] < PITCH)
    else:
        tl.store(ptrs, sums)


@triton.jit
def add_programs(ptrs, PITCH: tl.constexpr, PROGRAMS: tl.constexpr):
    """The sums of all programs, which lie PITCH apart, added in the same order by each reader."""
    IN_PAIRS: tl.constexpr = PITCH < LANES and ptrs.shape[1] == 16
    lane = tl.arange(0, LANES)[:, None]
    if IN_PAIRS:
        ptrs += lane // PITCH * PITCH
    STEP: tl.constexpr = 2 if IN_PAIRS else 1
    sums = tl.load(ptrs, cache_modifier=".cg")
    for program in tl.static_range(STEP, PROGRAMS, STEP):
        sums += tl.load(ptrs + program * PITCH, cache_modifier=".cg")
    if IN_PAIRS:
        sums += tl.gather(sums, tl.broadcast_to(lane ^ PITCH, sums.shape), 0)
    return sums


@triton.jit
def through_cell(y, sums, normal_c, statistics):
    """The gradient of the new c before its norm; and what the gates' gradients are reduced by, [LANES, ROWS]."""
    a, b, factor = statistics[0], statistics[1], statistics[2]
    along = pick(sums * factor, 0)
    across = pick(sums * factor, 1)
    return y - along - across * normal_c, (sums - along * a - across * b) * factor


@triton.jit
def through_gates(d, reduced, FIRST: tl.constexpr, normal, weight, scales):
    """The gradients before the norm of four gates: each with its own pair of lanes from FIRST on, or all with one."""
    result = ()
    for k in tl.static_range(4):
        if k < len(scales):
            along = pick(reduced, FIRST + 2 * k)
            across = pick(reduced, FIRST + 2 * k + 1)
        result = result + (scales[k % len(scales)] * (d[k] * weight[k]) - along - across * normal[k],)  # noqa: RUF005
    return result
