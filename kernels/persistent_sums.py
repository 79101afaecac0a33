"""The sums over a row of units that layer norms need on the way back, which no program has alone.

With n what a norm made of x, and w its weight, the gradient of x is scale * (d - sum(d) / size - n * sum(d * n) / size)
for d = w times the gradient behind the norm. So the programs of a row exchange two sums for each norm: those of c's
norm; then, since they need c's gradient, those of the gates' four, or of both projections'. Means and deviations they
need not exchange: the forward left them. One buffer serves all steps: between a program's reading of it and another's
storing into it again all programs have met.

The sums of a row lie beside each other, norm after norm, in a tile [LANES, ROWS]: of 16 rows over and over, since all
lanes get them anyway; of more rows those of all programs in turn, until they are picked. Everything else is elementwise
on tiles [UNITS, ROWS]. A tuple of four is of the gates i, f, g, o.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(16)  # as many as a program has units, so that a tile of sums lies as one of units
CELL_SUMS = 4  # of c's norm, each twice: then their programs come in fours
GATE_SUMS = {"gates": 8, "projections": 4, "projections_cell": 4}


@triton.jit
def along_and_across(d, normal):
    """Summed over some gates: the gradients, times their weights; and these times the normalised values."""
    along = d[0]
    across = d[0] * normal[0]
    for k in tl.static_range(1, len(d)):
        along += d[k]
        across += d[k] * normal[k]
    return along, across


@triton.jit
def pick(tile, lane: tl.constexpr, COUNT: tl.constexpr = LANES):
    """[1, ROWS]: one lane of a tile [LANES, ROWS], for all to have; of sums, one of COUNT."""
    if tile.shape[1] == 16:  # a row's lanes are neighbours in a warp: one shuffle
        picked = tl.gather(tile, tl.full((1, tile.shape[1]), lane, tl.int32), 0)
    else:
        of_it = tl.arange(0, LANES)[:, None] % COUNT == lane
        picked = tl.sum(tl.where(of_it, tile, 0.0), 0, keep_dims=True)
    return picked


@triton.jit
def sums_of_units(terms):
    """Of each of some tiles [UNITS, ROWS]: [LANES, ROWS]."""
    lane = tl.arange(0, LANES)[:, None]
    if terms[0].shape[0] == LANES and terms[0].shape[1] == 16:
        sums = _folded(_folded(_folded(_folded(terms, lane, 1), lane, 2), lane, 4), lane, 8)[0]
    else:
        sums = tl.zeros((LANES, terms[0].shape[1]), tl.float32)
        for k in tl.static_range(len(terms)):
            sums = tl.where(lane == k, tl.sum(terms[k], 0, keep_dims=True), sums)
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
def store_sums(ptrs, sums, COUNT: tl.constexpr):
    """ptrs: [1, ROWS], of a program's COUNT places in each row; COUNT: the number of sums, or a multiple."""
    lane = tl.arange(0, LANES)[:, None]
    tl.store(ptrs + lane, sums, mask=lane < COUNT)


@triton.jit
def add_programs(ptrs, COUNT: tl.constexpr, PROGRAMS: tl.constexpr):
    """The sums of all programs, [LANES, ROWS], added in the same order by each reader. ptrs: of the first program."""
    lane = tl.arange(0, LANES)[:, None]
    TOGETHER: tl.constexpr = LANES // COUNT  # the lanes of a row share the programs
    sums = tl.load(ptrs + lane, cache_modifier=".cg")
    for program in tl.static_range(TOGETHER, PROGRAMS, TOGETHER):
        sums += tl.load(ptrs + lane + program * COUNT, cache_modifier=".cg")
    if sums.shape[1] == 16:  # and add up what they found
        if TOGETHER > 1:
            sums += tl.gather(sums, tl.broadcast_to(lane ^ 8, sums.shape), 0)
        if TOGETHER > 2:
            sums += tl.gather(sums, tl.broadcast_to(lane ^ 4, sums.shape), 0)
    return sums


@triton.jit
def through_norm(d, sums, FIRST: tl.constexpr, COUNT: tl.constexpr, normal, scale, SIZE: tl.constexpr):
    """The gradients before a norm of SIZE numbers, whose sums are of COUNT those from FIRST on; d: of what it made,
    times its weight."""
    along = pick(sums, FIRST, COUNT) * (1.0 / SIZE)
    across = pick(sums, FIRST + 1, COUNT) * (1.0 / SIZE)
    before = ()
    for k in tl.static_range(len(d)):
        before = before + (scale * (d[k] - along - across * normal[k]),)  # noqa: RUF005
    return before


@triton.jit
def through_each(d, sums, normal, scales, H: tl.constexpr):
    """The gradients before the norms of four gates, each with its own."""
    i = through_norm(d[:1], sums, 0, 8, normal[:1], scales[0], H)
    f = through_norm(d[1:2], sums, 2, 8, normal[1:2], scales[1], H)
    g = through_norm(d[2:3], sums, 4, 8, normal[2:3], scales[2], H)
    o = through_norm(d[3:4], sums, 6, 8, normal[3:4], scales[3], H)
    return i + f + g + o
