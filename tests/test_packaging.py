"""What an installation puts on a machine: the package fused_lstm, kernels and bench within it, and nothing else."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# where each package lies in the repository
PLACES = {"fused_lstm": "fused_lstm", "fused_lstm/kernels": "kernels", "fused_lstm/bench": "bench"}


def run(*command, cwd, **environment) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, *what: str) -> Path:
    """The one file that building a wheel or an sdist of source makes."""
    out = source.with_name(f"{source.name}-{'-'.join(what).strip('-')}")
    run(sys.executable, "-P", "-m", "build", "--no-isolation", *what, "--outdir", str(out), str(source), cwd=out.parent)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository, since a build leaves its traces where it is made."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "results")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("packaging") / "source", ignore=ignored)


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    return build(source, "--wheel")


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    return build(source, "--sdist")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_alone(wheel, source):
    """Each Python file of the three folders, the type marker, the budgets, and the metadata."""
    inside = {name for name in contents(wheel) if not name.split("/")[0].endswith(".dist-info")}
    expected = {f"{package}/{path.name}" for package, place in PLACES.items() for path in (source / place).glob("*.py")}
    assert len(expected) > 20
    assert inside == {*expected, "fused_lstm/py.typed", "fused_lstm/kernels/budgets.json"}


def test_metadata(wheel):
    (text,) = (body for name, body in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(text)
    assert metadata["Name"] == "fused-lstm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == ["torch>=2.7", 'triton>=3.3; platform_system == "Linux"']
    assert {"cli", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata.get_payload().lstrip().startswith("#")


def test_entry_point(wheel):
    (text,) = (body for name, body in contents(wheel).items() if name.endswith(".dist-info/entry_points.txt"))
    assert text.decode().split("\n", 1) == ["[console_scripts]", "fused-lstm = fused_lstm.bench.cli:main\n"]


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **options)
    (unpacked,) = tmp_path.iterdir()
    again = build(unpacked, "--wheel")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


LOOK = """
import pathlib, sys, torch
import fused_lstm, fused_lstm.kernels, fused_lstm.bench, fused_lstm.kernels.stepwise, fused_lstm.bench.cli
for module in (fused_lstm, fused_lstm.kernels, fused_lstm.bench):
    print(pathlib.Path(module.__file__).parent.relative_to(sys.argv[1]).as_posix())
output, _ = fused_lstm.LSTM(3, 4, backend="reference")(torch.zeros(5, 2, 3))
output.sum().backward()
"""


def test_installed_wheel(wheel, tmp_path):
    """It works from where it was installed, and nothing called kernels or bench lies beside it."""
    site = tmp_path / "site"
    install = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-P", *install, "--target", str(site), str(wheel), cwd=tmp_path)
    there = {path.name for path in site.iterdir()}
    assert {name for name in there if not name.endswith(".dist-info")} == {"fused_lstm", "bin"}
    assert len(there) == 3
    assert {path.name for path in (site / "bin").iterdir()} == {"fused-lstm"}
    found = run(sys.executable, "-P", "-c", LOOK, str(site), cwd=tmp_path, PYTHONPATH=str(site))
    assert found.split() == list(PLACES)
