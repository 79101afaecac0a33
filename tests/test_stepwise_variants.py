"""The stepwise kernels with every option of the cell against the reference: interpreted on a CPU, for real on a GPU."""

import pytest
import torch
import walks
from tolerance import assert_as_accurate
from walks import COMBINED, PLAIN, SINGLE, Variant

from fused_lstm import recurrence, reference_recurrence
from fused_lstm.kernels import norms, stepwise

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PROJECTED = [variant._replace(projection=True) for variant in (PLAIN, *SINGLE, *COMBINED)]
NORMS = [variant for variant in SINGLE if variant.layer_norm is not None]
LOW = [torch.float16, torch.bfloat16]


def assert_same(actual, expected, tolerance=0.0) -> None:
    """By name: |actual - expected| <= tolerance * max(1, max|expected|); NaN fails."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        found = actual[name]
        assert (found.shape, found.dtype) == (value.shape, value.dtype), name
        if value.numel() > 0:
            error = (found - value).abs().max().item()
            assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: error {error:.3e}"


def assert_as_the_reference(make, seeds=1) -> None:
    """make(seed) -> inputs. In float64 the same numbers; in any other dtype as near to those of float64 as the
    reference comes, over several seeds: in a few numbers its error may be small by chance."""
    draws = [make(seed) for seed in range(seeds)]
    actual = [walks.run(stepwise, inputs) for inputs in draws]
    exact = [walks.run(reference_recurrence, walks.cast(inputs, torch.float64)) for inputs in draws]
    if draws[0].gates.dtype == torch.float64:
        for found, expected in zip(actual, exact, strict=True):
            # a norm over a few units can divide by little, and so enlarge what was rounded
            assert_same(found, expected, 1e-13 if draws[0].layer_norm is None else 1e-11)
        return
    same_dtype = [walks.run(reference_recurrence, inputs) for inputs in draws]
    for name in exact[0]:
        try:
            assert_as_accurate(*(torch.stack([run[name] for run in runs]) for runs in (actual, same_dtype, exact)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def one_way(variant, reverse):
    """There is no layer of two directions with resets."""
    return variant._replace(reset=variant.reset and len(reverse) == 1)


@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=["forward", "reverse", "both"])
@pytest.mark.parametrize("variant", [*SINGLE, *COMBINED, *PROJECTED], ids=str)
def test_float64(variant, reverse, device):
    options = {"reverse": reverse, "dtype": torch.float64, "output_size": 5, "device": device}
    assert_as_the_reference(lambda seed: walks.make_inputs(4, 3, 17, one_way(variant, reverse), seed=seed, **options))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("variant", SINGLE, ids=str)
def test_dtypes(variant, dtype, device):
    assert_as_the_reference(
        lambda seed: walks.make_inputs(3, 2, 17, variant, seed=seed, dtype=dtype, device=device), seeds=4
    )


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("variant", [*COMBINED, PROJECTED[-1]], ids=str)
def test_dtypes_together(variant, dtype, device):
    """More rows: the more options, the more the largest error is by chance."""
    options = {"dtype": dtype, "output_size": 16, "device": device}
    assert_as_the_reference(lambda seed: walks.make_inputs(2, 32, 33, variant, seed=seed, **options))


# steps, rows, units, projected features: one of each; a row of several warps or programs; a projected one likewise
SIZES = [(1, 1, 1, 1), (1, 3, 2, 1), (5, 1, 100, 7), (2, 2, 130, 129)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("variant", [*COMBINED, PROJECTED[-4], PROJECTED[-3]], ids=str)
def test_sizes(variant, sizes, device):
    *sizes, output_size = sizes
    options = {"dtype": torch.float64, "output_size": output_size, "device": device}
    assert_as_the_reference(lambda seed: walks.make_inputs(*sizes, variant, seed=seed, **options))


@pytest.mark.parametrize("variant", [Variant("gates", peephole=True), COMBINED[3]], ids=str)
def test_a_norm_of_a_long_row(variant, device):
    options = {"dtype": torch.float32, "device": device}
    assert_as_the_reference(lambda seed: walks.make_inputs(2, 2, 1025, variant, seed=seed, **options))


@pytest.mark.parametrize("variant", NORMS[:2], ids=str)  # the third's norms of the gates are the second's
def test_a_norm_of_a_row_far_from_zero(variant, device):
    """Its variance is not lost in the square of its mean."""

    def make(seed):
        inputs = walks.make_inputs(2, 32, 100, variant, seed=seed, device=device)
        return inputs._replace(gates=inputs.gates + 300.0)

    assert_as_the_reference(make, seeds=2)


@pytest.mark.interpreter  # compiled, it is how the sums are made
@pytest.mark.parametrize("variant", NORMS, ids=str)
def test_sums_that_cross_the_warps_together(variant, monkeypatch):
    inputs = walks.make_inputs(2, 1, 5, variant, dtype=torch.float64)
    one_by_one = walks.run(stepwise, inputs)
    monkeypatch.setattr(norms, "_TOGETHER", True)
    assert_same(walks.run(stepwise, inputs), one_by_one, 1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("variant", [Variant(zoneout="rates"), COMBINED[1]], ids=str)
def test_rates_of_zoneout(variant, rate, device):
    """One that float32 does not have, and both ends."""

    def make(seed):
        inputs = walks.make_inputs(3, 2, 5, variant, dtype=torch.float64, seed=seed, device=device)
        conditions = inputs.conditions[0]._replace(zoneout_h=rate, zoneout_c=1.0 - rate)
        return inputs._replace(conditions=(conditions,))

    assert_as_the_reference(make)


@pytest.mark.parametrize("only", ["zoneout_h", "zoneout_c"])
@pytest.mark.parametrize("zoneout", ["masks", "rates"])
@pytest.mark.parametrize("projection", [False, True], ids=["", "projection"])
def test_zoneout_of_one_state(only, zoneout, projection, device):
    variant = Variant(zoneout=zoneout, projection=projection)

    def make(seed):
        inputs = walks.make_inputs(3, 2, 5, variant, dtype=torch.float64, output_size=4, seed=seed, device=device)
        zoneouts = {name: None for name in ("zoneout_h", "zoneout_c") if name != only}
        return inputs._replace(conditions=(inputs.conditions[0]._replace(**zoneouts),))

    assert_as_the_reference(make)


@pytest.mark.parametrize("bias", [0, 1, 2], ids=["none", "one", "both"])
@pytest.mark.parametrize("layer_norm", ["projections", "projections_cell"])
def test_biases_after_a_norm(layer_norm, bias, device):
    def make(seed):
        inputs = walks.make_inputs(2, 2, 5, Variant(layer_norm), dtype=torch.float64, seed=seed, device=device)
        without = dict.fromkeys(("bias_ih", "bias_hh")[bias:])
        return inputs._replace(parameters=(inputs.parameters[0]._replace(**without),))

    assert_as_the_reference(make)


@pytest.mark.parametrize("variant", [PLAIN, *SINGLE, *COMBINED, *PROJECTED], ids=str)
def test_saves_nothing_where_nothing_is_to_be_saved(variant, device):
    """And computes the same, but for what a product's bits owe to where its operands lie."""
    inputs = walks.make_inputs(4, 3, 6, variant, output_size=4, dtype=torch.float64, device=device)
    saved, unsaved = walks.walk_of(inputs), walks.walk_of(inputs, save=False)
    for walk in (saved, unsaved):
        stepwise.recurrence_forward(walk)
    torch.testing.assert_close(unsaved.output, saved.output, rtol=0, atol=1e-13)
    torch.testing.assert_close(unsaved.c[:, 0], saved.c[:, -1], rtol=0, atol=1e-13)
    for buffer in (unsaved.entered, unsaved.product, unsaved.c):
        assert buffer is None or buffer.size(1) == 1


def tensors_of(value) -> list[torch.Tensor]:
    """All tensors in tuples of tuples."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("variant", [PLAIN, *COMBINED, *PROJECTED[-4:]], ids=str)
def test_what_was_given_stays(variant, device):
    """A second backward may come, and finds the same."""
    inputs = walks.make_inputs(3, 2, 6, variant, output_size=4, device=device)
    walk = walks.walk_of(inputs)
    stepwise.recurrence_forward(walk)
    given = (inputs, walk)
    kept = [tensor.clone() for tensor in tensors_of(given)]
    runs = []
    for _ in range(2):
        gradients = walks.gradients_of(walk, inputs)
        stepwise.recurrence_backward(walk, gradients)
        runs.append(tensors_of(gradients))
        for tensor, copy in zip(tensors_of(given), kept, strict=True):
            assert torch.equal(tensor, copy)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("variant", [COMBINED[0], COMBINED[2], PROJECTED[-4]], ids=str)
def test_each_direction_is_as_alone(variant, device):
    options = {"reverse": (True, False), "output_size": 4, "device": device}
    inputs = walks.make_inputs(4, 3, 6, variant._replace(reset=False), **options)
    together = walks.run(stepwise, inputs)
    names = ("gates", "h0", "c0", "d_c_all", "d_h_n", "d_c_n", "parameters", "conditions", "reverse")
    for d in range(2):
        alone = inputs._replace(
            **{name: getattr(inputs, name)[d : d + 1] for name in names}, d_output=inputs.d_output[:, :, d : d + 1]
        )
        found = {
            name: value[:, :, d : d + 1] if name == "output" else value[d : d + 1] for name, value in together.items()
        }
        assert_same(found, walks.run(stepwise, alone))


@pytest.mark.parametrize("gap", [0, 3, 16])
@pytest.mark.parametrize("hidden_size", [6, 16])
@pytest.mark.parametrize("projection", [False, True], ids=["", "projection"])
@pytest.mark.parametrize("variant", [PLAIN, COMBINED[0]], ids=str)
def test_rows_that_lie_apart(variant, projection, hidden_size, gap, device):
    """An output whose batch comes first, with other columns beside it; and its gradient likewise."""
    variant = variant._replace(reset=False, projection=projection)
    options = {"reverse": (False, True), "output_size": hidden_size, "dtype": torch.float64, "device": device}
    inputs = walks.make_inputs(3, 2, hidden_size, variant, **options)
    expected = walks.run(stepwise, inputs)

    def apart():
        wide = torch.full((2, 3, 2 * hidden_size + gap), 7.0, dtype=torch.float64, device=device)
        return wide, wide[:, :, : 2 * hidden_size].unflatten(2, (2, hidden_size)).transpose(0, 1)

    wide, output = apart()
    d_output = apart()[1].copy_(inputs.d_output)
    walk = walks.walk_of(inputs)._replace(output=output)
    stepwise.recurrence_forward(walk)
    gradients = walks.gradients_of(walk, inputs._replace(d_output=d_output))
    stepwise.recurrence_backward(walk, gradients)
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=1e-13)
    assert (wide[:, :, 2 * hidden_size :] == 7.0).all()
    for name in ("d_gates", "d_h", "d_c"):
        torch.testing.assert_close(getattr(gradients, name), expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("without", ["d_output", "d_c_all", "reset states", "all"])
@pytest.mark.parametrize("variant", [COMBINED[0], COMBINED[3], PROJECTED[-4]], ids=str)
def test_without(variant, without, device):
    """Gradients that do not arrive, or are not wanted."""
    inputs = walks.make_inputs(3, 2, 5, variant, dtype=torch.float64, output_size=4, device=device)
    kept = {name: None if without in (name, "all") else getattr(inputs, name) for name in ("d_output", "d_c_all")}
    found = []
    for backend in (stepwise, reference_recurrence):
        walk = walks.walk_of(inputs)
        backend.recurrence_forward(walk)
        reset_state = without not in ("reset states", "all")
        gradients = recurrence.new_gradients(walk, *kept.values(), inputs.d_h_n, inputs.d_c_n, reset_state)
        assert (gradients.d_reset_h is None) is not reset_state
        backend.recurrence_backward(walk, gradients)
        filled = {name: buffer for name, buffer in gradients._asdict().items() if name not in kept}
        found.append({name: buffer for name, buffer in filled.items() if buffer is not None})
    assert_same(*found, 1e-11)


@pytest.mark.parametrize("projection", [False, True], ids=["", "projection"])
@pytest.mark.parametrize("layer_norm", [None, "gates", "projections_cell"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_nothing_crosses_a_reset(reverse, layer_norm, projection, device):
    """NaN in what was before it, and in the gradients of what comes after, ends there, either way."""
    variant = Variant(layer_norm, True, "masks", True, True, projection, True)
    options = {"reverse": (reverse,), "output_size": 4, "device": device}
    inputs = walks.make_inputs(5, 3, 5, variant, **options)
    reset = inputs.conditions[0].reset
    reset[:] = False
    at = 2
    reset[at] = True
    early, late = (slice(at + 1, None), slice(None, at + 1)) if reverse else (slice(None, at), slice(at, None))
    clean = walks.run(stepwise, inputs)

    spoilt = inputs._replace(gates=inputs.gates.clone(), h0=inputs.h0 * torch.nan, c0=inputs.c0 * torch.nan)
    spoilt.gates[0, early] = torch.nan
    found = walks.run(stepwise, spoilt)
    assert found["d_h"].isnan().all()
    assert torch.equal(found["output"][late], clean["output"][late])
    for name in ("d_gates", "d_product", "entered"):
        assert torch.equal(found[name][:, late], clean[name][:, late]), name
    for name in ("d_reset_h", "d_reset_c"):
        assert torch.equal(found[name], clean[name]), name

    spoilt = inputs._replace(
        d_output=inputs.d_output.clone(), d_h_n=inputs.d_h_n * torch.nan, d_c_n=inputs.d_c_n * torch.nan
    )
    spoilt.d_output[late] = torch.nan
    found = walks.run(stepwise, spoilt)
    assert found["d_reset_h"].isnan().all()
    assert torch.equal(found["d_gates"][:, early], clean["d_gates"][:, early])
    for name in ("d_h", "d_c"):
        assert torch.equal(found[name], clean[name]), name


@pytest.mark.parametrize("projection", [False, True], ids=["", "projection"])
def test_a_reset_at_either_end(projection, device):
    """At the first step it replaces h0 and c0; nothing comes after the last one."""
    variant = Variant(reset=True, recurrent_mask=True, zoneout="masks", projection=projection)
    for steps, at in ((1, 0), (3, 0), (3, 2)):

        def make(seed, steps=steps, at=at):
            options = {"dtype": torch.float64, "output_size": 4, "seed": seed, "device": device}
            inputs = walks.make_inputs(steps, 3, 5, variant, **options)
            inputs.conditions[0].reset[:] = False
            inputs.conditions[0].reset[at, :2] = True
            return inputs

        assert_as_the_reference(make)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("variant", [*NORMS, Variant(peephole=True)], ids=str)
def test_parameters_in_the_dtype_of_the_gates(variant, dtype, device):
    """As a module has them that was cast as a whole."""

    def make(seed):
        inputs = walks.make_inputs(3, 2, 17, variant, dtype=dtype, seed=seed, device=device)
        return inputs._replace(parameters=walks.cast(inputs.parameters, dtype))

    assert_as_the_reference(make, seeds=4)


def test_masks_need_not_be_contiguous(device):
    """A reset comes with the batch first, say."""
    inputs = walks.make_inputs(3, 2, 5, COMBINED[0], device=device)
    conditions = inputs.conditions[0]
    apart = {}
    for name in ("reset", "zoneout_h", "zoneout_c"):
        apart[name] = getattr(conditions, name).transpose(0, 1).contiguous().transpose(0, 1)
        assert not apart[name].is_contiguous()
    for name in ("reset_h", "reset_c", "recurrent_mask"):
        apart[name] = getattr(conditions, name).t().contiguous().t()
    expected = walks.run(stepwise, inputs)
    assert_same(walks.run(stepwise, inputs._replace(conditions=(conditions._replace(**apart),))), expected)
