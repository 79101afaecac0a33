"""The timer and the order of the contenders, on a clock of the test's own."""

import pytest

from fused_lstm.bench.timing import ClockTimer, Timing, round_robin


class FakeClock:
    """A clock that stands still but for the steps that move it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def step(self, *seconds):
        """A step that takes each of seconds in turn, the last one for ever."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def nothing(_):
    pass


def no_error(name, error):
    raise AssertionError(name) from error


def test_clock_timer_gives_seconds_a_step():
    clock = FakeClock()
    assert ClockTimer(clock)(clock.step(1.0, 2.0, 6.0), 3) == pytest.approx(3.0)


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 30.0), 7)
    assert timing.median == 4.0
    assert timing.to_json() == {
        "median_s": 4.0,
        "lower_quartile_s": 2.0,
        "upper_quartile_s": 5.0,
        "min_s": 1.0,
        "samples_s": [5.0, 1.0, 2.0, 4.0, 30.0],
        "steps_per_sample": 7,
    }


def test_one_sample_has_no_quartiles():
    json = Timing((2.0,), 1).to_json()
    assert (json["median_s"], json["lower_quartile_s"], json["upper_quartile_s"]) == (2.0, None, None)


def test_round_robin_takes_turns_and_leaves_warm_up_out():
    clock, turns = FakeClock(), []
    # a: warm-up of two steps, calibration, then the samples; the slow first steps must not be seen
    steps = {"a": clock.step(90.0, 80.0, 1.0, 1.0, 3.0, 2.0), "b": clock.step(70.0, 60.0, 5.0, 7.0, 8.0, 9.0)}
    timings = round_robin(steps, ClockTimer(clock), repeats=3, warmup=2, on_turn=turns.append, on_error=no_error)
    assert turns == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert timings["a"].samples == pytest.approx((1.0, 3.0, 2.0))
    assert timings["a"].median == pytest.approx(2.0)
    assert timings["b"].samples == pytest.approx((7.0, 8.0, 9.0))


@pytest.mark.parametrize(("seconds", "count"), [(0.5, 1), (0.01, 2), (0.004, 5), (1e-6, 100)])
def test_a_sample_fills_its_time_with_steps(seconds, count):
    clock = FakeClock()
    timings = round_robin(
        {"a": clock.step(seconds)},
        ClockTimer(clock),
        repeats=2,
        warmup=1,
        sample_seconds=0.02,
        on_turn=nothing,
        on_error=no_error,
    )
    assert timings["a"].steps_per_sample == count
    assert timings["a"].samples == pytest.approx((seconds, seconds), rel=1e-6)


@pytest.mark.parametrize("good_steps", [0, 1, 2, 3], ids=["warm-up", "calibration", "first round", "second round"])
def test_one_that_raises_drops_out_and_the_others_go_on(good_steps):
    clock, failures = FakeClock(), []
    left = good_steps

    def broken():
        nonlocal left
        if left == 0:
            raise RuntimeError("out of order")
        left -= 1
        clock.now += 1.0

    timings = round_robin(
        {"broken": broken, "sound": clock.step(2.0)},
        ClockTimer(clock),
        repeats=3,
        warmup=1,
        on_turn=nothing,
        on_error=lambda name, error: failures.append((name, str(error))),
    )
    assert failures == [("broken", "out of order")]
    assert list(timings) == ["sound"]
    assert timings["sound"].samples == (2.0, 2.0, 2.0)
