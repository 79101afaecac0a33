"""The persistent forward kernel, every program of a grid alive at once, against the reference."""

import pytest
import torch
import walks
from concurrent_interpreter import Deadlock
from tolerance import assert_as_accurate
from walks import PLAIN

from fused_lstm import reference_recurrence
from fused_lstm.kernels import persistent_forward, persistent_launch
from fused_lstm.kernels.devices import KNOWN_DEVICES
from fused_lstm.reference import LAYER_NORMS

pytest_plugins = ["persistent_grids"]
pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poisoned_memory")]

OPTIONS = [variant for variant in walks.SINGLE if variant.layer_norm is None and not variant.d_c_all]
ALL_OPTIONS = [walks.COMBINED[0]._replace(zoneout=zoneout) for zoneout in ("masks", "rates")]
NORMS = [walks.Variant(layer_norm=name) for name in LAYER_NORMS]
BUFFERS = ("gates", "product", "output", "entered", "c")


def run(backend, inputs, save=True):
    """Every buffer of the walk that is there, filled by a backend."""
    walk = walks.walk_of(inputs, save)
    backend.recurrence_forward(walk)
    names = BUFFERS if save else ("output", "c")
    return {name: getattr(walk, name) for name in names if getattr(walk, name) is not None}


def check(inputs, save=True):
    actual = run(persistent_forward, inputs, save)
    same_dtype = run(reference_recurrence, inputs, save)
    exact = run(reference_recurrence, walks.cast(inputs, torch.float64), save)
    for name, result in actual.items():
        assert_as_accurate(result, same_dtype[name], exact[name])


@pytest.mark.parametrize(
    ("steps", "batch_size", "hidden_size", "reverse", "expected"),
    [
        (3, 13, 40, (False,), (1, 1, 1)),  # one program waits for nobody
        (4, 13, 100, (True,), (8, 1, 1)),  # tiles reach beyond N and H; two steps of each parity
        (2, 18, 128, (False,), (8, 2, 1)),  # the second batch tile is ragged
        (1, 16, 65, (False,), (8, 1, 1)),  # one step, no wait
        (3, 18, 40, (False, True), (1, 2, 2)),
        (3, 3, 100, (False, True), (8, 1, 2)),
        (2, 1, 17, (True, True), (1, 1, 2)),
    ],
)
def test_matches_the_reference(steps, batch_size, hidden_size, reverse, expected, grids, device):
    check(walks.make_inputs(steps, batch_size, hidden_size, PLAIN, reverse=reverse, device=device))
    assert grids == [expected]


@pytest.mark.parametrize(("dtype", "hidden_size"), [(torch.float16, 40), (torch.bfloat16, 100)], ids=str)
def test_matches_the_reference_in_two_bytes(dtype, hidden_size, grids, device):
    check(walks.make_inputs(3, 13, hidden_size, PLAIN, dtype=dtype, device=device))
    assert len(grids) == 1


def test_directions_that_do_not_fit_together_walk_one_after_the_other(grids, device, monkeypatch):
    one = persistent_launch.persistent_config(KNOWN_DEVICES["h100"], 4, 100, 3)
    monkeypatch.setattr(persistent_launch, "persistent_config", lambda *_: one)
    check(walks.make_inputs(3, 3, 100, PLAIN, reverse=(False, True), device=device))
    assert grids == [(8, 1, 1)] * 2


@pytest.mark.parametrize("variant", OPTIONS, ids=str)
@pytest.mark.parametrize("reverse", [(True,), (False, True)], ids=str)
def test_options_match_the_reference(reverse, variant, grids, device):
    check(walks.make_inputs(4, 18, 40, variant, reverse=reverse, device=device))
    assert grids == [(4, 2, len(reverse))]  # where the plain cell is one program


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
    check(walks.make_inputs(steps, 3, hidden_size, variant, reverse=reverse, dtype=dtype, device=device))
    assert len(grids) == 1


@pytest.mark.parametrize("variant", NORMS, ids=str)
@pytest.mark.parametrize(
    ("steps", "batch_size", "hidden_size", "reverse", "dtype"),
    [
        (3, 3, 100, (True,), torch.float32),  # of the last programs one has four units and one none
        (3, 18, 40, (False, True), torch.float32),
        (2, 2, 17, (False,), torch.bfloat16),
    ],
)
def test_norms_match_the_reference(steps, batch_size, hidden_size, reverse, dtype, variant, grids, device):
    check(walks.make_inputs(steps, batch_size, hidden_size, variant, reverse=reverse, dtype=dtype, device=device))
    assert len(grids) == 1


@pytest.mark.parametrize(
    ("steps", "batch_size", "reverse", "variant"),
    [(2, 18, (False,), NORMS[0]), (1, 3, (False, True), NORMS[2])],
    ids=str,
)
def test_norms_of_several_batch_tiles_and_directions(steps, batch_size, reverse, variant, grids, device):
    check(walks.make_inputs(steps, batch_size, 65, variant, reverse=reverse, device=device))
    assert grids in ([(8, 2, 1)], [(8, 1, 2)])


@pytest.mark.parametrize("variant", walks.COMBINED[1:], ids=str)
@pytest.mark.parametrize(("steps", "hidden_size"), [(3, 100), (4, 40)])
def test_norms_match_the_reference_with_all_options(steps, hidden_size, variant, grids, device):
    check(walks.make_inputs(steps, 3, hidden_size, variant, reverse=(True,), device=device))
    assert len(grids) == 1


@pytest.mark.parametrize("hidden_size", [40, 100])
def test_a_norm_of_projections_without_biases(hidden_size, grids, device):
    inputs = walks.make_inputs(2, 13, hidden_size, walks.Variant(layer_norm="projections"), device=device)
    without = (inputs.parameters[0]._replace(bias_ih=None, bias_hh=None),)
    check(inputs._replace(parameters=without))
    assert len(grids) == 1


@pytest.mark.parametrize("hidden_size", [40, 100])
def test_statistics_of_a_row_whose_mean_is_large(hidden_size, grids, device):
    """Good to what float32 resolves at the mean's size: from a mean of squares the variance would come out wild."""
    inputs = walks.make_inputs(2, 3, hidden_size, walks.Variant(layer_norm="gates"), device=device)
    inputs = inputs._replace(gates=inputs.gates + 1000.0)
    actual = run(persistent_forward, inputs)["output"]
    exact = run(reference_recurrence, walks.cast(inputs, torch.float64))["output"]
    assert (actual.double() - exact).abs().max() < 4 * 1000.0 * torch.finfo(torch.float32).eps
    assert len(grids) == 1


@pytest.mark.parametrize("alone", ["zoneout_h", "zoneout_c"])
@pytest.mark.parametrize("zoneout", ["masks", "rates"])
def test_one_state_zoned_out_alone(zoneout, alone, grids, device):
    inputs = walks.make_inputs(3, 2, 17, walks.Variant(zoneout=zoneout), device=device)
    without = {name: None for name in ("zoneout_h", "zoneout_c") if name != alone}
    check(inputs._replace(conditions=(inputs.conditions[0]._replace(**without),)))
    assert len(grids) == 1


@pytest.mark.parametrize("zoneout", ["masks", "rates"])
def test_a_reset_ends_what_is_not_a_number(zoneout, grids, device):
    """It selects: no factor 0 would end a NaN, in a zoned-out value or in a masked one."""
    inputs = walks.make_inputs(4, 3, 40, ALL_OPTIONS[0]._replace(zoneout=zoneout), device=device)
    reset = torch.zeros(4, 3, dtype=torch.bool, device=device)
    reset[0, 0] = reset[1, 1] = reset[3, 2] = True
    conditions = (inputs.conditions[0]._replace(reset=reset),)
    clean = run(persistent_forward, inputs._replace(conditions=conditions))
    nan = {"h0": torch.full_like(inputs.h0, torch.nan), "c0": torch.full_like(inputs.c0, torch.inf)}
    broken = run(persistent_forward, inputs._replace(conditions=conditions, **nan))
    for row, first in ((0, 0), (1, 1), (2, 3)):
        for name in ("gates", "output", "entered"):
            of_row = slice(row, row + 1)
            actual, expected = (b[name] if name == "output" else b[name][0] for b in (broken, clean))
            torch.testing.assert_close(actual[first:, of_row], expected[first:, of_row], rtol=0, atol=0)
            assert not actual[:first, of_row].isfinite().any()
        torch.testing.assert_close(broken["c"][0, first + 1 :, row], clean["c"][0, first + 1 :, row], rtol=0, atol=0)
    assert len(grids) == 2


@pytest.mark.parametrize("variant", [PLAIN, *walks.COMBINED], ids=str)
def test_without_saving_the_results_are_the_same(variant, grids, device):
    inputs = walks.make_inputs(3, 2, 40, variant, reverse=(False, True), device=device)
    saved = run(persistent_forward, inputs)
    alone = run(persistent_forward, inputs, save=False)
    torch.testing.assert_close(alone["output"], saved["output"], rtol=0, atol=0)
    torch.testing.assert_close(alone["c"][:, 0], torch.stack([saved["c"][0, -1], saved["c"][1, 0]]), rtol=0, atol=0)
    assert len(grids) == 2


@pytest.mark.parametrize("variant", [PLAIN, walks.COMBINED[2]], ids=str)
def test_without_saving_several_programs_match_the_reference(variant, grids, device):
    check(walks.make_inputs(3, 2, 100, variant, device=device), save=False)
    assert len(grids) == 1


def test_an_empty_batch_launches_nothing(grids, device):
    walk = walks.walk_of(walks.make_inputs(3, 0, 100, PLAIN, device=device))
    persistent_forward.recurrence_forward(walk)
    assert grids == []


# of a step's waits, in order, one is left out: (layer norm, how many there are, which one)
WAITS = [(None, 1, 0), ("gates", 3, 0), ("gates", 3, 1), ("gates", 3, 2), ("projections", 3, 0)]


@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize(("layer_norm", "waits", "skipped"), WAITS)
def test_a_missing_wait_shows(layer_norm, waits, skipped, skip_call, slow_program):
    slow_program(persistent_forward, "product", "tanh")  # before each of what is waited for
    skip_call(persistent_forward, "wait", skipped, of=waits)
    with pytest.raises(AssertionError, match="error"):
        check(walks.make_inputs(2, 2, 100, walks.Variant(layer_norm=layer_norm)))


@pytest.mark.usefixtures("grids")
def test_nobody_runs_ahead_of_a_slow_program(slow_program):
    slow_program(persistent_forward, "product", "tanh", "arrive")
    check(walks.make_inputs(2, 2, 100, walks.Variant(layer_norm="gates")))


@pytest.mark.usefixtures("grids")
@pytest.mark.parametrize(("layer_norm", "waits", "skipped"), WAITS)
def test_a_missing_arrival_is_a_deadlock(layer_norm, waits, skipped, skip_call, patience):
    patience.seconds = 3  # enough for a grid of this size that does end
    skip_call(persistent_forward, "arrive", skipped, of=waits)
    with pytest.raises(Deadlock, match="programs still wait"):
        check(walks.make_inputs(2, 2, 100, walks.Variant(layer_norm=layer_norm)))


def test_the_interpreter_alone_refuses_programs_that_wait(device):
    with pytest.raises(RuntimeError, match="one program after another"):
        persistent_forward.recurrence_forward(walks.walk_of(walks.make_inputs(2, 2, 100, device=device)))
