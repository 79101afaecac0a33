"""The command `fused-lstm` as a user runs it, on a text and a model small enough for a test."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

WORDS = ["the", "cat", "sat", "on", "a", "mat,", "and", "saw", "one", "red", "hen:", "“é”", "ran", "far.\n"]

# Of 4,000 characters 3,800 are trained on, in 4 columns of 950: after 79 windows of 12 the text starts anew.
SIZES = {
    "embedding-size": 6,
    "hidden-size": 10,
    "num-layers": 2,
    "batch-size": 4,
    "sequence-length": 12,
    "steps": 12,
    "validate-every": 5,
    "sample-length": 20,
}


def make_text(folder: Path, characters: int = 4000) -> Path:
    """A text of random words."""
    path = folder / "text.txt"
    words = random.Random(0).choices(WORDS, k=characters)
    path.write_text(" ".join(words)[:characters], encoding="utf-8")
    return path


def arguments(text: Path, **options: object) -> list[str]:
    """The arguments of a tiny run; options by name, with _ for -, True for a flag, None for left out."""
    chosen = {"text": text, **SIZES} | {name.replace("_", "-"): value for name, value in options.items()}
    command = ["train"]
    for name, value in chosen.items():
        if value is not None:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def program() -> str:
    """The installed script of the environment that runs the tests."""
    return str(Path(sys.executable).with_name("fused-lstm"))


def environment(**variables: str) -> dict[str, str]:
    """A subprocess's environment: this one's, with one thread (the tensors are small) and without a wide terminal."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"} | variables


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed script to its end."""
    return subprocess.run(
        [program(), *command],
        env=environment(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def read_log(path: Path) -> dict:
    """What --log has written."""
    return json.loads(path.read_text(encoding="utf-8"))
