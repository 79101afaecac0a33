"""Files that are replaced whole or not at all, and Ctrl-C at a moment of our choice."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import command
import pytest

from fused_lstm.bench.atomic import check_writable, write_atomically
from fused_lstm.bench.cli import main
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.interrupts import shielded


def test_write_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"old", b"the new one"):
        check_writable(path)
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask  # as any file, not a temporary one's 0600


def test_write_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_atomically(path, b"new")
    if expected is UserError:
        assert caught.value.cause == f"cannot write {path}: No space left on device"
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_checkpoint_survives_a_disk_that_fills_up(tmp_path: Path) -> None:
    text, checkpoint = command.make_text(tmp_path), tmp_path / "run.pt"
    assert main(command.arguments(text, checkpoint=checkpoint, steps=5)) == 0
    old = checkpoint.read_bytes()
    # The limit on a file's size stops the write in its middle, as a full disk does.
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(old) // 2},) * 2); "
    code = limit + "from fused_lstm.bench.cli import main; sys.exit(main())"
    run = command.arguments(text, resume=checkpoint, steps=10)
    result = subprocess.run(
        [sys.executable, "-c", code, *run],
        env=command.environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"fused-lstm: cannot write {checkpoint}: File too large; ")
    assert result.stderr.count("\n") == 1
    assert checkpoint.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["run.pt", text.name]


def test_shielded_block_ends_before_ctrl_c_takes_effect() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = []

        def block() -> None:
            with shielded():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("first")
                os.kill(os.getpid(), signal.SIGINT)
                done.append("second")

        with pytest.raises(KeyboardInterrupt):
            block()
        assert done == ["first", "second"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
        block()
        assert len(done) == 4
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_shielded_block_runs_in_any_thread() -> None:
    done = []

    def work() -> None:
        with shielded():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
