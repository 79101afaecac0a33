"""Files that are replaced whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path

from fused_lstm.bench.errors import UserError


def check_writable(path: Path) -> None:
    """Tries, without touching `path`, whether `write_atomically` could replace it.

    Raises:
        UserError: its folder is missing or cannot be written to, or `path` is not a regular file
    """
    target = _target(path)
    try:
        # A device is no file to replace: that would take /dev/null away from the whole machine.
        if os.path.lexists(target) and not target.is_file():
            raise UserError(f"{path} is not a regular file", "name a file to write")
        temporary = _temporary(target)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces `path` by a file that holds `data`.

    Whoever reads `path` finds the old file or the new one, also after a crash or a full disk.

    Raises:
        UserError: the file cannot be written; the old one, if any, is as it was
    """
    target = _target(path)
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a crash after it must not find an empty file
        os.replace(temporary, target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _target(path: Path) -> Path:
    # A link keeps pointing where it does: the file behind it is replaced.
    return Path(os.path.realpath(path))


def _temporary(target: Path) -> Path:
    # Beside the target, because a rename is atomic within one file system only.
    return target.parent / f".fused-lstm-{secrets.token_hex(8)}.tmp"


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}", "name a file in a folder that exists and has room")
