"""`fused-lstm train --model awd` from its command line to the files it leaves."""

import math
import struct
from pathlib import Path

import command
import pytest
import torch
from rich.console import Console

import fused_lstm
from fused_lstm.bench import report
from fused_lstm.bench.char_model import sample
from fused_lstm.bench.checkpoint import Checkpoint
from fused_lstm.bench.cli import main
from fused_lstm.bench.options import DEFAULTS, TrainingOptions
from fused_lstm.bench.preparation import make_corpus
from fused_lstm.bench.training import Training

OURS = "fused_lstm"
GENTLE = {"dropout": 0.1, "input_dropout": 0.0, "hidden_dropout": 0.1, "embedding_dropout": 0.02, "weight_dropout": 0.2}
LEFT_OUT = dict.fromkeys((name.replace("-", "_") for name in command.SIZES), None)  # a resumed run knows its own


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return command.make_text(tmp_path)


def arguments(text: Path | None, **options: object) -> list[str]:
    return command.arguments(text, **{"model": "awd"} | options)


def train(tmp_path: Path, text: Path | None, name: str = "log", **options: object) -> dict:
    """Runs the command in this process and returns its log."""
    log = tmp_path / f"{name}.json"
    assert main(arguments(text, log=log, **options)) == 0
    return command.read_log(log)


def refuse(run: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command line, checks that it is refused in one line, and returns it."""
    capsys.readouterr()
    assert main(run) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("fused-lstm: ")
    assert errors.count("\n") == 1
    assert "; " in errors  # cause; remedy
    return errors


def flatten(value: object) -> object:
    """Nested containers with their tensors as lists, which compare by value."""
    if isinstance(value, dict):
        return {key: flatten(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def without_speed(log: dict) -> dict:
    for learner in log["learners"].values():
        learner.pop("characters_per_second", None)
        learner.pop("words_per_second", None)
    return log


def test_run_learns_and_reports(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By characters: from that of an even guess to less than two thirds of the unigram entropy."""
    sizes = {"hidden_size": 24, "embedding_size": 12, "steps": 300, "validate_every": 100, "sequence_length": 16}
    log = train(tmp_path, text, level="char", seed=1, alpha=0.1, beta=0.1, **sizes, **GENTLE)
    learner = log["learners"][OURS]
    assert learner["losses"][0] == pytest.approx(math.log(len(log["text"]["vocabulary"])), rel=0.05)
    assert learner["validation_bits"][-1] < 0.65 * log["unigram_bits"]
    assert len(learner["losses"]) == 300
    assert log["validation_steps"] == [100, 200, 300]
    assert log["text"]["unit"] == "character"
    shown = capsys.readouterr().out
    assert "embedding 12, AWD-LSTM 2 × 24" in shown
    assert "(bits per character)" in shown
    assert "perplexity" not in shown


def test_defaults_of_the_command(tmp_path: Path, text: Path) -> None:
    """A run without an option has those of its model, and a longer text than a test's."""
    only_sizes = {"model": "awd", "min_count": 1}
    options = train(tmp_path, text, **only_sizes)["options"]
    given = {name.replace("-", "_"): value for name, value in command.SIZES.items() if name != "sample-length"}
    expected = vars(DEFAULTS["awd"]) | given | only_sizes | {"text": str(text)}
    assert options == expected
    assert options["level"] == "word"
    assert vars(DEFAULTS["lstm"]) == vars(TrainingOptions())


SWITCH = {"non_monotone": 0, "validate_every": 5, "learning_rate": 60.0, "seed": 3}


@pytest.mark.parametrize("stop", [5, 30, 45], ids=lambda step: f"stopped at {step}")
@pytest.mark.parametrize(
    "options",
    [{}, {"level": "char", "dtype": "float64", "num_layers": 1}, {"dtype": "bfloat16"}, {"dtype": "float16"}],
    ids=["words", "float64 characters", "bfloat16", "float16"],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, text: Path, options: dict, stop: int) -> None:
    """Dropout, lengths, weights, averages, the trigger and the carried state; the text ends again and again."""
    options = SWITCH | ({} if options.get("level") == "char" else {"min_count": 1}) | options
    whole = train(tmp_path, text, "whole", steps=50, checkpoint=tmp_path / "whole.pt", **options)
    switch = whole["learners"][OURS]["averaging_from"]
    assert 10 <= switch < 30  # so that runs stop before and after it
    train(tmp_path, text, "first", steps=stop, checkpoint=tmp_path / "parts.pt", **options)
    saved = torch.load(tmp_path / "parts.pt", weights_only=True)["training"]["learners"][OURS]
    assert saved["averaging_from"] == (switch if stop >= switch else None)
    resumed = LEFT_OUT | {"model": None, "sample_length": 20, "steps": 50, "resume": tmp_path / "parts.pt"}
    parts = train(tmp_path, None, "rest", **resumed)
    assert without_speed(parts) == without_speed(whole)
    end, other_end = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    assert flatten(end) == flatten(other_end)


def test_checkpoint_of_the_time_before_awd(tmp_path: Path, text: Path) -> None:
    """A run of the character model that was saved when there was no other model goes on."""
    plain = {"model": None, "dropout": 0.3}
    whole = train(tmp_path, text, "whole", steps=20, **plain)
    train(tmp_path, text, "first", steps=10, checkpoint=tmp_path / "old.pt", **plain)
    contents = torch.load(tmp_path / "old.pt", weights_only=True)
    later = "model level min_count input_dropout hidden_dropout embedding_dropout weight_dropout"
    for name in [*later.split(), "alpha", "beta", "weight_decay", "non_monotone"]:
        del contents["options"][name]
    assert set(contents["training"]) == {"step", "position", "validation_steps", "learners", "generators"}
    names = {"model", "optimizer", "scaler", "state", "losses", "validation_losses"}
    assert set(contents["training"]["learners"][OURS]) == names
    assert set(contents["training"]["generators"]) == {"cpu", "cuda"}
    torch.save(contents, tmp_path / "old.pt")
    rest = train(tmp_path, None, "rest", resume=tmp_path / "old.pt", **LEFT_OUT | {"model": None, "steps": 20})
    assert rest["learners"][OURS]["losses"] == whole["learners"][OURS]["losses"]


def test_resumed_run_takes_new_rates(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "a.pt"
    train(tmp_path, text, steps=5, checkpoint=path, min_count=1)
    new = {"learning_rate": 1e-30, "weight_decay": 0.5, "weight_dropout": 0.0, "alpha": 0.0, "dropout": 0.0}
    resumed = LEFT_OUT | {"model": None, "resume": path, "steps": 15}
    frozen = train(tmp_path, None, "frozen", **resumed, **new, backend="torch")  # which can drop no weights
    bits = frozen["learners"][OURS]["validation_bits"]
    assert bits[0] == bits[1] == bits[2]
    assert frozen["backend"]["name"] == "torch"
    contents = torch.load(path, weights_only=True)
    assert {name: contents["options"][name] for name in new} == new
    (group,) = contents["training"]["learners"][OURS]["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.5


def test_seed_decides_everything(tmp_path: Path, text: Path) -> None:
    logs = [train(tmp_path, text, f"log{i}", seed=seed, min_count=1) for i, seed in enumerate((3, 3, 4))]
    first, again, other = (without_speed(log) for log in logs)
    assert first == again
    assert first["learners"] != other["learners"]


def test_switch_is_shown(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(report, "Console", lambda **options: Console(width=200, **options))
    plot = tmp_path / "plot.png"
    log = train(tmp_path, text, steps=50, plot=plot, min_count=1, **SWITCH)
    lines = capsys.readouterr().out.splitlines()
    (index,) = [index for index, line in enumerate(lines) if line.startswith("weights are averaged from here on")]
    assert lines[index - 1].split()[0] == str(log["learners"][OURS]["averaging_from"])
    assert struct.unpack(">II", plot.read_bytes()[16:24]) == (1200, 675)


def test_sample_is_of_the_averages(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "run.pt"
    log = train(tmp_path, text, steps=50, checkpoint=path, min_count=1, **SWITCH)
    assert log["learners"][OURS]["averaging_from"] < 45
    begun = Checkpoint.load(path)
    corpus = make_corpus(begun.options)
    training = Training(begun.options, corpus, torch.device("cpu"))
    training.load_state_dict(begun.training)
    prompt, seed = corpus.validation[: begun.options.sequence_length], begun.options.seed
    assert corpus.decode(sample(training.model, prompt, 20, seed=seed)) != log["sample"]
    with training.learners[OURS].result():
        assert corpus.decode(sample(training.model, prompt, 20, seed=seed)) == log["sample"]


def test_options_reach_the_run(tmp_path: Path, text: Path) -> None:
    """Each of them changes the numbers, or the file that is kept."""
    base = train(tmp_path, text, min_count=1)
    changes = [
        *({name: 0.0} for name in ("input_dropout", "hidden_dropout", "embedding_dropout", "weight_dropout")),
        *({name: 0.0} for name in ("dropout", "alpha", "beta")),
        {"weight_decay": 0.1},
        {"clip": 0.01},
        {"min_count": 300},
    ]
    for change in changes:
        log = train(tmp_path, text, **{"min_count": 1} | change)
        assert log["learners"][OURS]["losses"] != base["learners"][OURS]["losses"], change
    tied = train(tmp_path, text, tied=True, min_count=1)  # it always is
    assert tied["learners"][OURS]["losses"] == base["learners"][OURS]["losses"]


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
def test_backend_is_passed_through(tmp_path: Path, text: Path, backend: str, monkeypatch) -> None:
    made = []
    make = fused_lstm.LSTM.__init__

    def record(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(kwargs["backend"])

    monkeypatch.setattr(fused_lstm.LSTM, "__init__", record)
    short = {"steps": 2, "sequence_length": 5, "min_count": 1, "validation_fraction": 0.02, "sample_length": 0}
    log = train(tmp_path, text, backend=backend, **short)
    assert made == [backend] * 2
    assert log["backend"] == {"name": backend, "reason": "asked for by backend="}


def test_sizes_of_two_layers_may_have_two_backends(tmp_path: Path, text: Path, monkeypatch) -> None:
    def select(_, *, hidden_size, options, **__):
        assert options == ("weight_dropout",)
        return fused_lstm.BackendChoice("persistent" if hidden_size == 6 else "stepwise", f"it has {hidden_size}")

    monkeypatch.setattr("fused_lstm.bench.preparation.select_backend", select)
    log = train(tmp_path, text, min_count=1)
    assert log["backend"] == {"name": "stepwise, persistent", "reason": "H=10: it has 10; H=6: it has 6"}
    log = train(tmp_path, text, min_count=1, num_layers=1)
    assert log["backend"] == {"name": "persistent", "reason": "it has 6"}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"model": "gru"}, "--model is gru; give one of lstm, awd"),
        ({"level": "syllable"}, "--level is syllable; give one of char, word"),
        ({"level": "char", "min_count": 3}, "--min-count is of --level word; leave it out, or give --level word"),
        ({"min_count": 0}, "--min-count is 0; give a whole number from 1"),
        ({"compare": True}, "--compare is of --model lstm; leave it out, or give --model lstm"),
        ({"model": "lstm", "weight_dropout": 0.5}, "--weight-dropout is of --model awd; leave it out, or give"),
        ({"model": "lstm", "non_monotone": 3}, "--non-monotone is of --model awd"),
        ({"model": "lstm", "weight_decay": 0.1}, "--weight-decay is of --model awd"),
        *(({name: 1.5}, f"--{name.replace('_', '-')} is 1.5; give a rate from 0 to 1") for name in GENTLE),
        ({"alpha": -1}, "--alpha is -1.0; give a number of at least 0"),
        ({"beta": "inf"}, "--beta is inf"),
        ({"weight_decay": "nan"}, "--weight-decay is nan"),
        ({"non_monotone": -1}, "--non-monotone is -1; give a whole number from 0"),
        ({"backend": "torch"}, "backend 'torch' cannot run this: torch.nn.LSTM knows no weight_dropout; leave"),
        ({"batch_size": 400}, "is too short: "),
    ],
    ids=lambda value: " ".join(f"{name}={v}" for name, v in value.items()) if isinstance(value, dict) else "",
)
def test_refusals(text: Path, capsys: pytest.CaptureFixture[str], options: dict, cause: str) -> None:
    assert cause in refuse(arguments(text, **options), capsys)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"model": "lstm"}, "was trained with --model awd, not lstm; leave --model out"),
        ({"level": "char"}, "was trained with --level word, not char"),
        ({"min_count": 4}, "was trained with --min-count 1, not 4"),
        ({"non_monotone": 2}, "was trained with --non-monotone 5, not 2"),
        ({"compare": True}, "was trained without --compare"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_run(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], options: dict, cause: str
) -> None:
    path = tmp_path / "run.pt"
    train(tmp_path, text, steps=2, checkpoint=path, min_count=1)
    resumed = LEFT_OUT | {"model": None, "resume": path, "steps": 9} | options
    assert cause in refuse(arguments(text, **resumed), capsys)


def test_damaged_checkpoint(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "run.pt", tmp_path / "other.pt"
    train(tmp_path, text, steps=2, checkpoint=path, min_count=1)
    for spoil in (
        lambda training: training["generators"].pop("lengths"),
        lambda training: training["generators"].update(lengths=torch.zeros(3, dtype=torch.uint8)),
        lambda training: training["learners"][OURS].pop("averaging_from"),
        lambda training: training["learners"][OURS]["optimizer"].pop("param_groups"),
        lambda training: training["learners"][OURS].update(state=3),
    ):
        contents = torch.load(path, weights_only=True)
        spoil(contents["training"])
        torch.save(contents, other)
        run = arguments(None, **LEFT_OUT | {"model": None, "resume": other, "steps": 9})
        assert f"{other} is damaged, or no checkpoint of fused-lstm train" in refuse(run, capsys)


def test_help_names_both_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERMINAL_WIDTH", "500")
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    awd = DEFAULTS["awd"]
    assert "Options of --model awd" in shown
    assert f"Default: 0.008; awd: {awd.learning_rate} (its paper: 30.0)." in shown
    assert f"Default: 128; awd: {awd.hidden_size} (its paper: 1150)." in shown
    assert f"Default: 2; awd: {awd.num_layers} (its paper: 3)." in shown
    assert f"Default: 1.0; awd: {awd.clip}." in shown
    assert f"Default: char; awd: {awd.level}." in shown
    assert f"Dropout rate on the hidden-to-hidden weights. Default: {awd.weight_dropout}" in shown
