"""The persistent backward kernel, every program of a grid alive at once, against the reference."""

import time

import concurrent_interpreter
import pytest
import torch
import walks
from concurrent_interpreter import Deadlock
from tolerance import assert_as_accurate
from walks import Variant

from fused_lstm import reference_recurrence
from fused_lstm.kernels import persistent_backward, persistent_launch
from fused_lstm.kernels.devices import KNOWN_DEVICES

pytest_plugins = ["persistent_grids"]
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

GIVEN = ("d_output", "d_c_all")


def filled(inputs):
    """A walk forward, by the reference."""
    walk = walks.walk_of(inputs)
    reference_recurrence.recurrence_forward(walk)
    return walk


def run(backend, walk, inputs):
    """Every buffer that a backend's way back fills."""
    gradients = walks.gradients_of(walk, inputs)
    backend.recurrence_backward(walk, gradients)
    return {name: buffer for name, buffer in gradients._asdict().items() if buffer is not None and name not in GIVEN}


def check(inputs):
    walk = filled(inputs)
    actual = run(persistent_backward, walk, inputs)
    same_dtype = run(reference_recurrence, walk, inputs)
    float64 = walks.cast(inputs, torch.float64)
    exact = run(reference_recurrence, filled(float64), float64)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert_as_accurate(result, same_dtype[name], exact[name])


@pytest.mark.parametrize(
    ("steps", "batch_size", "hidden_size", "reverse", "expected"),
    [
        (3, 13, 40, (False,), (1, 1, 1)),  # one program waits for nobody
        (4, 13, 100, (True,), (8, 1, 1)),  # tiles reach beyond N and H; two steps of each parity
        (2, 18, 128, (False,), (8, 2, 1)),  # the second batch tile is ragged
        (1, 16, 65, (False,), (8, 1, 1)),  # one step
        (3, 18, 40, (False, True), (1, 2, 2)),
        (3, 3, 100, (False, True), (8, 1, 2)),
        (2, 16, 128, (True, True), (8, 1, 2)),
    ],
)
def test_matches_the_reference(steps, batch_size, hidden_size, reverse, expected, grids, device):
    check(walks.make_inputs(steps, batch_size, hidden_size, reverse=reverse, device=device))
    assert grids == [expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference_in_two_bytes(dtype, grids, device):
    check(walks.make_inputs(3, 13, 100, dtype=dtype, device=device))
    assert len(grids) == 1


def test_directions_that_do_not_fit_together_walk_one_after_the_other(grids, device, monkeypatch):
    one = persistent_launch.persistent_config(KNOWN_DEVICES["h100"], 4, 100, 3)
    monkeypatch.setattr(persistent_launch, "persistent_config", lambda *_: one)
    check(walks.make_inputs(3, 3, 100, Variant(d_c_all=True), reverse=(False, True), device=device))
    assert grids == [(8, 1, 1)] * 2


def test_matches_the_reference_from_final_states_alone(grids, device):
    check(walks.make_inputs(2, 13, 100, device=device)._replace(d_output=None))
    assert len(grids) == 1


@pytest.mark.parametrize(("steps", "batch_size"), [(3, 2), (3, 1), (1, 2), (1, 1)])
def test_gradients_of_outputs_may_lie_anyhow(steps, batch_size, device):
    inputs = walks.make_inputs(steps, batch_size, 17, reverse=(False, True), device=device)
    walk, d_output = filled(inputs), inputs.d_output
    expected = run(persistent_backward, walk, inputs)
    wider = torch.full((steps, batch_size, 3, 17), torch.nan, device=device)[:, :, :2].copy_(d_output)
    odd = torch.full((steps, 1, batch_size, 1, 2, 17), torch.nan, device=device)[:, 0, :, 0].copy_(d_output)
    transposed = d_output.transpose(0, 1).contiguous().transpose(0, 1)
    apart = d_output.mT.contiguous().mT
    for view in (wider, odd, transposed, apart):
        for name, value in run(persistent_backward, walk, inputs._replace(d_output=view)).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    ones = torch.ones((), device=device).expand(d_output.shape)
    actual, expected = (run(persistent_backward, walk, inputs._replace(d_output=d)) for d in (ones, ones.clone()))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_of_outputs_are_not_copied_where_rows_only_lie_wider(steps, device):
    wider = torch.zeros(steps, 2, 3, 17, device=device)
    for view in (wider, wider[:, :, :2], wider[:, :, 1:], wider[:, :, :1]):
        assert persistent_backward._evenly_apart(view).data_ptr() == view.data_ptr()


def test_an_empty_batch_launches_nothing(grids, device):
    inputs = walks.make_inputs(3, 0, 100, device=device)
    run(persistent_backward, walks.walk_of(inputs), inputs)
    assert grids == []


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
    check(walks.make_inputs(3, 13, 100))


WAITS = [pytest.param(0, id="for d_gates"), pytest.param(1, id="for partial sums")]


@pytest.mark.parametrize("skipped", WAITS)
@pytest.mark.usefixtures("grids", "late_program")
def test_a_missing_wait_shows(skipped, skip_call):
    skip_call(persistent_backward, "wait", skipped, of=2)
    with pytest.raises(AssertionError, match="error"):
        check(walks.make_inputs(3, 2, 100))


@pytest.mark.parametrize("skipped", WAITS)
@pytest.mark.usefixtures("grids")
def test_a_missing_arrival_is_a_deadlock(skipped, skip_call, patience):
    patience.seconds = 5  # enough for a grid of this size that does end
    skip_call(persistent_backward, "arrive", skipped, of=2)
    with pytest.raises(Deadlock, match="programs still wait"):
        check(walks.make_inputs(3, 2, 100))


def test_the_interpreter_alone_refuses_programs_that_wait(device):
    inputs = walks.make_inputs(2, 2, 100, device=device)
    with pytest.raises(RuntimeError, match="one program after another"):
        run(persistent_backward, filled(inputs), inputs)
