"""The hand-written recurrence against autograd through the definition."""

import itertools

import pytest
import torch
import walks
from walks import COMBINED, PLAIN, SINGLE, Variant

from fused_lstm import recurrence, reference, reference_recurrence
from fused_lstm.reference import compute_dtype

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PROJECTED = [Variant(projection=True), *(variant._replace(projection=True) for variant in COMBINED)]


def from_the_definition(inputs: walks.Inputs) -> dict[str, torch.Tensor]:
    """By the names of walks.run, what lstm_layer and autograd say."""
    after_norm = inputs.layer_norm not in (None, "gates")  # the biases, which the input product holds otherwise
    found = []
    for d, reverse in enumerate(inputs.reverse):
        p = inputs.parameters[d]._replace(weight_ih=torch.eye(inputs.gates.size(3), dtype=inputs.gates.dtype))
        p = p if after_norm else p._replace(bias_ih=None, bias_hh=None)
        conditions = inputs.conditions[d]
        leaves = {"d_gates": inputs.gates[d], "d_h": inputs.h0[d], "d_c": inputs.c0[d]}
        leaves |= {"d_reset_h": conditions.reset_h, "d_reset_c": conditions.reset_c, "d_weight_ph": p.weight_ph}
        leaves |= {"d_norm_weight": p.norm_gates_weight if p.norm_ih_weight is None else p.norm_ih_weight}
        leaves |= {"d_norm_hh_weight": p.norm_hh_weight}
        leaves |= {"d_norm_bias": p.norm_gates_bias if p.norm_ih_weight is None else p.bias_ih}
        leaves |= {"d_norm_cell_weight": p.norm_cell_weight, "d_norm_cell_bias": p.norm_cell_bias}
        leaves = {name: leaf.detach().clone() for name, leaf in leaves.items() if leaf is not None}
        for leaf in leaves.values():
            leaf.requires_grad_()
        p = p._replace(
            weight_ph=leaves.get("d_weight_ph"),
            norm_cell_weight=leaves.get("d_norm_cell_weight"),
            norm_cell_bias=leaves.get("d_norm_cell_bias"),
        )
        if after_norm:
            p = p._replace(
                norm_ih_weight=leaves["d_norm_weight"],
                norm_hh_weight=leaves["d_norm_hh_weight"],
                bias_ih=leaves["d_norm_bias"],
            )
        elif inputs.layer_norm == "gates":
            p = p._replace(norm_gates_weight=leaves["d_norm_weight"], norm_gates_bias=leaves["d_norm_bias"])
        conditions = conditions._replace(reset_h=leaves.get("d_reset_h"), reset_c=leaves.get("d_reset_c"))
        output, h_n, c_n, c_all = reference.lstm_layer(
            leaves["d_gates"], leaves["d_h"], leaves["d_c"], p, inputs.layer_norm, conditions, None, reverse
        )
        results = [output, h_n, c_n]
        d_results = [inputs.d_output[:, :, d], inputs.d_h_n[d], inputs.d_c_n[d]]
        if inputs.d_c_all is not None:
            results.append(c_all)
            d_results.append(inputs.d_c_all[d])
        grads = torch.autograd.grad(results, list(leaves.values()), d_results)
        c0 = inputs.c0[d][None]
        c = torch.cat((c_all, c0) if reverse else (c0, c_all))
        found.append({"output": output, "c": c, **dict(zip(leaves, grads, strict=True))})
    merged = {name: torch.stack([each[name] for each in found]).detach() for name in found[0]}
    return merged | {"output": merged["output"].permute(1, 2, 0, 3)}


@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=["forward", "backward", "both"])
@pytest.mark.parametrize("variant", [PLAIN, *SINGLE, *COMBINED, *PROJECTED], ids=str)
def test_matches_the_definition(variant, reverse):
    if variant.reset and len(reverse) > 1:
        variant = variant._replace(reset=False)  # there is no such layer
    inputs = walks.make_inputs(5, 3, 6, variant, reverse=reverse, dtype=torch.float64, output_size=4)
    expected = from_the_definition(inputs)
    actual = walks.run(reference_recurrence, inputs)
    assert expected.keys() <= actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("variant", [PLAIN, *SINGLE, *COMBINED, *PROJECTED], ids=str)
def test_saves_nothing_where_nothing_is_to_be_saved(variant):
    inputs = walks.make_inputs(4, 3, 6, variant, dtype=torch.float64, output_size=4)
    saved, unsaved = walks.walk_of(inputs), walks.walk_of(inputs, save=False)
    for walk in (saved, unsaved):
        reference_recurrence.recurrence_forward(walk)
    torch.testing.assert_close(unsaved.output, saved.output, rtol=0, atol=0)
    torch.testing.assert_close(unsaved.c[:, 0], saved.c[:, -1], rtol=0, atol=0)
    assert unsaved.c.size(1) == 1
    for buffer in (unsaved.entered, unsaved.product):
        assert buffer is None or buffer.size(1) == 1


@pytest.mark.parametrize("with_projection", [False, True])
def test_what_backward_hands_on_for_the_weights(with_projection):
    """entered, d_product, d_projected and hidden, from which the weights' gradients are made."""
    variant = COMBINED[1]._replace(projection=with_projection)
    inputs = walks.make_inputs(4, 3, 6, variant, dtype=torch.float64, output_size=4)
    actual = walks.run(reference_recurrence, inputs)
    weights = [w for w in (inputs.parameters[0].weight_hh, inputs.parameters[0].weight_hr) if w is not None]
    made = [torch.einsum("dtng,dtnp->gp", actual["d_product"], actual["entered"])]
    if with_projection:
        made.append(torch.einsum("dtnp,dtnh->ph", actual["d_projected"], actual["hidden"]))

    def output_of(*weights):
        names = ("weight_hh", "weight_hr")[: len(weights)]
        p = inputs.parameters[0]._replace(
            weight_ih=torch.eye(24, dtype=torch.float64),
            bias_ih=None,
            bias_hh=None,
            **dict(zip(names, weights, strict=True)),
        )
        results = reference.lstm_layer(inputs.gates[0], inputs.h0[0], inputs.c0[0], p, "gates", inputs.conditions[0])
        d_results = (inputs.d_output[:, :, 0], inputs.d_h_n[0], inputs.d_c_n[0], inputs.d_c_all[0])
        return sum((result * d).sum() for result, d in zip(results, d_results, strict=True))

    leaves = [weight.clone().requires_grad_() for weight in weights]
    for gradient, expected in zip(made, torch.autograd.grad(output_of(*leaves), leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_both_directions_are_those_of_one():
    inputs = walks.make_inputs(4, 3, 5, COMBINED[2]._replace(reset=False), reverse=(True, False), dtype=torch.float64)
    together = walks.run(reference_recurrence, inputs)
    for d in range(2):
        alone = inputs._replace(
            **{name: getattr(inputs, name)[d : d + 1] for name in ("gates", "h0", "c0", "d_c_all", "d_h_n", "d_c_n")},
            **{name: getattr(inputs, name)[d : d + 1] for name in ("parameters", "conditions", "reverse")},
            d_output=inputs.d_output[:, :, d : d + 1],
        )
        for name, value in walks.run(reference_recurrence, alone).items():
            found = together[name][:, :, d : d + 1] if name == "output" else together[name][d : d + 1]
            torch.testing.assert_close(found, value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [PLAIN, *COMBINED], ids=str)
def test_buffers_have_the_dtypes_told(variant, dtype):
    inputs = walks.make_inputs(2, 2, 4, variant, dtype=dtype)
    exact = walks.run(reference_recurrence, walks.cast(inputs, torch.float64))
    wide = {
        "moments",
        "c",
        "d_h",
        "d_c",
        "d_reset_h",
        "d_reset_c",
        *(name for name in exact if "norm" in name),
        "d_weight_ph",
    }
    for name, value in walks.run(reference_recurrence, inputs).items():
        assert value.dtype == (compute_dtype(dtype) if name in wide else dtype), name
        scale = exact[name].abs().max()
        assert (value.double() - exact[name]).abs().max() <= 30 * torch.finfo(dtype).eps * scale, name


def test_a_reset_ends_what_was_not_a_number():
    inputs = walks.make_inputs(4, 3, 5, Variant(reset=True, recurrent_mask=True), dtype=torch.float64)
    inputs.conditions[0].reset[:] = False
    inputs.conditions[0].reset[2] = True
    clean = walks.run(reference_recurrence, inputs)
    inputs.gates[0, 1] = torch.nan
    spoilt = walks.run(reference_recurrence, inputs)
    for name in ("output", "c"):
        after = slice(2, None) if name == "output" else slice(3, None)
        clean_after, spoilt_after = (x[name][after] if name == "output" else x[name][0, after] for x in (clean, spoilt))
        torch.testing.assert_close(spoilt_after, clean_after, rtol=0, atol=0)
    for name in ("d_gates", "entered"):
        torch.testing.assert_close(spoilt[name][:, 2:], clean[name][:, 2:], rtol=0, atol=0)
    for name in ("d_reset_h", "d_reset_c"):
        torch.testing.assert_close(spoilt[name], clean[name], rtol=0, atol=0)


def test_new_buffers():
    inputs = walks.make_inputs(3, 2, 4, COMBINED[3], dtype=torch.bfloat16)
    walk = walks.walk_of(inputs)
    assert walk.c.shape == (1, 4, 2, 4)
    torch.testing.assert_close(walk.c[0, 0], inputs.c0[0].float())
    gradients = recurrence.new_gradients(walk, None, None, None, None, False)
    assert gradients.d_reset_h is None
    assert gradients.d_product is not gradients.d_gates
    for buffer in (gradients.d_h, gradients.d_c):
        torch.testing.assert_close(buffer, torch.zeros_like(buffer))


def test_every_variant_is_here():
    """A new option must join the lists that all backends are tested with."""
    for field, without in Variant()._asdict().items():
        assert any(getattr(v, field) != without for v in itertools.chain(SINGLE, COMBINED, PROJECTED)), field
