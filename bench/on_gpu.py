"""Tests and measures this checkout on a machine with a GPU: python bench/on_gpu.py --out DIRECTORY

It needs torch, Triton and pytest, and no installation: fused_lstm is imported from the checkout that this file is in.
It ends by itself within its time budget. Each piece leaves whole JSON files as it goes, so that being cut off loses one
piece at most: machine.json, tests.json (and tests.log), telling.json, grid.json, summary.md; worker.log has what the
measuring process wrote to stderr. The exit code is 1 if a test failed, or a result of ours was less accurate than
allowed or could not be computed; 2 for a usage error.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent

# Seconds at the end of the budget for ending processes and writing what is there.
_RESERVE = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    options = _parse(arguments)
    start = time.monotonic()
    budget = options.budget_minutes * 60
    deadline = start + budget - min(_RESERVE, budget / 10)
    # so that a polite end, too, ends the processes started here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with _importable() as environment:
        from fused_lstm.bench.errors import UserError
        from fused_lstm.bench.visit import Visit

        try:
            return Visit(options, ROOT, environment, start, deadline).run()
        except UserError as error:
            print(f"on_gpu.py: {error}", file=sys.stderr)
            return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage before it."""
        self.exit(2, f"on_gpu.py: {message}; see --help\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where the files go")
    parser.add_argument("--budget-minutes", type=float, default=8, help="for everything (default: %(default)s)")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--tests-minutes", type=float, help="for the tests (default: 40 %% of the budget)")
    parser.add_argument("--marker", default="gpu", help='which tests: pytest -m; "" for all (default: %(default)s)')
    parser.add_argument("--test", action="append", metavar="FILE", help="only these; may be repeated (default: all)")
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument("--backend", action="append", help="of ours; may be repeated (default: all with kernels)")
    parser.add_argument("--seed", type=int, help="of weights and inputs (default: fresh for each case)")
    parser.add_argument("--silence-seconds", type=float, default=90, help="after which a process counts as hung")
    parser.add_argument("--commit", help="what is checked out, where the copy of the checkout has no .git")
    parser.add_argument("--tiny", action="store_true", help="a dry run: small sizes, few repeats")
    options = parser.parse_args(arguments)
    if options.tests_minutes is None:
        options.tests_minutes = 0.4 * options.budget_minutes
    for name in ("budget_minutes", "tests_minutes", "silence_seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; give a number above 0")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make {options.out}: {error.strerror}; give --out a folder that can be written to")
    return options


@contextlib.contextmanager
def _importable() -> Iterator[dict[str, str]]:
    """Makes fused_lstm, with its kernels and bench, importable from the checkout, here and in what is started with the
    environment that this gives."""
    here = str(Path(__file__).resolve().parent)
    # bench/ itself, which Python has put first: its modules must not pass for others of the same name
    sys.path[:] = [entry for entry in sys.path if entry != here]
    with tempfile.TemporaryDirectory(prefix="fused-lstm-") as directory:
        package = Path(directory, "fused_lstm")
        package.mkdir()
        for entry in (ROOT / "fused_lstm").iterdir():
            if entry.name not in ("kernels", "bench", "__pycache__"):
                (package / entry.name).symlink_to(entry)
        for name in ("kernels", "bench"):
            (package / name).symlink_to(ROOT / name)
        Path(directory, "pytest_recorder.py").symlink_to(ROOT / "bench" / "pytest_recorder.py")
        sys.path.insert(0, directory)
        others = os.environ.get("PYTHONPATH")
        yield {
            **os.environ,
            "PYTHONPATH": directory if not others else os.pathsep.join((directory, others)),
            "PYTHONSAFEPATH": "1",  # else the root would be importable, with ./kernels as a package of its own
            "PYTHONUNBUFFERED": "1",
        }


if __name__ == "__main__":
    sys.exit(main())
