"""The options of a training run, their defaults and their limits."""

import dataclasses
import math
from collections.abc import Iterable

import torch

from fused_lstm.bench.errors import UserError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

LEVELS = {"char": "character", "word": "word"}  # by name, what a text is made of

# Nobody trains a larger one here; a slip of the keyboard must not reach the allocator.
LARGEST_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """What a run computes. The field `batch_size` is the option --batch-size, and so on.

    The defaults are those of the model "lstm"; `DEFAULTS` has the others.

    Attributes:
        model: "lstm", `char_model.CharModel` under Adam, or "awd", `fused_lstm.AWDLSTM` under `fused_lstm.NTASGD`
        text: path of the text; None: `corpus.default_text`
        validation_fraction: the part of the text, at its end, that is not trained on
        level: what a text is made of, "char" or "word"
        min_count: of words that are rarer in the training part, each is <unk>
        embedding_size, hidden_size, num_layers, dropout, tied: of the model
        input_dropout, hidden_dropout, embedding_dropout, weight_dropout: of the AWD-LSTM
        batch_size: N, columns read side by side
        sequence_length: T, characters or words between two updates, through which gradients flow; of the AWD-LSTM,
            the nominal one of `lengths.RandomLengths`
        dtype: of the arithmetic: float64 throughout, or float32 parameters, with autocast for the half types
        device: "auto" (CUDA if there), or what `torch.device` takes
        backend: of `fused_lstm.LSTM`
        seed: of parameters, dropout and the sample
        learning_rate: of Adam; of NTASGD, at the nominal length
        clip: largest norm of the gradient
        weight_decay, non_monotone: of NTASGD; the latter is its n, in validations
        alpha, beta: of the AWD-LSTM's penalties AR and TAR
        steps: updates in all
        validate_every: steps from one validation, and saved checkpoint, to the next
        threads: of the CPU. One gives the same numbers on any number of cores, and small steps lose more than they gain
            by more of them where another program runs
        compare: train `torch.nn.LSTM` beside, from the same weights and on the same batches
    """

    model: str = "lstm"
    text: str | None = None
    validation_fraction: float = 0.05
    level: str = "char"
    min_count: int = 2
    embedding_size: int = 64
    hidden_size: int = 128
    num_layers: int = 2
    dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    weight_dropout: float = 0.0
    tied: bool = False
    batch_size: int = 32
    sequence_length: int = 64
    dtype: str = "float32"
    device: str = "auto"
    backend: str = "auto"
    seed: int = 0
    learning_rate: float = 0.008
    clip: float = 1.0
    weight_decay: float = 0.0
    non_monotone: int = 5
    alpha: float = 0.0
    beta: float = 0.0
    steps: int = 500
    validate_every: int = 100
    threads: int = 1
    compare: bool = False

    def check(self) -> None:
        """Finds what cannot work before anything is done.

        Raises:
            UserError: a value is out of its range, or two do not go together
        """
        self._require("model", self.model in DEFAULTS, "one of " + ", ".join(DEFAULTS))
        self._require("level", self.level in LEVELS, "one of " + ", ".join(LEVELS))
        sizes = "embedding_size", "hidden_size", "num_layers", "batch_size", "sequence_length"
        for name in (*sizes, "steps", "validate_every", "min_count"):
            largest = LARGEST_SIZE if name in sizes else 10**9
            self._require(name, 1 <= getattr(self, name) <= largest, f"a whole number from 1 to {largest}")
        self._require("threads", 1 <= self.threads <= 1024, "a whole number from 1 to 1024")
        self._require("seed", 0 <= self.seed < 1 << 63, "a whole number from 0 to 2**63 - 1")
        self._require("non_monotone", 0 <= self.non_monotone <= 10**9, "a whole number from 0 to 1000000000")
        for name in RATES:
            self._require(name, 0 <= getattr(self, name) <= 1, "a rate from 0 to 1")
        self._require("validation_fraction", 0 < self.validation_fraction < 1, "a number between 0 and 1")
        self._require("learning_rate", 0 < self.learning_rate <= 100, "a number above 0, and 100 at most")
        self._require("clip", self.clip > 0, "a number above 0, or inf for no clipping")
        for name in ("weight_decay", "alpha", "beta"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        self._require("dtype", self.dtype in DTYPES, "one of " + ", ".join(DTYPES))
        if self.level != "word":
            self._require_unused(("min_count",), "--level word")
        if self.model == "awd":
            self._require_unused(("compare",), "--model lstm")
            return
        self._require_unused(AWD_ONLY, "--model awd")
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
        return dataclasses.replace(self, **given)

    def _require_unused(self, names: Iterable[str], where: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(DEFAULTS["lstm"], name):
                raise UserError(f"{option_name(name)} is of {where}", f"leave it out, or give {where}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"{option_name(name)} is {getattr(self, name)}", f"give {expected}")


RATES = ("dropout", "input_dropout", "hidden_dropout", "embedding_dropout", "weight_dropout")
AWD_ONLY = (*RATES[1:], "weight_decay", "non_monotone", "alpha", "beta")

# What a resumed run may change and still be the same model on the same walk through the text.
CHANGEABLE = frozenset(
    (
        *("text", *RATES, "device", "backend", "learning_rate", "clip", "weight_decay", "alpha", "beta"),
        *("steps", "validate_every", "threads"),
    )
)

# What the AWD-LSTM's paper has for the Penn Treebank (Merity et al. 2017, section 5).
PAPER = {
    "embedding_size": 400,
    "hidden_size": 1150,
    "num_layers": 3,
    "dropout": 0.4,
    "input_dropout": 0.4,
    "hidden_dropout": 0.3,
    "embedding_dropout": 0.1,
    "weight_dropout": 0.5,
    "tied": True,
    "batch_size": 40,
    "sequence_length": 70,
    "learning_rate": 30.0,
    "clip": 0.25,
    "weight_decay": 1.2e-6,
    "non_monotone": 5,
    "alpha": 2.0,
    "beta": 1.0,
}

# Of that, the AWD-LSTM's defaults change the sizes and the learning rate: on a text of a
# thirteenth of the treebank's words, within minutes on a CPU, many small updates of a small model go furthest, and at
# its 30 that model does not leave the unigram entropy behind.
DEFAULTS = {
    "lstm": TrainingOptions(),
    "awd": TrainingOptions(
        model="awd",
        level="word",
        **PAPER
        | {
            "embedding_size": 100,
            "hidden_size": 200,
            "num_layers": 2,
            "batch_size": 20,
            "sequence_length": 35,
            "learning_rate": 10.0,
        },
        steps=1000,
    ),
}


def default_options(model: str, **given: object) -> TrainingOptions:
    """The options of a new run: those given, else the model's own.

    Raises:
        UserError: there is no such model
    """
    if model not in DEFAULTS:
        raise UserError(f"--model is {model}", "give one of " + ", ".join(DEFAULTS))
    return dataclasses.replace(DEFAULTS[model], **given)


def option_name(field: str) -> str:
    """The option of the command that sets a field."""
    return "--" + field.replace("_", "-")
