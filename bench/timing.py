"""How long a step takes: CUDA events or a clock, contenders in turn, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]


class CudaTimer:
    """Times on the GPU's own clock, from the first step's start to the last one's end."""

    def __init__(self, device: torch.device | str) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._stream = torch.cuda.current_stream(device)

    def __call__(self, step: Step, count: int) -> float:
        """Seconds a step, over count steps in a row."""
        self._start.record(self._stream)
        for _ in range(count):
            step()
        self._end.record(self._stream)
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3 / count  # elapsed_time is in milliseconds


class ClockTimer:
    """Times on the host, for work that has ended when its call returns."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def __call__(self, step: Step, count: int) -> float:
        """Seconds a step, over count steps in a row."""
        start = self._clock()
        for _ in range(count):
            step()
        return (self._clock() - start) / count


def timer_for(device: torch.device | str) -> CudaTimer | ClockTimer:
    return CudaTimer(device) if torch.device(device).type == "cuda" else ClockTimer()


@dataclass(frozen=True)
class Timing:
    """Seconds a step, one number a sample; each sample is the mean of steps_per_sample steps in a row."""

    samples: tuple[float, ...]
    steps_per_sample: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def to_json(self) -> dict:
        """Seconds throughout; the quartiles are null where there are fewer than two samples."""
        many = len(self.samples) > 1
        lower, _, upper = statistics.quantiles(self.samples, method="inclusive") if many else (None, None, None)
        return {
            "median_s": self.median,
            "lower_quartile_s": lower,
            "upper_quartile_s": upper,
            "min_s": min(self.samples),
            "samples_s": list(self.samples),
            "steps_per_sample": self.steps_per_sample,
        }


def round_robin(
    steps: Mapping[str, Step],
    timer: Callable[[Step, int], float],
    *,
    repeats: int,
    warmup: int,
    sample_seconds: float = 0.02,
    on_turn: Callable[[str], None],
    on_error: Callable[[str, Exception], None],
) -> dict[str, Timing]:
    """Times every step in turn, round after round, so that a drift of the machine's clock meets all alike.

    A sample runs as many steps in a row as fill sample_seconds: as in training, the host is then ahead of the GPU, and
    the latency of the first launch does not count for every step.

    Args:
        steps: by name
        timer: as `CudaTimer`
        repeats: samples of each
        warmup: steps of each before the first round, at least 1
        sample_seconds: seconds
        on_turn: told the name before each of its turns
        on_error: told the name and what its step raised; it drops out, and the rounds go on

    Returns:
        the timings of those that came through
    """
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {}

    def turn(name: str, count: int) -> float | None:
        on_turn(name)
        try:
            return timer(steps[name], count)
        except Exception as error:
            samples.pop(name, None)
            on_error(name, error)
            return None

    for name in steps:
        seconds = turn(name, warmup)
        seconds = turn(name, 1) if seconds is not None else None
        if seconds is not None:
            counts[name] = max(1, min(100, round(sample_seconds / max(seconds, 1e-9))))
            samples[name] = []
    for _ in range(repeats):
        for name in list(samples):
            seconds = turn(name, counts[name])
            if seconds is not None:
                samples[name].append(seconds)
    return {name: Timing(tuple(values), counts[name]) for name, values in samples.items()}
