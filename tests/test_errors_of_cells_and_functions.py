"""Bad calls of LSTMCell fail as those of torch.nn.LSTMCell do; those of the functions say what does not fit."""

import pytest
import torch
from raising import error_of

import fused_lstm

INPUT, HIDDEN = 3, 4


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def test_cell_constructor():
    for arguments in ({"input_size": INPUT}, {"input_size": INPUT, "hidden_size": HIDDEN, "unknown": 1}):
        assert error_of(fused_lstm.LSTMCell, **arguments) == error_of(torch.nn.LSTMCell, **arguments)


BAD_CELL_CALLS = {
    "input_0d": (randn(),),
    "input_3d": (randn(1, 2, 3),),
    "features": (randn(2, 5),),
    "features_unbatched": (randn(5),),
    "h_size": (randn(2, 3), (randn(2, 5), randn(2, 4))),
    "c_size": (randn(2, 3), (randn(2, 4), randn(2, 5))),
    "h_rows": (randn(2, 3), (randn(3, 4), randn(2, 4))),
    "c_rows": (randn(2, 3), (randn(2, 4), randn(3, 4))),
    "h_one_row": (randn(2, 3), (randn(1, 4), randn(2, 4))),
    "c_one_row": (randn(2, 3), (randn(2, 4), randn(1, 4))),
    "h_3d": (randn(2, 3), (randn(1, 2, 4), randn(2, 4))),
    "c_0d": (randn(2, 3), (randn(2, 4), randn())),
    "h_1d": (randn(2, 3), (randn(4), randn(2, 4))),
    "c_1d": (randn(2, 3), (randn(2, 4), randn(4))),
    "unbatched_h_and_c_2d": (randn(3), (randn(1, 4), randn(1, 4))),
    "unbatched_h_size": (randn(3), (randn(5), randn(4))),
    "unbatched_c_size": (randn(3), (randn(4), randn(5))),
    "hx_too_short": (randn(2, 3), (randn(2, 4),)),
    "hx_too_long": (randn(2, 3), (randn(2, 4), randn(2, 4), randn(2, 4))),
}
CLEARER_CELL_CALLS = {
    "dtype": (
        (randn(2, 3, dtype=torch.float32),),
        "Expected weight_ih to have the input's dtype torch.float32, got torch.float64",
    ),
    "h_dtype": (
        (randn(2, 3), (randn(2, 4, dtype=torch.float32), randn(2, 4))),
        "Expected hidden[0] to have the input's dtype torch.float64, got torch.float32",
    ),
    "c_dtype": (
        (randn(2, 3), (randn(2, 4), randn(2, 4, dtype=torch.float32))),
        "Expected hidden[1] to have the input's dtype torch.float64, got torch.float32",
    ),
}


def both_cells(backend):
    options = {"dtype": torch.float64}
    return torch.nn.LSTMCell(INPUT, HIDDEN, **options), fused_lstm.LSTMCell(INPUT, HIDDEN, **options, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("arguments", BAD_CELL_CALLS.values(), ids=BAD_CELL_CALLS)
def test_bad_call_of_a_cell(arguments, backend):
    theirs, ours = both_cells(backend)
    assert error_of(ours, *arguments) == error_of(theirs, *arguments)


@pytest.mark.parametrize(("arguments", "message"), CLEARER_CELL_CALLS.values(), ids=CLEARER_CELL_CALLS)
def test_clearer_than_torch_cell(arguments, message):
    assert error_of(both_cells("reference")[1], *arguments) == (ValueError, message)


def test_cell_on_another_device():
    _, ours = both_cells("reference")
    expected = (RuntimeError, "Expected hidden[0] on the input's device cpu, got meta")
    assert error_of(ours, randn(2, 3), (randn(2, 4).to("meta"), randn(2, 4))) == expected


def layer_arguments(**changed):
    arguments = {
        "input": randn(5, 2, 3),
        "hx": (randn(2, 4), randn(2, 4)),
        "weight_ih": randn(16, 3),
        "weight_hh": randn(16, 4),
        "bias_ih": randn(16),
        "bias_hh": randn(16),
        "weight_hr": None,
    }
    return {**arguments, **changed}


BAD_LAYERS = {
    "input_2d": ({"input": randn(5, 3)}, "input must have 3 dimensions, got 2"),
    "no_steps": ({"input": randn(0, 2, 3)}, "Expected sequence length to be larger than 0 in RNN"),
    "features": ({"input": randn(5, 2, 7)}, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
    "weight_ih_1d": (
        {"weight_ih": randn(16)},
        "Expected weight_ih size (4*hidden_size, input_size), got [16]",
    ),
    "weight_ih_rows": (
        {"weight_ih": randn(15, 3)},
        "Expected weight_ih size (4*hidden_size, input_size), got [15, 3]",
    ),
    "weight_hh": ({"weight_hh": randn(16, 5)}, "Expected weight_hh size (16, 4), got [16, 5]"),
    "bias_ih": ({"bias_ih": randn(4)}, "Expected bias_ih size (16,), got [4]"),
    "bias_hh": ({"bias_hh": randn(16, 1)}, "Expected bias_hh size (16,), got [16, 1]"),
    "weight_hr": ({"weight_hr": randn(2, 5)}, "Expected weight_hh size (16, 2), got [16, 4]"),
    "weight_hr_columns": (
        {"weight_hr": randn(2, 5), "weight_hh": randn(16, 2)},
        "Expected weight_hr size (2, 4), got [2, 5]",
    ),
    "h0": ({"hx": (randn(1, 4), randn(2, 4))}, "Expected hidden[0] size (2, 4), got [1, 4]"),
    "h0_3d": ({"hx": (randn(1, 2, 4), randn(2, 4))}, "Expected hidden[0] size (2, 4), got [1, 2, 4]"),
    "c0": ({"hx": (randn(2, 4), randn(2, 5))}, "Expected hidden[1] size (2, 4), got [2, 5]"),
    "hx_too_short": ({"hx": (randn(2, 4),)}, "lstm expects two hidden states"),
    "bias_device": ({"bias_hh": randn(16).to("meta")}, "Expected bias_hh on the input's device cpu, got meta"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize(("changed", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_bad_layer(changed, message, backend):
    assert error_of(fused_lstm.lstm_layer, **layer_arguments(**changed), backend=backend) == (RuntimeError, message)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "hidden[0]", "hidden[1]"])
def test_layer_of_two_dtypes(name, backend):
    arguments = layer_arguments()
    if name.startswith("hidden"):
        index = int(name[-2])
        arguments["hx"] = tuple(state.float() if i == index else state for i, state in enumerate(arguments["hx"]))
    else:
        arguments[name] = arguments[name].float()
    expected = (ValueError, f"Expected {name} to have the input's dtype torch.float64, got torch.float32")
    assert error_of(fused_lstm.lstm_layer, **arguments, backend=backend) == expected


def cell_arguments(**changed):
    arguments = {
        "input": randn(2, 3),
        "hx": (randn(2, 4), randn(2, 4)),
        "w_ih": randn(16, 3),
        "w_hh": randn(16, 4),
        "b_ih": randn(16),
        "b_hh": randn(16),
    }
    return {**arguments, **changed}


BAD_CELLS = {
    "input_1d": ({"input": randn(3)}, "input must have 2 dimensions, got 1"),
    "features": ({"input": randn(2, 7)}, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
    "w_hh": ({"w_hh": randn(16, 5)}, "Expected weight_hh size (16, 4), got [16, 5]"),
    "h": ({"hx": (randn(1, 4), randn(2, 4))}, "Expected hidden[0] size (2, 4), got [1, 4]"),
    "hx_too_short": ({"hx": (randn(2, 4),)}, "lstm_cell expects two hidden states"),
}


@pytest.mark.parametrize(("changed", "message"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_bad_cell_function(changed, message):
    arguments = cell_arguments(**changed)
    assert error_of(fused_lstm.lstm_cell, **arguments, backend="reference") == (RuntimeError, message)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_meta_device(backend):
    """No error: shapes without numbers, as torch's own modules give."""
    for theirs, ours, input in (
        (torch.nn.LSTM, fused_lstm.LSTM, randn(5, 2, INPUT)),
        (torch.nn.LSTMCell, fused_lstm.LSTMCell, randn(2, INPUT)),
    ):
        expected = theirs(INPUT, HIDDEN, device="meta", dtype=torch.float64)(input.to("meta"))[0]
        actual = ours(INPUT, HIDDEN, device="meta", dtype=torch.float64, backend=backend)(input.to("meta"))[0]
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
