"""The backends of kernels with every option against the oracle, and against the reference in low precision: few small
cases, since each runs in Triton's interpreter where there is no GPU. What holds on every backend is shown on the
reference, in the other files."""

import pytest
import torch
import variants
from variants import KERNELS, NORMS, assert_near, assert_same, build, make_call, record, run, run_oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EACH_BACKEND = pytest.mark.parametrize("backend", KERNELS)
EACH_NORM = pytest.mark.parametrize("layer_norm", NORMS)
SIZES = {"input_size": 2, "hidden_size": 3}
CELL = {"peephole": True, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3}
TOGETHER = {
    "resets": ({**CELL, "proj_size": 2, "recompute": True}, "lengths", True),
    "two_layers": (
        {**CELL, "num_layers": 2, "weight_dropout": 0.3, "dropout": 0.3, "locked_dropout": True},
        "batched",
        True,
    ),
    "bidirectional": ({**CELL, "bidirectional": True, "bias": False}, "packed", False),
}
ALONE = {
    "peephole": {"peephole": True},
    "zoneout_h": {"zoneout": 0.3},
    "zoneout_c": {"zoneout": (0.0, 0.3)},
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "recompute": {"peephole": True, "recompute": True},
}


def make(device, backend, options, kind="batched", reset=False, training=True, dtype=torch.float64):
    module = build(device, **{**SIZES, **options}, backend=backend, dtype=dtype).train(training)
    call = make_call(module, kind, reset=reset, reset_state=reset, steps=3, rows=2)
    return module, call if call.lengths is None else call._replace(lengths=[1, 3])


@EACH_BACKEND
@EACH_NORM
@pytest.mark.parametrize("case", TOGETHER.values(), ids=TOGETHER)
def test_together(case, layer_norm, backend, device, monkeypatch):
    options, kind, reset = case
    module, call = make(device, backend, {**options, "layer_norm": layer_norm}, kind, reset)
    drawn = record(monkeypatch)
    assert_same(run(module, call), run_oracle(module, call, drawn))


@EACH_BACKEND
@EACH_NORM
def test_states_in_evaluation(layer_norm, backend, device):
    """Zoneout by its rates; gradients through c of every step."""
    module, call = make(device, backend, {**CELL, "layer_norm": layer_norm}, "lengths", True, training=False)
    assert_same(run(module, call, states=True), run_oracle(module, call, states=True))


@EACH_BACKEND
@pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
def test_alone(reset, options, backend, device, monkeypatch):
    module, call = make(device, backend, options, reset=reset)
    drawn = record(monkeypatch)
    assert_same(run(module, call), run_oracle(module, call, drawn))


@EACH_BACKEND
@EACH_NORM
def test_same_seed_same_numbers_as_the_reference(layer_norm, backend, device):
    """Whatever is random is drawn before a backend is chosen."""
    options = {**CELL, "layer_norm": layer_norm, "weight_dropout": 0.3}
    found = [run(*make(device, name, options, reset=True)) for name in ("reference", backend)]
    assert_same(found[1], found[0])


@EACH_BACKEND
@EACH_NORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_lower_precision(dtype, layer_norm, backend, device):
    options = {**CELL, "layer_norm": layer_norm, "hidden_size": 8}  # of three units a norm is ill-conditioned
    exact = run(*make(device, "reference", options, "lengths", True))
    found = run(*make(device, backend, options, "lengths", True, dtype=dtype))
    assert {value.dtype for value in found.values()} == {dtype}
    assert_near(found, exact, 10 * torch.finfo(dtype).eps)


@EACH_BACKEND
def test_nan_ends_at_a_reset(backend, device):
    """What stood in hx before a reset at step 0 reaches nothing, in training too."""
    module, call = make(device, backend, {**CELL, "layer_norm": "gates"}, reset=True)
    reset = torch.ones_like(call.reset)
    reset[1:] = False
    found = []
    for value in (0.0, float("nan")):
        hx = tuple(torch.full_like(state, value).requires_grad_() for state in call.hx)
        found.append(variants.run(module, call._replace(hx=hx, reset=reset)))
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])
