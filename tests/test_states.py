"""LSTM.states: h and c after every step of every layer. forward gives h of the last layer, and final states."""

import pytest
import torch
import variant_oracle as oracle
import variants
from runs import randn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from variants import BACKENDS, KINDS, LENGTHS, ROWS, STEPS, assert_same, build, make_call, record

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
VARIANTS = {
    "plain": {},
    "gates": {"layer_norm": "gates", "peephole": True},
    "projections": {"layer_norm": "projections", "recompute": True},
    "projections_cell": {"layer_norm": "projections_cell", "peephole": True},
    "zoneout": {"zoneout": (0.3, 0.4)},
    "all": {"layer_norm": "projections", "peephole": True, "zoneout": (0.3, 0.4), "recompute": True},
}
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def two_layers(device, backend, variant, **more):
    return build(device, num_layers=2, bidirectional=True, **variant, **more, backend=backend)


def cell_of(module, index):
    """An LSTMCell with the parameters of one layer and direction."""
    suffix = f"_l{index // 2}" + "_reverse" * (index % 2)
    cell = fused_lstm.LSTMCell(
        module.input_size if index < 2 else 2 * module.hidden_size,
        module.hidden_size,
        layer_norm=module.layer_norm,
        peephole=module.peephole,
        zoneout=module.zoneout,
        device=module.weight_ih_l0.device,
        dtype=torch.float64,
    )
    own = {n.removesuffix(suffix): p for n, p in module.named_parameters() if n.endswith(suffix)}
    for name, parameter in own.items():
        setattr(cell, name, parameter)
    return cell.train(module.training)


@EACH_BACKEND
@EACH_VARIANT
def test_as_step_by_step_with_cells(variant, backend, device):
    """Both directions by input position; gradients through h and c of every step."""
    module = two_layers(device, backend, variant).eval()
    call = make_call(module)
    h_all, c_all, x = [], [], call.input
    for layer in range(2):
        outputs = []
        for d in range(2):
            index = 2 * layer + d
            cell, state, found = cell_of(module, index), [s[index] for s in call.hx], {}
            for t in reversed(range(STEPS)) if d else range(STEPS):
                state = found[t] = cell(x[t], state)
            h, c = (torch.stack([found[t][i] for t in range(STEPS)]) for i in range(2))
            outputs.append(h)
            h_all.append(h)
            c_all.append(c)
        x = torch.cat(outputs, 2)
    expected = {"h": torch.stack(h_all), "c": torch.stack(c_all)}
    expected |= variants.gradients(list(expected.values()), call.leaves(module))
    assert_same(variants.run(module, call, states=True), expected)


@EACH_BACKEND
@EACH_VARIANT
@EACH_KIND
@pytest.mark.parametrize("batch_first", [False, True])
def test_against_the_oracle(batch_first, kind, variant, backend, device, monkeypatch):
    """In training, with dropout between the layers, which states do not see."""
    options = {"dropout": 0.4, "recurrent_dropout": 0.3, "batch_first": batch_first}
    module = two_layers(device, backend, variant, **options)
    call = make_call(module, kind)
    drawn = record(monkeypatch)
    found = variants.run(module, call, states=True)
    assert_same(found, variants.run_oracle(module, call, drawn, states=True))


SHAPES = {
    "batched": ((4, STEPS, ROWS), (4, ROWS, STEPS)),
    "unbatched": ((4, STEPS), (4, STEPS)),
    "lengths": ((4, STEPS, ROWS), (4, ROWS, STEPS)),
    "packed": ((4, max(LENGTHS), ROWS), (4, ROWS, max(LENGTHS))),
}


@EACH_BACKEND
@EACH_KIND
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shapes(dtype, batch_first, kind, backend, device):
    """(num_layers * D, T, N, ·), (num_layers * D, N, T, ·) with batch_first, (num_layers * D, T, ·) unbatched; of the
    input's dtype."""
    module = two_layers(device, backend, {}, proj_size=2, batch_first=batch_first, dtype=dtype)
    call = make_call(module, kind)
    h, c = module.states(call.given(module), call.hx, **call.keywords())
    assert h.shape == (*SHAPES[kind][batch_first], 2)
    assert c.shape == (*SHAPES[kind][batch_first], 4)
    assert h.dtype == c.dtype == dtype


@EACH_BACKEND
@EACH_VARIANT
@EACH_KIND
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_agrees_with_forward(training, kind, variant, backend, device):
    """The output is h of the last layer, and the final states are those after each row's last step."""
    module = two_layers(device, backend, variant, dropout=0.3, proj_size=3).train(training)
    call = make_call(module, kind)
    found = variants.run(module, call)
    torch.manual_seed(9)
    states = module.states(call.given(module), call.hx, **call.keywords())
    if kind == "unbatched":
        states = [state.unsqueeze(2) for state in states]
        found = {name: value.unsqueeze(1) for name, value in found.items() if name in variants.RESULTS}
    steps = states[0].size(1)
    assert torch.equal(torch.cat(tuple(states[0][2:]), 2), found["output"][:steps])
    lengths = call.lengths or [STEPS] * ROWS
    for state, final in zip(states, (found["h_n"], found["c_n"]), strict=True):
        for n in range(state.size(2)):
            for index in range(4):
                last = 0 if index % 2 else lengths[n] - 1
                assert torch.equal(state[index, last, n], final[index, n])


@EACH_BACKEND
@EACH_VARIANT
@pytest.mark.parametrize("kind", ["lengths", "packed"])
def test_zero_past_an_end(kind, variant, backend, device):
    """And no gradient comes from there, NaN included."""
    module = two_layers(device, backend, variant)
    call = make_call(module, kind)
    states = module.states(call.given(module), call.hx, **call.keywords())
    steps = states[0].size(1)
    past = torch.arange(steps, device=device)[:, None] >= torch.tensor(LENGTHS, device=device)
    assert all((state[:, past] == 0).all() for state in states)
    assert all((state[:, ~past] != 0).all() for state in states)
    leaves = list(call.leaves(module).values())
    found = []
    for value in (0.0, float("nan")):
        d = [randn(*state.shape, seed=5, device=device).masked_fill(past[:, :, None], value) for state in states]
        found.append(torch.autograd.grad(states, leaves, d, retain_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[0][0].masked_select(torch.cat((past, past.new_ones(STEPS - steps, ROWS)))[:, :, None]).any()


@EACH_BACKEND
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
def test_packed_is_in_the_callers_order(enforce_sorted, batch_first, backend, device):
    """Padded, each row where the caller put it: what forward's output is when it is padded again."""
    lengths = [4, 2, 1] if enforce_sorted else [1, 4, 2]
    module = two_layers(device, backend, {"peephole": True}, batch_first=batch_first)
    call = make_call(module)
    packed = pack_padded_sequence(call.input, lengths, batch_first, enforce_sorted)
    states = module.states(packed, call.hx)
    output, _ = pad_packed_sequence(module(packed, call.hx)[0], batch_first)
    assert torch.equal(torch.cat(tuple(states[0][2:]), 2), output)
    padded = module.states(call.input, call.hx, lengths=torch.tensor(lengths))
    for state, expected in zip(states, padded, strict=True):
        assert_same({"state": state}, {"state": expected.narrow(2 if batch_first else 1, 0, 4)})


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"bias": False, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_of_the_plain_cell_by_the_default_backend(kind, options, device):
    """torch.nn.LSTM has no such method: every layer's h is the output of that layer run alone by torch."""
    module = build(device, num_layers=2, **options)
    call = make_call(module, kind)
    h, c = module.states(call.given(module), call.hx, **call.keywords())
    theirs = torch.nn.LSTM(3, 4, **options, device=device, dtype=torch.float64)
    theirs.load_state_dict({n: p for n, p in module.state_dict().items() if "_l0" in n})
    directions = 2 if module.bidirectional else 1
    hx = [state[:directions] for state in call.hx]
    input = call.given(module)
    if kind == "lengths":
        input = pack_padded_sequence(call.input, LENGTHS, enforce_sorted=False)
    output, (_, c_n) = theirs(input, hx)
    if kind in ("lengths", "packed"):
        output, _ = pad_packed_sequence(output, total_length=h.size(1))
    assert_same({"h": torch.cat(tuple(h[:directions]), -1)}, {"h": output})
    if kind == "batched":
        assert_same({"c": c[0, -1]}, {"c": c_n[0]})


@EACH_BACKEND
def test_of_zoneout_are_the_zoned_out(backend, device, monkeypatch):
    """Where an element keeps its old value, so do the states."""
    module = build(device, zoneout=(0.5, 0.5), backend=backend)
    call = make_call(module)
    drawn = record(monkeypatch)
    h, c = module.states(call.input, call.hx)
    for state, start, kept in zip((h[0], c[0]), call.hx, drawn.masks[0][2:], strict=True):
        before = torch.cat((start, state[:-1]))
        assert torch.equal(state == before, kept)


@EACH_BACKEND
def test_of_dropout_are_those_before_it(backend, device):
    """All of the first layer's are there, and in its gradients too."""
    module = build(device, num_layers=2, dropout=0.9, backend=backend)
    call = make_call(module)
    h, _ = module.states(call.input, call.hx)
    assert (h != 0).all()
    d_weight = torch.autograd.grad(h[0].sum(), module.weight_ih_l0)[0]
    module.eval()
    h, _ = module.states(call.input, call.hx)
    assert_same({"d": d_weight}, {"d": torch.autograd.grad(h[0].sum(), module.weight_ih_l0)[0]})


@EACH_BACKEND
@EACH_VARIANT
def test_gradient_of_each_state_alone(variant, backend, device, monkeypatch):
    """Of one element of h or c at one step of one layer."""
    module = two_layers(device, backend, variant)
    call = make_call(module)
    drawn = record(monkeypatch)
    torch.manual_seed(9)
    states = module.states(call.input, call.hx)
    exact = oracle.lstm(module, call.input, call.hx, drawn)
    leaves = call.leaves(module)
    for name, state in zip("hc", states, strict=True):
        for index in range(4):
            for t in (0, 2, STEPS - 1):
                found = variants.gradients([state[index, t, 1]], leaves)
                assert_same(found, variants.gradients([exact[name][index, t, 1]], leaves))


@EACH_BACKEND
def test_together_with_forward_in_one_loss(backend, device):
    """Both in one graph: the gradients add up."""
    module = two_layers(device, backend, {"layer_norm": "gates"})
    call = make_call(module)
    leaves = call.leaves(module)
    output, _ = module(call.input, call.hx)
    h, c = module.states(call.input, call.hx)
    parts = [variants.gradients([result], leaves) for result in (output, h, c)]
    d = [randn(*r.shape, seed=20, device=device) for r in (output, h, c)]
    together = torch.autograd.grad((output, h, c), list(leaves.values()), d)
    for value, *each in zip(together, *(part.values() for part in parts), strict=True):
        assert_same({"d": value}, {"d": sum(each)})


@EACH_BACKEND
def test_without_gradients(backend, device):
    module = two_layers(device, backend, {"layer_norm": "projections_cell"})
    call = make_call(module)
    expected = module.states(call.input, call.hx)
    with torch.no_grad():
        found = module.states(call.input, call.hx)
    for actual, value in zip(found, expected, strict=True):
        assert not actual.requires_grad
        assert_same({"s": actual}, {"s": value})


@EACH_BACKEND
def test_states_belong_to_the_caller(backend, device):
    """Changed in place, they change no gradient but their own."""
    module = two_layers(device, backend, {})
    call = make_call(module)
    leaves = list(call.leaves(module).values())
    h, c = module.states(call.input, call.hx)
    expected = torch.autograd.grad((3 * h).sum() + (5 * c).sum(), leaves)
    h, c = module.states(call.input, call.hx)
    h.mul_(3)
    c.mul_(5)
    found = torch.autograd.grad(h.sum() + c.sum(), leaves)
    for actual, value in zip(found, expected, strict=True):
        assert_same({"d": actual}, {"d": value})


def test_errors_are_those_of_forward(device):
    """Whatever forward refuses, with the same words."""
    module = build(device, backend="reference")
    call = make_call(module)
    bad = [
        (call.input[0, 0],),
        (call.input[..., :2],),
        (call.input.float(),),
        (call.input[:0],),
        (call.input, (call.hx[0],)),
        (call.input, (call.hx[0][:, :2], call.hx[1])),
        (call.input, (call.hx[0][:, 0], call.hx[1])),
    ]
    for arguments in bad:
        errors = []
        for function in (module, module.states):
            with pytest.raises((ValueError, RuntimeError)) as raised:
                function(*arguments)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


def test_backend_that_cannot(device):
    module = build(device, backend="torch")
    with pytest.raises(ValueError, match=r"^backend 'torch' cannot run this: torch.nn.LSTM knows no states$"):
        module.states(make_call(module).input)
