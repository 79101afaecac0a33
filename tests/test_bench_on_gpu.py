"""bench/on_gpu.py as it is run on a machine that has a copy of the checkout and no installation; on the CPU here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_lstm.bench.grid import grid_cases, telling_cases, tiny
from fused_lstm.bench.variants import VARIANTS
from fused_lstm.bench.workload import Case

ROOT = Path(__file__).resolve().parent.parent
FILES = ["grid.json", "machine.json", "summary.md", "telling.json", "tests.json", "tests.log", "worker.log"]

# Imported by Python as it starts: takes away the hook by which an editable installation is found.
NO_INSTALLATION = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""

# The copy's suite. It has no conftest, so the marked test runs on a CPU as well.
SUITE = """
import importlib.util, os, sys
import pytest

def test_unmarked():
    raise AssertionError("not asked for")

@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fused_lstm", "fused_lstm.kernels", "fused_lstm.bench"])
def test_the_copy_is_what_is_imported(name):
    folder = name.rpartition(".")[2]
    expected = os.path.join(os.getcwd(), folder, "__init__.py")
    assert os.path.realpath(importlib.import_module(name).__file__) == expected

@pytest.mark.gpu
@pytest.mark.skipif(sys.version_info < (3, 11), reason="-m puts the current folder on the path")
@pytest.mark.parametrize("name", ["kernels", "bench"])
def test_folders_of_the_root_are_no_packages(name):
    assert importlib.util.find_spec(name) is None
"""


@pytest.fixture
def checkout(tmp_path):
    """A plain copy of what the script needs, with a suite of its own."""
    folder = tmp_path / "checkout"
    for name in ("fused_lstm", "kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_copy.py").write_text(SUITE)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_INSTALLATION)
    return folder


def start(checkout, *options):
    """Starts the script from elsewhere, in a process where only the copy could be fused_lstm."""
    script, out = checkout / "bench" / "on_gpu.py", checkout.parent / "out"
    return subprocess.Popen(
        [sys.executable, str(script), "--out", str(out), "--device", "cpu", "--tiny", "--seed", "1", *options],
        cwd=checkout.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.parent / "site")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Its status, stdout and stderr."""
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def read(checkout, name):
    return json.loads((checkout.parent / "out" / name).read_text())


def wait_for_records(checkout, name, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (checkout.parent / "out" / name).exists() and len(read(checkout, name)["records"]) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} has not reached {count} records")


def fields(pid):
    """State and parent of a process, as /proc tells them; nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []


def children(pid):
    processes = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [process for process in processes if fields(process)[1:] == [str(pid)]]


def wait_for_end(pids):
    """Until all have ended, as far as that shows: whom nobody collects stays a zombie."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if all(fields(pid)[:1] in ([], ["Z"]) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pids} go on")


def test_a_dry_run(checkout):
    out = checkout.parent / "out"
    out.mkdir()
    (out / "grid.json").write_text("of another run")
    status, stdout, stderr = finish(start(checkout, "--commit", "abc123"))
    assert (status, stderr) == (0, ""), stdout
    assert sorted(path.name for path in out.iterdir()) == FILES

    machine = read(checkout, "machine.json")
    assert machine["complete"]
    assert machine["machine"]["torch"] == torch.__version__
    assert machine["machine"]["commit"] == "abc123"  # the copy has no .git

    tests = read(checkout, "tests.json")
    assert tests["complete"]
    assert tests["machine"] == machine["machine"]
    assert tests["failures"] == tests["uncollected"] == []
    assert sum(tests["counts"].values()) == 5
    assert tests["counts"]["passed"] >= 3

    yardsticks = ["torch.nn.LSTM plain", "fused_lstm reference plain"]
    of_variants = {name: [*yardsticks, "fused_lstm reference", "textbook loop"] for name in VARIANTS}
    for name in ("lengths", "weight_dropout"):
        of_variants[name].insert(2, "torch.nn.LSTM")
    of_variants["recompute"].append("textbook loop checkpointed")
    for name, cases, contenders in (
        ("telling", telling_cases("cpu"), {"plain": ["torch.nn.LSTM", "fused_lstm reference"]}),
        (
            "grid",
            grid_cases("cpu"),
            of_variants | {"plain": ["torch.nn.LSTM", "fused_lstm reference", "LSTMCell loop"]},
        ),
    ):
        piece = read(checkout, f"{name}.json")
        assert piece["complete"]
        assert piece["not_measured"] == []
        assert piece["cut_off"] is None
        assert [Case(**record["case"], variant=record["variant"]) for record in piece["records"]] == tiny(cases)
        for record in piece["records"]:
            assert record["error"] is None
            assert record["machine"]["commit"] == "abc123"
            assert [entry["name"] for entry in record["contenders"]] == contenders[record["variant"]]
            for entry in record["contenders"]:
                assert entry["status"] == "measured"
                assert entry["yardstick"] == (entry["name"] in yardsticks)
                assert (entry["accuracy"] is None) == entry["yardstick"]
                if not entry["yardstick"]:
                    assert (entry["speedup"] is not None) == entry["accuracy"]["passed"]
            [ours] = (entry for entry in record["contenders"] if entry["name"] == "fused_lstm reference")
            assert ours["accuracy"]["passed"]

    assert stdout.rstrip().endswith("problems: none")
    summary = (out / "summary.md").read_text()
    labels = re.findall("bf16 H=64 N=4 T=4(?: [a-z_0-9]+)*", summary)
    variants = [f"bf16 H=64 N=4 T=4 {name}" for name in VARIANTS if name != "plain"]
    assert labels[-len(variants) :] == variants
    assert len(labels) - len(variants) == 4  # telling, and the grid: alone, both directions, two layers
    assert summary.strip("`\n").removeprefix("text\n") in stdout


def test_failures_end_with_1(checkout):
    with (checkout / "fused_lstm" / "modules.py").open("a") as file:
        file.write(
            "\n_forward = LSTM.forward\n"
            "def _wrong(self, *inputs):\n"
            "    output, state = _forward(self, *inputs)\n"
            "    return output * 1.5, state\n"
            "LSTM.forward = _wrong\n"
        )
    with (checkout / "tests" / "test_copy.py").open("a") as file:
        file.write("\n@pytest.mark.gpu\ndef test_wrong():\n    assert 1 == 2\n")
    status, stdout, stderr = finish(start(checkout))
    assert (status, stderr) == (1, ""), stdout
    tests = read(checkout, "tests.json")
    [failure] = tests["failures"]
    assert (failure["test"], failure["outcome"]) == ("tests/test_copy.py::test_wrong", "failed")
    assert "assert 1 == 2" in failure["text"]
    for record in read(checkout, "telling.json")["records"]:
        ours = record["contenders"][1]
        assert not ours["accuracy"]["passed"]
        assert ours["speedup"] is None
    problems = stdout.rpartition("problems:")[2]
    assert "1 failed" in problems
    assert problems.count("H=64 N=4 T=4: fused_lstm reference: FAILED the accuracy check: ") >= 2


def test_the_budget_holds(checkout):
    before = time.monotonic()
    status, stdout, stderr = finish(start(checkout, "--skip-tests", "--budget-minutes", "0.1"))
    assert time.monotonic() - before < 6 + 2
    assert stderr == ""
    # whether there was time to start the worker depends on the machine; what is there is whole
    assert status == (0 if read(checkout, "machine.json")["complete"] else 1), stdout
    for name in {"telling.json", "grid.json"} & {path.name for path in (checkout.parent / "out").iterdir()}:
        piece = read(checkout, name)
        assert piece["complete"] == (piece["not_measured"] == [])


def test_being_killed_keeps_what_was_measured(checkout):
    process = start(checkout, "--skip-tests")
    wait_for_records(checkout, "telling.json", 1)
    workers = children(process.pid)
    assert len(workers) == 1
    process.kill()
    process.communicate()
    assert read(checkout, "machine.json")["complete"]
    telling = read(checkout, "telling.json")
    assert not telling["complete"]
    assert len(telling["records"]) + len(telling["not_measured"]) == 4
    for record in telling["records"]:
        assert [entry["status"] for entry in record["contenders"]] == ["measured"] * 2
    wait_for_end(workers)  # at the latest once it has measured its case


def test_a_polite_end_takes_the_worker_along_and_sums_up(checkout):
    process = start(checkout, "--skip-tests")
    wait_for_records(checkout, "telling.json", 1)
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    status, _, stderr = finish(process)
    assert (status, stderr) == (128 + signal.SIGTERM, "")
    wait_for_end(workers)
    assert "torch" in (checkout.parent / "out" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "fast"], "on_gpu.py: --backend is 'fast'; give one of auto, "),
        (["--budget-minutes", "0"], "on_gpu.py: --budget-minutes is 0.0; give a number above 0"),
        (["--out", "/dev/null/x"], "on_gpu.py: cannot make /dev/null/x: Not a directory; give --out a folder"),
        (["--budget", "1"], "on_gpu.py: unrecognized arguments: --budget 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(checkout, options, message):
    status, stdout, stderr = finish(start(checkout, *options))
    assert (status, stdout) == (2, "")
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


def test_the_telling_cases_come_first():
    labels = [case.label for case in telling_cases("cuda")]
    sizes = ["H=512 N=16 T=512", "H=512 N=64 T=512", "H=1024 N=16 T=512", "H=1024 N=64 T=512"]
    assert labels == [f"{dtype} {size}" for dtype in ("bf16", "tf32") for size in sizes]


def test_the_grid_has_every_variation_once():
    cases = grid_cases("cuda")
    assert len(set(cases)) == len(cases)
    sizes = {(c.hidden_size, c.batch_size) for c in cases if c.dtype == "bfloat16" and c.layers == 1}
    assert sizes == {(hidden, batch) for hidden in (256, 512, 768, 1024) for batch in (1, 16, 64, 128)}
    assert {c.label for c in cases} >= {
        "fp16 H=512 N=16 T=512",
        "fp32 (no TF32) H=1024 N=64 T=512",
        "bf16 H=512 N=16 T=512 bidirectional",
        "bf16 H=1024 N=64 T=512 2 layers",
        "tf32 H=768 N=128 T=512",
    }


def test_the_grid_ends_with_every_variant_layer_norm_first():
    cases = grid_cases("cuda")
    plain = [case for case in cases if case.variant == "plain"]
    variants = cases[len(plain) :]
    assert {case.variant for case in variants} == set(VARIANTS) - {"plain"}
    assert [case.label for case in variants[:2]] == [
        "bf16 H=512 N=64 T=512 layer_norm_gates",
        "bf16 H=1024 N=64 T=512 layer_norm_gates",
    ]
    assert len(variants) == 2 * (len(VARIANTS) - 1)
    assert len(tiny(cases)) == len(tiny(plain)) + len(variants)
