"""What `fused-lstm train` shows on the terminal."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fused_lstm import BackendChoice
from fused_lstm.bench.corpus import Corpus
from fused_lstm.bench.learners import OURS, TORCHS
from fused_lstm.bench.record import bits
from fused_lstm.bench.training import Training

# Wide enough for "torch.nn.LSTM" over two columns of numbers.
COLUMN = 12


class Report:
    """Prints a run: its plan, a bar and rows while it goes, its outcome.

    Args:
        corpus: the text, in characters or in words
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._unit = corpus.unit
        self.console = Console(highlight=False, markup=False, soft_wrap=True)

    def plan(self, training: Training, choice: BackendChoice) -> None:
        """What will be trained, on what, where."""
        options, corpus = training.options, self._corpus
        name = "AWD-LSTM" if options.model == "awd" else "LSTM"
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        lines = {
            "text": f"{corpus.name}: {len(corpus.vocabulary)} distinct {self._unit}s, "
            f"{len(corpus.training):,} to train on, {len(corpus.validation):,} to validate on",
            "model": f"embedding {options.embedding_size}, {name} {options.num_layers} × {options.hidden_size}, "
            f"{parameters:,} parameters, {options.dtype} on {training.device}",
            "batch": f"{options.batch_size} × {options.sequence_length} {self._unit}s, {options.steps:,} steps",
            "backend": _backend(choice),
        }
        for name, line in lines.items():
            self.console.print(f"{name:<9}{line}")
        self.console.print()

    def curve_head(self, training: Training) -> None:
        """The head of the rows of `curve_row`."""
        names = list(reversed(training.learners))
        if len(names) > 1:
            self.console.print(" " * 7 + "".join(f"{name:>{2 * COLUMN}}" for name in names))
        pairs = f"{'training':>{COLUMN}}{'validation':>{COLUMN}}" * len(names)
        self.console.print(f"{'step':>7}{pairs}  (bits per {self._unit})")

    def curve_row(self, training: Training) -> None:
        """Bits per character or word at a validation: training (the mean since the one before) and validation."""
        previous = training.validation_steps[-2] if len(training.validation_steps) > 1 else 0
        row = f"{training.step:>7}"
        for learner in reversed(training.learners.values()):
            recent = statistics.fmean(learner.losses[previous:])
            row += f"{bits(recent):>{COLUMN}.4f}{bits(learner.validation_losses[-1]):>{COLUMN}.4f}"
        self.console.print(row)
        if training.learners[OURS].averaging_from == training.step:
            self.console.print(
                f"weights are averaged from here on: no better than before the last {training.options.non_monotone}"
            )

    @contextlib.contextmanager
    def progress(self, training: Training) -> Iterator[Callable[[], None]]:
        """A bar, while the block lasts, and the function that moves it on to the training's step.

        Where the output is not a terminal there is no bar.
        """
        bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[bits]:.3f} bits/" + self._corpus.level),
            TextColumn("{task.fields[speed]:,.0f} " + self._corpus.level + "s/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        options = training.options
        learner = training.learners[OURS]
        task = bar.add_task("", total=options.steps, completed=training.step, loss=0.0, bits=0.0, speed=0.0)

        def move() -> None:
            loss = learner.losses[-1]
            speed = options.batch_size * options.sequence_length / learner.seconds[-1]
            bar.update(task, completed=training.step, loss=loss, bits=bits(loss), speed=speed)

        with bar:
            yield move

    def outcome(self, results: dict[str, Any], choice: BackendChoice) -> None:
        """The sample and the figures of the whole run."""
        if results["sample"]:
            self.console.print("\nsample", style="bold")
            self.console.print(results["sample"])
        table = Table(f"bits per {self._unit}", "validation", "unigram entropy", f"{self._unit}s/s")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, learner in reversed(results["learners"].items()):
            table.add_row(
                name,
                f"{learner['validation_bits'][-1]:.4f}",
                f"{results['unigram_bits']:.4f}",
                f"{learner[f'{self._unit}s_per_second']:,.0f}",
            )
        self.console.print()
        self.console.print(table)
        if self._corpus.level == "word":
            bits_per_word = results["learners"][OURS]["validation_bits"][-1]
            perplexity = 2**bits_per_word if bits_per_word < 1024 else math.inf  # a float ends there
            self.console.print(f"validation perplexity {perplexity:,.1f}")
        self.console.print(f"backend  {_backend(choice)}")
        if TORCHS in results["learners"]:
            self._comparison(results["learners"])

    def _comparison(self, learners: dict[str, Any]) -> None:
        ours, torchs = learners[OURS], learners[TORCHS]
        differences = [abs(a - b) / (b or 1.0) for a, b in zip(ours["losses"], torchs["losses"], strict=True)]
        ratio = ours["characters_per_second"] / torchs["characters_per_second"]
        self.console.print(
            f"{OURS} runs at {ratio:.2f} times the speed of {TORCHS}; over {len(differences):,} steps their losses "
            f"differ by {max(differences):.1e} at most, relatively"
        )


def _backend(choice: BackendChoice) -> str:
    return f"{choice.name} ({choice.reason})"
