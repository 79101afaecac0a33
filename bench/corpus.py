"""A text as indices of characters or words: its vocabulary, its two parts, columns for truncated backpropagation."""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_lstm.bench import words
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.options import LEVELS

DEFAULT_TEXT = "pydoc_data.topics"


def default_text() -> str:
    """The reference manual of the Python language, as far as every Python brings it along for `help()`.

    Raises:
        UserError: this Python was installed without it
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(f"this Python lacks {DEFAULT_TEXT}", "give a text with --text") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, its line ends as `\\n`.

    Raises:
        UserError: the file is missing, unreadable or not UTF-8
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file", "give a text file with --text")
        return path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark is no character of the text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give a text file with --text") from error
    except UnicodeDecodeError as error:
        cause = f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise UserError(cause, "convert it to UTF-8 first") from error


@dataclass(frozen=True)
class Corpus:
    """A text, split into a front part for training and an end part for validation.

    Attributes:
        name: where the text is from
        digest: SHA-256 of the text, in hexadecimal
        level: what it is made of, "char" or "word"
        vocabulary: at the level "char", every character of the text once, in the order of code points; at "word", that
            of `words.vocabulary`. An index is the place in it
        training, validation: int64 (characters,) or (words,), indices into `vocabulary`
    """

    name: str
    digest: str
    level: str
    vocabulary: Sequence[str]
    training: Tensor
    validation: Tensor

    @classmethod
    def from_text(cls, name: str, text: str, *, validation_fraction: float) -> "Corpus":
        """Splits a text in characters; the last `validation_fraction` of it is for validation.

        Raises:
            UserError: the text is empty
        """
        if not text:
            raise UserError(f"{name} is empty", "give a longer text with --text")
        encoded = bytearray(text.encode(f"utf-32-{sys.byteorder[0]}e"))
        code_points, indices = torch.frombuffer(encoded, dtype=torch.int32).unique(return_inverse=True)
        boundary = len(text) - round(len(text) * validation_fraction)
        return cls(
            name=name,
            digest=_digest(text),
            level="char",
            vocabulary="".join(map(chr, code_points.tolist())),
            training=indices[:boundary],
            validation=indices[boundary:],
        )

    @classmethod
    def from_words(cls, name: str, text: str, *, validation_fraction: float, min_count: int) -> "Corpus":
        """Splits a text in words, likewise; its vocabulary is of the words that occur `min_count` times in training.

        Raises:
            UserError: the text is empty
        """
        tokens = words.split(text)
        if not tokens:
            raise UserError(f"{name} is empty", "give a longer text with --text")
        boundary = len(tokens) - round(len(tokens) * validation_fraction)
        vocabulary = words.vocabulary(tokens[:boundary], min_count)
        indices = words.indices(tokens, vocabulary)
        return cls(
            name=name,
            digest=_digest(text),
            level="word",
            vocabulary=vocabulary,
            training=indices[:boundary],
            validation=indices[boundary:],
        )

    @property
    def unit(self) -> str:
        """What the text is made of, as a word."""
        return LEVELS[self.level]

    def decode(self, indices: Tensor) -> str:
        """The text that `indices` (characters,) or (words,) stand for."""
        parts = [self.vocabulary[index] for index in indices.tolist()]
        return words.join(parts) if self.level == "word" else "".join(parts)

    def require_length(self, batch_size: int, sequence_length: int) -> None:
        """Checks that a batch can be cut from either part.

        Raises:
            UserError: the text is too short
        """
        # One more than a window, as the target is the next one; validation windows may be shorter.
        for part, available, needed in (
            ("training", len(self.training), batch_size * (sequence_length + 1)),
            ("validation", len(self.validation), batch_size * 2),
        ):
            if available < needed:
                raise UserError(
                    f"{self.name} is too short: {available} {self.unit}s for {part}, {needed} needed",
                    "give a longer text, or lower --batch-size or --sequence-length",
                )

    def unigram_bits(self) -> float:
        """Bits per character (or word) of the validation part, for a model that knows how often each is, and no more.

        Its probabilities are the training part's counts plus one, so that no character is impossible.
        """
        counts = torch.bincount(self.training, minlength=len(self.vocabulary)).double() + 1
        surprise = (counts.sum() / counts).log()
        return surprise[self.validation].mean().item() / math.log(2)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def columns(indices: Tensor, batch_size: int) -> Tensor:
    """Lays a text out for `batch_size` readers that walk it side by side.

    Args:
        indices: (characters,)

    Returns:
        (characters // batch_size, batch_size): each column one stretch of the text, top to bottom; a remainder that
        does not fill a row is dropped
    """
    rows = len(indices) // batch_size
    return indices[: rows * batch_size].view(batch_size, rows).t().contiguous()
