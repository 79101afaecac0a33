"""Which backend runs a case, and why."""

import subprocess
import sys

import pytest
import torch
from raising import error_of

import fused_lstm
from fused_lstm import BACKENDS, BackendChoice, _backends, select_backend

CASE = {"dtype": torch.float32, "hidden_size": 64, "batch_size": 8}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
UNKNOWN = "should be one of " + ", ".join(repr(name) for name in ("auto", *BACKENDS)) + ", got 'cudnn'"

NO_KERNELS = "; ".join(f"nor {name}: Triton's kernels need a CUDA device" for name in ("persistent", "stepwise"))


@pytest.fixture
def compiled_kernels(monkeypatch):
    """As on a machine whose kernels are compiled: they run on CUDA tensors only."""
    from fused_lstm.kernels import interpretation

    monkeypatch.setattr(interpretation, "INTERPRETED", False)


@pytest.fixture
def no_triton(monkeypatch):
    """As on a machine without Triton: importing the kernels fails."""
    for name in list(sys.modules):
        if name.startswith("fused_lstm.kernels"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fused_lstm, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_names():
    assert BACKENDS == ("persistent", "stepwise", "torch", "reference")


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_automatic_plain_cell_is_torch(dtype, device):
    choice = select_backend(**{**CASE, "dtype": dtype}, device=device)
    if (dtype, device) == (torch.float16, "cpu"):
        assert choice == BackendChoice("reference", f"torch's own cannot: it takes float16 on few CPUs; {NO_KERNELS}")
        return
    assert choice.name == "torch"
    if device == "cuda":
        assert choice.reason == f"cuDNN: no measurement yet says that ours is faster for H=64, N=8 in {dtype}"
    else:
        assert choice.reason == f"torch's own kernels, on {device}"


@pytest.mark.usefixtures("no_triton")
def test_automatic_without_triton():
    """auto never fails where another backend could serve."""
    assert select_backend(**CASE, lengths=True, device="cuda").name == "reference"
    kind, message = error_of(select_backend, "stepwise", **CASE, device="cuda")
    assert kind is ValueError
    assert message.startswith("backend 'stepwise' cannot run this: it needs Triton, and importing that failed: ")


def test_interpreted_kernels_run_anywhere(monkeypatch):
    from fused_lstm.kernels import interpretation

    monkeypatch.setattr(interpretation, "INTERPRETED", True)
    assert select_backend("stepwise", **CASE, device="cpu").name == "stepwise"
    assert select_backend(**CASE, lengths=True, device="cpu").name == "reference"  # but nobody asks for that


@pytest.mark.parametrize("name", BACKENDS)
def test_argument_over_variable_over_rule(name, monkeypatch, device):
    assert select_backend(name, **CASE, device=device) == BackendChoice(name, "asked for by backend=")
    monkeypatch.setenv("FUSED_LSTM_BACKEND", name)
    assert select_backend(**CASE, device=device) == BackendChoice(name, "asked for by FUSED_LSTM_BACKEND")
    assert select_backend("auto", **CASE, device=device).name == name
    for other in BACKENDS:
        assert select_backend(other, **CASE, device=device) == BackendChoice(other, "asked for by backend=")
    monkeypatch.setenv("FUSED_LSTM_BACKEND", "auto")
    assert select_backend(**CASE, device="cpu") == BackendChoice("torch", "torch's own kernels, on cpu")


@pytest.mark.parametrize("name", BACKENDS)
def test_variable_reaches_every_door(name, monkeypatch, device):
    """LSTM, LSTMCell, lstm_layer and lstm_cell all ask it, at each call."""
    asked = []
    select = _backends.select_backend

    def spy(*args, **kwargs):
        choice = select(*args, **kwargs)
        asked.append(choice.name)
        return choice

    monkeypatch.setattr("fused_lstm._run.select_backend", spy)
    monkeypatch.setenv("FUSED_LSTM_BACKEND", name)
    module, cell = fused_lstm.LSTM(3, 4, device=device), fused_lstm.LSTMCell(3, 4, device=device)
    x, state = torch.zeros(5, 2, 3, device=device), (torch.zeros(2, 4, device=device),) * 2
    module(x)
    cell(x[0])
    fused_lstm.lstm_layer(x, state, *module.parameters())
    fused_lstm.lstm_cell(x[0], state, *cell.parameters())
    assert set(asked) == {name}
    assert len(asked) >= 4


@pytest.fixture
def h100(monkeypatch):
    """As on a machine with an H100 and compiled kernels."""
    from fused_lstm.kernels import persistent_launch
    from fused_lstm.kernels.devices import KNOWN_DEVICES

    monkeypatch.setattr(persistent_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(persistent_launch, "cuda_device", lambda _index: KNOWN_DEVICES["h100"])


@pytest.mark.usefixtures("compiled_kernels", "h100")
@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("torch.nn.LSTM takes no lengths (pack the sequence, or use another backend)", {"lengths": True}),
        ("torch.nn.LSTM keeps the gates for its backward", {"recompute": True}),
        ("torch.compile cannot trace torch.nn.LSTM", {"compiling": True}),
        ("torch.nn.LSTM knows no reset, states", {"options": ["reset", "states"]}),
    ],
)
def test_automatic_where_torch_cannot(reason, options):
    """One launch where it fits, a kernel a step where not; without a GPU the reference."""
    on_cuda = select_backend(**CASE, **options, device="cuda:0")
    assert on_cuda == BackendChoice("persistent", f"torch's own cannot: {reason}")
    too_large = select_backend(**{**CASE, "hidden_size": 4096}, **options, device="cuda:0")
    assert too_large.name == "stepwise"
    assert too_large.reason.startswith(f"torch's own cannot: {reason}; nor persistent: 1024 KB of W_hh a program")
    on_cpu = select_backend(**CASE, **options, device="cpu")
    assert on_cpu == BackendChoice("reference", f"torch's own cannot: {reason}; {NO_KERNELS}")


@pytest.mark.usefixtures("compiled_kernels")
def test_automatic_with_a_norm():
    choice = select_backend(**CASE, layer_norm="gates", options=["zoneout"], device="cpu")
    assert choice.reason.startswith("torch's own cannot: torch.nn.LSTM knows no layer_norm, zoneout; nor ")
    expected = "layer_norm should be one of None, 'gates', 'projections', 'projections_cell', got 'batch'"
    assert error_of(select_backend, **CASE, layer_norm="batch", device="cpu") == (ValueError, expected)


_WIDE = {"dtype": torch.bfloat16, "hidden_size": 1024, "batch_size": 128}  # which only a plain step has registers for
_NARROW = "64 programs for each 32 of 128 rows are more than the 132 multiprocessors of H100"


@pytest.mark.usefixtures("compiled_kernels", "h100")
@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({}, None),
        ({"lengths": True, "recompute": True, "compiling": True}, None),
        ({"dtype": torch.bfloat16, "hidden_size": 1024}, None),
        ({"dtype": torch.float64}, "its products are the matrix units', which take no float64"),
        ({"projection": True}, "it knows no projection"),
        ({"hidden_size": 1024}, "256 KB of W_hh a program are more than a block of H100 has"),
        ({**_WIDE, "options": ["weight_dropout", "locked_dropout", "states"]}, None),  # nothing of these is in a step
        *(({**_WIDE, "options": [name]}, _NARROW) for name in ("peephole", "zoneout", "recurrent_dropout", "reset")),
        ({**_WIDE, "layer_norm": "gates"}, _NARROW),
    ],
)
def test_persistent_on_an_h100(options, obstacle):
    case = {**CASE, **options, "device": "cuda:0"}
    if obstacle is None:
        assert select_backend("persistent", **case).name == "persistent"
    else:
        expected = (ValueError, f"backend 'persistent' cannot run this: {obstacle}")
        assert error_of(select_backend, "persistent", **case) == expected


@pytest.mark.usefixtures("compiled_kernels", "h100")
def test_persistent_float32_needs_tf32(monkeypatch):
    monkeypatch.setattr(_backends, "tf32_allowed", lambda: False)
    kind, message = error_of(select_backend, "persistent", **CASE, device="cuda:0")
    assert kind is ValueError
    assert message.endswith("TF32, which torch.backends.cudnn.rnn.fp32_precision does not allow")
    assert select_backend("persistent", **{**CASE, "dtype": torch.bfloat16}, device="cuda:0").name == "persistent"


@pytest.mark.usefixtures("compiled_kernels")
def test_persistent_without_a_device(monkeypatch):
    from fused_lstm.kernels import persistent_launch

    monkeypatch.setattr(persistent_launch, "INTERPRETED", False)
    expected = (ValueError, "backend 'persistent' cannot run this: there is no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error_of(select_backend, "persistent", **CASE, device="cuda") == expected


@pytest.mark.interpreter
def test_interpreted_programs_that_wait_for_each_other():
    expected = (
        "backend 'persistent' cannot run this: Triton's interpreter runs one program after another, "
        "and 8 would wait for each other"
    )
    assert error_of(select_backend, "persistent", **{**CASE, "hidden_size": 65}, device="cpu") == (ValueError, expected)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(
    ("name", "options", "obstacle"),
    [
        ("torch", {"lengths": True}, "torch.nn.LSTM takes no lengths (pack the sequence, or use another backend)"),
        ("torch", {"recompute": True}, "torch.nn.LSTM keeps the gates for its backward"),
        ("torch", {"compiling": True}, "torch.compile cannot trace torch.nn.LSTM"),
        (
            "stepwise",
            {},
            "it needs a CUDA device, and the input is on cpu "
            "(for a test without a GPU, set TRITON_INTERPRET=1 before the first import)",
        ),
        (
            "reference",
            {"dtype": torch.int64},
            "it computes in torch.float64, torch.float32, torch.float16, torch.bfloat16, got torch.int64",
        ),
        (
            "stepwise",
            {"dtype": torch.complex64},
            "it computes in torch.float64, torch.float32, torch.float16, torch.bfloat16, got torch.complex64",
        ),
    ],
)
def test_what_was_asked_for_cannot_run(name, options, obstacle, monkeypatch):
    expected = (ValueError, f"backend {name!r} cannot run this: {obstacle}")
    assert error_of(select_backend, name, **{**CASE, **options}, device="cpu") == expected
    monkeypatch.setenv("FUSED_LSTM_BACKEND", name)
    assert error_of(select_backend, **{**CASE, **options}, device="cpu") == expected


def test_lengths_on_the_torch_backend(device):
    module = fused_lstm.LSTM(3, 4, backend="torch", device=device)
    expected = (
        "backend 'torch' cannot run this: torch.nn.LSTM takes no lengths (pack the sequence, or use another backend)"
    )
    x, lengths = torch.zeros(5, 2, 3, device=device), torch.tensor([5, 2], device=device)
    assert error_of(module, x, lengths=lengths) == (ValueError, expected)


def test_autocast_decides_the_dtype(device, monkeypatch):
    """What is selected for is the dtype that autocast casts to."""
    asked = []
    select = _backends.select_backend
    monkeypatch.setattr(
        "fused_lstm._run.select_backend", lambda *a, **k: (asked.append(k["dtype"]), select(*a, **k))[1]
    )
    for dtype in (torch.float32, torch.float64):
        module = fused_lstm.LSTM(3, 4, dtype=dtype, backend="reference", device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            module(torch.zeros(5, 2, 3, dtype=dtype, device=device))
    assert asked == [torch.bfloat16, torch.float64]


def test_unknown_backend():
    expected = (ValueError, f"backend {UNKNOWN}")
    x, state = torch.zeros(5, 2, 3), (torch.zeros(2, 4), torch.zeros(2, 4))
    assert error_of(select_backend, "cudnn", **CASE, device="cpu") == expected
    assert error_of(fused_lstm.LSTM, 3, 4, backend="cudnn") == expected
    assert error_of(fused_lstm.LSTMCell, 3, 4, backend="cudnn") == expected
    weights = list(fused_lstm.LSTM(3, 4).parameters())
    assert error_of(fused_lstm.lstm_layer, x, state, *weights, backend="cudnn") == expected
    assert error_of(fused_lstm.lstm_cell, x[0], state, *weights, backend="cudnn") == expected
    module = fused_lstm.LSTM(3, 4)
    module.backend = "cudnn"
    assert error_of(module, x) == expected


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("FUSED_LSTM_BACKEND", "cudnn")
    expected = (ValueError, f"FUSED_LSTM_BACKEND {UNKNOWN}")
    assert error_of(select_backend, **CASE, device="cpu") == expected
    assert error_of(fused_lstm.LSTM(3, 4), torch.zeros(5, 2, 3)) == expected
    assert select_backend("reference", **CASE, device="cpu").name == "reference"


STEPWISE_ON_CPU = """
import torch, fused_lstm
for call, x in (fused_lstm.LSTM, torch.zeros(2, 1, 3)), (fused_lstm.LSTMCell, torch.zeros(1, 3)):
    try:
        call(3, 4, backend="stepwise")(x)
    except ValueError as error:
        print(error)
"""


def test_stepwise_needs_a_gpu_or_the_interpreter():
    """In a process of its own, whose kernels are not interpreted."""
    command = [sys.executable, "-P", "-c", STEPWISE_ON_CPU]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    message = "backend 'stepwise' cannot run this: it needs a CUDA device, and the input is on cpu "
    message += "(for a test without a GPU, set TRITON_INTERPRET=1 before the first import)"
    assert done.stdout.splitlines() == [message, message]
