"""What `fused-lstm train` refuses: one line on stderr, exit status 2, and nothing on disk that was not there."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import command
import pytest
import torch

from fused_lstm.bench.cli import main

CHECKPOINT_SIZES = dict.fromkeys((name.replace("-", "_") for name in command.SIZES), None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return command.make_text(tmp_path)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs the command line, checks that it is refused as it should be, and returns the line."""

    def check(arguments: list[str]) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(arguments) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("fused-lstm: ")
        assert errors.count("\n") == 1
        assert errors.endswith("\n")
        assert "; " in errors  # cause; remedy
        assert contents(tmp_path) == before
        return errors

    return check


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"hidden_size": 0}, "--hidden-size is 0; give a whole number from 1"),
        ({"embedding_size": -3}, "--embedding-size is -3"),
        ({"num_layers": 0}, "--num-layers is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"sequence_length": -1}, "--sequence-length is -1"),
        ({"hidden_size": 10**12}, "--hidden-size is 1000000000000"),
        ({"hidden_size": "many"}, "--hidden-size"),
        ({"steps": 0}, "--steps is 0"),
        ({"validate_every": 0}, "--validate-every is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"sample_length": -1}, "--sample-length is -1"),
        ({"dropout": 1.5}, "--dropout is 1.5; give a rate from 0 to 1"),
        ({"dropout": "nan"}, "--dropout is nan"),
        ({"validation_fraction": 0}, "--validation-fraction is 0"),
        ({"validation_fraction": 1}, "--validation-fraction is 1"),
        ({"learning_rate": 0}, "--learning-rate is 0"),
        ({"learning_rate": 101}, "--learning-rate is 101.0"),
        ({"learning_rate": "inf"}, "--learning-rate is inf"),
        ({"clip": -1}, "--clip is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**63}, "--seed is 9223372036854775808"),
        ({"dtype": "int8"}, "--dtype is int8; give one of float32, bfloat16, float16, float64"),
        ({"device": "nowhere"}, "--device nowhere is no device"),
        ({"device": "meta"}, "--device meta is not supported"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, f"torch sees {torch.cuda.device_count()} CUDA devices"),
        ({"backend": "cudnn"}, "got 'cudnn'"),
        ({"tied": True}, "--embedding-size is 6 and --hidden-size 10; make them equal"),
        ({"batch_size": 400}, "is too short: 3800 characters for training, 5200 needed"),
        ({"sequence_length": 950}, "is too short: 3800 characters for training, 3804 needed"),
        ({"validation_fraction": 0.001}, "is too short: 4 characters for validation, 8 needed"),
        ({"no_such_option": 1}, "--no-such-option"),
    ],
    ids=lambda value: " ".join(f"{name}={v}" for name, v in value.items()) if isinstance(value, dict) else "",
)
def test_option(text: Path, refused: Callable, options: dict, cause: str) -> None:
    assert cause in refused(command.arguments(text, **options))


def test_text(tmp_path: Path, refused: Callable) -> None:
    assert "No such file" in refused(command.arguments(tmp_path / "absent.txt"))
    assert "is not a regular file" in refused(command.arguments(tmp_path))
    (tmp_path / "empty.txt").touch()
    assert "empty.txt is empty" in refused(command.arguments(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 noir".encode("latin-1") * 1000)
    assert "latin.txt is not UTF-8: byte 3 is 0xe9" in refused(command.arguments(tmp_path / "latin.txt"))
    (tmp_path / "short.txt").write_text("short")
    assert "short.txt is too short: 5 characters" in refused(command.arguments(tmp_path / "short.txt"))


@pytest.mark.parametrize("option", ["checkpoint", "log", "plot"])
def test_output_path(tmp_path: Path, text: Path, refused: Callable, option: str) -> None:
    def refuse(path: Path) -> str:
        return refused(command.arguments(text, **{option: path}))

    assert "No such file" in refuse(tmp_path / "absent" / "out.png")
    assert "Not a directory" in refuse(text / "out.png")
    assert "is not a regular file" in refuse(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")  # stands for /dev/null, which a failing test must not replace
    assert "is not a regular file" in refuse(tmp_path / "pipe.png")
    assert "File name too long" in refuse(tmp_path / f"{'x' * 300}.png")
    assert "would overwrite the file of --text" in refuse(text)
    link = tmp_path / "link.png"
    link.symlink_to(text)
    assert "would overwrite the file of --text" in refuse(link)


def test_plot_in_another_format(tmp_path: Path, text: Path, refused: Callable) -> None:
    assert "--plot draws PNG" in refused(command.arguments(text, plot=tmp_path / "curve.pdf"))
    shared = tmp_path / "out.png"
    assert "--plot would overwrite the file of --log" in refused(command.arguments(text, log=shared, plot=shared))


def test_plot_without_matplotlib(
    tmp_path: Path, text: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(command.arguments(text, plot=tmp_path / "curve.png"))
    assert "--plot needs matplotlib; pip install 'fused-lstm[cli]'" in line


@pytest.fixture
def checkpoint(tmp_path: Path, text: Path) -> Path:
    path = tmp_path / "run.pt"
    assert main(command.arguments(text, checkpoint=path, steps=3)) == 0
    return path


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"hidden_size": 11}, "was trained with --hidden-size 10, not 11; leave --hidden-size out"),
        ({"num_layers": 3}, "was trained with --num-layers 2, not 3"),
        ({"batch_size": 5}, "was trained with --batch-size 4, not 5"),
        ({"dtype": "float64"}, "was trained with --dtype float32, not float64"),
        ({"compare": True}, "was trained without --compare; leave --compare out"),
        ({"steps": 3}, "is at step 3 of 3 already; give more with --steps"),
        ({"dropout": -1, "steps": 9}, "--dropout is -1"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_run(text: Path, checkpoint: Path, refused: Callable, options: dict, cause: str) -> None:
    assert cause in refused(command.arguments(text, **CHECKPOINT_SIZES | {"resume": checkpoint} | options))


def test_checkpoint_of_another_text(tmp_path: Path, text: Path, checkpoint: Path, refused: Callable) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8").replace("z", "zZ") + "!", encoding="utf-8")
    line = refused(command.arguments(other, **CHECKPOINT_SIZES | {"resume": checkpoint, "steps": 9}))
    assert f"{checkpoint} was trained on another text than {other}" in line


def test_damaged_checkpoint(tmp_path: Path, text: Path, checkpoint: Path, refused: Callable) -> None:
    def refuse(path: Path) -> str:
        return refused(command.arguments(text, **CHECKPOINT_SIZES | {"resume": path, "steps": 9}))

    data = checkpoint.read_bytes()
    other = tmp_path / "other.pt"
    damages = [data[: len(data) // 2], data[:-10], b"", b"\0" * 1000, random.Random(0).randbytes(5000), b"text" * 99]
    for damage in damages:
        other.write_bytes(damage)
        assert f"{other} is damaged, or no checkpoint of fused-lstm train" in refuse(other)

    good = torch.load(checkpoint, weights_only=True)
    assert set(good) == {"format", "options", "digest", "training"}
    ours = good["training"]["learners"]["fused_lstm"]
    for bad in (
        good["training"]["learners"],
        torch.zeros(3),
        good | {"format": "another"},
        good | {"options": {"wings": 2}},
        good | {"options": good["options"] | {"hidden_size": "many"}},
        good | {"training": {}},
        good | {"training": good["training"] | {"learners": {}}},
        good | {"training": good["training"] | {"learners": {"fused_lstm": ours | {"model": {}}}}},
        {name: value for name, value in good.items() if name != "digest"},
    ):
        torch.save(bad, other)
        assert f"{other} is damaged, or no checkpoint of fused-lstm train" in refuse(other)
    assert "No such file" in refuse(tmp_path / "absent.pt")
    assert "Is a directory" in refuse(tmp_path)


def test_checkpoint_runs_no_code(tmp_path: Path, text: Path, refused: Callable) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "trap.pt"
    torch.save({"format": "fused-lstm train 1", "options": Trap()}, path)
    refused(command.arguments(text, resume=path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["train", "--hidden-size", "0"], "fused-lstm: --hidden-size is 0; give a whole number from 1 to 1048576\n"),
        (["train", "--backend", "stepwise"], "fused-lstm: backend 'stepwise' cannot run this: "),
        ([], "fused-lstm: Missing command; see fused-lstm --help\n"),
    ],
    ids=["size", "backend", "nothing"],
)
def test_installed_script(arguments: list[str], cause: str) -> None:
    # Without an interpreter, and with all devices hidden, no Triton kernel can run.
    result = command.run(arguments, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert result.returncode == 2
    assert result.stderr.startswith(cause)
    assert (result.stderr.count("\n"), result.stdout) == (1, "")
