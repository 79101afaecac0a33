"""The run of the test suite that goes on after a test that hangs, dies, or loses the device."""

import os
import shutil
import time
from pathlib import Path

import pytest

from fused_lstm.bench.gpu_tests import all_passed, missing_package, run_tests

ROOT = Path(__file__).resolve().parent.parent

RIGHT = """
import pytest

@pytest.mark.gpu
def test_right():
    pass

@pytest.mark.gpu
@pytest.mark.skip(reason="not here")
def test_skipped():
    raise AssertionError

def test_unmarked():
    raise AssertionError
"""

WRONG = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

@pytest.fixture
def broken():
    yield
    raise ValueError("not put away")

def test_hangs():
    time.sleep(60)

def test_between():
    pass

def test_dies():
    os._exit(11)

def test_fails():
    assert 6 * 9 == 42

def test_fails_to_end(broken):
    pass

def test_loses_the_device():
    assert os.getpid() != int(os.environ.get("LOST", 0))
    os.environ["LOST"] = str(os.getpid())
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after_it():
    assert "LOST" not in os.environ

def test_last():
    pass
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Writes a suite; gives the function that runs it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "plugins").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "plugins" / "pytest_recorder.py").symlink_to(ROOT / "bench" / "pytest_recorder.py")

    def run(limit=60.0, silence=4.0, marker="gpu", only=(), plugins=False, **files):
        for name, text in files.items():
            (tmp_path / "tests" / f"{name}.py").write_text(text)
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "plugins"), "PYTHONSAFEPATH": "1"}
        if not plugins:  # they take long to load; pytest-timeout is one of them
            environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        log, record = tmp_path / "tests.log", tmp_path / "record.jsonl"
        record.unlink(missing_ok=True)
        return run_tests(tmp_path, environment, log, record, marker=marker, only=only, limit=limit, silence=silence)

    # pytest sets it for its own tests, and takes offence at it in others
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    return run


@pytest.mark.parametrize("plugins", [True, False], ids=["with pytest-timeout", "without"])
def test_all_well(suite, tmp_path, plugins):
    """Without pytest-timeout its option in pyproject.toml is unknown, and warnings are errors."""
    result = suite(test_right=RIGHT, plugins=plugins)
    assert result["complete"]
    assert result["counts"] == {"passed": 1, "skipped": 1}
    assert result["failures"] == result["uncollected"] == []
    assert set(result["slowest"]) == {"tests/test_right.py::test_right", "tests/test_right.py::test_skipped"}
    assert 0 < result["seconds"] < 60
    assert all_passed(result, some=True)
    assert "test_right PASSED" in (tmp_path / "tests.log").read_text()


def test_none_selected(suite):
    result = suite(test_unmarked="def test(): pass")
    assert result["complete"]
    assert result["counts"] == {}
    assert all_passed(result, some=False)
    assert not all_passed(result, some=True)


def test_marker_and_files_choose(suite):
    result = suite(test_right=RIGHT, test_wrong=WRONG, marker="", only=["tests/test_right.py"])
    assert result["counts"] == {"passed": 1, "skipped": 1, "failed": 1}


def test_it_goes_on_after_whatever_happens(suite):
    result = suite(test_broken="import no_such_module", test_right=RIGHT, test_wrong=WRONG)
    assert result["complete"]
    outcomes = {failure["test"].rpartition("::")[2]: failure["outcome"] for failure in result["failures"]}
    assert outcomes == {
        "test_hangs": "hung",
        "test_dies": "crashed",
        "test_fails": "failed",
        "test_fails_to_end": "error",
        "test_loses_the_device": "failed",
    }
    # between, after it (in a process that has not lost the device), last, and the right one
    assert result["counts"]["passed"] == 4
    [uncollected] = result["uncollected"]
    assert uncollected["test"] == "tests/test_broken.py"
    assert missing_package(uncollected) == "no_such_module"
    assert "no_such_module" in uncollected["text"]
    texts = {failure["outcome"]: failure["text"] for failure in result["failures"]}
    assert "assert (6 * 9) == 42" in texts["failed"] or "illegal memory access" in texts["failed"]
    assert "not put away" in texts["error"]
    assert not all_passed(result, some=True)


@pytest.mark.parametrize(("package", "passed"), [("rich", True), ("rich.table", True), ("torch", False)])
def test_files_that_need_what_the_gpu_can_do_without(suite, package, passed):
    missing = f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    result = suite(test_right=RIGHT, test_other=missing)
    [entry] = result["uncollected"]
    assert missing_package(entry) == package.partition(".")[0]
    assert result["counts"] == {"passed": 1, "skipped": 1}
    assert all_passed(result, some=True) is passed


def test_the_limit_cuts_it_off(suite):
    before = time.monotonic()
    result = suite(test_wrong=WRONG, limit=3.0, silence=60.0)
    assert time.monotonic() - before < 6.0
    assert not result["complete"]
    assert result["counts"] == {"cut off": 1}
    assert not all_passed(result, some=True)
