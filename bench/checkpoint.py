"""A training run on disk."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from fused_lstm.bench.atomic import write_atomically
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.options import TrainingOptions

FORMAT = "fused-lstm train 1"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a run continues from.

    Attributes:
        options: of the run
        digest: of its text
        training: `Training.state_dict`
    """

    options: TrainingOptions
    digest: str
    training: dict[str, Any]

    def save(self, path: Path) -> None:
        """Replaces `path`, whole or not at all.

        Raises:
            UserError: the file cannot be written
        """
        contents = {
            "format": FORMAT,
            "options": dataclasses.asdict(self.options),
            "digest": self.digest,
            "training": self.training,
        }
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads what `save` wrote, onto the CPU.

        Raises:
            UserError: the file is missing, damaged, or something else
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            cause = f"cannot read {path}: {error.strerror}"
            raise UserError(cause, "give a file that --checkpoint has written") from error
        try:
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # what torch.load raises on a damaged file is of a dozen types
            raise unusable(path) from error
        if not isinstance(contents, dict) or contents.get("format") != FORMAT:
            raise unusable(path)
        try:
            options = TrainingOptions(**contents["options"])
            options.check()
            return cls(options, contents["digest"], contents["training"])
        except (KeyError, TypeError) as error:
            raise unusable(path) from error


def unusable(path: Path) -> UserError:
    """The error for a checkpoint that cannot be taken up."""
    return UserError(
        f"{path} is damaged, or no checkpoint of fused-lstm train",
        "give another file that --checkpoint has written, or start anew without --resume",
    )
