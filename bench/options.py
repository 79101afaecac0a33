"""The options of a training run, their defaults and their limits."""

from dataclasses import dataclass, fields

import torch

from fused_lstm.bench.errors import UserError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

# Nobody trains a larger one here; a slip of the keyboard must not reach the allocator.
LARGEST_SIZE = 1 << 20


@dataclass(frozen=True)
class TrainingOptions:
    """What a run computes. The field `batch_size` is the option --batch-size, and so on.

    Attributes:
        text: path of the text; None: `corpus.default_text`
        validation_fraction: the part of the text, at its end, that is not trained on
        embedding_size, hidden_size, num_layers, dropout, tied: of `char_model.CharModel`
        batch_size: N, columns read side by side
        sequence_length: T, characters between two updates, through which gradients flow
        dtype: of the arithmetic: float64 throughout, or float32 parameters, with autocast for the half types
        device: "auto" (CUDA if there), or what `torch.device` takes
        backend: of `fused_lstm.LSTM`
        seed: of parameters, dropout and the sample
        learning_rate: of Adam
        clip: largest norm of the gradient
        steps: updates in all
        validate_every: steps from one validation, and saved checkpoint, to the next
        threads: of the CPU. One gives the same numbers on any number of cores, and small steps lose more than they gain
            by more of them where another program runs
        compare: train `torch.nn.LSTM` beside, from the same weights and on the same batches
    """

    text: str | None = None
    validation_fraction: float = 0.05
    embedding_size: int = 64
    hidden_size: int = 128
    num_layers: int = 2
    dropout: float = 0.0
    tied: bool = False
    batch_size: int = 32
    sequence_length: int = 64
    dtype: str = "float32"
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    learning_rate: float = 0.008
    clip: float = 1.0
    steps: int = 500
    validate_every: int = 100
    threads: int = 1
    compare: bool = False

    def check(self) -> None:
        """Finds what cannot work before anything is done.

        Raises:
            UserError: a value is out of its range, or two do not go together
        """
        sizes = "embedding_size", "hidden_size", "num_layers", "batch_size", "sequence_length"
        for name in (*sizes, "steps", "validate_every"):
            largest = LARGEST_SIZE if name in sizes else 10**9
            self._require(name, 1 <= getattr(self, name) <= largest, f"a whole number from 1 to {largest}")
        self._require("threads", 1 <= self.threads <= 1024, "a whole number from 1 to 1024")
        self._require("seed", 0 <= self.seed < 1 << 63, "a whole number from 0 to 2**63 - 1")
        self._require("dropout", 0 <= self.dropout <= 1, "a rate from 0 to 1")
        self._require("validation_fraction", 0 < self.validation_fraction < 1, "a number between 0 and 1")
        self._require("learning_rate", 0 < self.learning_rate <= 100, "a number above 0, and 100 at most")
        self._require("clip", self.clip > 0, "a number above 0, or inf for no clipping")
        self._require("dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        if self.tied and self.embedding_size != self.hidden_size:
            raise UserError(
                f"--tied shares one matrix, but --embedding-size is {self.embedding_size} "
                f"and --hidden-size {self.hidden_size}",
                "make them equal, or leave --tied out",
            )

    def resumed(self, given: dict[str, object], source: str) -> "TrainingOptions":
        """These options of a run that was begun, with those that are given anew for the rest of it.

        Args:
            given: new values by field name
            source: the name of the checkpoint, for the error

        Raises:
            UserError: a new value would make it another model or another walk through the text
        """
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                option = option_name(name)
                # A flag is given or not: it has no value to name.
                was = f"without {option}" if value is True else f"with {option} {getattr(self, name)}, not {value}"
                raise UserError(f"{source} was trained {was}", f"leave {option} out, or start anew without --resume")
        return TrainingOptions(**{field.name: getattr(self, field.name) for field in fields(self)} | given)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{option_name(name)} is {getattr(self, name)}", f"give {expected}")


# What a resumed run may change and still be the same model on the same walk through the text.
CHANGEABLE = frozenset(
    ("text", "dropout", "device", "backend", "learning_rate", "clip", "steps", "validate_every", "threads")
)


def option_name(field: str) -> str:
    """The option of the command that sets a field."""
    return "--" + field.replace("_", "-")
