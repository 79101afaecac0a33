"""reset and reset_state: episodes that end in the middle of a sequence, run as if each were alone."""

import re

import pytest
import torch
import variants
from runs import randn
from variants import BACKENDS, ROWS, STEPS, assert_same, build, make_call

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
VARIANTS = {
    "plain": {},
    "deep_projection": {"num_layers": 2, "proj_size": 2, "bias": False},
    "gates": {"layer_norm": "gates", "peephole": True},
    "projections": {"layer_norm": "projections", "num_layers": 2, "proj_size": 2},
    "projections_cell": {"layer_norm": "projections_cell", "recompute": True},
    "peephole_recompute": {"peephole": True, "recompute": True, "num_layers": 2},
    "zoneout": {"zoneout": (0.3, 0.2), "layer_norm": "projections_cell", "peephole": True},
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
RESET = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]]).bool()  # (T, N)


def make_module(device, backend, variant, **more):
    """In evaluation: nothing is drawn, and zoneout mixes."""
    return build(device, **variant, **more, backend=backend).eval()


@EACH_BACKEND
@EACH_VARIANT
def test_layouts(variant, backend, device):
    """(T, N), (N, T) with batch_first and, of a row alone, (T,)."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=True)._replace(reset=RESET.to(device))
    expected = variants.run(module, call)

    turned = make_module(device, backend, variant, batch_first=True)
    output, state = turned(*(call.input.transpose(0, 1), call.hx), reset=call.reset.t(), reset_state=call.reset_state)
    assert torch.equal(output.transpose(0, 1), expected["output"])
    assert all(torch.equal(a, expected[name]) for a, name in zip(state, ("h_n", "c_n"), strict=True))
    for n in range(ROWS):
        hx, reset_state = ([state[:, n] for state in states] for states in (call.hx, call.reset_state))
        output, (h_n, c_n) = module(call.input[:, n], hx, reset=call.reset[:, n], reset_state=reset_state)
        assert_same(
            {"output": output, "h_n": h_n, "c_n": c_n},
            {"output": expected["output"][:, n], "h_n": expected["h_n"][:, n], "c_n": expected["c_n"][:, n]},
        )


@EACH_BACKEND
@pytest.mark.parametrize(
    "dtype",
    [*(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64), *(torch.float16, torch.bfloat16, torch.float64)],
    ids=str,
)
def test_dtypes(dtype, backend, device):
    """What is not zero resets."""
    module = make_module(device, backend, {})
    call = make_call(module)._replace(reset=RESET.to(device))
    expected = variants.run(module, call)
    given = (RESET * 3).to(device, dtype)
    kept = given.clone()
    found = variants.run(module, call._replace(reset=given))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(given, kept)


@EACH_BACKEND
@pytest.mark.parametrize(
    ("value", "resets"),
    [(float("nan"), True), (float("inf"), True), (-1.0, True), (1e-300, True), (0.0, False), (-0.0, False)],
)
def test_values(value, resets, backend, device):
    """NaN is not zero."""
    module = make_module(device, backend, {})
    call = make_call(module)._replace(reset=RESET.to(device))
    expected = variants.run(module, call if resets else call._replace(reset=None))
    reset = torch.zeros(STEPS, ROWS, dtype=torch.float64).masked_fill(RESET, value).to(device)
    found = variants.run(module, call._replace(reset=reset))
    assert_same(found, expected)


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("has_state", [False, True], ids=["zeros", "reset_state"])
@pytest.mark.parametrize("lengths", [None, [3, 5, 4]], ids=str)
def test_as_if_each_episode_were_alone(lengths, has_state, variant, backend, device):
    """Each row cut where it is reset, each piece run by the module without resets: all results, all gradients."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=has_state)._replace(reset=RESET.to(device), lengths=lengths)
    call = call._replace(kind="batched" if lengths is None else "lengths")
    outputs, finals = [], []
    for n in range(ROWS):
        length = STEPS if lengths is None else lengths[n]
        starts = [0, *(t for t in range(1, length) if RESET[t, n])]
        pieces = []
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            state = [s[:, n] for s in (call.reset_state if has_state else map(torch.zeros_like, call.hx))]
            if start == 0 and not RESET[0, n]:
                state = [s[:, n] for s in call.hx]
            output, final = module(call.input[start:end, n], state)
            pieces.append(output)
        outputs.append(torch.cat([*pieces, pieces[0].new_zeros(STEPS - length, pieces[0].size(1))]))
        finals.append(final)
    h_n, c_n = (torch.stack(each, 1) for each in zip(*finals, strict=True))
    expected = {"output": torch.stack(outputs, 1), "h_n": h_n, "c_n": c_n}
    expected |= variants.gradients(list(expected.values()), call.leaves(module))
    assert_same(variants.run(module, call), expected)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "proj_size": 2}, {"bias": False}], ids=str)
def test_as_torchs_own_on_each_episode(options, device):
    """The plain cell, whose pieces torch.nn.LSTM runs; by the default backend."""
    module = build(device, **options)
    theirs = torch.nn.LSTM(**variants.SIZES, **options, device=device, dtype=torch.float64)
    theirs.load_state_dict(module.state_dict())
    call = make_call(module, reset_state=True)
    reset = torch.zeros(STEPS, ROWS, dtype=torch.bool, device=device)
    reset[2] = True
    output, (h_n, c_n) = module(call.input, call.hx, reset=reset, reset_state=call.reset_state)
    first, _ = theirs(call.input[:2], call.hx)
    second, (h, c) = theirs(call.input[2:], call.reset_state)
    assert_same({"o": output, "h": h_n, "c": c_n}, {"o": torch.cat((first, second)), "h": h, "c": c})


@EACH_BACKEND
@EACH_VARIANT
def test_at_every_step(variant, backend, device):
    """Nothing is remembered: each step is a sequence of its own."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=True)
    reset = torch.ones(STEPS, ROWS, device=device)
    output, _ = module(call.input, call.hx, reset=reset, reset_state=call.reset_state)
    for t in range(STEPS):
        alone, _ = module(call.input[t : t + 1], call.reset_state)
        assert_same({"output": output[t : t + 1]}, {"output": alone})


@EACH_BACKEND
@EACH_VARIANT
def test_nowhere(variant, backend, device):
    """No reset set is no reset given; the reset state has a gradient of zeros."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=True)._replace(reset=torch.zeros(STEPS, ROWS, device=device))
    expected = variants.run(module, call._replace(reset=None, reset_state=None))
    found = variants.run(module, call)
    assert not found.pop("d_reset_h").any()
    assert not found.pop("d_reset_c").any()
    assert_same(found, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto", "torch"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
def test_reset_state_alone_has_no_effect(kind, options, backend, device):
    module = build(device, **options, backend=backend)
    call = make_call(module, kind, reset_state=True)
    expected = variants.run(module, call._replace(reset_state=None))
    found = variants.run(module, call)
    assert not found.pop("d_reset_h").any()
    assert not found.pop("d_reset_c").any()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("has_state", [False, True], ids=["zeros", "reset_state"])
def test_at_step_0_it_replaces_hx(has_state, value, variant, backend, device):
    """Whatever stood there, NaN and infinities included: forward, and in every gradient."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=has_state)
    reset = RESET.clone()
    reset[0] = True
    call = call._replace(reset=reset.to(device))
    expected = variants.run(module, call)
    assert not expected["d_h_0"].any()
    assert not expected["d_c_0"].any()
    dirty = call._replace(hx=tuple(torch.full_like(state, value).requires_grad_() for state in call.hx))
    found = variants.run(module, dirty)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].isfinite().all() for name in found)


@EACH_BACKEND
@EACH_VARIANT
def test_draws_do_not_carry_what_was_before(variant, backend, device):
    """In training too: neither a zoneout nor a recurrent mask brings back what a reset ended."""
    module = build(device, **variant, recurrent_dropout=0.5, backend=backend)
    module.zoneout = (0.5, 0.5)
    reset = torch.zeros(STEPS, ROWS, device=device)
    reset[0] = 1
    found = []
    for value in (0.0, float("nan")):
        call = make_call(module, reset_state=True)._replace(reset=reset)
        call = call._replace(hx=tuple(torch.full_like(state, value).requires_grad_() for state in call.hx))
        found.append(variants.run(module, call))
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


@EACH_BACKEND
@EACH_VARIANT
def test_no_gradient_crosses(variant, backend, device):
    """From the steps since a reset to anything before it: exact zeros."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=True)
    for t in range(1, STEPS):
        reset = torch.zeros(STEPS, ROWS, device=device)
        reset[t, 0] = 1
        output, (h_n, c_n) = module(call.input, call.hx, reset=reset, reset_state=call.reset_state)
        results = (output[t:, 0].sum(), h_n[:, 0].sum(), c_n[:, 0].sum())
        d_input, *d_states = torch.autograd.grad(results, (call.input, *call.hx, *call.reset_state))
        assert not d_input[:t, 0].any()
        assert d_input[t:, 0].all()
        assert not d_input[:, 1:].any()
        assert not any(d.any() for d in d_states[:2])
        assert all(d[:, 0].all() for d in d_states[2:])
        assert not any(d[:, 1:].any() for d in d_states[2:])


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_ends_at_a_reset(value, variant, backend, device):
    """A row whose input is NaN in step 1 and that is reset in step 3: from there on its numbers are those of a clean
    row, and so are the gradients of what lies there. The other rows see nothing of it."""
    module = make_module(device, backend, variant)
    reset = torch.zeros(STEPS, ROWS, device=device)
    reset[3, 0] = 1
    found = []
    for dirty in (False, True):
        call = make_call(module, reset_state=True)
        input = call.input.detach().clone()
        input[1, 0] = value if dirty else input[1, 0]
        input.requires_grad_()
        output, (h_n, c_n) = module(input, call.hx, reset=reset, reset_state=call.reset_state)
        results = (output[3:], h_n, c_n, output[:3, 1:])
        d = [randn(*r.shape, seed=i, device=device) for i, r in enumerate(results)]
        d_input, d_h_0, d_c_0, *d_reset = torch.autograd.grad(results, (input, *call.hx, *call.reset_state), d)
        found.append([*results, d_input[3:], d_input[:, 1:], d_h_0[:, 1:], d_c_0[:, 1:], *d_reset])
        if dirty and value != value:
            assert output[1:3, 0].isnan().all()
    assert all(value.isfinite().all() for value in found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_gradient_ends_at_a_reset(value, variant, backend, device):
    """Backward: what arrives since a reset, NaN included, is nothing to the steps before it; its own row alone sees
    it there."""
    module = make_module(device, backend, variant)
    call = make_call(module, reset_state=True)
    reset = torch.zeros(STEPS, ROWS, device=device)
    reset[3, 0] = 1
    output, _ = module(call.input, call.hx, reset=reset, reset_state=call.reset_state)
    found = []
    for dirty in (0.0, value):
        d_output = randn(*output.shape, device=device)
        d_output[4, 0] = dirty
        wanted = (call.input, *call.hx, *call.reset_state)
        d_input, d_h_0, d_c_0, d_reset_h, d_reset_c = torch.autograd.grad(output, wanted, d_output, retain_graph=True)
        found.append([d_input[:3], d_input[:, 1:], d_h_0, d_c_0, d_reset_h[:, 1:], d_reset_c[:, 1:]])
    assert all(d.isfinite().all() for d in found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("has_state", [False, True], ids=["zeros", "reset_state"])
def test_in_the_padding_it_changes_nothing(has_state, variant, backend, device):
    """Nor has what would be put there a gradient; it may be NaN."""
    module = make_module(device, backend, variant)
    lengths = [2, 5, 4]
    reset = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1], [0, 1, 0]], device=device)
    call = make_call(module, "lengths", reset_state=has_state)._replace(lengths=lengths, reset=reset)
    expected = variants.run(module, call)
    past = torch.arange(STEPS, device=device)[:, None] >= torch.tensor(lengths, device=device)
    found = variants.run(module, call._replace(reset=reset.masked_fill(past, 1)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if has_state:
        assert not any(found[name][:, 0].any() for name in ("d_reset_h", "d_reset_c"))
        assert all(found[name][:, 1:].all() for name in ("d_reset_h", "d_reset_c"))
        dirty = [state.detach().clone() for state in call.reset_state]
        for state in dirty:
            state[:, 0] = float("nan")
            state.requires_grad_()
        found = variants.run(module, call._replace(reset=reset.masked_fill(past, 1), reset_state=tuple(dirty)))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@EACH_BACKEND
def test_state_that_a_reset_leaves(backend, device):
    """states: after a reset, that of one step from the reset state, in every layer."""
    module = make_module(device, backend, {"num_layers": 2})
    call = make_call(module, reset_state=True)
    reset = torch.zeros(STEPS, ROWS, device=device)
    reset[2] = 1
    h, c = module.states(call.input, call.hx, reset=reset, reset_state=call.reset_state)
    h_one, c_one = module.states(call.input[2:3], call.reset_state)
    assert_same({"h": h[:, 2], "c": c[:, 2]}, {"h": h_one[:, 0], "c": c_one[:, 0]})


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [None, "gates", "projections", "projections_cell"])
def test_lower_precision(name, dtype, backend, device):
    """Resets with a state run in every dtype, and come near the exact numbers."""
    options = {"layer_norm": name, "peephole": True, "proj_size": 2}
    exact, module = build(device, **options), build(device, **options, dtype=dtype, backend=backend)
    expected = variants.run(exact, make_call(exact, reset=True, reset_state=True))
    found = variants.run(module, make_call(module, reset=True, reset_state=True))
    assert {value.dtype for value in found.values()} == {dtype}
    rounding = torch.finfo(dtype).eps
    for key, value in expected.items():
        error = (found[key].double() - value).abs().max().item()
        assert error <= 60 * rounding * max(1.0, value.abs().max().item()), key


ONES = torch.ones
BAD = {
    "transposed": (ONES(3, 5), "Expected reset size (5, 3), got (3, 5)"),
    "one_row": (ONES(5, 1), "Expected reset size (5, 3), got (5, 1)"),
    "one_step": (ONES(1, 3), "Expected reset size (5, 3), got (1, 3)"),
    "vector": (ONES(5), "Expected reset size (5, 3), got (5,)"),
    "scalar": (torch.tensor(1), "Expected reset size (5, 3), got ()"),
    "features": (ONES(5, 3, 1), "Expected reset size (5, 3), got (5, 3, 1)"),
    "steps": (ONES(4, 3), "Expected reset size (5, 3), got (4, 3)"),
    "list": ([[0] * 3] * 5, "Expected reset size (5, 3), got list"),
    "bool": (True, "Expected reset size (5, 3), got bool"),
}
H, C = ONES(1, 3, 4), ONES(1, 3, 4)
BAD_STATE = {
    "tensor": (H, "reset_state should be two tensors, h and c, as hx"),
    "one": ((H,), "reset_state should be two tensors, h and c, as hx"),
    "three": ((H, C, C), "reset_state should be two tensors, h and c, as hx"),
    "numbers": ((0.0, 0.0), "Expected reset_state[0] size (1, 3, 4), got float"),
    "h_2d": ((H[0], C), "Expected reset_state[0] size (1, 3, 4), got (3, 4)"),
    "h_row": ((H[:, :1], C), "Expected reset_state[0] size (1, 3, 4), got (1, 1, 4)"),
    "c_unit": ((H, C[:, :, :1]), "Expected reset_state[1] size (1, 3, 4), got (1, 3, 1)"),
    "c_none": ((H, None), "Expected reset_state[1] size (1, 3, 4), got NoneType"),
    "c_layers": ((H, ONES(2, 3, 4)), "Expected reset_state[1] size (1, 3, 4), got (2, 3, 4)"),
}
WHERE = pytest.mark.parametrize("where", ["forward", "states"])


def assert_refused(function, message, *args, **keywords) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(*args, **keywords)


@WHERE
@pytest.mark.parametrize(("reset", "message"), BAD.values(), ids=BAD)
def test_bad_reset(reset, message, where, device):
    module = build(device)
    call = make_call(module)
    assert_refused(getattr(module, where), message, call.input, call.hx, reset=reset)
    if where == "forward":
        own = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
        hx = (call.hx[0][0], call.hx[1][0])
        assert_refused(fused_lstm.lstm_layer, message, call.input, hx, **own, reset=reset)


@WHERE
@pytest.mark.parametrize("has_reset", [False, True])
@pytest.mark.parametrize(("state", "message"), BAD_STATE.values(), ids=BAD_STATE)
def test_bad_reset_state(state, message, has_reset, where, device):
    """Also without a reset."""
    module = build(device)
    call = make_call(module)
    reset = ONES(5, 3, device=device) if has_reset else None
    assert_refused(getattr(module, where), message, call.input, call.hx, reset=reset, reset_state=state)


@pytest.mark.parametrize("has_reset", [False, True])
def test_bad_reset_state_of_a_layer(has_reset, device):
    module = build(device, proj_size=2)
    call = make_call(module)
    own = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    reset = ONES(5, 3, device=device) if has_reset else None
    bad = {
        "Expected reset_state[0] size (3, 2), got (1, 3, 2)": (ONES(1, 3, 2), ONES(3, 4)),
        "Expected reset_state[0] size (3, 2), got (3, 4)": (ONES(3, 4), ONES(3, 4)),
        "Expected reset_state[1] size (3, 4), got (1, 4)": (ONES(3, 2), ONES(1, 4)),
        "reset_state should be two tensors, h and c, as hx": ONES(2, 3, 4),
    }
    for message, state in bad.items():
        hx = (call.hx[0][0], call.hx[1][0])
        assert_refused(fused_lstm.lstm_layer, message, call.input, hx, **own, reset=reset, reset_state=state)


@WHERE
def test_sizes_of_other_layouts(where, device):
    """Projected, of several layers, batch first and unbatched."""
    module = build(device, proj_size=2, num_layers=2, batch_first=True)
    call = make_call(module)
    function = getattr(module, where)
    assert_refused(function, "Expected reset size (3, 5), got (5, 3)", call.input, call.hx, reset=ONES(5, 3))
    message = "Expected reset_state[0] size (2, 3, 2), got (2, 3, 4)"
    assert_refused(function, message, call.input, reset_state=(ONES(2, 3, 4), ONES(2, 3, 4)))
    call = make_call(module, "unbatched")
    assert_refused(function, "Expected reset size (5,), got (5, 1)", call.input, call.hx, reset=ONES(5, 1))
    message = "Expected reset_state[1] size (2, 4), got (2, 1, 4)"
    assert_refused(function, message, call.input, reset_state=(ONES(2, 2), ONES(2, 1, 4)))


@WHERE
def test_with_bidirectional(where, device):
    module = build(device, bidirectional=True)
    call = make_call(module)
    message = "reset cannot be given to a bidirectional LSTM: its other direction comes from the future"
    for kind in ("batched", "unbatched", "lengths"):
        call = make_call(module, kind)
        reset = ONES(5) if kind == "unbatched" else ONES(5, 3)
        assert_refused(getattr(module, where), message, call.input, call.hx, **call.keywords(), reset=reset)
    message = "Expected reset_state[0] size (2, 3, 4), got (1, 3, 4)"
    assert_refused(getattr(module, where), message, make_call(module).input, reset_state=(H, C))


@WHERE
def test_with_packed_sequence(where, device):
    module = build(device)
    call = make_call(module, "packed")
    message = "reset cannot be given with a PackedSequence; pad the input and give lengths"
    assert_refused(getattr(module, where), message, call.given(module), reset=ONES(5, 3))
    message = "Expected reset_state[0] size (1, 3, 4), got (1, 4)"
    assert_refused(getattr(module, where), message, call.given(module), reset_state=(ONES(1, 4), ONES(1, 4)))


def test_backend_that_cannot(device):
    module = build(device, backend="torch")
    with pytest.raises(ValueError, match=r"^backend 'torch' cannot run this: torch.nn.LSTM knows no reset$"):
        module(make_call(module).input, reset=RESET.to(device))


def test_keywords_only(device):
    module = build(device)
    call = make_call(module)
    with pytest.raises(TypeError, match="positional argument"):
        module(call.input, call.hx, RESET)


def test_a_leaf_as_reset(device):
    """A float reset that wants a gradient is a flag all the same."""
    module = make_module(device, "reference", {})
    reset = RESET.double().to(device).requires_grad_()
    call = make_call(module, reset_state=True)
    output, _ = module(call.input, call.hx, reset=reset, reset_state=call.reset_state)
    assert torch.autograd.grad(output.sum(), reset, allow_unused=True) == (None,)
    expected, _ = module(call.input, call.hx, reset=RESET.to(device), reset_state=call.reset_state)
    assert torch.equal(output, expected)
