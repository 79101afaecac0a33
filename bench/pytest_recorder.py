"""A pytest plugin that writes every test's fate to a file as it happens, so that a hung or killed run keeps the rest.

The environment variable FUSED_LSTM_TEST_RECORD names the file, of JSON lines. Tests that it already tells of are not
run again: after a test that brought the process down, the same command goes on with the next. Of fused_lstm this
imports nothing: it is loaded before the tests' conftest decides how kernels are compiled.
"""

import json
import os

# What CUDA calls that come after an illegal access raise, whoever makes them: such failures say nothing of their test.
_LOST = "CUDA error", "Triton Error [CUDA]"

_session = None


def pytest_sessionstart(session) -> None:
    global _session
    _session = session


def pytest_collection_modifyitems(config, items) -> None:
    with open(os.environ["FUSED_LSTM_TEST_RECORD"], encoding="utf-8") as file:
        begun = {json.loads(line).get("begun") for line in file}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in begun])
    items[:] = [item for item in items if item.nodeid not in begun]


def pytest_collectreport(report) -> None:
    if report.failed:
        _write(uncollected=report.nodeid, text=report.longreprtext)


def pytest_runtest_logstart(nodeid) -> None:
    _write(begun=nodeid)


def pytest_runtest_logreport(report) -> None:
    if report.when != "call" and report.passed:
        return
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    _write(test=report.nodeid, outcome=outcome, seconds=report.duration, text=report.longreprtext)
    if report.failed and any(words in report.longreprtext for words in _LOST):
        _session.shouldstop = "the device may be lost to this process"


def pytest_sessionfinish(exitstatus) -> None:
    _write(exit=int(exitstatus), stopped=bool(_session.shouldstop))


def _write(**fields) -> None:
    with open(os.environ["FUSED_LSTM_TEST_RECORD"], "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")
