"""The command `fused-lstm train`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from fused_lstm.bench.atomic import write_atomically
from fused_lstm.bench.char_model import sample
from fused_lstm.bench.checkpoint import Checkpoint
from fused_lstm.bench.corpus import DEFAULT_TEXT, Corpus
from fused_lstm.bench.devices import find_device
from fused_lstm.bench.errors import Interrupted, UserError
from fused_lstm.bench.learners import OURS
from fused_lstm.bench.options import AWD_ONLY, DEFAULTS, DTYPES, LEVELS, PAPER, default_options
from fused_lstm.bench.plot import as_png
from fused_lstm.bench.preparation import check_outputs, choose_backend, make_corpus, take_up
from fused_lstm.bench.record import as_json, collect
from fused_lstm.bench.report import Report
from fused_lstm.bench.training import Training


def _option(help: str, default: object = None, panel: str | None = None) -> typer.models.OptionInfo:
    # The parameter itself defaults to None, which tells a default from a value given anew to a resumed run.
    default_text = "" if default is None else f" Default: {default}."
    return typer.Option(help=help + default_text, show_default=False, rich_help_panel=panel)


def _field(name: str, help: str) -> typer.models.OptionInfo:
    """An option that sets a field of `TrainingOptions`, with the defaults of each model."""
    usual, awd = (getattr(DEFAULTS[model], name) for model in ("lstm", "awd"))
    if name in AWD_ONLY:
        return _option(help, awd, "Options of --model awd")
    paper = f" (its paper: {PAPER[name]})" if PAPER.get(name, awd) != awd else ""
    return _option(help, f"{usual}; awd: {awd}{paper}" if usual != awd or paper else usual)


def train(
    model: Annotated[
        str | None, _option("lstm: embedding, LSTM and output, under Adam; awd: AWDLSTM under NTASGD.", "lstm")
    ] = None,
    text: Annotated[Path | None, _option("Text to train on, UTF-8.", DEFAULT_TEXT)] = None,
    validation_fraction: Annotated[
        float | None, _field("validation_fraction", "Part of the text, at its end, kept for validation.")
    ] = None,
    level: Annotated[str | None, _field("level", f"What the text is read in: {', '.join(LEVELS)}.")] = None,
    min_count: Annotated[
        int | None, _field("min_count", "Words that the training part has less often are <unk>.")
    ] = None,
    embedding_size: Annotated[int | None, _field("embedding_size", "Embedding features.")] = None,
    hidden_size: Annotated[int | None, _field("hidden_size", "LSTM units a layer.")] = None,
    num_layers: Annotated[int | None, _field("num_layers", "LSTM layers.")] = None,
    dropout: Annotated[
        float | None, _field("dropout", "Dropout rate before, between and after the layers; awd: after the last.")
    ] = None,
    tied: Annotated[
        bool,
        typer.Option(
            "--tied", help="Share one matrix between embedding and output; needs equal sizes. awd always does."
        ),
    ] = False,
    batch_size: Annotated[int | None, _field("batch_size", "Columns of text read side by side.")] = None,
    sequence_length: Annotated[
        int | None,
        _field("sequence_length", "Characters, or words, that gradients flow through; awd draws lengths near it."),
    ] = None,
    dtype: Annotated[
        str | None,
        _field("dtype", f"{', '.join(DTYPES)}; the half types by autocast on float32 parameters."),
    ] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...", "cuda if there")] = None,
    backend: Annotated[str | None, _field("backend", "What runs fused_lstm.LSTM.")] = None,
    seed: Annotated[int | None, _field("seed", "Seed of parameters, dropout, lengths and the sample.")] = None,
    learning_rate: Annotated[
        float | None, _field("learning_rate", "Step size of Adam; awd: of NTASGD, in proportion to the length drawn.")
    ] = None,
    clip: Annotated[float | None, _field("clip", "Largest gradient norm; inf for no clipping.")] = None,
    steps: Annotated[int | None, _field("steps", "Updates in all, resumed ones included.")] = None,
    validate_every: Annotated[int | None, _field("validate_every", "Steps from one validation to the next.")] = None,
    threads: Annotated[int | None, _field("threads", "CPU threads; more help large models on an idle machine.")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Train torch.nn.LSTM beside, from the same weights on the same batches; lstm only."
        ),
    ] = False,
    sample_length: Annotated[int, typer.Option(help="Characters, or words, to write at the end.")] = 300,
    checkpoint: Annotated[
        Path | None, _option("Where to save the run: at each validation, at the end and on Ctrl-C.")
    ] = None,
    resume: Annotated[
        Path | None,
        _option("Checkpoint to go on from, with its options; saved to again unless --checkpoint names another."),
    ] = None,
    log: Annotated[Path | None, _option("Where to write a JSON log: every loss, the figures, the sample.")] = None,
    plot: Annotated[Path | None, _option("Where to draw the loss curves: a file in .png.")] = None,
    input_dropout: Annotated[float | None, _field("input_dropout", "Dropout rate on the words' features.")] = None,
    hidden_dropout: Annotated[float | None, _field("hidden_dropout", "Dropout rate between layers.")] = None,
    embedding_dropout: Annotated[float | None, _field("embedding_dropout", "Rate at which words are dropped.")] = None,
    weight_dropout: Annotated[
        float | None, _field("weight_dropout", "Dropout rate on the hidden-to-hidden weights.")
    ] = None,
    alpha: Annotated[float | None, _field("alpha", "Factor of AR, the penalty on large outputs.")] = None,
    beta: Annotated[float | None, _field("beta", "Factor of TAR, the penalty on fast ones.")] = None,
    weight_decay: Annotated[float | None, _field("weight_decay", "L2 penalty on the weights.")] = None,
    non_monotone: Annotated[
        int | None,
        _field("non_monotone", "Averaging begins at a validation worse than the best of all but the last so many."),
    ] = None,
) -> None:
    """Train a language model on a text.

    A new run needs no option at all. It ends with the loss on a part of the text that it never saw, beside the
    unigram entropy, which a model reaches that knows nothing but how often each character is.

    --model awd trains the AWD-LSTM (Merity et al. 2017) by words. Its defaults are the paper's, save where another is
    named beside them: they make a small model, which learns something of a small text in minutes on a CPU.
    """
    given = {
        "model": model,
        "text": None if text is None else str(text),
        "validation_fraction": validation_fraction,
        "level": level,
        "min_count": min_count,
        "embedding_size": embedding_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "dropout": dropout,
        "input_dropout": input_dropout,
        "hidden_dropout": hidden_dropout,
        "embedding_dropout": embedding_dropout,
        "weight_dropout": weight_dropout,
        "tied": tied or None,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "seed": seed,
        "learning_rate": learning_rate,
        "clip": clip,
        "weight_decay": weight_decay,
        "non_monotone": non_monotone,
        "alpha": alpha,
        "beta": beta,
        "steps": steps,
        "validate_every": validate_every,
        "threads": threads,
        "compare": compare or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume is None:
        begun = None
        options = default_options(given.pop("model", "lstm"), **given)
    else:
        begun = Checkpoint.load(resume)
        options = begun.options.resumed(given, str(resume))
        checkpoint = checkpoint or resume
    options.check()
    if sample_length < 0:
        raise UserError(f"--sample-length is {sample_length}", "give a whole number from 0")
    check_outputs(options, {"--checkpoint": checkpoint, "--log": log, "--plot": plot})
    torch_device = find_device(options.device)
    choice = choose_backend(options, torch_device)
    corpus = make_corpus(options)

    # cuBLAS promises the same bits for the same work only with a workspace of fixed size, read when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    torch.set_num_threads(options.threads)
    with _failures_explained():
        training = Training(options, corpus, torch_device)
        if begun is not None:
            take_up(training, corpus, begun, resume)
        report = Report(corpus)
        report.plan(training, choice)
        _run(training, corpus, report, checkpoint)
        prompt = corpus.validation[: options.sequence_length]
        with training.learners[OURS].result():
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
