"""Fixtures for kernels whose programs wait for each other: a grid's programs side by side, and what disturbs them.

A test file takes them by `pytest_plugins = ["persistent_grids"]`.
"""

import functools
import time

import concurrent_interpreter
import pytest
from concurrent_interpreter import launch_concurrently

from fused_lstm.kernels import persistent_launch


@pytest.fixture
def patience():
    """Seconds that a grid may take: a test that expects a deadlock sets `patience.seconds`."""

    class Patience:
        seconds = 60.0

    return Patience()


@pytest.fixture
def grids(monkeypatch, patience):
    """The grids that were launched, (programs, batch tiles, directions) each."""
    launched = []

    def launch(kernel, config, tensors, sizes, constants):
        launched.append((config.programs, config.batch_tiles, config.directions))
        launch_concurrently(kernel, launched[-1], *tensors, *sizes, **constants, timeout=patience.seconds)

    monkeypatch.setattr(persistent_launch, "launch", launch)
    return launched


@pytest.fixture
def late_program(monkeypatch):
    """The grid's first program starts a little late: who does not wait for it is ahead of it for certain."""
    run_program = concurrent_interpreter._run_program

    def run_late(kernel, index, *rest):
        if index == (0, 0, 0):
            time.sleep(1)
        run_program(kernel, index, *rest)

    monkeypatch.setattr(concurrent_interpreter, "_run_program", run_late)


@pytest.fixture
def slow_program(monkeypatch):
    """slow_program(module, *names): the grid's first program waits a moment before each call of these functions."""
    run_program, running = concurrent_interpreter._run_program, []

    def run_noted(kernel, index, *rest):
        running.append(index)
        run_program(kernel, index, *rest)

    def slow(module, *names):
        monkeypatch.setattr(concurrent_interpreter, "_run_program", run_noted)
        for name in names:
            monkeypatch.setattr(module, name, slowed(getattr(module, name)))

    def slowed(function):
        @functools.wraps(getattr(function, "fn", function))
        def late(*args):
            if running == [(0, 0, 0)]:
                time.sleep(0.3)
            return function(*args)

        return late

    return slow


@pytest.fixture
def skip_call(monkeypatch):
    """skip_call(module, name, skipped, of): of every so many calls the skipped-th, counted from 0, does nothing."""

    def skip(module, name, skipped=0, of=1):
        function, calls = getattr(module, name), 0

        @functools.wraps(getattr(function, "fn", function))
        def sometimes(*args):
            nonlocal calls
            calls += 1
            if (calls - 1) % of != skipped:
                function(*args)

        monkeypatch.setattr(module, name, sometimes)

    return skip
