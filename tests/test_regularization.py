"""LockedDropout and EmbeddingDropout: which elements they drop, what they do to the rest, and the gradients."""

import copy

import numpy as np
import pytest
import torch
from runs import randn

from fused_lstm.regularization import EmbeddingDropout, LockedDropout

LAYOUTS = {"time first": ((7, 5, 11), False, 0), "batch first": ((5, 7, 11), True, 1), "unbatched": ((7, 11), True, 0)}
locked_layouts = pytest.mark.parametrize(("shape", "batch_first", "time"), LAYOUTS.values(), ids=LAYOUTS)


def nonzero(*shape, **options) -> torch.Tensor:
    """Random numbers, none of them small: their quotients are the mask."""
    x = randn(*shape, **options)
    return x + x.sign()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@locked_layouts
def test_locked_mask_is_the_same_at_every_step(shape, batch_first, time):
    x = nonzero(*shape)
    mask = LockedDropout(0.4, batch_first)(x) / x
    first = mask.select(time, 0).unsqueeze(time)
    torch.testing.assert_close(mask, first.expand(shape), rtol=1e-15, atol=0)
    kept = mask != 0
    assert 0 < kept.sum() < kept.numel()
    np.testing.assert_allclose(mask[kept].numpy(), 1 / 0.6, rtol=1e-15)


def test_locked_mask_differs_between_sequences_features_and_calls():
    dropout, x = LockedDropout(), torch.ones(2, 8, 32)
    first, second = dropout(x)[0], dropout(x)[0]
    assert (first != second).any()
    assert (first != first[:1]).any()
    assert (first != first[:, :1]).any()


@pytest.mark.parametrize("p", [0.1, 0.8])
def test_locked_rate(p):
    """Of 200,000 elements; five standard deviations of their mean are less than 0.006."""
    dropped = LockedDropout(p)(torch.ones(2, 200, 1000)) == 0
    assert abs(dropped[0].double().mean().item() - p) < 0.006


@locked_layouts
def test_locked_gradient_is_the_mask(shape, batch_first, time):
    x = nonzero(*shape, requires_grad=True)
    output = LockedDropout(0.3, batch_first)(x)
    weights = nonzero(*shape, seed=1)
    (gradient,) = torch.autograd.grad(output, x, weights)
    torch.testing.assert_close(gradient, output.detach() / x.detach() * weights, rtol=1e-14, atol=0)
    assert (gradient == 0).any()
    assert gradient.select(time, 0).eq(0).equal(gradient.select(time, 1).eq(0))


def test_locked_second_derivatives():
    x = nonzero(4, 2, 3, requires_grad=True)

    def cubed(x):
        torch.manual_seed(3)
        return LockedDropout()(x**3)

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_locked_keeps_the_dtype(dtype):
    output = LockedDropout(0.5)(torch.full((3, 4, 64), 3.0, dtype=dtype))
    assert output.dtype == dtype
    assert set(output.flatten().tolist()) == {0.0, 6.0}


def test_locked_ends_of_the_range():
    x = nonzero(3, 4, 5, requires_grad=True)
    assert LockedDropout(0)(x) is x
    zeros = LockedDropout(1.0)(x)
    assert zeros.eq(0).all()
    assert torch.autograd.grad(zeros.sum(), x)[0].eq(0).all()


def test_locked_is_off_in_eval():
    x = nonzero(3, 4, 5)
    before = torch.get_rng_state()
    assert LockedDropout(0.9).eval()(x) is x
    assert torch.get_rng_state().equal(before)


def test_locked_takes_no_steps_and_no_rows():
    assert LockedDropout()(torch.ones(0, 2, 3)).shape == (0, 2, 3)
    assert LockedDropout()(torch.ones(2, 0, 3)).shape == (2, 0, 3)


BAD_RATES = [-0.1, 1.1, float("nan"), True, "0.5", None]


@pytest.mark.parametrize("p", BAD_RATES, ids=repr)
def test_bad_rates(p):
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got "):
        LockedDropout(p)
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got "):
        EmbeddingDropout(torch.nn.Embedding(3, 2), p)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 4])
def test_locked_refuses_other_dimensions(dim, training):
    with pytest.raises(ValueError, match=f"^LockedDropout: Expected input to be 2D or 3D, got {dim}D instead$"):
        LockedDropout().train(training)(torch.ones([2] * dim))


def test_locked_refuses_a_packed_sequence():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    with pytest.raises(TypeError, match=r"^LockedDropout: Expected input to be a tensor, got: PackedSequence$"):
        LockedDropout()(packed)


def test_what_modules_print():
    assert repr(LockedDropout(0.25)) == "LockedDropout(p=0.25)"
    assert repr(LockedDropout(0.25, batch_first=True)) == "LockedDropout(p=0.25, batch_first=True)"
    assert "p=0.1" in repr(EmbeddingDropout(torch.nn.Embedding(3, 2)))


@pytest.mark.parametrize("make", [lambda: LockedDropout(0.5), lambda: EmbeddingDropout(torch.nn.Embedding(9, 4), 0.5)])
def test_they_are_traced_whole(make):
    """torch.compile sees through them, and the graph draws what eager draws."""
    module = make()
    x = torch.arange(9) if isinstance(module, EmbeddingDropout) else torch.ones(3, 2, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    found = compiled(x)
    torch.manual_seed(1)
    assert found.equal(module(x))
    assert (found == 0).any()


VOCABULARY, DIM = 40, 6
# Every word, most of them twice or more, in two dimensions.
WORDS = torch.cat([torch.arange(VOCABULARY), torch.arange(VOCABULARY - 4) // 2]).reshape(4, -1)


def words_embedding(**options) -> torch.nn.Embedding:
    embedding = torch.nn.Embedding(VOCABULARY, DIM, dtype=torch.float64, **options)
    with torch.no_grad():
        embedding.weight.copy_(nonzero(VOCABULARY, DIM))
    return embedding


def row_mask(output: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    """The number (V,) by which each word's vector was multiplied: one number for all that it holds and occurs."""
    mask = np.full(VOCABULARY, np.nan)
    ratios = (output.detach() / weight.detach()[WORDS]).numpy()
    for word in range(VOCABULARY):
        found = ratios[WORDS.numpy() == word]
        np.testing.assert_allclose(found, found[0, 0], rtol=1e-14)
        mask[word] = found[0, 0]
    return mask


def test_words_are_dropped_whole():
    module = EmbeddingDropout(words_embedding(), 0.3)
    mask = row_mask(module(WORDS), module.embedding.weight)
    assert 0 < (mask == 0).sum() < VOCABULARY
    np.testing.assert_allclose(mask[mask != 0], 1 / 0.7, rtol=1e-14)
    assert (row_mask(module(WORDS), module.embedding.weight) != mask).any()


def test_word_rate():
    """Of 200,000 words; five standard deviations of their mean are less than 0.0034."""
    module = EmbeddingDropout(torch.nn.Embedding.from_pretrained(torch.ones(200_000, 1)))
    assert abs((module(torch.arange(200_000)) == 0).double().mean().item() - 0.1) < 0.0034


@pytest.mark.parametrize(
    ("scale_grad_by_freq", "sparse"),
    [(False, False), (True, False), (False, True)],  # both at once: torch's embedding has no such gradient
)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_gradient_reaches_the_raw_weight(padding_idx, scale_grad_by_freq, sparse):
    """d_weight[v] = mask[v] * sum of d_output where v occurs, over its count if asked; none at padding_idx."""
    embedding = words_embedding(padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
    module = EmbeddingDropout(embedding, 0.3)
    output = module(WORDS)
    mask = row_mask(output, embedding.weight)
    d_output = randn(*output.shape, seed=5)
    output.backward(d_output)
    expected = np.zeros((VOCABULARY, DIM))
    for word in range(VOCABULARY):
        at_word = d_output.numpy()[WORDS.numpy() == word]
        expected[word] = mask[word] * at_word.sum(axis=0) / (len(at_word) if scale_grad_by_freq else 1)
    if padding_idx is not None:
        expected[padding_idx] = 0
    assert embedding.weight.grad.is_sparse == sparse
    np.testing.assert_allclose(embedding.weight.grad.to_dense().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_padding_is_dropped_and_scaled_like_any_word():
    module = EmbeddingDropout(words_embedding(padding_idx=3), 0.5)
    assert {row_mask(module(WORDS), module.embedding.weight)[3] for _ in range(40)} == {0.0, 2.0}


def test_max_norm_bounds_the_rows_before_they_are_scaled():
    module = EmbeddingDropout(words_embedding(max_norm=1.0), 0.5)
    twin = copy.deepcopy(module.embedding)
    assert (twin.weight.norm(dim=1) > 1).any()
    lengths = module(WORDS).norm(dim=-1)
    twin(WORDS)
    assert module.embedding.weight.equal(twin.weight)
    np.testing.assert_allclose(lengths[lengths > 0].detach().numpy(), 2.0, rtol=1e-6)


@pytest.mark.parametrize("p", [0.9, 1])
def test_words_are_not_dropped_in_eval(p):
    module = EmbeddingDropout(words_embedding(), p).eval()
    before = torch.get_rng_state()
    assert module(WORDS).equal(module.embedding.weight[WORDS])
    assert torch.get_rng_state().equal(before)


def test_word_ends_of_the_range():
    embedding = words_embedding()
    assert EmbeddingDropout(embedding, 0.0)(WORDS).equal(embedding.weight[WORDS])
    output = EmbeddingDropout(embedding, 1)(WORDS)
    assert output.shape == (*WORDS.shape, DIM)
    assert output.eq(0).all()


def test_the_embedding_is_a_submodule_left_as_it_is():
    embedding = words_embedding()
    weight = embedding.weight
    before = weight.detach().clone()
    module = EmbeddingDropout(embedding, 0.5)
    assert list(module.state_dict()) == ["embedding.weight"]
    assert list(module.parameters()) == [weight]
    module(WORDS).sum().backward()
    assert embedding.weight is weight
    assert weight.equal(before)
    other = EmbeddingDropout(words_embedding().requires_grad_(False))
    other.embedding.weight.zero_()
    other.load_state_dict(module.state_dict())
    assert other.embedding.weight.equal(before)


def test_a_tied_decoder_sees_the_raw_weight():
    module = EmbeddingDropout(words_embedding(), 1.0)
    decoder = torch.nn.Linear(DIM, VOCABULARY, bias=False)
    decoder.weight = module.embedding.weight
    logits = decoder(module(WORDS) + 1)
    expected = module.embedding.weight.sum(dim=1).expand(*WORDS.shape, -1)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nn.EmbeddingBag(3, 2), torch.nn.Linear(2, 3), torch.ones(3, 2)])
def test_only_embeddings(bad):
    message = f"^embedding should be a torch.nn.Embedding, got: {type(bad).__name__}$"
    with pytest.raises(TypeError, match=message):
        EmbeddingDropout(bad)


def test_words_beyond_the_vocabulary_are_torchs_error():
    with pytest.raises(IndexError, match="index out of range"):
        EmbeddingDropout(words_embedding())(torch.tensor([VOCABULARY]))
