"""The parts of a training of the AWD-LSTM against computations of their own: lengths, walk, updates, averages."""

import io
import itertools
import math
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fused_lstm
from fused_lstm.bench.char_model import sample
from fused_lstm.bench.corpus import Corpus
from fused_lstm.bench.learners import OURS
from fused_lstm.bench.lengths import RandomLengths
from fused_lstm.bench.options import default_options
from fused_lstm.bench.training import Training
from fused_lstm.bench.walk import Walk

CPU = torch.device("cpu")
TEXT = "".join(f"{a}{b}, " for a, b in itertools.product("abcdefgh", "αβγ")) * 5  # 480 characters, 360 to train on
SIZES = {"embedding_size": 5, "hidden_size": 7, "num_layers": 2, "batch_size": 3, "sequence_length": 12}
OFF = dict.fromkeys(("dropout", "input_dropout", "hidden_dropout", "embedding_dropout", "weight_dropout"), 0.0)


def make_training(**options: object) -> Training:
    chosen = default_options("awd", **SIZES | {"level": "char", "min_count": 2} | options)
    chosen.check()
    return Training(chosen, Corpus.from_text("a text", TEXT, validation_fraction=0.25), CPU)


def columns() -> torch.Tensor:
    """The training part as a walk sees it, 120 rows of 3."""
    corpus = Corpus.from_text("a text", TEXT, validation_fraction=0.25)
    return corpus.training.view(3, 120).t()


def script(training: Training, monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Lets the validations find these losses."""
    scripted = iter(losses)
    monkeypatch.setattr(training.learners[OURS], "evaluate", lambda *_: next(scripted))


def weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


@pytest.mark.parametrize("nominal", [70, 71, 12, 3])
def test_lengths_by_the_formula(nominal: int) -> None:
    lengths = RandomLengths(nominal, seed=5)
    generator = torch.Generator().manual_seed(5)
    untouched = torch.get_rng_state()
    for _ in range(300):
        mean = nominal if torch.rand((), generator=generator).item() < 0.95 else nominal / 2
        drawn = mean + 5 * torch.randn((), generator=generator).item()
        if abs(drawn - round(drawn)) < 1e-4:  # a rounding error may cross the whole number
            assert abs(lengths() - max(5, drawn)) < 2
        else:
            assert lengths() == max(5, int(drawn))
    assert torch.equal(torch.get_rng_state(), untouched)


def test_lengths_as_a_crowd() -> None:
    lengths = RandomLengths(70, seed=0)
    drawn = torch.tensor([lengths() for _ in range(20_000)], dtype=torch.float64)
    halved, near = drawn[drawn < 52], drawn[drawn >= 52]
    # the borders lie more than 3.4 standard deviations away; of 20,000, five of a mean's are as given
    assert len(halved) / len(drawn) == pytest.approx(0.05, abs=0.008)
    assert near.mean().item() == pytest.approx(69.5, abs=0.2)  # a number without its fraction is lower by a half
    assert near.std().item() == pytest.approx(5, abs=0.15)
    assert halved.mean().item() == pytest.approx(34.5, abs=0.9)
    short = RandomLengths(7, seed=0)
    assert min(short() for _ in range(1000)) == 5


def test_lengths_go_on_from_a_state() -> None:
    lengths = RandomLengths(70, seed=0)
    state = [lengths() for _ in range(5)] and lengths.get_state()
    expected = [lengths() for _ in range(5)]
    other = RandomLengths(70, seed=1)
    other.set_state(state)
    assert [other() for _ in range(5)] == expected
    assert [RandomLengths(70, seed=1)() for _ in range(5)] != expected


@pytest.mark.parametrize(
    ("drop_last", "expected"),
    [(False, [(0, 4), (4, 8), (8, 10), (0, 4)]), (True, [(0, 4), (4, 8), (0, 4), (4, 8)])],
    ids=["whole text", "drop last"],
)
def test_walk_begins_anew(drop_last: bool, expected: list[tuple[int, int]]) -> None:
    text = torch.arange(11)[:, None]
    walk = Walk(text, 4, drop_last=drop_last)
    for start, end in expected:
        assert walk.position in (start, 8, 10)  # it has not turned round yet
        with walk.chunk() as chunk:
            assert (chunk.state is None) == (start == 0)
            input, target = chunk.data
            assert input.flatten().tolist() == list(range(start, end))
            assert target.flatten().tolist() == list(range(start + 1, end + 1))
            chunk.state = [torch.full((1,), float(end))]
        assert walk.position == end
        assert walk.state == [end]
    for position in (0, 4, 8, 9, 10):  # another walk goes on from there as this one would
        other = Walk(text, 4, drop_last=drop_last)
        other.begin(position, torch.zeros(1))
        with other.chunk() as chunk:
            begun_anew = position == 10 or (position >= 8 and drop_last)
            assert chunk.data[0][0] == (0 if begun_anew else position)
            assert (chunk.state is None) == begun_anew
            chunk.state = None


def test_rate_follows_the_length() -> None:
    training = make_training(learning_rate=0.5)
    seen = []
    training.model.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    rates = []
    optimizer = training.learners[OURS].optimizer
    optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    for _ in range(25):
        training.advance()
    lengths, expected, position = RandomLengths(12, seed=0), [], 0
    while len(expected) < 25:
        expected.append(min(lengths(), 119 - position))
        position = (position + expected[-1]) % 119
    assert seen == expected
    assert len(set(seen)) > 5
    assert rates == [[0.5 * size / 12] for size in seen]
    assert 119 in itertools.accumulate(seen)  # the last chunk of a pass ends where the text does


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_update_is_sgd_on_the_clipped_gradient(alpha: float) -> None:
    """Through more than a pass of the text, by a loop of its own."""
    options = {"dtype": "float64", "learning_rate": 3.0, "clip": 0.05, "weight_decay": 0.01, "alpha": alpha, **OFF}
    training, twin = make_training(**options), make_training(**options).model
    text, lengths = columns(), RandomLengths(12, seed=0)
    position, state, losses = 0, None, []
    for _ in range(14):
        size = min(lengths(), 119 - position)
        logits, state, raw, dropped = twin(text[position : position + size], state)
        state = fused_lstm.detach_state(state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[position + 1 : position + 1 + size].flatten())
        losses.append(loss.item())
        objective = loss + alpha * dropped[-1].square().mean()
        if size > 1:
            objective = objective + (raw[-1][1:] - raw[-1][:-1]).square().mean()
        parameters = list(twin.parameters())
        gradients = torch.autograd.grad(objective, parameters)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        assert norm > 0.05
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 3.0 * size / 12 * (gradient * 0.05 / (norm + 1e-6) + 0.01 * parameter)  # as torch clips
        position += size
        if position == 119:
            position, state = 0, None
        training.advance()
    assert position < 60  # in the second pass
    assert training.learners[OURS].losses == pytest.approx(losses, rel=1e-9)
    for actual, expected in zip(training.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_rates_reach_the_model() -> None:
    names = ("dropout", "input_dropout", "hidden_dropout", "embedding_dropout", "weight_dropout")
    model = make_training(**{name: index / 10 for index, name in enumerate(names, 1)}, backend="reference").model
    modules = model.dropout, model.input_dropout, model.hidden_dropout, model.embedding
    assert [module.p for module in modules] == [0.1, 0.2, 0.3, 0.4]
    assert [(layer.weight_dropout, layer.backend) for layer in model.layers] == [(0.5, "reference")] * 2
    assert model.decoder.weight is model.embedding.embedding.weight
    assert [(layer.input_size, layer.hidden_size) for layer in model.layers] == [(5, 7), (7, 5)]


# The best of all but the last n is what a loss must not exceed; None: they never do.
RULE = [
    (0, [3, 2, 1, 2], 4),
    (0, [3, 3, 3], None),
    (1, [3, 2, 2.5, 1.9], None),
    (1, [3, 2, 2.5, 2.1, 1.0], 4),
    (2, [1, 9, 9, 2], 4),
    (2, [1, 9, 9], None),
    (5, [1, 2, 3, 4, 5, 6, 7, 8], 7),
]


@pytest.mark.parametrize(("n", "losses", "switch"), RULE)
def test_averaging_begins_by_the_rule(monkeypatch, n: int, losses: list[float], switch: int | None) -> None:
    """And the averages are means of the weights after each later step, which go on as without them."""
    options = {"non_monotone": n, "validate_every": 3, "learning_rate": 1.0, **OFF}
    training, other = make_training(**options), make_training(**options)
    script(training, monkeypatch, losses)
    after = []
    for _ in losses:
        for _ in range(3):
            training.advance()
            after.append(weights(training))
            other.advance()
        assert training.validation_due
        training.validate()
    learner = training.learners[OURS]
    assert learner.validation_losses == losses
    assert training.validation_steps == [3 * count for count in range(1, len(losses) + 1)]
    begun = None if switch is None else 3 * switch
    assert learner.averaging_from == begun
    training.advance()
    other.advance()
    after.append(weights(training))
    assert all(map(torch.equal, after[-1], weights(other)))
    with learner.result():
        means = after[-1] if begun is None else [torch.stack(each).mean(0) for each in zip(*after[begun:], strict=True)]
        for actual, expected in zip(training.model.parameters(), means, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert all(map(torch.equal, after[-1], weights(training)))


def test_evaluation_and_sample_are_of_the_averages(monkeypatch) -> None:
    training = make_training(non_monotone=0, validate_every=4, learning_rate=5.0)
    with monkeypatch.context() as patch:
        script(training, patch, [1.0, 2.0])
        for step in range(12):
            training.advance()
            if step in (3, 7):
                training.validate()
    learner = training.learners[OURS]
    before = weights(training)
    averages = [learner.optimizer.state[parameter]["average"] for parameter in training.model.parameters()]
    training.validate()
    assert all(map(torch.equal, before, weights(training)))
    assert training.model.training

    twin = make_training().model
    with torch.no_grad():
        for parameter, average in zip(twin.parameters(), averages, strict=True):
            parameter.copy_(average)
    text = Corpus.from_text("a text", TEXT, validation_fraction=0.25).validation.view(3, 40).t()
    twin.eval()
    logits, *_ = twin(text[:-1])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), text[1:].flatten()).item()
    assert learner.validation_losses[-1] == pytest.approx(expected, rel=1e-5)
    own, *_ = training.model.eval()(text[:-1])
    assert abs(nn.functional.cross_entropy(own.flatten(0, 1), text[1:].flatten()).item() - expected) > 1e-3
    with learner.result():
        assert torch.equal(sample(training.model, text[0], 30, seed=0), sample(twin, text[0], 30, seed=0))


def test_evaluations_change_no_number_of_the_training() -> None:
    """With averages and without: the draws, the weights and the carried state are left alone."""
    trainings = []
    for often in (True, False):
        training = make_training(non_monotone=0, learning_rate=20.0)
        for _ in range(30):
            training.advance()
            if often:
                training.validate()
                assert training.model.training
        trainings.append(training)
    often, never = trainings
    assert often.learners[OURS].averaging_from < 20
    assert often.learners[OURS].losses == never.learners[OURS].losses
    assert all(map(torch.equal, weights(often), weights(never)))


@pytest.mark.parametrize("stop", [1, 9, 17, 33])
@pytest.mark.parametrize("options", [{}, {"dtype": "float16", "num_layers": 1}], ids=["float32", "float16"])
def test_goes_on_from_any_step(monkeypatch, options: dict, stop: int) -> None:
    """As a run does that Ctrl-C has ended between two validations; what it found is what it would have found."""

    def go_on(training: Training, end: int) -> None:
        while training.step < end:
            training.advance()
            if training.validation_due:
                training.validate()

    options = {"non_monotone": 1, "validate_every": 5, "learning_rate": 20.0} | options
    losses = [4.0, 3.0, 5.0, 6.0, 5.0, 7.0, 2.0, 3.0]  # averaging begins at step 15
    whole = make_training(**options)
    script(whole, monkeypatch, losses)
    go_on(whole, 40)
    first = make_training(**options)
    script(first, monkeypatch, losses)
    go_on(first, stop)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = make_training(**options, seed=1)  # of other weights, draws and lengths
    second.load_state_dict(torch.load(buffer, weights_only=True))
    script(second, monkeypatch, losses[len(second.validation_steps) :])
    go_on(second, 40)
    ours, theirs = whole.learners[OURS], second.learners[OURS]
    assert ours.averaging_from == theirs.averaging_from == 15
    assert ours.losses == theirs.losses
    assert ours.validation_losses == theirs.validation_losses
    assert whole.validation_steps == second.validation_steps
    with ours.result(), theirs.result():
        assert all(map(torch.equal, weights(whole), weights(second)))


@pytest.mark.parametrize("moment", ["swap in", "evaluation", "swap out"])
def test_ctrl_c_leaves_the_weights_in_their_place(monkeypatch, moment: str) -> None:
    training = make_training(non_monotone=0, learning_rate=5.0)
    script(training, monkeypatch, [1.0, 2.0])
    for _ in range(2):
        training.advance()
        training.validate()
    training.advance()
    monkeypatch.undo()
    learner = training.learners[OURS]
    before = weights(training)
    all_parameters = learner.optimizer._parameters

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def parameters_with_ctrl_c() -> Iterator[nn.Parameter]:
        for index, parameter in enumerate(all_parameters()):
            yield parameter
            if index == 0 and learner.optimizer.swapped == (moment == "swap out"):
                press()  # the first is exchanged, the others are not

    if moment == "evaluation":
        training.model.register_forward_hook(lambda *_: press())
    else:
        monkeypatch.setattr(learner.optimizer, "_parameters", parameters_with_ctrl_c)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            training.validate()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not learner.optimizer.swapped
    assert all(map(torch.equal, before, weights(training)))
    assert training.validation_steps == [1, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_keep_float32(dtype: str) -> None:
    half, full = (make_training(dtype=name, learning_rate=2.0, backend="reference") for name in (dtype, "float32"))
    seen = []
    half.model.layers[0].register_forward_hook(lambda *call: seen.append(call[2][0].dtype))
    for _ in range(8):
        half.advance()
        full.advance()
    half.validate()
    assert set(seen) == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    losses, exact = (training.learners[OURS].losses for training in (half, full))
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.02)


def test_speed_counts_each_length_for_itself(monkeypatch) -> None:
    """A step of half the length in half the time is as fast."""
    training = make_training()
    clock = iter([value for size in (12, 6, 18) for value in (0.0, size / 10)])
    monkeypatch.setattr("fused_lstm.bench.learner.time.perf_counter", lambda: next(clock))
    learner = training.learners[OURS]
    for size in (12, 6, 18):
        learner.step(columns()[:size], columns()[1 : size + 1], None)
    assert learner.seconds == pytest.approx([1.2] * 3)
    assert training.characters_per_second() == {OURS: pytest.approx(3 * 12 / 1.2)}
