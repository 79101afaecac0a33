"""lengths: padded rows computed as if packed, and nothing that lies in the padding has an effect."""

import functools
import itertools
import re

import pytest
import torch
from runs import randn, run, twin
from tolerance import assert_same_float64

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

STEPS, LENGTHS = 5, [3, 5, 1, 3]  # of four rows
BACKENDS = pytest.mark.parametrize("backend", ["reference", "stepwise"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 2}],
    ids=str,
)


def build(device, **options) -> torch.nn.LSTM:
    torch.manual_seed(0)
    return torch.nn.LSTM(3, 5, device=device, dtype=torch.float64, **options)


def make_input(module, rows=4):
    options = {"device": module.weight_ih_l0.device, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows, STEPS) if module.batch_first else (STEPS, rows)
    h_0 = randn(count, rows, module.proj_size or 5, seed=2, **options)
    return randn(*shape, 3, seed=1, **options), (h_0, randn(count, rows, 5, seed=3, **options))


def padding(module, device):
    """True where an input's or output's step lies past its row's end; broadcasts over features."""
    past = torch.arange(STEPS, device=device)[:, None] >= torch.tensor(LENGTHS, device=device)
    return (past.t() if module.batch_first else past)[:, :, None]


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


@BACKENDS
@OPTIONS
def test_as_if_packed(options, backend, device):
    """lengths, the same packed, and torch's own packed: one result."""
    module = build(device, **options)
    ours = twin(module, backend)
    expected = run(module, *make_input(module), lengths=LENGTHS, pack="unsorted")
    assert_same(run(ours, *make_input(module), lengths=LENGTHS, pack="unsorted"), expected)
    assert_same(run(ours, *make_input(module), lengths=LENGTHS), expected)


@OPTIONS
@pytest.mark.parametrize(
    ("backend", "value"),
    [("reference", float("nan")), ("reference", float("inf")), ("reference", 1e300), ("stepwise", float("nan"))],
)
def test_padding_has_no_effect(value, options, backend, device):
    """What lies in the padding of the input, or of the output's gradient, reaches nothing."""
    module = twin(build(device, **options), backend)
    input, hx = make_input(module)
    expected = run(module, input, hx, lengths=LENGTHS)
    past = padding(module, device)
    dirty = input.detach().masked_fill(past, value).requires_grad_()
    lengths = torch.tensor(LENGTHS, device=device)
    output, (h_n, c_n) = module(dirty, hx, lengths=lengths)
    results = (output, h_n, c_n)
    for result, name in zip(results, ("output", "h_n", "c_n"), strict=True):
        assert torch.equal(result, expected[name])
    assert not output.masked_select(past).any()
    # the gradients that `run` starts from, with the padding of output's made dirty too
    d_results = [randn(*r.shape, seed=7 + i, dtype=r.dtype, device=device) for i, r in enumerate(results)]
    d_results[0].masked_fill_(past, value)
    leaves = {"input": dirty, "h_0": hx[0], "c_0": hx[1], **dict(module.named_parameters())}
    gradients = torch.autograd.grad(results, list(leaves.values()), d_results)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected["d_" + name])
    assert not gradients[0].masked_select(past).any()


@BACKENDS
def test_padding_has_no_effect_on_a_layer(backend, device):
    """The same through lstm_layer, forward and reverse."""
    module = build(device)
    input, (h_0, c_0) = make_input(module)
    past, lengths = padding(module, device), torch.tensor(LENGTHS, device=device)
    for reverse in (False, True):
        found = []
        for value in (0.0, float("nan")):
            dirty = input.detach().masked_fill(past, value).requires_grad_()
            output, (h_n, c_n) = fused_lstm.lstm_layer(
                dirty, (h_0[0], c_0[0]), *module.parameters(), lengths=lengths, reverse=reverse, backend=backend
            )
            d_output = torch.ones_like(output).masked_fill(past, value)
            leaves = [dirty, h_0, c_0, *module.parameters()]
            d_state = [torch.ones_like(h_n), torch.ones_like(c_n)]
            gradients = torch.autograd.grad((output, h_n, c_n), leaves, [d_output, *d_state])
            found.append([output, h_n, c_n, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert not any(value.isnan().any() for value in found[0])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_any_dtype_and_device(dtype, backend, device):
    module = twin(build(device, bidirectional=True), backend)
    input, hx = make_input(module)
    expected = run(module, input, hx, lengths=LENGTHS)
    for where in {"cpu", device}:
        output, (h_n, c_n) = module(input, hx, lengths=torch.tensor(LENGTHS, dtype=dtype, device=where))
        for name, value in {"output": output, "h_n": h_n, "c_n": c_n}.items():
            assert torch.equal(value, expected[name])


@BACKENDS
@pytest.mark.parametrize("reverse", [False, True])
def test_all_steps_is_no_lengths(reverse, backend, device):
    module = build(device)
    input, (h_0, c_0) = make_input(module)
    options = {"reverse": reverse, "backend": backend}
    lengths = torch.full((len(LENGTHS),), STEPS, device=device)
    with_lengths = fused_lstm.lstm_layer(input, (h_0[0], c_0[0]), *module.parameters(), lengths=lengths, **options)
    without = fused_lstm.lstm_layer(input, (h_0[0], c_0[0]), *module.parameters(), **options)
    assert_same_float64(with_lengths[0], without[0])
    for actual, expected in zip(with_lengths[1], without[1], strict=True):
        assert_same_float64(actual, expected)


@BACKENDS
def test_no_rows(backend, device):
    module = twin(build(device, bidirectional=True), backend)
    input, hx = make_input(module, rows=0)
    output, (h_n, c_n) = module(input, hx, lengths=torch.zeros(0, dtype=torch.int64))
    assert output.shape == (STEPS, 0, 10)
    assert h_n.shape == c_n.shape == (2, 0, 5)
    gradients = torch.autograd.grad((output.sum(), h_n.sum(), c_n.sum()), [input, *module.parameters()])
    assert not any(gradient.any() for gradient in gradients)


@BACKENDS
def test_rows_in_any_order(backend, device):
    """Another order of the rows gives the same rows."""
    module = twin(build(device, bidirectional=True), backend)
    input, (h_0, c_0) = make_input(module, rows=3)
    lengths = torch.tensor(LENGTHS[:3], device=device)
    output, (h_n, c_n) = module(input, (h_0, c_0), lengths=lengths)
    for order in list(itertools.permutations(range(3)))[1:4]:
        order = torch.tensor(order, device=device)
        permuted, (h_p, c_p) = module(input[:, order], (h_0[:, order], c_0[:, order]), lengths=lengths[order])
        assert_same_float64(permuted, output[:, order])
        assert_same_float64(h_p, h_n[:, order])
        assert_same_float64(c_p, c_n[:, order])


@BACKENDS
def test_each_row_alone(backend, device):
    """A row of the batch is what the same row gives alone, cut to its length."""
    module = twin(build(device, num_layers=2, bidirectional=True), backend)
    input, (h_0, c_0) = make_input(module)
    output, (h_n, c_n) = module(input, (h_0, c_0), lengths=torch.tensor(LENGTHS, device=device))
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone, (h, c) = module(input[:length, one].contiguous(), (h_0[:, one].contiguous(), c_0[:, one].contiguous()))
        assert_same_float64(output[:length, one], alone)
        assert_same_float64(h_n[:, one], h)
        assert_same_float64(c_n[:, one], c)


def test_final_state_is_a_row_of_the_output(device):
    """h_n of the forward direction stands in the output at each row's last step, the reverse one's at its first."""
    module = twin(build(device, bidirectional=True), "reference")
    output, (h_n, _) = module(make_input(module)[0], lengths=torch.tensor(LENGTHS, device=device))
    rows = torch.arange(len(LENGTHS), device=device)
    assert torch.equal(output[torch.tensor(LENGTHS, device=device) - 1, rows, :5], h_n[0])
    assert torch.equal(output[0, :, 5:], h_n[1])


BAD = {
    "list": ([3, 5, 1, 3], "lengths should be a tensor of int32 or int64, got list"),
    "float": (torch.tensor([3.0, 5.0, 1.0, 3.0]), "lengths should be a tensor of int32 or int64, got torch.float32"),
    "bool": (torch.tensor([True] * 4), "lengths should be a tensor of int32 or int64, got torch.bool"),
    "short": (torch.tensor([3, 5, 1]), r"Expected lengths size (4,), got (3,)"),
    "scalar": (torch.tensor(3), r"Expected lengths size (4,), got ()"),
    "matrix": (torch.tensor([[3, 5, 1, 3]]), r"Expected lengths size (4,), got (1, 4)"),
    "zero": (torch.tensor([3, 0, 1, 3]), r"lengths should lie in [1, 5], got values from 0 to 3"),
    "negative": (torch.tensor([3, -2, 1, 3]), r"lengths should lie in [1, 5], got values from -2 to 3"),
    "beyond": (torch.tensor([3, 5, 6, 3]), r"lengths should lie in [1, 5], got values from 3 to 6"),
}


@pytest.mark.parametrize("where", ["module", "batch_first", "layer"])
@pytest.mark.parametrize(("lengths", "message"), BAD.values(), ids=BAD.keys())
def test_bad_lengths(lengths, message, where, device):
    module = twin(build(device, batch_first=where == "batch_first"), "auto")
    input, (h_0, c_0) = make_input(module)
    if where == "layer":
        call = functools.partial(fused_lstm.lstm_layer, input, (h_0[0], c_0[0]), *module.parameters())
    else:
        call = functools.partial(module, input, (h_0, c_0))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(lengths=lengths)


def test_lengths_with_packed_input(device):
    module = twin(build(device), "auto")
    packed = torch.nn.utils.rnn.pack_padded_sequence(make_input(module)[0], LENGTHS, enforce_sorted=False)
    with pytest.raises(ValueError, match=r"^lengths cannot be given with a PackedSequence, which has its own$"):
        module(packed, lengths=torch.tensor(LENGTHS, device=device))


def test_lengths_with_unbatched_input(device):
    module = twin(build(device), "auto")
    with pytest.raises(ValueError, match=r"^lengths needs a batched input, got a 2D one$"):
        module(make_input(module)[0][:, 0], lengths=torch.tensor([3], device=device))


def test_automatic_backend_takes_lengths(device):
    """The default never fails where another backend can serve."""
    module = build(device, bidirectional=True)
    expected = run(module, *make_input(module), lengths=LENGTHS, pack="unsorted")
    assert_same(run(twin(module, "auto"), *make_input(module), lengths=LENGTHS), expected)
