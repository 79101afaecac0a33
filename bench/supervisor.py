"""Measures cases in a process apart: a kernel that hangs or breaks its process costs one contender, not the visit."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from fused_lstm.bench.contenders import standard_of
from fused_lstm.bench.measure import last_line, new_record
from fused_lstm.bench.workload import Case

# Cases in which a contender may bring the process down before it is left out of all others.
_CHANCES = 2


class OutOfTime(Exception):
    """The deadline has passed before the case was measured; the text says how far it was."""


class _Downfall(Exception):
    """The worker came down. culprit: the contender whose turn it was, or None where that is nobody's fault."""

    def __init__(self, culprit: str | None, reason: str) -> None:
        super().__init__(reason)
        self.culprit = culprit


class Supervisor:
    """Keeps a `case_worker` alive and asks it case by case.

    Args:
        command: starts the worker
        environment: of the worker
        log: file that takes what it writes to stderr
        silence: seconds without a word after which it counts as hung
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, silence: float) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._log = log
        self._silence = silence
        self._process: subprocess.Popen[str] | None = None
        self._messages: queue.Queue[dict | None] = queue.Queue()
        self._downfalls: Counter[tuple[str, str]] = Counter()  # by variant and contender
        self._machine: dict | None = None

    def machine(self, deadline: float) -> dict | None:
        """The worker's `describe_machine`, or None if it does not start.

        Args:
            deadline: in time.monotonic()'s seconds, here and below
        """
        try:
            self._ensure_started(deadline)
        except (_Downfall, OutOfTime):
            self.close()
        return self._machine

    def measure(self, case: Case, contenders: dict, options: dict, deadline: float) -> dict:
        """The record of `measure`, whatever happens to the worker.

        A contender that brings the worker down has failed, and the case is measured again without it.

        Args:
            case: the sizes
            contenders: arguments of `contenders_for`
            options: arguments of `measure`: seed, repeats, warmup, sample_seconds
            deadline: when the worker is stopped even within a case

        Raises:
            OutOfTime: the deadline has passed
        """
        excluded = {
            name: f"left out: it brought the process down in {count} cases before"
            for (variant, name), count in self._downfalls.items()
            if variant == case.variant and count >= _CHANCES
        }
        while True:
            try:
                self._ensure_started(deadline)
                return self._ask(case, contenders, options | {"excluded": excluded}, deadline)
            except _Downfall as downfall:
                self.close()
                if downfall.culprit in (None, standard_of(case.variant)):
                    record = new_record(case, self._machine, options)
                    record["error"] = str(downfall)
                    return record
                self._downfalls[case.variant, downfall.culprit] += 1
                excluded[downfall.culprit] = str(downfall)

    def close(self) -> None:
        """Ends the worker, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()
            self._process = None

    def _ensure_started(self, deadline: float) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # a group of its own, to be ended with all that it has started
            )
        self._messages = queue.Queue()
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._messages), daemon=True).start()
        self._machine = self._receive(None, deadline)["machine"]

    def _ask(self, case: Case, contenders: dict, options: dict, deadline: float) -> dict:
        request = {"case": asdict(case), "contenders": contenders, "measure": options}
        turn = None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _Downfall(None, f"the worker ended between two cases: {self._last_words()}") from error
        while "record" not in (message := self._receive(turn, deadline)):
            turn = message["turn"]
        record = message["record"]
        lost = record["device_lost"]
        if lost is not None:
            [entry] = (entry for entry in record["contenders"] if entry["name"] == lost)
            raise _Downfall(lost, f"left the device unusable: {entry['reason']}")
        return record

    def _receive(self, turn: list[str] | None, deadline: float) -> dict:
        """The next message. turn: whose it is, and its stage."""
        culprit = turn and turn[0]
        where = "" if turn is None else f" during {turn[0]}: {turn[1]}"
        remaining = deadline - time.monotonic()
        try:
            if remaining <= 0:
                raise queue.Empty
            message = self._messages.get(timeout=min(self._silence, remaining))
        except queue.Empty:
            if remaining <= self._silence:
                self.close()
                raise OutOfTime(f"the time for all cases ended{where}") from None
            raise _Downfall(culprit, f"hung: not a word for {self._silence:.0f} s{where}") from None
        if message is None:
            status = self._process.wait()
            raise _Downfall(culprit, f"the process ended with status {status}{where}: {self._last_words()}")
        return message

    def _last_words(self) -> str:
        return last_line(self._log.read_text(errors="replace")[-2000:]) or "it says nothing"


def _pass_on(lines: IO[bytes], messages: queue.Queue[dict | None]) -> None:
    """Moves messages into the queue, and None after the last; a line that was cut by the end of its writer is none."""
    with lines:
        for line in lines:
            if line.endswith(b"\n"):
                messages.put(json.loads(line))
    messages.put(None)
