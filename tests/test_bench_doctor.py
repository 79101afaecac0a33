"""`fused-lstm doctor`."""

import pytest
import torch
from command import run

import fused_lstm
from fused_lstm.bench import doctor as module
from fused_lstm.bench.cli import main


def lines_of(output):
    return [" ".join(line.split()) for line in output.splitlines()]


def test_on_a_machine_without_a_gpu():
    done = run(["doctor"], COLUMNS="160", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
    lines = lines_of(done.stdout)
    assert f"torch {torch.__version__}" in lines
    assert "FUSED_LSTM_BACKEND not set" in lines
    assert "No CUDA device here: Triton's kernels can run in its interpreter only, for tests." in lines
    assert "torch float32 torch's own kernels, on cpu" in lines
    [line] = (line for line in lines if "float32, with lengths" in line)
    assert line.startswith("reference ")
    assert "torch.nn.LSTM takes no lengths" in line


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ("reference", "reference float32 asked for by FUSED_LSTM_BACKEND"),
        ("fast", "none float32 FUSED_LSTM_BACKEND should be one of"),
    ],
)
def test_the_environment_variable_is_shown_and_followed(backend, line, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_LSTM_BACKEND", backend)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert f"FUSED_LSTM_BACKEND {backend}" in lines
    assert any(found.startswith(line) for found in lines)


def test_every_case_is_asked_of_the_library(monkeypatch, capsys):
    asked = []

    def choose(backend, **options):
        asked.append((backend, options))
        return fused_lstm.BackendChoice("torch", "[because]")

    monkeypatch.setattr(fused_lstm, "select_backend", choose)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor"]) == 0
    assert "[because]" in capsys.readouterr().out  # nothing is taken for markup
    assert {backend for backend, _ in asked} == {"auto"}
    assert {(o["hidden_size"], o["batch_size"], o["device"]) for _, o in asked} == {(512, 16, torch.device("cpu"))}
    flags = [(o["dtype"], o.get("lengths", False), o.get("compiling", False)) for _, o in asked]
    plain = [(dtype, False, False) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    assert flags == [
        *plain,
        *((dtype, True, False) for dtype in (torch.float32, torch.bfloat16)),
        *((dtype, False, True) for dtype in (torch.float32, torch.bfloat16)),
        *[(torch.bfloat16, False, False)] * 2,
    ]
    assert [(o.get("layer_norm"), o.get("options")) for _, o in asked[-2:]] == [
        ("gates", None),
        (None, ("zoneout", "reset")),
    ]


def pretend_gpu(monkeypatch, failure):
    """One CUDA device, on which a training step on our kernels ends in failure, or well if that is None."""
    facts = {"gpu": "Pretence", "gpu_memory_bytes": 2**34, "multiprocessors": 7, "compute_capability": "9.0"}
    describe = module.describe_machine
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module, "describe_machine", lambda device: describe("cpu") | facts | {"device": str(device)})
    monkeypatch.setattr(module, "_failure", lambda _: failure)
    device = fused_lstm.Device("Pretence", 90, 7, 232_448)
    monkeypatch.setattr(fused_lstm, "cuda_device", lambda index: [device][index])


def test_working_kernels_on_a_gpu(monkeypatch, capsys):
    pretend_gpu(monkeypatch, None)
    assert main(["doctor"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert "Triton on cuda:0: works" in lines
    assert any(line.startswith("cuda:0 Pretence, 16 GiB, 7 multiprocessors") for line in lines)
    assert "backend='auto' on cuda:0, H=512, N=16" in lines
    assert "backend='auto' on cpu, H=512, N=16" in lines
    assert any(line.startswith("Pretence: 7 multiprocessors, 227 KB of shared memory a block.") for line in lines)


def test_broken_kernels_on_a_gpu_exit_with_1(monkeypatch, capsys):
    pretend_gpu(monkeypatch, "no compiler")
    assert main(["doctor"]) == 1
    assert "Triton on cuda:0: does not work: no compiler" in lines_of(capsys.readouterr().out)


def test_the_trial_runs_the_kernels(device, monkeypatch):
    """Interpreted where there is no GPU. A right step is no failure; a wrong or broken one is, in a line."""
    device = torch.device(device)
    assert module._failure(device) is None
    forward = fused_lstm.LSTM.forward
    monkeypatch.setattr(fused_lstm.LSTM, "forward", lambda self, *a: (2 * forward(self, *a)[0], None))
    assert module._failure(device) == "a gradient of stepwise is 300% off torch's"
    monkeypatch.setattr(fused_lstm.LSTM, "forward", lambda self, *a: (torch.nan * forward(self, *a)[0], None))
    assert module._failure(device) == "a gradient of stepwise is nan% off torch's"
    monkeypatch.setattr(fused_lstm.LSTM, "forward", lambda *_: 1 / 0)
    assert module._failure(device) == "ZeroDivisionError: division by zero"


def test_the_grids_of_a_named_device(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["doctor", "--device-name", "h100"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert lines[0].startswith("H100: 132 multiprocessors, 227 KB of shared memory a block.")
    assert "512 16 32 x 1 16 512 yes 80 16 16 16" in lines
    assert "1024 64 64 x 2 32 1024 yes 192 64 32 32" in lines
    assert "1024 128 64 x 2 64 512 + 512 no 192 - - -" in lines
    assert "1024 16 256 KB of W_hh a program are more than a block of H100 has" in lines  # in float32


def test_an_unknown_device_name(capsys):
    assert main(["doctor", "--device-name", "voodoo2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'voodoo2'" in error
    assert "h100" in error
