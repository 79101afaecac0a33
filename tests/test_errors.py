"""Bad calls of LSTM fail as those of torch.nn.LSTM do: the same class and the same words, wherever torch means it."""

import pytest
import torch
from raising import error_of
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_lstm

STEPS, ROWS, INPUT, HIDDEN = 5, 2, 3, 4

BAD_ARGUMENTS = [
    *({"dropout": value} for value in (-0.1, 1.1, "0.5", True, float("nan"))),
    *({"input_size": value} for value in (0, -1, 3.0, "3")),
    *({"hidden_size": value} for value in (0, -1, 4.0)),
    *({"num_layers": value} for value in (0, -1)),
    *({"proj_size": value} for value in (-1, 4, 5)),
    *({"bias": value} for value in (1, None)),
    *({"batch_first": value} for value in (1, None)),
    {"device": "nowhere"},
    {"dtype": "float32"},
    {"dtype": torch.int64},
    {"unknown": 1},
]


@pytest.mark.parametrize("bad", BAD_ARGUMENTS, ids=str)
def test_constructor(bad):
    arguments = {"input_size": INPUT, "hidden_size": HIDDEN, **bad}
    assert error_of(fused_lstm.LSTM, **arguments) == error_of(torch.nn.LSTM, **arguments)


@pytest.mark.parametrize("arguments", [(), (3,), (3, 4, 1, True, False, 0.0, False, 0, None, None, "auto")], ids=str)
def test_constructor_arity(arguments):
    kind, message = error_of(torch.nn.LSTM, *arguments)
    assert error_of(fused_lstm.LSTM, *arguments) == (kind, message)


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


class Sizes:
    """Right and wrong arguments for a module."""

    def __init__(self, module):
        self.directions = 2 if module.bidirectional else 1
        self.projected = module.proj_size or HIDDEN
        self.batch_first = module.batch_first

    def x(self, features=INPUT, steps=STEPS, rows=ROWS, **options):
        return randn(*((rows, steps) if self.batch_first else (steps, rows)), features, **options)

    def h(self, more=0, layers=0, rows=ROWS, **options):
        return randn(self.directions + layers, rows, self.projected + more, **options)

    def c(self, more=0, layers=0, rows=ROWS, **options):
        return randn(self.directions + layers, rows, HIDDEN + more, **options)

    def packed(self, **options):
        return pack_padded_sequence(self.x(**options), [5, 3], self.batch_first)


F32, INT = torch.float32, torch.int64
BAD_CALLS = {
    "input_0d": lambda _: (randn(),),
    "input_1d": lambda _: (randn(INPUT),),
    "input_4d": lambda _: (randn(1, STEPS, ROWS, INPUT),),
    "features": lambda s: (s.x(features=7),),
    "features_unbatched": lambda _: (randn(STEPS, 7),),
    "features_with_hx": lambda s: (s.x(features=7), (s.h(), s.c())),
    "dtype": lambda s: (s.x(dtype=F32),),
    "dtype_with_hx": lambda s: (s.x(dtype=F32), (s.h(), s.c())),
    "dtype_of_all": lambda s: (s.x(dtype=F32), (s.h(dtype=F32), s.c(dtype=F32))),
    "dtype_integer": lambda _: (torch.ones(STEPS, ROWS, INPUT, dtype=INT),),
    "dtype_complex": lambda s: (s.x(dtype=torch.complex128),),
    "h_size": lambda s: (s.x(), (s.h(more=1), s.c())),
    "c_size": lambda s: (s.x(), (s.h(), s.c(more=1))),
    "h_rows": lambda s: (s.x(), (s.h(rows=3), s.c())),
    "c_rows": lambda s: (s.x(), (s.h(), s.c(rows=3))),
    "h_layers": lambda s: (s.x(), (s.h(layers=1), s.c())),
    "c_layers": lambda s: (s.x(), (s.h(), s.c(layers=1))),
    "h_2d": lambda s: (s.x(), (s.h()[:, 0], s.c())),
    "c_2d": lambda s: (s.x(), (s.h(), s.c()[:, 0])),
    "h_and_c_2d": lambda s: (s.x(), (s.h()[:, 0], s.c()[:, 0])),
    "unbatched_h_and_c_3d": lambda s: (randn(STEPS, INPUT), (s.h(), s.c())),
    "unbatched_h_3d": lambda s: (randn(STEPS, INPUT), (s.h(), s.c()[:, 0])),
    "unbatched_h_size": lambda s: (randn(STEPS, INPUT), (s.h(more=1)[:, 0], s.c()[:, 0])),
    "unbatched_c_size": lambda s: (randn(STEPS, INPUT), (s.h()[:, 0], s.c(more=1)[:, 0])),
    "hx_too_long": lambda s: (s.x(), (s.h(), s.c(), s.c())),
    "no_steps": lambda s: (s.x(steps=0),),
    "no_steps_with_hx": lambda s: (s.x(steps=0), (s.h(), s.c())),
    "no_steps_unbatched": lambda _: (randn(0, INPUT),),
}
ELSEWHERE = {
    "h_device": lambda s: (s.x(), (s.h().to("meta"), s.c())),
    "c_device": lambda s: (s.x(), (s.h(), s.c().to("meta"))),
    "input_device": lambda s: (s.x().to("meta"),),
}
MODULES = [{}, {"batch_first": True, "bidirectional": True}, {"proj_size": 2}]
EACH_MODULE = pytest.mark.parametrize("options", MODULES, ids=str)


def both(options, backend, device="cpu"):
    theirs = torch.nn.LSTM(INPUT, HIDDEN, dtype=torch.float64, **options)
    ours = fused_lstm.LSTM(INPUT, HIDDEN, dtype=torch.float64, device=device, backend=backend, **options)
    return theirs, ours


@EACH_MODULE
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("make", {**BAD_CALLS, **ELSEWHERE}.values(), ids=[*BAD_CALLS, *ELSEWHERE])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_bad_call(make, backend, options):
    theirs, ours = both(options, backend)
    arguments = make(Sizes(theirs))
    assert error_of(ours, *arguments) == error_of(theirs, *arguments)


@pytest.mark.parametrize("make", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call_of_stepwise(make, device):
    theirs, ours = both({}, "stepwise", device)
    input, *hx = make(Sizes(theirs))
    there = [input.to(device), *(tuple(state.to(device) for state in states) for states in hx)]
    assert error_of(ours, *there) == error_of(theirs, input, *hx)


# torch's own error is an accident of its insides here, or there is none: ours says what is wrong
HIDDEN_DTYPE = (
    "Input and hidden tensors are not the same dtype, found input tensor with torch.float64 and hidden tensor "
)
HIDDEN_DTYPE += "with torch.float32"
HIDDEN_DEVICE = (
    "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden tensor at meta"
)
TWO_STATES = "lstm expects two hidden states"
NOT_PACKED = "input must have 2 dimensions, got 3"
FEATURES = "input.size(-1) must be equal to input_size. Expected 3, got 7"
INPUT_DTYPE = "RNN input dtype (torch.float32) does not match weight dtype (torch.float64). "
INPUT_DTYPE += "Convert input: input.to(torch.float64), or convert model: model.to(torch.float32)"
CLEARER = {
    "h_dtype": (lambda s: (s.x(), (s.h(dtype=F32), s.c())), RuntimeError, HIDDEN_DTYPE),
    "c_dtype": (lambda s: (s.x(), (s.h(), s.c(dtype=F32))), RuntimeError, HIDDEN_DTYPE),
    "hx_empty": (lambda s: (s.x(), ()), RuntimeError, TWO_STATES),
    "hx_too_short": (lambda s: (s.x(), (s.h(),)), RuntimeError, TWO_STATES),
    "packed_hx_too_short": (lambda s: (s.packed(), (s.h(),)), RuntimeError, TWO_STATES),
    "packed_hx_too_long": (lambda s: (s.packed(), (s.h(), s.c(), s.c())), RuntimeError, TWO_STATES),
    "packed_features": (lambda s: (s.packed(features=7),), RuntimeError, FEATURES),
    "packed_dtype": (lambda s: (s.packed(dtype=F32),), ValueError, INPUT_DTYPE),
    "packed_3d": (lambda s: (PackedSequence(s.x(), torch.tensor([3, 2])),), RuntimeError, NOT_PACKED),
    "packed_h_dtype": (lambda s: (s.packed(), (s.h(dtype=F32), s.c())), RuntimeError, HIDDEN_DTYPE),
    "packed_c_dtype": (lambda s: (s.packed(), (s.h(), s.c(dtype=F32))), RuntimeError, HIDDEN_DTYPE),
    "packed_h_device": (lambda s: (s.packed(), (s.h().to("meta"), s.c())), RuntimeError, HIDDEN_DEVICE),
    "packed_h_rows": (
        lambda s: (s.packed(), (s.h(rows=3), s.c())),
        *(RuntimeError, "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
    ),
    "packed_h_size": (
        lambda s: (s.packed(), (s.h(more=1), s.c())),
        *(RuntimeError, "Expected hidden[0] size (1, 2, 4), got [1, 2, 5]"),
    ),
    "packed_c_size": (
        lambda s: (s.packed(), (s.h(), s.c(more=1))),
        *(RuntimeError, "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]"),
    ),
    "packed_c_layers": (
        lambda s: (s.packed(), (s.h(), s.c(layers=1))),
        *(RuntimeError, "Expected hidden[1] size (1, 2, 4), got [2, 2, 4]"),
    ),
    "packed_h_2d": (
        lambda s: (s.packed(), (s.h()[:, 0], s.c())),
        *(RuntimeError, "Expected hidden[0] size (1, 2, 4), got [1, 4]"),
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), CLEARER.values(), ids=CLEARER)
def test_clearer_than_torch(make, kind, message):
    theirs, ours = both({}, "reference")
    assert error_of(ours, *make(Sizes(theirs))) == (kind, message)
