"""AWDLSTM against the same model written once more, step by step, with the masks that it drew."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch

from fused_lstm import NTASGD, TruncatedBPTT
from fused_lstm.awd import AWDLSTM

V, E, H, L = 13, 4, 6, 3
T, N = 5, 2
RATES = {
    "dropout": 0.25,
    "hidden_dropout": 0.3,
    "input_dropout": 0.35,
    "embedding_dropout": 0.15,
    "weight_dropout": 0.45,
}
OFF = dict.fromkeys(RATES, 0.0)
models = pytest.mark.parametrize(
    "sizes",
    [{}, {"tie_weights": False}, {"num_layers": 1}, {"num_layers": 1, "tie_weights": False}, {"num_layers": 2}],
    ids=["tied", "untied", "one layer", "one layer untied", "two layers"],
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make(device):
    def make(**options) -> AWDLSTM:
        sizes = {"num_embeddings": V, "embedding_dim": E, "hidden_size": H, "num_layers": L}
        return AWDLSTM(**sizes | RATES | {"device": device, "dtype": torch.float64} | options)

    return make


@pytest.fixture
def words(device) -> torch.Tensor:
    return torch.randint(V, (T, N), device=device)


@pytest.fixture
def masks(monkeypatch) -> list[tuple[tuple[int, ...], float, torch.Tensor]]:
    """(shape, rate, mask) of every dropout from here on, in order; drawn here, of a generator of the test's own."""
    drawn = []
    generator = torch.Generator().manual_seed(1)

    def dropout(input, p=0.5, training=True, inplace=False):
        assert training
        assert not inplace
        kept = torch.rand(input.shape, generator=generator) >= p
        mask = kept.to(input) / (1 - p)
        drawn.append((tuple(input.shape), p, mask))
        return input * mask

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    return drawn


def lstm_layer(layer, x, state, weight_mask):
    """One layer of LSTM, a step after the other."""
    w_ih, w_hh, b_ih, b_hh = (getattr(layer, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, c = (part[0] for part in state)
    outputs = []
    for x_t in x:
        i, f, g, o = (x_t @ w_ih.T + b_ih + h @ (w_hh * weight_mask).T + b_hh).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), (h[None], c[None])


def rewritten(model, words, state, masks):
    """The whole model; masks in the order of the data: words, input, and W_hh and output of each layer."""
    masks = iter(masks)
    matrix = model.embedding.embedding.weight * next(masks)
    x = matrix[words] * next(masks)
    leaving, raw, dropped = [], [], []
    for layer, entering in zip(model.layers, state, strict=True):
        output, left = lstm_layer(layer, x, entering, next(masks))
        x = output * next(masks)
        raw.append(output)
        dropped.append(x)
        leaving.append(left)
    assert next(masks, None) is None
    return x @ model.decoder.weight.T + model.decoder.bias, leaving, raw, dropped


def layer_sizes(model) -> list[int]:
    return [layer.hidden_size for layer in model.layers]


def random_state(model, rows=N):
    like = model.decoder.bias
    return [tuple(torch.randn(2, 1, rows, size).to(like)) for size in layer_sizes(model)]


def zero_state(model):
    return [tuple(torch.zeros_like(part) for part in pair) for pair in random_state(model)]


def gradients(model, results, words) -> dict[str, torch.Tensor]:
    """Of a loss that every result has a part in."""
    logits, state, raw, dropped = results
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), words.flatten())
    loss = loss + AWDLSTM.regularization(raw, dropped, 2, 1) + sum(h.sum() + c.square().sum() for h, c in state)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@models
@pytest.mark.parametrize("carried", [False, True], ids=["from zeros", "from a state"])
def test_numbers_are_those_of_a_rewrite(make, words, masks, sizes, carried):
    model = make(**sizes)
    state = random_state(model) if carried else None
    found = model(words, state)
    expected = rewritten(model, words, state or zero_state(model), [mask for *_, mask in masks])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model, found, words), gradients(model, expected, words))


@models
def test_masks_are_no_larger_than_they_must_be(make, words, masks, sizes):
    """One number a word, one a row and feature for all steps, one a weight; nothing is drawn beside them."""
    model = make(**sizes)
    model(words)
    expected = [((V, 1), 0.15), ((1, N, E), 0.35)]
    for index, size in enumerate(layer_sizes(model)):
        last = index + 1 == len(model.layers)
        expected += [((4 * size, size), 0.45), ((1, N, size), 0.25 if last else 0.3)]
    assert [mask[:2] for mask in masks] == expected


def test_no_second_embedding_matrix_is_kept(make, words):
    model = make(num_embeddings=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(words)
    assert {x.data_ptr() for x in kept if x.numel() >= 1000 * E} == {model.decoder.weight.data_ptr()}


@models
def test_evaluation_drops_nothing(make, words, masks, sizes):
    model = make(**sizes).eval()
    state = random_state(model)
    found = model(words, state)
    assert masks == []
    ones = [torch.ones((), dtype=torch.float64, device=words.device)] * (2 + 2 * len(model.layers))
    torch.testing.assert_close(found, rewritten(model, words, state, ones))
    _, _, raw, dropped = found
    for pair in zip(raw, dropped, strict=True):
        assert torch.equal(*pair)
    twin = make(**sizes, **OFF)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.train()(words, state), found)
    assert masks == []


@pytest.mark.parametrize("name", RATES)
def test_each_rate_acts_in_its_place(make, words, name):
    """Alone and at 1: what must be lost is lost."""
    model = make(**OFF | {name: 1.0})
    logits, _, raw, dropped = model(words)
    bias = model.decoder.bias.expand(T, N, V)
    blind = {"dropout", "hidden_dropout"}  # what comes out cannot depend on the words
    if name == "dropout":
        torch.testing.assert_close(logits, bias)
        assert raw[-1].any()
    if name == "hidden_dropout":
        assert not dropped[0].any()
        assert not dropped[1].any()
        assert torch.equal(dropped[-1], raw[-1])
    if name in ("input_dropout", "embedding_dropout"):
        blind.add(name)
    other, *_ = model((words + 1) % V)
    assert torch.equal(logits, other) == (name in blind)
    if name == "weight_dropout":
        torch.testing.assert_close(model(words[:1])[0], make_from(model, OFF)(words[:1])[0])  # h is 0 at the start
        assert not torch.allclose(logits, make_from(model, OFF)(words)[0])


def make_from(model, rates):
    """Another AWDLSTM of the same weights."""
    weight = model.decoder.weight
    twin = AWDLSTM(V, E, H, len(model.layers), **rates, device=weight.device, dtype=weight.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def test_tied_weight_has_the_gradients_of_both_uses(make, words):
    tied = make(embedding_dim=H, **OFF)
    untied = make(embedding_dim=H, tie_weights=False, **OFF)
    untied.load_state_dict(tied.state_dict())
    of_tied, of_untied = (gradients(model, model(words), words) for model in (tied, untied))
    assert untied.decoder.weight is not untied.embedding.embedding.weight
    sums = of_untied["embedding.embedding.weight"] + of_untied.pop("decoder.weight")
    torch.testing.assert_close(of_tied, of_untied | {"embedding.embedding.weight": sums})


def test_tied_weight_is_one_parameter_and_stays_it(make, words):
    def is_tied(model):
        return (
            model.decoder.weight is model.embedding.embedding.weight
            and sum(parameter.shape == (V, E) for parameter in model.parameters()) == 1
        )

    model = make()
    assert is_tied(model)
    assert is_tied(copy.deepcopy(model))
    twin = make()
    twin.load_state_dict(model.state_dict())
    assert is_tied(twin)
    assert torch.equal(twin.eval()(words)[0], model.eval()(words)[0])
    assert is_tied(model.float())
    assert model(words)[0].dtype == torch.float32
    optimizer = NTASGD(model.train().parameters(), 0.1)
    model(words)[0].square().mean().backward()
    optimizer.step()
    assert is_tied(model)


def test_copies_share_nothing(make, words):
    model = make().eval()
    twin = copy.deepcopy(model)
    before = model(words)[0]
    assert torch.equal(twin(words)[0], before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.0)
    assert torch.equal(model(words)[0], before)


def test_state_dict_names():
    model = AWDLSTM(V, E, H, 2)
    names = ["embedding.embedding.weight", "decoder.weight", "decoder.bias"]
    names += [f"layers.{k}.{name}_l0" for k in range(2) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert sorted(model.state_dict()) == sorted(names)


@models
def test_initialisation(make, sizes):
    sizes = {"num_embeddings": 500, "embedding_dim": 40, "hidden_size": 60} | sizes
    model = make(**sizes)
    assert not model.decoder.bias.any()
    for weight in (model.embedding.embedding.weight, model.decoder.weight):
        assert 0.099 < weight.abs().max() <= 0.1
        assert weight.mean().abs() < 0.002  # five standard deviations
        assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
    for layer in model.layers:
        bound = layer.hidden_size**-0.5
        for parameter in layer.parameters():
            assert 0.9 * bound < parameter.abs().max() <= bound
    torch.manual_seed(0)
    again = make(**sizes)
    torch.manual_seed(0)
    assert all(map(torch.equal, again.parameters(), make(**sizes).parameters()))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, [(E, H), (H, H), (H, E)]),
        ({"tie_weights": False}, [(E, H), (H, H), (H, H)]),
        ({"num_layers": 1}, [(E, E)]),
        ({"num_layers": 1, "tie_weights": False}, [(E, H)]),
    ],
    ids=str,
)
def test_sizes_of_the_layers(make, sizes, expected):
    assert [(layer.input_size, layer.hidden_size) for layer in make(**sizes).layers] == expected


def test_defaults_are_those_of_the_paper():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(AWDLSTM).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {
        "embedding_dim": 400,
        "hidden_size": 1150,
        "num_layers": 3,
        "dropout": 0.4,
        "hidden_dropout": 0.3,
        "input_dropout": 0.4,
        "embedding_dropout": 0.1,
        "weight_dropout": 0.5,
        "tie_weights": True,
        "backend": "auto",
        "device": None,
        "dtype": None,
    }
    model = AWDLSTM(10_000, device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 24  # its table 1: 24M


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("alpha", "beta"), [(2, 1), (0.5, 3.0), (2, 0), (0, 1), (0, 0)])
def test_regularization_by_numpy(steps, alpha, beta):
    raw, dropped = ([torch.randn(steps, 3, size, dtype=torch.float64) for size in (6, 4)] for _ in range(2))
    activation = np.mean(dropped[-1].numpy() ** 2)
    r = raw[-1].numpy()
    change = np.mean((r[1:] - r[:-1]) ** 2) if steps > 1 else 0.0
    found = AWDLSTM.regularization(raw, dropped, alpha, beta)
    np.testing.assert_allclose(found.item(), alpha * activation + beta * change, rtol=1e-14)
    assert found.shape == ()


def test_regularization_of_one_step_has_gradients():
    raw = torch.randn(1, 2, 3, requires_grad=True)
    AWDLSTM.regularization([raw], [2 * raw], 2, 1).backward()
    torch.testing.assert_close(raw.grad, 2 * 2 * 4 * raw.detach() / 6)


def test_regularization_takes_the_last_layer_only():
    raw, dropped = ([torch.full((4, 2, 3), torch.nan), torch.ones(4, 2, 3)] for _ in range(2))
    assert AWDLSTM.regularization(raw, dropped, 2, 1) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_regularization_of_half_types_is_in_float32(dtype):
    x = torch.full((5, 2, 3), 300.0, dtype=dtype)
    found = AWDLSTM.regularization([x], [x], 2, 1)
    assert found.dtype == torch.float32
    assert found == 2 * 300.0**2  # float16 ends at 65,504


@pytest.mark.parametrize("size", [1, 2, 3, T])
def test_carried_state_is_one_long_run(make, words, size):
    model = make().eval()
    whole, last, _, _ = model(words)
    walk = TruncatedBPTT(words, size)
    parts = []
    for chunk in walk:
        logits, chunk.state, _, _ = model(chunk.data, chunk.state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(walk.state, last)
    assert type(walk.state) is list
    assert [type(pair) for pair in walk.state] == [tuple] * L
    assert [tuple(part.shape) for pair in walk.state for part in pair] == [(1, N, H)] * 4 + [(1, N, E)] * 2


def test_gradients_end_between_chunks(make, words):
    model = make()
    for chunk in TruncatedBPTT(words, 2):
        assert not any(part.requires_grad for pair in chunk.state or () for part in pair)
        logits, chunk.state, raw, dropped = model(chunk.data, chunk.state)
        (logits.square().mean() + AWDLSTM.regularization(raw, dropped, 2, 1)).backward()  # of this chunk's graph alone
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_training_goes_on_after_an_evaluation(make, words):
    def step(model):
        torch.manual_seed(7)
        return model(words)[0]

    model = make()
    first, again = step(model), step(model)
    assert torch.equal(first, again)
    evaluated = model.eval()(words)[0]
    assert torch.equal(evaluated, model(words)[0])
    assert torch.equal(step(model.train()), first)
    assert not torch.allclose(first, evaluated)
    assert not torch.allclose(first, model(words)[0])  # drawn anew


def test_learns(make, words):
    """A text of which each next word follows from the last: the loss goes to a tenth of where it starts."""
    model = make(hidden_size=16, embedding_dim=8, num_layers=2, dtype=torch.float32, **OFF)
    text = ((3 * torch.arange(40, device=words.device)) % V)[:, None].expand(-1, N)
    optimizer = NTASGD(model.parameters(), 5.0)
    losses = []
    for _ in range(60):
        for chunk in TruncatedBPTT((text[:-1], text[1:]), 13):
            logits, chunk.state, raw, dropped = model(chunk.data[0], chunk.state)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chunk.data[1].flatten())
            optimizer.zero_grad()
            (loss + AWDLSTM.regularization(raw, dropped, 0.02, 0.01)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(V), rel=0.02)
    assert losses[-1] < 0.1 * losses[0]


def test_backend_reaches_every_layer(make, words):
    assert [layer.backend for layer in make(backend="reference").layers] == ["reference"] * L
    with pytest.raises(ValueError, match=r"backend 'torch' cannot run this: .* knows no weight_dropout"):
        make(backend="torch")(words)
    make(backend="torch").eval()(words)


@pytest.mark.parametrize("backend", ["stepwise", "reference"])
def test_backends_agree(make, words, backend):
    results = []
    for name in ("auto", backend):
        torch.manual_seed(3)
        model = make(backend=name, num_layers=2)
        found = model(words[:3])
        results.append((found, gradients(model, found, words[:3])))
    torch.testing.assert_close(*results)


def test_under_autocast(make, words):
    model = make(dtype=torch.float32)
    with torch.autocast(words.device.type, torch.bfloat16):
        logits, state, raw, dropped = model(words)
        logits, state, raw, dropped = model(words, state)
        penalty = AWDLSTM.regularization(raw, dropped, 2, 1)
    assert {logits.dtype, raw[-1].dtype} == {torch.bfloat16}
    assert penalty.dtype == torch.float32
    (logits.float().square().mean() + penalty).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# dynamo's own, when it traces any autograd.Function
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
def test_is_traced_whole(make, words):
    torch._dynamo.reset()
    model = make(backend="reference", num_layers=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    found = compiled(words)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(words))


SIZES = ("num_embeddings", "embedding_dim", "hidden_size", "num_layers")
BAD_SIZES = (0, -1, 2.0, True)
BAD_RATES = (-0.1, 1.1, math.nan, "0.5", True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *(({name: value}, f"{name} should be an integer of at least 1, got ") for name in SIZES for value in BAD_SIZES),
        *(
            ({name: value}, f"{name} should be a number in range")
            for name in RATES
            for value in (-0.1, 1.1, "0.5", True)
        ),
        ({"backend": "cudnn"}, "backend should be one of"),
    ],
    ids=str,
)
def test_bad_arguments(make, bad, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**bad)


def test_bad_calls(make, words):
    model = make()
    with pytest.raises(TypeError, match="tie_weights should be of type bool, got: int"):
        make(tie_weights=1)
    for input in (words[0], words[None]):
        with pytest.raises(ValueError, match=rf"Expected input to be 2D, \(T, N\), got {input.dim()}D instead"):
            model(input)
    for state in ([], random_state(model)[:2]):
        with pytest.raises(ValueError, match=rf"Expected state to be a list of \(h, c\), 3 of them, got {len(state)}"):
            model(words, state)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 6\), got \[1, 3, 6\]"):
        model(words, random_state(model, rows=3))
    for alpha, beta, name in ((-1, 1, "alpha"), (2, -0.5, "beta"), (math.nan, 1, "alpha")):
        with pytest.raises(ValueError, match=f"{name} should be a number of at least 0"):
            AWDLSTM.regularization([torch.ones(1, 1, 1)], [torch.ones(1, 1, 1)], alpha, beta)
    with pytest.raises(ValueError, match="hold a tensor a layer, got none"):
        AWDLSTM.regularization([], [], 2, 1)
