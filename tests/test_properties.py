"""Whatever the sizes and options: the numbers of torch.nn.LSTM, and what must hold of any LSTM."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import randn, run, twin
from tolerance import assert_as_accurate, assert_same_float64

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# derandomize: the same examples in every run; HealthCheck: `device` is one for the whole session
FEW = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=60)


@st.composite
def modules(draw, most=6):
    """Arguments of an LSTM, its sizes between 1 and most."""
    hidden_size = draw(st.integers(1, most))
    return {
        "input_size": draw(st.integers(1, most)),
        "hidden_size": hidden_size,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "proj_size": draw(st.integers(0, hidden_size - 1)),
    }


def build(arguments, device, dtype=torch.float64) -> torch.nn.LSTM:
    torch.manual_seed(0)
    return torch.nn.LSTM(**arguments, device=device, dtype=dtype)


def make_input(module, steps, rows, has_hx=True):
    weight = next(module.parameters())
    options = {"device": weight.device, "dtype": weight.dtype, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows, steps) if module.batch_first else (steps, rows)
    h_0 = randn(count, rows, module.proj_size or module.hidden_size, seed=2, **options)
    c_0 = randn(count, rows, module.hidden_size, seed=3, **options)
    return randn(*shape, module.input_size, seed=1, **options), (h_0, c_0) if has_hx else None


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


def check_parity(backend, arguments, steps, rows, has_hx, device):
    module = build(arguments, device)
    expected = run(module, *make_input(module, steps, rows, has_hx))
    assert_same(run(twin(module, backend), *make_input(module, steps, rows, has_hx)), expected)


@MANY
@given(arguments=modules(most=40), steps=st.integers(1, 12), rows=st.integers(1, 9), has_hx=st.booleans())
def test_parity(arguments, steps, rows, has_hx, device):
    check_parity("reference", arguments, steps, rows, has_hx, device)


@FEW
@given(arguments=modules(most=40), steps=st.integers(1, 3), rows=st.integers(1, 2), has_hx=st.booleans())
def test_parity_of_stepwise(arguments, steps, rows, has_hx, device):
    check_parity("stepwise", arguments, steps, rows, has_hx, device)


def check_lengths(backend, arguments, lengths, device):
    module = build(arguments, device)
    given_input = make_input(module, max(lengths), len(lengths))
    expected = run(module, *given_input, lengths=lengths, pack="unsorted")
    assert_same(run(twin(module, backend), *given_input, lengths=lengths), expected)


@MANY
@given(arguments=modules(), lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_lengths(arguments, lengths, device):
    check_lengths("reference", arguments, lengths, device)


@FEW
@given(arguments=modules(), lengths=st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_lengths_of_stepwise(arguments, lengths, device):
    check_lengths("stepwise", arguments, lengths, device)


@MANY
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    hidden_size=st.integers(16, 40),
    bidirectional=st.booleans(),
    steps=st.integers(1, 6),
)
def test_lower_precision(dtype, hidden_size, bidirectional, steps, device):
    arguments = {"input_size": 16, "hidden_size": hidden_size, "bidirectional": bidirectional}
    module = build(arguments, device, dtype)
    input, hx = make_input(module, steps, 8)
    same_dtype, actual = run(module, input, hx), run(twin(module, "reference"), input, hx)
    exact_hx = [state.detach().double().requires_grad_() for state in hx]
    exact = run(module.double(), input.detach().double().requires_grad_(), exact_hx)
    for name, value in exact.items():
        assert_as_accurate(actual[name], same_dtype[name], value)


EACH_BACKEND = pytest.mark.parametrize("backend", ["reference", "stepwise"])
INVARIANT = settings(FEW, max_examples=4)
SIZES = {"steps": st.integers(1, 4), "rows": st.integers(1, 3)}


def plain(arguments, backend, device):
    return twin(build({**arguments, "num_layers": 1, "batch_first": False}, device), backend)


@EACH_BACKEND
@INVARIANT
@given(arguments=modules(), order=st.permutations(range(3)), steps=st.integers(1, 4))
def test_rows_are_independent(backend, arguments, order, steps, device):
    """Permuting the rows of the batch permutes the rows of every result, and of every row's gradients."""
    module = plain(arguments, backend, device)
    input, (h_0, c_0) = make_input(module, steps, 3)

    def results(input, h_0, c_0, weight):
        output, (h_n, c_n) = module(input, (h_0, c_0))
        d_leaves = torch.autograd.grad((output * weight).sum() + h_n.sum() + (c_n**2).sum(), [input, h_0, c_0])
        return [output, h_n, c_n, *d_leaves]

    weight = randn(*module(input)[0].shape, seed=9, device=device)
    expected = results(input, h_0, c_0, weight)
    actual = results(input[:, order], h_0[:, order], c_0[:, order], weight[:, order])
    for a, e in zip(actual, expected, strict=True):
        assert_same_float64(a.detach(), e[:, order].detach())


@EACH_BACKEND
@INVARIANT
@given(arguments=modules(), before=st.integers(1, 3), after=st.integers(1, 3))
def test_carried_state_is_one_run(backend, arguments, before, after, device):
    """Two pieces of a sequence, the state carried from one to the other, are the whole; so are the gradients."""
    module = plain({**arguments, "bidirectional": False}, backend, device)
    input, hx = make_input(module, before + after, 2)
    output, state = module(input, hx)
    first, middle = module(input[:before], hx)
    second, last = module(input[before:], middle)
    leaves = [input, *hx, *module.parameters()]
    for actual, expected in ((torch.cat((first, second)), output), *zip(last, state, strict=True)):
        assert_same_float64(actual.detach(), expected.detach())
        pair = (torch.autograd.grad((result**2).sum(), leaves, retain_graph=True) for result in (actual, expected))
        for a, e in zip(*pair, strict=True):
            assert_same_float64(a, e)


@EACH_BACKEND
@INVARIANT
@given(arguments=modules(), **SIZES)
def test_reverse_is_the_flipped_sequence(backend, arguments, steps, rows, device):
    """With both directions' weights exchanged and the sequence flipped, the output is flipped and exchanged."""
    module = plain({**arguments, "bidirectional": True}, backend, device)
    input, (h_0, c_0) = make_input(module, steps, rows)
    output, (h_n, c_n) = module(input, (h_0, c_0))
    state = module.state_dict()
    names = {name: name.removesuffix("_reverse") if name.endswith("_reverse") else f"{name}_reverse" for name in state}
    module.load_state_dict({names[name]: value.clone() for name, value in state.items()})
    flipped, (h_f, c_f) = module(input.flip(0), (h_0.flip(0), c_0.flip(0)))
    size = output.size(2) // 2
    assert_same_float64(flipped.flip(0).roll(size, 2).detach(), output.detach())
    assert_same_float64(h_f.flip(0).detach(), h_n.detach())
    assert_same_float64(c_f.flip(0).detach(), c_n.detach())


@EACH_BACKEND
@INVARIANT
@given(arguments=modules(), **SIZES)
def test_full_lengths_are_none(backend, arguments, steps, rows, device):
    module = plain(arguments, backend, device)
    expected = run(module, *make_input(module, steps, rows))
    assert_same(run(module, *make_input(module, steps, rows), lengths=[steps] * rows), expected)


@EACH_BACKEND
@INVARIANT
@given(arguments=modules(), rows=st.integers(1, 3))
def test_one_step_is_a_cell(backend, arguments, rows, device):
    """An LSTM over one step is an LSTMCell."""
    module = plain({**arguments, "bidirectional": False, "proj_size": 0}, backend, device)
    cell = torch.nn.LSTMCell(
        module.input_size, module.hidden_size, bias=module.bias, device=device, dtype=torch.float64
    )
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    input, (h_0, c_0) = make_input(module, 1, rows)
    output, (h_n, c_n) = module(input, (h_0, c_0))
    h, c = twin(cell, backend)(input[0], (h_0[0], c_0[0]))
    for actual, expected in ((output[0], h), (h_n[0], h), (c_n[0], c)):
        assert_same_float64(actual.detach(), expected.detach())
