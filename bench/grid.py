"""The cases that a visit to a GPU measures, the most telling first."""

from collections.abc import Iterable
from dataclasses import replace

from fused_lstm.bench.variants import PLAIN, VARIANTS
from fused_lstm.bench.workload import Case

_STEPS = 512


def telling_cases(device: str) -> list[Case]:
    """What most people train: one layer in bfloat16 and in TF32, two widths, two batches."""
    return [
        Case(hidden, batch, _STEPS, dtype=dtype, device=device)
        for dtype in ("bfloat16", "float32")
        for hidden in (512, 1024)
        for batch in (16, 64)
    ]


def grid_cases(device: str) -> list[Case]:
    """Everything else a user may ask about: first each variation of the telling cases, then sizes, then the variants of
    the cell."""
    middle = [Case(hidden, batch, _STEPS, dtype="bfloat16", device=device) for hidden, batch in ((512, 16), (1024, 64))]
    variations = ({}, {"dtype": "float16"}, {"dtype": "float32", "tf32": False}, {"bidirectional": True}, {"layers": 2})
    sizes = [
        Case(hidden, batch, _STEPS, dtype=dtype, device=device)
        for dtype in ("bfloat16", "float32")
        for batch in (16, 64, 128, 1)
        for hidden in (512, 1024, 256, 768)
    ]
    cases = [replace(case, **variation) for variation in variations for case in middle]
    variants = [
        Case(hidden, 64, _STEPS, dtype="bfloat16", device=device, variant=name)
        for name in VARIANTS
        if name != PLAIN
        for hidden in (512, 1024)
    ]
    return list(dict.fromkeys([*cases, *sizes, *variants]))


def tiny(cases: Iterable[Case]) -> list[Case]:
    """The same variety in sizes that take milliseconds on a CPU: for trying the way, not for numbers."""
    small = (replace(case, hidden_size=64 if case.hidden_size <= 512 else 128, batch_size=4, steps=4) for case in cases)
    return list(dict.fromkeys(small))
