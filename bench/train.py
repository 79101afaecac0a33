"""The command `fused-lstm train`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

import fused_lstm
from fused_lstm.bench.atomic import check_writable, write_atomically
from fused_lstm.bench.char_model import sample
from fused_lstm.bench.checkpoint import Checkpoint, unusable
from fused_lstm.bench.corpus import DEFAULT_TEXT, Corpus, default_text, read_text
from fused_lstm.bench.devices import find_device
from fused_lstm.bench.errors import Interrupted, UserError
from fused_lstm.bench.options import DTYPES, TrainingOptions
from fused_lstm.bench.plot import as_png, require_matplotlib
from fused_lstm.bench.record import as_json, collect
from fused_lstm.bench.report import Report
from fused_lstm.bench.training import Training

DEFAULTS = TrainingOptions()


def _option(help: str, default: object = None) -> typer.models.OptionInfo:
    # The parameter itself defaults to None, which tells a default from a value given anew to a resumed run.
    default_text = "" if default is None else f" Default: {default}."
    return typer.Option(help=help + default_text, show_default=False)


def train(
    text: Annotated[Path | None, _option("Text to train on, UTF-8.", DEFAULT_TEXT)] = None,
    validation_fraction: Annotated[
        float | None, _option("Part of the text, at its end, kept for validation.", DEFAULTS.validation_fraction)
    ] = None,
    embedding_size: Annotated[int | None, _option("Embedding features.", DEFAULTS.embedding_size)] = None,
    hidden_size: Annotated[int | None, _option("LSTM units a layer.", DEFAULTS.hidden_size)] = None,
    num_layers: Annotated[int | None, _option("LSTM layers.", DEFAULTS.num_layers)] = None,
    dropout: Annotated[
        float | None, _option("Dropout rate before, between and after the layers.", DEFAULTS.dropout)
    ] = None,
    tied: Annotated[
        bool, typer.Option("--tied", help="Share one matrix between embedding and output; needs equal sizes.")
    ] = False,
    batch_size: Annotated[int | None, _option("Columns of text read side by side.", DEFAULTS.batch_size)] = None,
    sequence_length: Annotated[
        int | None, _option("Characters that gradients flow through.", DEFAULTS.sequence_length)
    ] = None,
    dtype: Annotated[
        str | None,
        _option(f"{', '.join(DTYPES)}; the half types by autocast on float32 parameters.", DEFAULTS.dtype),
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...", "cuda if there")] = None,
    backend: Annotated[str | None, _option("What runs fused_lstm.LSTM.", DEFAULTS.backend)] = None,
    seed: Annotated[int | None, _option("Seed of parameters, dropout and the sample.", DEFAULTS.seed)] = None,
    learning_rate: Annotated[float | None, _option("Step size of Adam.", DEFAULTS.learning_rate)] = None,
    clip: Annotated[float | None, _option("Largest gradient norm; inf for no clipping.", DEFAULTS.clip)] = None,
    steps: Annotated[int | None, _option("Updates in all, resumed ones included.", DEFAULTS.steps)] = None,
    validate_every: Annotated[
        int | None, _option("Steps from one validation to the next.", DEFAULTS.validate_every)
    ] = None,
    threads: Annotated[
        int | None, _option("CPU threads; more help large models on an idle machine.", DEFAULTS.threads)
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train torch.nn.LSTM beside, from the same weights on the same batches.")
    ] = False,
    sample_length: Annotated[int, typer.Option(help="Characters to write at the end.")] = 300,
    checkpoint: Annotated[
        Path | None, _option("Where to save the run: at each validation, at the end and on Ctrl-C.")
    ] = None,
    resume: Annotated[
        Path | None,
        _option("Checkpoint to go on from, with its options; saved to again unless --checkpoint names another."),
    ] = None,
    log: Annotated[Path | None, _option("Where to write a JSON log: every loss, the figures, the sample.")] = None,
    plot: Annotated[Path | None, _option("Where to draw the loss curves: a file in .png.")] = None,
) -> None:
    """Train a character model on a text.

    A new run needs no option at all. It ends with the loss on a part of the text that it never saw, beside the
    unigram entropy, which a model reaches that knows nothing but how often each character is.
    """
    given = {
        "text": None if text is None else str(text),
        "validation_fraction": validation_fraction,
        "embedding_size": embedding_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "dropout": dropout,
        "tied": tied or None,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "seed": seed,
        "learning_rate": learning_rate,
        "clip": clip,
        "steps": steps,
        "validate_every": validate_every,
        "threads": threads,
        "compare": compare or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume is None:
        begun = None
        options = TrainingOptions(**given)
    else:
        begun = Checkpoint.load(resume)
        options = begun.options.resumed(given, str(resume))
        checkpoint = checkpoint or resume
    options.check()
    if sample_length < 0:
        raise UserError(f"--sample-length is {sample_length}", "give a whole number from 0")
    _check_outputs(options, {"--checkpoint": checkpoint, "--log": log, "--plot": plot})
    torch_device = find_device(options.device)
    choice = _backend(options, torch_device)
    corpus = _corpus(options)

    # cuBLAS promises the same bits for the same work only with a workspace of fixed size, read when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    torch.set_num_threads(options.threads)
    with _failures_explained():
        training = Training(options, corpus, torch_device)
        if begun is not None:
            _take_up(training, corpus, begun, resume)
        report = Report()
        report.plan(training, corpus, choice)
        _run(training, corpus, report, checkpoint)
        prompt = corpus.validation[: options.sequence_length]
        written = corpus.decode(sample(training.model, prompt, sample_length, seed=options.seed))

    results = collect(training, corpus, choice, written)
    report.outcome(results, choice)
    if log is not None:
        write_atomically(log, as_json(results))
    if plot is not None:
        write_atomically(plot, as_png(results))


def _run(training: Training, corpus: Corpus, report: Report, checkpoint: Path | None) -> None:
    def save() -> None:
        if checkpoint is not None:
            Checkpoint(training.options, corpus.digest, training.state_dict()).save(checkpoint)

    report.curve_head(training)
    try:
        with report.progress(training) as move_bar:
            while True:
                if training.validation_due:
                    training.validate()
                    report.curve_row(training)
                    save()
                if training.done:
                    return
                training.advance()
                move_bar()
    except KeyboardInterrupt:
        where = f"interrupted at step {training.step}"
        if checkpoint is None:
            raise Interrupted(where) from None
        save()
        raise Interrupted(f"{where}; go on with --resume {checkpoint}") from None


def _check_outputs(options: TrainingOptions, outputs: dict[str, Path | None]) -> None:
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


def _backend(options: TrainingOptions, device: torch.device) -> fused_lstm.BackendChoice:
    try:
        return fused_lstm.select_backend(
            options.backend,
            device=device,
            dtype=DTYPES[options.dtype],
            hidden_size=options.hidden_size,
            batch_size=options.batch_size,
        )
    except ValueError as error:
        raise UserError(str(error).rstrip("."), "leave --backend out to run what fits") from error


def _corpus(options: TrainingOptions) -> Corpus:
    if options.text is None:
        name, text = DEFAULT_TEXT, default_text()
    else:
        name, text = options.text, read_text(Path(options.text))
    corpus = Corpus.from_text(name, text, validation_fraction=options.validation_fraction)
    corpus.require_length(options.batch_size, options.sequence_length)
    return corpus


def _take_up(training: Training, corpus: Corpus, begun: Checkpoint, path: Path) -> None:
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


@contextlib.contextmanager
def _failures_explained() -> Iterator[None]:
    # Only what the sizes or the dtype bring about; any other RuntimeError is a bug and keeps its traceback.
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise UserError(
                "the model does not fit into memory", "lower --hidden-size, --batch-size or --sequence-length"
            ) from error
        if "could not create a primitive" in text:
            raise UserError(
                "torch's LSTM cannot run in this --dtype on this processor", "give --dtype float32 or bfloat16"
            ) from error
        raise
