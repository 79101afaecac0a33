"""Runs the test suite in a process apart, and goes on after a test that hangs or breaks its process."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

# A run can be brought down again and again; each start costs seconds.
_STARTS = 6
_LONGEST_TEXT = 4000

# What the command line and its tests need, and the machine with the GPU may lack.
_DISPENSABLE = "hypothesis", "matplotlib", "rich", "typer"

# Seconds that pytest may take to import torch and collect, before its first test.
_COLLECTION = 60.0


def run_tests(
    root: Path,
    environment: Mapping[str, str],
    log: Path,
    record: Path,
    *,
    marker: str,
    only: Sequence[str],
    limit: float,
    silence: float,
) -> dict:
    """Runs the tests that marker and only select.

    Args:
        root: of the checkout
        environment: in which `fused_lstm` and `pytest_recorder` can be imported
        log: file that takes pytest's output
        record: file for `pytest_recorder`; must not exist
        marker: pytest's -m, as in "gpu"
        only: files or node ids; none: all
        limit: seconds for all of it
        silence: seconds that one test may take before it counts as hung

    Returns:
        JSON-ready: `complete` (did it come to its end?), `counts` by outcome (passed, failed, error, skipped, hung,
        crashed, cut off), `failures` and `uncollected` (a list of `test`, `outcome`, `text`), `slowest` (the ten
        longest, in seconds) and `seconds`
    """
    start = time.monotonic()
    command = [
        *(sys.executable, "-m", "pytest", "-vv", "-m", marker, "--continue-on-collection-errors", "--tb=short"),
        *("--color=no", "-p", "no:cacheprovider", "-p", "pytest_recorder"),
        # pytest-timeout may be missing here; warnings are errors, so its option would be one
        *("-W", "ignore:Unknown config option:pytest.PytestConfigWarning"),
        *only,
    ]
    environment = {**environment, "FUSED_LSTM_TEST_RECORD": str(record)}
    record.touch()
    complete = False
    for _ in range(_STARTS):
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            ending = _wait(process, record, start + limit, silence)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = _read(record)
        running = _running(lines)
        if running is not None:
            _append(record, {"test": running, "outcome": ending or "crashed", "seconds": None, "text": ""})
        finished = lines[-1] if lines and "exit" in lines[-1] else {"exit": None, "stopped": False}
        # 0: passed; 1: some failed; 5: none were selected
        complete = finished["exit"] in (0, 1, 5) and not finished["stopped"]
        if ending == "cut off" or (running is None and not finished["stopped"]):
            break
    return {"complete": complete, **_summary(_read(record)), "seconds": time.monotonic() - start}


def all_passed(result: dict, *, some: bool) -> bool:
    """Did all that ran pass, and nothing stay out, save files that need a package which a GPU's tests can do without?

    Args:
        result: of `run_tests`
        some: must there have been a test at all?
    """
    bad = set(result["counts"]) - {"passed", "skipped"}
    stayed_out = [entry for entry in result["uncollected"] if missing_package(entry) not in _DISPENSABLE]
    return result["complete"] and not bad and not stayed_out and (not some or result["counts"] != {})


def missing_package(entry: dict) -> str | None:
    """The package for want of which a file could not be collected, or None if the reason is another."""
    found = re.search(r"ModuleNotFoundError: No module named '(\w+)", entry["text"])
    return found and found[1]


def _wait(process: subprocess.Popen, record: Path, deadline: float, silence: float) -> str | None:
    """How process has to be ended: "hung", "cut off", or None where it ends by itself."""
    size, heard = record.stat().st_size, time.monotonic()
    patience = max(silence, _COLLECTION)
    while process.poll() is None:
        now = time.monotonic()
        if record.stat().st_size != size:
            size, heard, patience = record.stat().st_size, now, silence
        if now >= deadline:
            return "cut off"
        if now - heard > patience:
            return "hung"
        time.sleep(0.1)
    return None


def _read(record: Path) -> list[dict]:
    # a last line without its end was cut by the end of its writer
    text = record.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _append(record: Path, fields: dict) -> None:
    text = record.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    record.write_text(whole + json.dumps(fields) + "\n", encoding="utf-8")


def _running(lines: list[dict]) -> str | None:
    """The test that began and has not ended."""
    begun = [line["begun"] for line in lines if "begun" in line]
    ended = {line["test"] for line in lines if "test" in line}
    return begun[-1] if begun and begun[-1] not in ended else None


def _summary(lines: list[dict]) -> dict:
    # a test that fails in its teardown too, or is begun again by a plugin, has several lines: the worst counts
    order = ("passed", "skipped", "failed", "error", "crashed", "hung", "cut off")
    tests: dict[str, dict] = {}
    for line in lines:
        if "test" in line and (
            line["test"] not in tests or order.index(line["outcome"]) > order.index(tests[line["test"]]["outcome"])
        ):
            tests[line["test"]] = line
    failures = [
        {"test": name, "outcome": line["outcome"], "text": line["text"][-_LONGEST_TEXT:]}
        for name, line in tests.items()
        if line["outcome"] not in ("passed", "skipped")
    ]
    uncollected = {
        line["uncollected"]: {"test": line["uncollected"], "outcome": "error", "text": line["text"][-_LONGEST_TEXT:]}
        for line in lines
        if "uncollected" in line
    }
    seconds = {name: line["seconds"] for name, line in tests.items() if line["seconds"] is not None}
    return {
        "counts": dict(Counter(line["outcome"] for line in tests.values())),
        "failures": failures,
        "uncollected": list(uncollected.values()),
        "slowest": dict(sorted(seconds.items(), key=lambda item: -item[1])[:10]),
    }
