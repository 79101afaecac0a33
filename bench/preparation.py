"""What a run of `fused-lstm train` needs before its first step."""

import os
from pathlib import Path

import torch

from fused_lstm import BackendChoice, select_backend
from fused_lstm.bench.atomic import check_writable
from fused_lstm.bench.checkpoint import Checkpoint, unusable
from fused_lstm.bench.corpus import DEFAULT_TEXT, Corpus, default_text, read_text
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.options import DTYPES, TrainingOptions
from fused_lstm.bench.plot import require_matplotlib
from fused_lstm.bench.training import Training


def check_outputs(options: TrainingOptions, outputs: dict[str, Path | None]) -> None:
    """Finds out before a run whether its files can be written.

    Args:
        outputs: by option, where it was given

    Raises:
        UserError: one cannot be, or would overwrite another or the text
    """
    taken = {os.path.realpath(options.text): "--text"} if options.text is not None else {}
    for option, path in outputs.items():
        if path is None:
            continue
        check_writable(path)
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UserError(f"{option} would overwrite the file of {other}, {path}", f"give {option} a file of its own")
    plot = outputs["--plot"]
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise UserError(f"--plot draws PNG, but {plot} has another ending", "name a file in .png")
        require_matplotlib()


def choose_backend(options: TrainingOptions, device: torch.device) -> BackendChoice:
    """What runs the LSTM layers in training; where they are of two sizes, maybe two backends.

    Raises:
        UserError: the backend that is asked for cannot
    """
    hidden_sizes = [options.hidden_size]
    if options.model == "awd":  # its last layer has as many units as a word has features
        hidden_sizes = [options.hidden_size] * (options.num_layers > 1) + [options.embedding_size]
    try:
        choices = [
            select_backend(
                options.backend,
                device=device,
                dtype=DTYPES[options.dtype],
                hidden_size=hidden_size,
                batch_size=options.batch_size,
                options=("weight_dropout",) if options.weight_dropout > 0 else (),
            )
            for hidden_size in hidden_sizes
        ]
    except ValueError as error:
        raise UserError(str(error).rstrip("."), "leave --backend out to run what fits") from error
    if len({choice.name for choice in choices}) == 1:
        return choices[0]
    reasons = [f"H={size}: {choice.reason}" for size, choice in zip(hidden_sizes, choices, strict=True)]
    return BackendChoice(", ".join(choice.name for choice in choices), "; ".join(reasons))


def make_corpus(options: TrainingOptions) -> Corpus:
    """The text that the options name.

    Raises:
        UserError: it cannot be read, or is too short
    """
    if options.text is None:
        name, text = DEFAULT_TEXT, default_text()
    else:
        name, text = options.text, read_text(Path(options.text))
    fraction = options.validation_fraction
    if options.level == "word":
        corpus = Corpus.from_words(name, text, validation_fraction=fraction, min_count=options.min_count)
    else:
        corpus = Corpus.from_text(name, text, validation_fraction=fraction)
    corpus.require_length(options.batch_size, options.sequence_length)
    return corpus


def take_up(training: Training, corpus: Corpus, begun: Checkpoint, path: Path) -> None:
    """Lets a training go on where a checkpoint, read from `path`, was saved.

    Raises:
        UserError: it is of another text, of a run that is done, or damaged
    """
    if begun.digest != corpus.digest:
        raise UserError(
            f"{path} was trained on another text than {corpus.name}, with a vocabulary and a place of its own",
            "give its text with --text, or start anew without --resume",
        )
    try:
        training.load_state_dict(begun.training)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise unusable(path) from error
    if training.done:
        raise UserError(
            f"{path} is at step {training.step} of {training.options.steps} already", "give more with --steps"
        )
