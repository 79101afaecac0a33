"""`fused-lstm train` from its command line to the files it leaves."""

import math
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import command
import matplotlib.image
import pytest
import torch

from fused_lstm.bench.cli import main

OURS, TORCHS = "fused_lstm", "torch.nn.LSTM"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return command.make_text(tmp_path)


def train(tmp_path: Path, text: Path, name: str = "log", **options: object) -> dict:
    """Runs the command in this process and returns its log."""
    log = tmp_path / f"{name}.json"
    assert main(command.arguments(text, log=log, **options)) == 0
    return command.read_log(log)


def unigram_bits(text: str, fraction: float) -> float:
    """Bits per character of the end of a text under the counts, plus one, of its front."""
    validation_length = round(len(text) * fraction)
    front, end = text[:-validation_length], text[-validation_length:]
    counts = Counter(front)
    total = len(front) + len(set(text))
    return -sum(math.log2((counts[character] + 1) / total) for character in end) / len(end)


def test_run_learns_and_reports(tmp_path: Path, text: Path) -> None:
    log_path, plot_path = tmp_path / "log.json", tmp_path / "plot.png"
    result = command.run(
        command.arguments(
            text, log=log_path, plot=plot_path, steps=150, validate_every=60, hidden_size=24, learning_rate=0.02
        )
    )
    assert (result.returncode, result.stderr) == (0, "")
    log = command.read_log(log_path)
    ours = log["learners"][OURS]
    content = text.read_text(encoding="utf-8")
    vocabulary = "".join(sorted(set(content)))

    assert log["text"]["vocabulary"] == vocabulary
    assert log["text"]["characters"] == 4000
    assert log["text"]["validation_characters"] == 200
    assert log["unigram_bits"] == pytest.approx(unigram_bits(content, 0.05), rel=1e-12)
    assert log["backend"]["name"] in ("torch", "stepwise")
    assert log["steps"] == len(ours["losses"]) == 150
    assert log["validation_steps"] == [60, 120, 150]
    assert ours["losses"][0] == pytest.approx(math.log(len(vocabulary)), rel=0.1)
    assert ours["validation_bits"][-1] < 0.75 * log["unigram_bits"]
    assert ours["validation_bits"] == sorted(ours["validation_bits"], reverse=True)
    assert len(log["sample"]) == 20
    assert set(log["sample"]) <= set(vocabulary)

    first_row = f"60 {sum(ours['losses'][:60]) / 60 / math.log(2):.4f} {ours['validation_bits'][0]:.4f}"
    assert first_row.split() in [line.split() for line in result.stdout.splitlines()]
    assert f"{ours['validation_bits'][-1]:.4f}" in result.stdout
    assert f"{log['unigram_bits']:.4f}" in result.stdout
    assert f"{ours['characters_per_second']:,.0f}" in result.stdout
    assert f"backend  {log['backend']['name']} ({log['backend']['reason']})" in result.stdout
    assert log["sample"] in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.json", "plot.png", "text.txt"]


def test_default_text(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    log_path = tmp_path / "log.json"
    run = command.arguments(None, log=log_path, steps=1, validation_fraction=0.01, sample_length=0, sequence_length=500)
    assert main(run) == 0
    log = command.read_log(log_path)
    content = "\n\n".join(topics[name] for name in sorted(topics))
    assert log["text"]["name"] == "pydoc_data.topics"
    assert log["text"]["characters"] == len(content) > 200_000
    assert log["unigram_bits"] == pytest.approx(unigram_bits(content, 0.01), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "compare": True},
        {"dtype": "bfloat16", "tied": True, "hidden_size": 6, "dropout": 0.3},
        {"dtype": "float16", "backend": "reference"},
        {"dtype": "float64", "num_layers": 1, "dropout": 0.3},
    ],
    ids=["compare", "bfloat16", "float16", "float64"],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, text: Path, options: dict) -> None:
    # The text ends after 79 steps, behind the resumption; 75 is a multiple of validate-every.
    whole = train(tmp_path, text, "whole", steps=85, checkpoint=tmp_path / "whole.pt", **options)
    train(tmp_path, text, "first", steps=75, checkpoint=tmp_path / "parts.pt", **options)
    only_steps = dict.fromkeys((name.replace("-", "_") for name in command.SIZES), None) | {"sample_length": 20}
    parts = train(tmp_path, None, "rest", resume=tmp_path / "parts.pt", **only_steps | {"steps": 85})

    assert [len(learner["losses"]) for learner in parts["learners"].values()] == [85] * len(parts["learners"])
    for log in (whole, parts):
        for learner in log["learners"].values():
            del learner["characters_per_second"]
    assert parts == whole
    end, other_end = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    assert flatten(end) == flatten(other_end)


def flatten(value: object) -> object:
    """Nested containers with their tensors as lists, which compare by value."""
    if isinstance(value, dict):
        return {key: flatten(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_resumed_run_takes_new_rates(tmp_path: Path, text: Path) -> None:
    train(tmp_path, text, steps=5, checkpoint=tmp_path / "a.pt")
    frozen = train(tmp_path, text, "frozen", resume=tmp_path / "a.pt", steps=15, learning_rate=1e-30)
    bits = frozen["learners"][OURS]["validation_bits"]
    assert frozen["validation_steps"] == [5, 10, 15]
    assert bits[0] == bits[1] == bits[2]
    assert torch.load(tmp_path / "a.pt", weights_only=True)["options"]["learning_rate"] == 1e-30


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
def test_comparison_agrees_step_by_step(tmp_path: Path, text: Path, backend: str) -> None:
    log_path = tmp_path / "log.json"
    # Short, as the interpreter takes 20 milliseconds and more a kernel.
    short = {"num_layers": 1, "sequence_length": 4, "validation_fraction": 0.002, "sample_length": 0}
    run = command.arguments(
        text, log=log_path, backend=backend, compare=True, steps=50, validate_every=50, learning_rate=0.02, **short
    )
    result = command.run(run, TRITON_INTERPRET="1")
    assert (result.returncode, result.stderr) == (0, "")
    log = command.read_log(log_path)
    assert log["backend"]["name"] == backend
    ours, torchs = (torch.tensor(log["learners"][name]["losses"], dtype=torch.float64) for name in (OURS, TORCHS))
    assert len(ours) == 50
    assert not torch.equal(ours, torchs)  # two implementations, not one called twice
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=0)
    assert ours[-10:].mean() < 0.95 * ours[0]
    worst = ((ours - torchs).abs() / torchs).max().item()
    assert f"over 50 steps their losses differ by {worst:.1e} at most" in result.stdout


def test_comparison_leaves_our_numbers_alone(tmp_path: Path, text: Path) -> None:
    alone = train(tmp_path, text, "alone", dropout=0.4)
    beside = train(tmp_path, text, "beside", dropout=0.4, compare=True)
    assert beside["learners"][OURS]["losses"] == alone["learners"][OURS]["losses"]
    assert beside["sample"] == alone["sample"]
    # Same dropout: without it the losses would part at the first step.
    assert beside["learners"][TORCHS]["losses"] == pytest.approx(alone["learners"][OURS]["losses"], rel=1e-4)
    assert alone["learners"][OURS]["losses"] != train(tmp_path, text, "plain")["learners"][OURS]["losses"]


def test_seed_decides_everything(tmp_path: Path, text: Path) -> None:
    logs = [train(tmp_path, text, f"log{i}", seed=seed, dropout=0.2) for i, seed in enumerate((3, 3, 4))]
    first, again, other = ((log["sample"], log["learners"][OURS]["losses"]) for log in logs)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_threads_are_those_asked_for(tmp_path: Path, text: Path) -> None:
    for options, threads in (({"threads": 2}, 2), ({}, 1)):
        train(tmp_path, text, steps=1, **options)
        assert torch.get_num_threads() == threads


def test_plot_shows_the_curve(tmp_path: Path, text: Path) -> None:
    plot = tmp_path / "$x.png"
    train(tmp_path, text.rename(tmp_path / "$\\nothing$.txt"), plot=plot)
    data = plot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 675)
    pixels = matplotlib.image.imread(plot)[..., :3]
    blue = abs(pixels - torch.tensor([0x1F, 0x77, 0xB4]).div(255).numpy()).max(axis=2) < 0.02
    columns = blue.any(axis=0).nonzero()[0]
    assert columns.max() - columns.min() > 0.8 * 1200  # from the first step to the last
    assert blue.sum() < 0.05 * blue.size


@pytest.mark.parametrize("asked", [True, False], ids=["checkpoint", "no checkpoint"])
def test_ctrl_c_keeps_the_run(tmp_path: Path, text: Path, asked: bool) -> None:
    checkpoint = tmp_path / "run.pt" if asked else None
    options = {"dropout": 0.3, "validate_every": 100, "sample_length": 0}
    # A shell may have made this process deaf to SIGINT, and it would hand that down.
    wake = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = wake + "from fused_lstm.bench.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command.arguments(text, checkpoint=checkpoint, steps=10**6, **options)],
        cwd=tmp_path,
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    with process:
        for line in process.stdout:
            if line.split()[:1] == ["100"]:
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(errors.split("interrupted at step ")[1].split(";")[0])
    assert step >= 100
    if not asked:
        assert errors == f"fused-lstm: interrupted at step {step}\n"
        assert os.listdir(tmp_path) == [text.name]
        return
    assert errors == f"fused-lstm: interrupted at step {step}; go on with --resume {checkpoint}\n"
    assert sorted(os.listdir(tmp_path)) == ["run.pt", text.name]
    resumed = train(tmp_path, text, "resumed", resume=checkpoint, steps=step + 10, **options)
    whole = train(tmp_path, text, "whole", steps=step + 10, **options)
    assert resumed["learners"][OURS]["losses"] == whole["learners"][OURS]["losses"]


def test_modules_for_a_machine_without_the_extras() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(('typer', 'rich', 'matplotlib'))); "
    modules = "from fused_lstm.bench import char_model, corpus, training, record, checkpoint; "
    result = subprocess.run(
        [sys.executable, "-c", block + modules + "from fused_lstm.bench.cli import main; sys.exit(main(['train']))"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.stderr == "fused-lstm: the command needs typer; pip install 'fused-lstm[cli]'\n"
    assert (result.returncode, result.stdout) == (2, "")
