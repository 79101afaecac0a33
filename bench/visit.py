"""What `on_gpu.py` does: tests, the telling numbers, then the grid, as far as the time goes."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fused_lstm.bench.atomic import write_atomically
from fused_lstm.bench.contenders import chosen_backends
from fused_lstm.bench.devices import find_device
from fused_lstm.bench.gpu_tests import all_passed, missing_package, run_tests
from fused_lstm.bench.grid import grid_cases, telling_cases, tiny
from fused_lstm.bench.machine import now
from fused_lstm.bench.measure import problems
from fused_lstm.bench.results_table import machine_line, overview
from fused_lstm.bench.supervisor import OutOfTime, Supervisor
from fused_lstm.bench.workload import Case, fresh_seed

# What a run leaves in its folder.
_FILES = "machine.json", "tests.json", "tests.log", "telling.json", "grid.json", "summary.md", "worker.log"


class Visit:
    """One run of the script, piece by piece; each leaves whole JSON files as it goes.

    Args:
        options: of the command line
        root: of the checkout
        environment: for the processes that it starts, in which `fused_lstm` and `pytest_recorder` can be imported
        start, deadline: in time.monotonic()'s seconds
    """

    def __init__(
        self,
        options: argparse.Namespace,
        root: Path,
        environment: Mapping[str, str],
        start: float,
        deadline: float,
    ) -> None:
        self._options = options
        self._root = root
        self._out = options.out
        self._environment = environment
        self._start = start
        self._deadline = deadline
        self._machine: dict | None = None
        self._problems: list[str] = []
        self._summary: list[str] = []

    def run(self) -> int:
        """Returns the exit code: 1 if there were problems.

        Raises:
            UserError: there is no such device or backend, or a file cannot be written
        """
        device, shrink = str(find_device(self._options.device)), tiny if self._options.tiny else list
        backends = chosen_backends(self._options.backend, device)
        command = [sys.executable, "-m", "fused_lstm.bench.case_worker", device]
        for name in _FILES:
            (self._out / name).unlink(missing_ok=True)  # of another run: it must not pass for this one's
        log = self._out / "worker.log"
        supervisor = Supervisor(command, self._environment, log, silence=self._options.silence_seconds)
        try:
            working = self._describe_machine(supervisor)
            if not self._options.skip_tests:
                self._run_tests()
            if working:
                few = {"backends": backends, "graphs": False, "loop": False, "others": False}
                self._measure(supervisor, "telling", shrink(telling_cases(device)), few, repeats=20)
                self._measure(supervisor, "grid", shrink(grid_cases(device)), {"backends": backends}, repeats=10)
        finally:
            supervisor.close()
            text = self._text()
            write_atomically(self._out / "summary.md", f"```text\n{text}\n```\n".encode())
        print("\n" + text)
        return 1 if self._problems else 0

    def _text(self) -> str:
        problems = "".join(f"\n  {line}" for line in self._problems) or " none"
        return "\n\n".join([*self._summary, f"problems:{problems}"])

    def _describe_machine(self, supervisor: Supervisor) -> bool:
        """False where nothing can be measured."""
        self._machine = supervisor.machine(self._deadline)
        working = self._machine is not None
        if working:
            self._state_commit(self._machine)
            self._say(machine_line(self._machine))
            self._summary.append(machine_line(self._machine))
        else:
            self._problem("the measuring process does not start: see worker.log")
        self._write("machine.json", {"complete": working})
        return working

    def _run_tests(self) -> None:
        self._write("tests.json", {"complete": False})
        with tempfile.TemporaryDirectory(prefix="fused-lstm-") as directory:
            result = run_tests(
                self._root,
                self._environment,
                self._out / "tests.log",
                Path(directory, "record.jsonl"),
                marker=self._options.marker,
                only=self._options.test or (),
                limit=min(self._options.tests_minutes * 60, self._deadline - time.monotonic()),
                silence=self._options.silence_seconds,
            )
        self._write("tests.json", result | {"marker": self._options.marker, "only": self._options.test})
        counts = ", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items()) or "none ran"
        whole = "" if result["complete"] else ", and the run did not come to its end"
        line = f"tests: {counts}{whole}, in {result['seconds']:.0f} s"
        for entry in result["uncollected"]:
            package = missing_package(entry)
            line += f"; not collected: {entry['test']}" + (f" (no {package})" if package else "")
        self._say(line)
        self._summary.append(line)
        if not all_passed(result, some=self._options.device != "cpu"):
            failed = [failure["test"] for failure in result["failures"] + result["uncollected"]]
            self._problem("; ".join([line, *failed[:5]]))

    def _measure(
        self, supervisor: Supervisor, name: str, cases: Sequence[Case], contenders: dict, repeats: int
    ) -> None:
        """Measures cases until the time is over, and writes NAME.json after each."""
        records: list[dict] = []
        cut_off = None

        def write() -> None:
            left = [case.label for case in cases[len(records) :]]
            content = {"complete": not left, "cut_off": cut_off, "not_measured": left, "records": records}
            self._write(f"{name}.json", content)

        write()
        for case in cases:
            options = {
                "repeats": 2 if self._options.tiny else repeats,
                "warmup": 1 if self._options.tiny else 3,
                "sample_seconds": 0.001 if self._options.tiny else 0.02,
                "seed": fresh_seed() if self._options.seed is None else self._options.seed,
            }
            try:
                record = supervisor.measure(case, contenders, options, self._deadline)
            except OutOfTime as reason:
                cut_off = str(reason)
                self._say(f"{name}: {reason}")
                write()
                break
            if record["machine"] is not None:
                self._state_commit(record["machine"])
            records.append(record)
            write()
            self._say(f"{name}: {overview([record]).splitlines()[-1]}")
            for line in problems(record):
                self._problem(line)
        if records:
            self._summary.append(f"{name}: {len(records)} of {len(cases)} cases\n\n{overview(records)}")

    def _state_commit(self, machine: dict) -> None:
        if machine["commit"] is None:
            machine["commit"] = self._options.commit

    def _problem(self, line: str) -> None:
        self._problems.append(line)
        self._say(f"PROBLEM: {line}")

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:4.0f} s] {line}", flush=True)

    def _write(self, name: str, content: dict) -> None:
        content = {"date": now(), "machine": self._machine, **content}
        write_atomically(self._out / name, (json.dumps(content, indent=1) + "\n").encode())
