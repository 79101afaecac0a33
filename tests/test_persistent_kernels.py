"""The persistent kernels, every program of a grid alive at once, against the reference."""

import functools
import time

import concurrent_interpreter
import pytest
import torch
from concurrent_interpreter import Deadlock, launch_concurrently
from tolerance import assert_as_accurate

from fused_lstm import reference
from fused_lstm.kernels import persistent, persistent_backward, persistent_forward, persistent_launch

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture
def grids(monkeypatch):
    """The grids that were launched, their programs side by side, for at most a minute."""
    launched = []

    def launch(kernel, config, tensors, sizes, constants):
        launched.append((config.programs, config.batch_tiles))
        launch_concurrently(kernel, (*launched[-1], 1), *tensors, *sizes, **constants)

    monkeypatch.setattr(persistent_launch, "launch", launch)
    return launched


def make_inputs(steps, batch_size, hidden_size, dtype, device, lengths=None):
    """gates, h0, c0, weight_hh; d_output, d_h_n, d_c_n: random, in float64 and in dtype, equal in value."""
    generator = torch.Generator().manual_seed(steps * 1000 + batch_size * 100 + hidden_size)
    state = (batch_size, hidden_size)
    shapes = [(steps, batch_size, 4 * hidden_size), state, state, (4 * hidden_size, hidden_size)]
    shapes += [(steps, *state), state, state]
    rounded = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    rounded[3] = (rounded[3] / hidden_size**0.5).to(dtype)
    if lengths is not None:
        rounded[4][torch.arange(steps)[:, None] >= lengths] = 0
    rounded = [tensor.to(device) for tensor in rounded]
    return rounded, [tensor.double() for tensor in rounded]


def run(backend, inputs, lengths, reverse, with_d_output=True):
    """Activated gates, output, c, then d_gates, d_h0, d_c0, all from one backend."""
    gates, h0, c0, weight_hh, d_output, d_h_n, d_c_n = inputs
    gates = gates.clone()
    output, c = backend.recurrence_forward(gates, h0, c0, weight_hh, None, reverse, True)
    d_output = d_output if with_d_output else None
    gradients = backend.recurrence_backward(d_output, d_h_n, d_c_n, gates, c, weight_hh, None, lengths, reverse)
    assert gradients[3:] == (None, None)
    return gates, output, c, *gradients[:3]


def check(inputs, lengths=None, reverse=False, with_d_output=True):
    same_dtype, float64 = inputs
    exact = run(reference, float64, lengths, reverse, with_d_output)
    rounded = run(reference, same_dtype, lengths, reverse, with_d_output)
    actual = run(persistent, same_dtype, lengths, reverse, with_d_output)
    for result, same, true in zip(actual, rounded, exact, strict=True):
        assert_as_accurate(result, same, true)


@pytest.mark.parametrize(
    ("steps", "batch_size", "hidden_size", "expected"),
    [
        (3, 13, 40, (1, 1)),  # one program waits for nobody
        (4, 13, 100, (8, 1)),  # tiles reach beyond N and H; two steps of each parity
        (2, 18, 128, (8, 2)),  # the second batch tile is ragged
        (1, 16, 65, (8, 1)),  # one step, no wait
    ],
)
def test_matches_the_reference(steps, batch_size, hidden_size, expected, grids, device):
    check(make_inputs(steps, batch_size, hidden_size, torch.float32, device))
    assert grids == [expected, expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference_in_two_bytes(dtype, grids, device):
    check(make_inputs(3, 13, 100, dtype, device))
    assert len(grids) == 2


def test_matches_the_reference_in_reverse(grids, device):
    check(make_inputs(3, 13, 100, torch.float32, device), reverse=True)
    assert len(grids) == 2


def test_matches_the_reference_with_lengths(grids, device):
    lengths = torch.tensor([3, 1, 2])
    check(make_inputs(3, 3, 100, torch.float32, device, lengths), lengths.to(device))
    assert len(grids) == 2


def test_matches_the_reference_from_final_states_alone(grids, device):
    check(make_inputs(2, 13, 100, torch.float32, device), with_d_output=False)
    assert len(grids) == 2


@pytest.mark.parametrize("hidden_size", [40, 100])
def test_without_saving_the_results_are_the_same(hidden_size, grids, device):
    (gates, h0, c0, weight_hh, *_), _ = make_inputs(3, 2, hidden_size, torch.float32, device)
    output, c = persistent.recurrence_forward(gates.clone(), h0, c0, weight_hh, None, False, True)
    output_alone, c_alone = persistent.recurrence_forward(gates.clone(), h0, c0, weight_hh, None, False, False)
    torch.testing.assert_close(output_alone, output, rtol=0, atol=0)
    torch.testing.assert_close(c_alone, c[-1:], rtol=0, atol=0)
    assert len(grids) == 2


def test_an_empty_batch_launches_nothing(grids, device):
    (gates, h0, c0, weight_hh, *gradients), _ = make_inputs(3, 0, 100, torch.float32, device)
    output, c = persistent.recurrence_forward(gates, h0, c0, weight_hh, None, False, True)
    d_gates, d_h0, d_c0, *_ = persistent.recurrence_backward(*gradients, gates, c, weight_hh, None, None, False)
    assert [t.shape for t in (output, c, d_gates)] == [(3, 0, 100), (4, 0, 100), (3, 0, 400)]
    assert d_h0.shape == d_c0.shape == (0, 100)
    assert grids == []


def skip_call(function, skipped):
    """function, but each skipped-th of every two calls does nothing."""
    calls = 0

    @functools.wraps(getattr(function, "fn", function))
    def sometimes(*args):
        nonlocal calls
        calls += 1
        if calls % 2 != skipped:
            function(*args)

    return sometimes


def nothing(*_args):
    pass


@pytest.fixture
def late_program(monkeypatch):
    """Program (0, 0) starts a little late: who does not wait for it is ahead of it for certain."""
    run_program = concurrent_interpreter._run_program

    def run_late(kernel, index, *rest):
        if index == (0, 0, 0):
            time.sleep(1)
        run_program(kernel, index, *rest)

    monkeypatch.setattr(concurrent_interpreter, "_run_program", run_late)


@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize("slow", [1, 3, 6])
def test_nobody_runs_ahead_of_a_slow_product(slow, monkeypatch):
    """A program is slow between its two arrivals of a step: the faster ones' next arrivals must not count as its."""
    run_program, product = concurrent_interpreter._run_program, persistent_backward.product
    running = []

    def run_noted(kernel, index, *rest):
        running.append(index[0])
        run_program(kernel, index, *rest)

    def product_slowed(*args):
        if running == [slow]:
            time.sleep(0.5)
        return product(*args)

    monkeypatch.setattr(concurrent_interpreter, "_run_program", run_noted)
    monkeypatch.setattr(persistent_backward, "product", product_slowed)
    check(make_inputs(3, 13, 100, torch.float32, "cpu"))


@pytest.fixture
def short_patience(monkeypatch):
    """Five seconds are enough for a grid of this size that does end."""

    def launch(kernel, config, tensors, sizes, constants):
        grid = (config.programs, config.batch_tiles, 1)
        launch_concurrently(kernel, grid, *tensors, *sizes, **constants, timeout=5)

    monkeypatch.setattr(persistent_launch, "launch", launch)


@pytest.mark.parametrize("direction", ["forward", "backward d_gates", "backward partial sums"])
@pytest.mark.usefixtures("grids", "late_program")
def test_a_missing_wait_shows(direction, monkeypatch):
    inputs = make_inputs(3, 2, 100, torch.float32, "cpu")
    if direction == "forward":
        monkeypatch.setattr(persistent_forward, "wait", nothing)
    else:
        skipped = 1 if direction == "backward d_gates" else 0
        monkeypatch.setattr(persistent_backward, "wait", skip_call(persistent_backward.wait, skipped))
    with pytest.raises(AssertionError, match="error"):
        check(inputs)


@pytest.mark.parametrize("direction", ["forward", "backward d_gates", "backward partial sums"])
@pytest.mark.usefixtures("short_patience")
def test_a_missing_arrival_is_a_deadlock(direction, monkeypatch):
    inputs = make_inputs(3, 2, 100, torch.float32, "cpu")
    if direction == "forward":
        monkeypatch.setattr(persistent_forward, "arrive", nothing)
    else:
        skipped = 1 if direction == "backward d_gates" else 0
        monkeypatch.setattr(persistent_backward, "arrive", skip_call(persistent_backward.arrive, skipped))
    with pytest.raises(Deadlock, match="programs still wait"):
        check(inputs)


def test_the_interpreter_alone_refuses_programs_that_wait(device):
    (gates, h0, c0, weight_hh, *_), _ = make_inputs(2, 2, 100, torch.float32, device)
    with pytest.raises(RuntimeError, match="one program after another"):
        persistent.recurrence_forward(gates, h0, c0, weight_hh, None, False, True)
