"""The parts of a training run against computations of their own: text, model, updates, the walk through the text."""

import functools
import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm.bench.char_model import CharModel, sample
from fused_lstm.bench.corpus import Corpus, columns, read_text
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.options import TrainingOptions
from fused_lstm.bench.record import as_json, collect
from fused_lstm.bench.training import OURS, Training

CPU = torch.device("cpu")
TEXT = "".join(f"{a}{b}, " for a, b in itertools.product("abcdefgh", "αβγ"))  # 96 characters
SIZES = {"embedding_size": 5, "hidden_size": 7, "batch_size": 3, "sequence_length": 6, "validation_fraction": 0.25}
FROZEN = 1e-30  # a learning rate that changes no float32


def make_corpus() -> Corpus:
    return Corpus.from_text("a text", TEXT, validation_fraction=0.25)


def make_training(**options: object) -> Training:
    return Training(TrainingOptions(**SIZES | options), make_corpus(), CPU)


def make_model(**sizes: object) -> CharModel:
    defaults = {"vocabulary_size": 11, "embedding_size": 5, "hidden_size": 7, "num_layers": 2}
    return CharModel(nn.LSTM, **defaults | sizes)


def test_corpus_is_the_text_in_two_parts() -> None:
    corpus = make_corpus()
    assert corpus.vocabulary == "".join(sorted(set(TEXT)))
    assert corpus.decode(corpus.training) == TEXT[:72]
    assert corpus.decode(corpus.validation) == TEXT[72:]


def test_corpus_holds_any_character() -> None:
    text = "a\0\n\u00df\u4e2d\U0001f600" * 2
    corpus = Corpus.from_text("odd", text, validation_fraction=0.5)
    assert corpus.vocabulary == "\0\na\u00df\u4e2d\U0001f600"
    assert corpus.decode(torch.cat([corpus.training, corpus.validation])) == text


def test_unigram_entropy_by_hand() -> None:
    # Training "aaab": a has 3 + 1 of 4 + 3 counts, b 1 + 1, and c, which it never saw, 0 + 1.
    corpus = Corpus.from_text("small", "aaababcc", validation_fraction=0.5)
    expected = -(math.log2(4 / 7) + math.log2(2 / 7) + 2 * math.log2(1 / 7)) / 4
    assert corpus.unigram_bits() == pytest.approx(expected, rel=1e-12)
    assert Corpus.from_text("one", "aaaa", validation_fraction=0.5).unigram_bits() == 0


def test_columns_are_stretches_of_the_text() -> None:
    laid_out = columns(torch.arange(11), 3)
    assert laid_out.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_read_text_as_characters(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nnoir\n")
    assert read_text(path) == "café\nnoir\n"


@pytest.mark.parametrize("tied", [False, True])
def test_model_is_embedding_lstm_output(tied: bool) -> None:
    torch.manual_seed(0)
    model = make_model(embedding_size=7, tied=tied)
    input, state = torch.randint(11, (6, 3)), tuple(torch.randn(2, 2, 3, 7))
    logits, new_state = model(input, state)
    output, expected_state = model.lstm(model.embedding.weight[input], state)
    weight = model.embedding.weight if tied else model.output.weight
    torch.testing.assert_close(logits, output @ weight.T + model.output.bias)
    torch.testing.assert_close(new_state, expected_state, rtol=0, atol=0)
    matrices = sum(parameter.shape == (11, 7) for parameter in model.parameters())
    assert matrices == (1 if tied else 2)
    with pytest.raises(ValueError, match="got 5 and 7"):
        make_model(tied=True)


def test_dropout_acts_before_between_and_after_the_layers() -> None:
    torch.manual_seed(0)
    model = make_model(dropout=1.0)
    logits, _ = model(torch.randint(11, (6, 3)))
    torch.testing.assert_close(logits, model.output.bias.expand(6, 3, 11))
    assert model.lstm.dropout == 1.0
    first, second = model(torch.zeros(6, 1, dtype=torch.int64)), model(torch.ones(6, 1, dtype=torch.int64))
    torch.testing.assert_close(first[1], second[1])  # the LSTM sees no embedding
    model.eval()
    assert not torch.allclose(model(torch.zeros(6, 1, dtype=torch.int64))[0], logits[:, :1])


def test_sample_follows_the_model() -> None:
    model = make_model()
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(torch.tensor([0.0] * 9 + [math.log(3) + 50, 50]))
    generator_state = torch.get_rng_state()
    written = sample(model, torch.tensor([1, 2]), 400, seed=0)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert set(written.tolist()) == {9, 10}
    assert (written == 9).float().mean().item() == pytest.approx(0.75, abs=0.07)  # three standard deviations
    assert model.training


def test_sample_is_free_of_dropout() -> None:
    torch.manual_seed(0)
    plain, dropping = make_model(), make_model(dropout=1.0)
    nn.init.normal_(plain.output.weight, std=30.0)
    dropping.load_state_dict(plain.state_dict())
    written = sample(plain, torch.tensor([1]), 50, seed=0)
    assert torch.equal(sample(dropping, torch.tensor([1]), 50, seed=0), written)
    plain.output.weight.data.zero_()
    assert not torch.equal(sample(plain, torch.tensor([1]), 50, seed=0), written)


def test_sample_reads_what_it_has_written() -> None:
    # An output that looks at the last input alone: after character k comes k + 1.
    class Successor(CharModel):
        def forward(self, input, state=None):
            seen = torch.zeros(1) if state is None else state
            return 1000 * nn.functional.one_hot((input + 1) % 11, 11).float(), seen + len(input)

    model = Successor(nn.LSTM, vocabulary_size=11, embedding_size=5, hidden_size=7, num_layers=1)
    assert sample(model, torch.tensor([4, 8]), 5, seed=0).tolist() == [9, 10, 0, 1, 2]


def test_losses_are_those_of_one_walk_with_a_carried_state() -> None:
    training = make_training(learning_rate=FROZEN)
    corpus = make_corpus()
    # 72 characters in 3 columns of 24: windows of 6 start at 0, 6, 12; the fourth would lack its last target.
    text = corpus.training.view(3, 24).t()
    with torch.no_grad():
        logits, _ = training.model(text[:18])
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), text[1:19], reduction="none")
    expected = losses.view(3, 6, 3).mean(dim=(1, 2)).tolist()
    for _ in range(7):
        training.advance()
    walked = training.learners[OURS].losses
    assert walked == pytest.approx(expected * 2 + expected[:1], rel=1e-5)
    assert len({round(loss, 6) for loss in expected}) == 3


@pytest.mark.parametrize("sequence_length", [1, 4, 7, 100])
def test_validation_is_one_walk_at_any_length(sequence_length: int) -> None:
    training = make_training(dropout=0.5)
    text = make_corpus().validation.view(3, 8).t()
    training.model.eval()
    with torch.no_grad():
        logits, _ = training.model(text[:-1])
    training.model.train()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten()).item()
    learner = training.learners[OURS]
    assert learner.evaluate(text.contiguous(), sequence_length) == pytest.approx(expected, rel=1e-5)
    assert training.model.training


def test_update_is_adam_on_the_clipped_gradient() -> None:
    training = make_training(learning_rate=0.01, clip=0.05, dtype="float64")
    model = make_training(dtype="float64").model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    text = make_corpus().training.view(3, 24).t()
    state = None
    for start in (0, 6, 12):
        logits, state = model(text[start : start + 6], state)
        state = fused_lstm.detach_state(state)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), text[start + 1 : start + 7].flatten()).backward()
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        assert norm > 0.05
        for parameter in model.parameters():
            parameter.grad *= 0.05 / norm
        optimizer.step()
        training.advance()
    for actual, expected in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_compute_in_half_and_keep_float32(dtype: str) -> None:
    seen = []
    half = make_training(dtype=dtype, backend="reference", clip=0.05)
    half.model.lstm.register_forward_hook(lambda *call: seen.append(call[2][0].dtype))
    full = make_training(backend="reference", clip=0.05)
    for _ in range(6):
        half.advance()
        full.advance()
    half.validate()
    assert set(seen) == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half.learners[OURS].scaler.is_enabled() == (dtype == "float16")
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in half.model.parameters()))
    assert norm == pytest.approx(0.05, rel=1e-3)  # clipped after the loss's scale is taken out again
    losses, exact = half.learners[OURS].losses, full.learners[OURS].losses
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.01)


def test_validation_comes_in_its_turn_and_at_the_end() -> None:
    training = make_training(steps=5, validate_every=2)
    while True:
        if training.validation_due:
            training.validate()
            assert not training.validation_due
        if training.done:
            break
        training.advance()
    assert training.validation_steps == [2, 4, 5]
    assert len(training.learners[OURS].validation_losses) == 3


def test_speed_is_that_of_the_median_step() -> None:
    training = make_training()
    training.learners[OURS].seconds = [9.0, 0.5, 0.25, 0.5, 0.5]
    assert training.characters_per_second() == {OURS: 3 * 6 / 0.5}


def test_ctrl_c_waits_for_the_end_of_an_update() -> None:
    training = make_training(compare=True)
    training.model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            training.advance()
    finally:
        signal.signal(signal.SIGINT, previous)
    undisturbed = make_training(compare=True)
    undisturbed.advance()
    assert training.step == 1
    assert all(map(torch.equal, training.model.parameters(), undisturbed.model.parameters()))
    expected = undisturbed.learners[OURS].losses
    assert [learner.losses for learner in training.learners.values()] == [expected, expected]
    assert training.state_dict()["position"] == 6


def test_record_is_in_the_units_it_names() -> None:
    training, corpus = make_training(steps=2), make_corpus()
    training.advance()
    training.advance()
    training.validate()
    learner = training.learners[OURS]
    record = collect(training, corpus, fused_lstm.BackendChoice("torch", "because"), "a sample")
    assert record["learners"][OURS]["losses"] == learner.losses
    assert record["learners"][OURS]["validation_bits"] == [learner.validation_losses[0] / math.log(2)]
    assert record["backend"] == {"name": "torch", "reason": "because"}
    assert json.loads(as_json(record)) == record


def test_infinite_loss_ends_the_run() -> None:
    training = make_training()
    nn.init.constant_(training.model.output.bias, math.inf)
    for step in (training.advance, training.validate):
        with pytest.raises(UserError, match="the loss of fused_lstm is nan after 1 steps; lower --learning-rate"):
            step()
    assert training.validation_steps == []


def test_comparison_starts_from_the_same_weights() -> None:
    training = make_training(compare=True, tied=True, embedding_size=7)
    torchs, ours = (learner.model for learner in training.learners.values())
    assert type(torchs.lstm) is nn.LSTM
    assert type(ours.lstm) is fused_lstm.LSTM
    for (name, theirs), (our_name, mine) in zip(torchs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == our_name
        assert torch.equal(theirs, mine)
        assert theirs is not mine
    assert torchs.output.weight is torchs.embedding.weight
    alone = make_training(tied=True, embedding_size=7)
    assert all(map(torch.equal, ours.parameters(), alone.model.parameters()))


def test_training_needs_a_text_of_its_size() -> None:
    make = functools.partial(Training, corpus=make_corpus(), device=CPU)
    make(TrainingOptions(**SIZES | {"sequence_length": 23}))
    with pytest.raises(UserError, match="72 characters for training, 75 needed"):
        make(TrainingOptions(**SIZES | {"sequence_length": 24}))
