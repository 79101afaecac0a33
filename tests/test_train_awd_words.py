"""A text in words: how it is split, which words have an index of their own, and what a run on words makes of it."""

import math
from collections import Counter
from pathlib import Path

import command
import pytest
import torch

from fused_lstm.bench import words
from fused_lstm.bench.cli import main
from fused_lstm.bench.corpus import Corpus
from fused_lstm.bench.errors import UserError

TEXT = "the cat sat\n\nthe  dog\tsat on the mat\nthe end\n"
SPLIT = ["the", "cat", "sat", "<eos>", "<eos>", "the", "dog", "sat", "on", "the", "mat", "<eos>", "the", "end", "<eos>"]


def make_corpus(text: str = TEXT, fraction: float = 0.2, min_count: int = 2) -> Corpus:
    return Corpus.from_words("a text", text, validation_fraction=fraction, min_count=min_count)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, SPLIT),
        (TEXT.removesuffix("\n"), SPLIT),
        ("one", ["one", "<eos>"]),
        ("\n\n", ["<eos>", "<eos>"]),
        ("a\u2028b c\x0bd\n", ["a", "b", "c", "d", "<eos>"]),  # spaces of a kind, but no ends of a line
        ("", []),
    ],
    ids=["lines", "no last end", "one word", "empty lines", "odd spaces", "nothing"],
)
def test_split(text: str, expected: list[str]) -> None:
    assert words.split(text) == expected


def test_join_is_what_split_takes_apart() -> None:
    joined = words.join(SPLIT)
    assert joined == "the cat sat\n\nthe dog sat on the mat\nthe end\n"
    assert words.split(joined) == SPLIT
    assert words.join(["in", "a<eos>b", "line"]) == "in a<eos>b line"
    assert words.join([]) == ""


def test_vocabulary_is_of_the_frequent_words() -> None:
    assert words.vocabulary(SPLIT, 1) == ["<unk>", "<eos>", "the", "sat", "cat", "dog", "end", "mat", "on"]
    assert words.vocabulary(SPLIT, 2) == ["<unk>", "<eos>", "the", "sat"]
    assert words.vocabulary(SPLIT, 5) == ["<unk>", "<eos>"]
    marked = ["<unk>", "<unk>", "a", "<eos>"]  # a text that was prepared already, as the Penn Treebank
    assert words.vocabulary(marked, 1) == ["<unk>", "<eos>", "a"]
    assert words.indices(marked, ["<unk>", "<eos>", "a"]).tolist() == [0, 0, 2, 1]


def test_corpus_knows_words_of_its_training_part_alone() -> None:
    corpus = make_corpus()
    assert len(SPLIT) == 15
    assert corpus.vocabulary == ["<unk>", "<eos>", "the", "sat"]  # of the first 12
    assert corpus.training.tolist() == [2, 0, 3, 1, 1, 2, 0, 3, 0, 2, 0, 1]
    assert corpus.validation.tolist() == [2, 0, 1]
    assert corpus.training.dtype == corpus.validation.dtype == torch.int64
    assert corpus.decode(corpus.validation) == "the <unk>\n"
    assert (corpus.level, corpus.unit) == ("word", "word")
    assert make_corpus(fraction=0.8).vocabulary == ["<unk>", "<eos>"]


def test_unigram_entropy_by_hand() -> None:
    # Training holds <unk> 4, <eos> 3, the 3, sat 2 of 12; with one more each, of 16.
    expected = -(math.log2(4 / 16) + math.log2(5 / 16) + math.log2(4 / 16)) / 3
    assert make_corpus().unigram_bits() == pytest.approx(expected, rel=1e-12)


def test_refusals_speak_of_words() -> None:
    with pytest.raises(UserError, match="a text is empty"):
        make_corpus("")
    with pytest.raises(UserError, match="a text is too short: 12 words for training, 14 needed"):
        make_corpus().require_length(2, 6)


@pytest.mark.parametrize("model", ["lstm", "awd"])
def test_run_on_words(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, log = command.make_text(tmp_path), tmp_path / "log.json"
    options = {"level": "word", "model": model, "min_count": 50, "validation_fraction": 0.25}
    assert main(command.arguments(text, log=log, plot=tmp_path / "plot.png", **options)) == 0
    found = command.read_log(log)
    tokens = words.split(text.read_text(encoding="utf-8"))
    front = tokens[: len(tokens) - round(len(tokens) / 4)]
    counts = Counter(front)
    often = {word for word, count in counts.items() if count >= 50}
    assert 0 < len(often) < len(counts)
    assert found["text"]["unit"] == "word"
    assert set(found["text"]["vocabulary"]) == often | {"<unk>", "<eos>"}
    assert found["text"]["words"] == len(tokens)
    assert found["text"]["validation_words"] == len(tokens) - len(front)
    learner = found["learners"]["fused_lstm"]
    assert learner["losses"][0] == pytest.approx(math.log(len(found["text"]["vocabulary"])), rel=0.15)
    assert learner["words_per_second"] > 0
    assert "characters_per_second" not in learner
    assert len(words.split(found["sample"])) in (20, 21)  # it may end within a line, which split ends
    assert set(found["sample"].split()) <= often | {"<unk>"}
    shown = capsys.readouterr().out
    assert "(bits per word)" in shown
    assert f"{len(found['text']['vocabulary'])} distinct words, {len(front):,} to train on" in shown
    assert f"validation perplexity {2 ** learner['validation_bits'][-1]:,.1f}" in shown
    assert "character" not in shown
