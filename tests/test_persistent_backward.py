"""The persistent backward kernel, every program of a grid alive at once, against the reference."""

import time
from dataclasses import replace

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
from fused_lstm.reference import LAYER_NORMS

pytest_plugins = ["persistent_grids"]
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

GIVEN = ("d_output", "d_c_all")
OPTIONS = [variant for variant in walks.SINGLE if variant.layer_norm is None]
ALL_OPTIONS = [walks.COMBINED[0]._replace(zoneout=zoneout) for zoneout in ("masks", "rates")]
NORMS = [Variant(layer_norm=name) for name in LAYER_NORMS]


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


@pytest.mark.parametrize("variant", OPTIONS, ids=str)
@pytest.mark.parametrize("reverse", [(True,), (False, True)], ids=str)
def test_options_match_the_reference(reverse, variant, grids, device):
    check(walks.make_inputs(4, 18, 40, variant, reverse=reverse, device=device))
    assert grids == [(1 if variant.d_c_all else 4, 2, len(reverse))]  # with options float32 takes several programs


@pytest.mark.parametrize(
    ("steps", "hidden_size", "reverse", "variant", "dtype"),
    [
        (3, 65, (False, True), ALL_OPTIONS[0], torch.float32),
        (4, 100, (True,), ALL_OPTIONS[1], torch.float32),
        (2, 17, (False,), ALL_OPTIONS[0], torch.bfloat16),
        (1, 17, (False, True), ALL_OPTIONS[1], torch.bfloat16),
    ],
    ids=str,
)
def test_options_match_the_reference_together(steps, hidden_size, reverse, variant, dtype, grids, device):
    check(walks.make_inputs(steps, 13, hidden_size, variant, reverse=reverse, dtype=dtype, device=device))
    assert len(grids) == 1


@pytest.mark.parametrize("variant", NORMS, ids=str)
@pytest.mark.parametrize(
    ("steps", "batch_size", "hidden_size", "reverse", "dtype", "expected"),
    [
        (3, 16, 100, (True,), torch.float32, (8, 1, 1)),  # of the last programs one has four units and some none
        (2, 18, 40, (False, True), torch.float32, (4, 2, 2)),
        (3, 16, 17, (False,), torch.bfloat16, (4, 1, 1)),
    ],
    ids=str,
)
def test_norms_match_the_reference(steps, batch_size, hidden_size, reverse, dtype, expected, variant, grids, device):
    check(walks.make_inputs(steps, batch_size, hidden_size, variant, reverse=reverse, dtype=dtype, device=device))
    assert grids == [expected]


@pytest.mark.parametrize("variant", walks.COMBINED[1:], ids=str)
@pytest.mark.parametrize(("steps", "hidden_size"), [(3, 100), (4, 40)])
def test_norms_match_the_reference_with_all_options(steps, hidden_size, variant, grids, device):
    check(walks.make_inputs(steps, 16, hidden_size, variant, reverse=(True,), device=device))
    assert len(grids) == 1


def test_norms_in_batch_tiles_of_32_rows(grids, device, monkeypatch):
    """Where multiprocessors are few: sums take another way there than through a warp's neighbours."""
    few = replace(persistent_launch.INTERPRETER, multiprocessors=7)
    monkeypatch.setattr(persistent_launch, "INTERPRETER", few)
    check(walks.make_inputs(2, 20, 24, walks.COMBINED[1], dtype=torch.bfloat16, device=device))
    assert grids == [(4, 1, 1)]


@pytest.mark.parametrize("variant", NORMS, ids=str)
def test_statistics_of_a_row_whose_mean_is_large(variant, grids, device):
    """Good to what float32 resolves at the mean's size: from a mean of squares the variance would come out wild."""
    inputs = walks.make_inputs(2, 3, 40, variant, device=device)
    inputs = inputs._replace(gates=inputs.gates + 1000.0)
    float64 = walks.cast(inputs, torch.float64)
    actual = run(persistent_backward, filled(inputs), inputs)["d_gates"]
    exact = run(reference_recurrence, filled(float64), float64)["d_gates"]
    assert (actual.double() - exact).abs().max() < 4 * 1000.0 * torch.finfo(torch.float32).eps
    assert len(grids) == 1


def test_a_norm_of_projections_without_biases(grids, device):
    inputs = walks.make_inputs(2, 32, 40, Variant(layer_norm="projections"), device=device)
    without = (inputs.parameters[0]._replace(bias_ih=None, bias_hh=None),)
    check(inputs._replace(parameters=without))
    assert len(grids) == 1


@pytest.mark.parametrize("layer_norm", [None, "gates"])
def test_gradients_of_reset_states_that_nobody_wants(layer_norm, grids, device):
    inputs = walks.make_inputs(3, 13, 40, Variant(layer_norm=layer_norm, reset=True), device=device)
    walk = filled(inputs)
    wanted = run(persistent_backward, walk, inputs)
    gradients = walks.gradients_of(walk, inputs)._replace(d_reset_h=None, d_reset_c=None)
    persistent_backward.recurrence_backward(walk, gradients)
    for name, value in wanted.items():
        if not name.startswith("d_reset"):
            torch.testing.assert_close(getattr(gradients, name), value, rtol=0, atol=0)
    assert len(grids) == 2


@pytest.mark.parametrize("alone", ["zoneout_h", "zoneout_c"])
@pytest.mark.parametrize("zoneout", ["masks", "rates"])
def test_one_state_zoned_out_alone(zoneout, alone, grids, device):
    inputs = walks.make_inputs(3, 13, 17, Variant(zoneout=zoneout), device=device)
    without = {name: None for name in ("zoneout_h", "zoneout_c") if name != alone}
    check(inputs._replace(conditions=(inputs.conditions[0]._replace(**without),)))
    assert len(grids) == 1


@pytest.mark.parametrize("layer_norm", [None, *LAYER_NORMS])
def test_no_gradient_crosses_a_reset(layer_norm, grids, device):
    """Not even one that is not a number."""
    inputs = walks.make_inputs(3, 2, 40, Variant(layer_norm=layer_norm, reset=True, zoneout="rates"), device=device)
    reset = torch.zeros(3, 2, dtype=torch.bool, device=device)
    reset[2, 0] = True
    inputs = inputs._replace(conditions=(inputs.conditions[0]._replace(reset=reset),))
    walk = filled(inputs)
    clean = run(persistent_backward, walk, inputs)
    d_output = inputs.d_output.clone()
    d_output[2] = torch.nan
    broken = run(persistent_backward, walk, inputs._replace(d_output=d_output))
    for name in ("d_gates", "d_product"):
        torch.testing.assert_close(broken[name][0, :2, 0], clean[name][0, :2, 0], rtol=0, atol=0)
        assert not broken[name][0, :2, 1].isfinite().any()
    for name in ("d_h", "d_c"):
        torch.testing.assert_close(broken[name][0, 0], clean[name][0, 0], rtol=0, atol=0)
    assert not broken["d_reset_h"][0, 0].isfinite().any()
    assert len(grids) == 2


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


@pytest.mark.parametrize("variant", [walks.PLAIN, walks.COMBINED[3]], ids=str)
def test_an_empty_batch_launches_nothing(variant, grids, device):
    inputs = walks.make_inputs(3, 0, 100, variant, device=device)
    for name, value in run(persistent_backward, walks.walk_of(inputs), inputs).items():
        assert value.numel() == 0 or (value == 0).all(), name
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


# of a step's waits, in order, one is left out: (layer norm, how many there are, which one)
WAITS = [
    pytest.param(None, 2, 0, id="for d_gates"),
    pytest.param(None, 2, 1, id="for partial sums"),
    pytest.param("gates", 4, 0, id="for sums of c's norm"),
    pytest.param("gates", 4, 1, id="for sums of the gates' norms"),
    pytest.param("projections", 4, 1, id="for sums of the products' norms"),
    pytest.param("projections", 4, 2, id="for d_gates after them"),
]


@pytest.mark.parametrize(("layer_norm", "waits", "skipped"), WAITS)
@pytest.mark.usefixtures("grids")
def test_a_missing_wait_shows(layer_norm, waits, skipped, skip_call, slow_program):
    slow_program(persistent_backward, "product", "store_gates")
    skip_call(persistent_backward, "wait", skipped, of=waits)
    with pytest.raises(AssertionError, match="error"):
        check(walks.make_inputs(3, 2, 100, Variant(layer_norm=layer_norm)))


@pytest.mark.usefixtures("grids")
def test_nobody_runs_ahead_of_a_slow_program(slow_program):
    slow_program(persistent_backward, "product", "arrive")
    check(walks.make_inputs(3, 16, 100, Variant(layer_norm="gates")))


@pytest.mark.parametrize(("layer_norm", "waits", "skipped"), WAITS)
@pytest.mark.usefixtures("grids")
def test_a_missing_arrival_is_a_deadlock(layer_norm, waits, skipped, skip_call, patience):
    patience.seconds = 5  # enough for a grid of this size that does end
    skip_call(persistent_backward, "arrive", skipped, of=waits)
    with pytest.raises(Deadlock, match="programs still wait"):
        check(walks.make_inputs(3, 2, 100, Variant(layer_norm=layer_norm)))


def test_the_interpreter_alone_refuses_programs_that_wait(device):
    inputs = walks.make_inputs(2, 2, 100, device=device)
    with pytest.raises(RuntimeError, match="one program after another"):
        run(persistent_backward, filled(inputs), inputs)
