"""The entry point of the command `fused-lstm`; each subcommand lives in a module of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fused_lstm.bench.errors import Interrupted, UserError

if TYPE_CHECKING:
    import typer

USAGE_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    A mistake in what the user gave becomes one line on stderr; a traceback means a bug.

    Args:
        arguments: without the program's name; None: those of the process

    Returns:
        the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C, or what the command says
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a sample may hold what the terminal's encoding cannot show
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        return _say(f"the command needs {package}; pip install 'fused-lstm[cli]'", USAGE_ERROR)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)

    import typer

    try:
        return app(args=arguments, prog_name="fused-lstm", standalone_mode=False) or 0
    except UserError as error:
        return _say(str(error), USAGE_ERROR)
    except Interrupted as error:
        return _say(str(error), INTERRUPTED)
    except (typer.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except Exception as error:
        # Typer has brought click from outside and from inside; its usage errors share this method alone.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().rstrip(".")
        return _say(f"{message}; see fused-lstm --help", USAGE_ERROR)


def build_app() -> typer.Typer:
    """The typer application with every subcommand.

    Raises:
        ModuleNotFoundError: the extra `cli` is not installed
    """
    import typer

    from fused_lstm.bench.benchmark import bench
    from fused_lstm.bench.doctor import doctor
    from fused_lstm.bench.train import train

    app = typer.Typer(
        help="Train, time and inspect fused_lstm, a drop-in torch.nn.LSTM.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (train, bench, doctor):
        app.command()(command)
    return app


def _say(text: str, status: int) -> int:
    print("fused-lstm:", " ".join(text.split()), file=sys.stderr)
    return status
