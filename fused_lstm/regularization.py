"""Dropout of the AWD-LSTM: one mask a sequence, and whole words of an embedding."""

import numbers

import torch
from torch import Tensor


class LockedDropout(torch.nn.Module):
    """Dropout with one mask a sequence: what is dropped at one step is dropped at all of them.

    Inverted dropout, drawn anew for each sequence of each call, and off in eval. (Gal & Ghahramani 2016, "variational"
    dropout; the name is AWD-LSTM's.)

    Args:
        p: the probability of an element to be dropped; the others are scaled by 1 / (1 - p)
        batch_first: the input is (N, T, F) instead of (T, N, F); no matter for an unbatched one

    Shape:
        * Input: (T, N, F), (N, T, F) with batch_first, or (T, F) unbatched; its mask is (1, N, F), (N, 1, F) or (1, F)
        * Output: as the input

    Raises:
        ValueError: p is not a number in [0, 1], or the input is neither 2D nor 3D
        TypeError: the input is not a tensor, a PackedSequence for instance
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        _check_probability(p)
        super().__init__()
        self.p = p
        self.batch_first = batch_first

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", batch_first=True" if self.batch_first else "")

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            raise TypeError(f"LockedDropout: Expected input to be a tensor, got: {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"LockedDropout: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if not self.training or self.p == 0:
            return input
        shape = list(input.shape)
        shape[1 if self.batch_first and input.dim() == 3 else 0] = 1
        return input * torch.nn.functional.dropout(input.new_ones(shape), self.p)


class EmbeddingDropout(torch.nn.Module):
    """Dropout of whole words: rows of the embedding's matrix, so that a word is dropped wherever it occurs.

    The mask is drawn anew at each call, one number a row; off in eval. The embedding stays as it is, a submodule, and
    whoever else uses its weight (a tied decoder) sees all of it. What it does itself, it goes on doing: with
    `padding_idx` that row gets no gradient, `max_norm` bounds the rows before they are scaled, `scale_grad_by_freq` and
    `sparse` shape the gradient of the raw weight. (Gal & Ghahramani 2016; Merity et al. 2017, section 4.3.)

    Args:
        embedding: a torch.nn.Embedding
        p: the probability of a row to be dropped; the others are scaled by 1 / (1 - p)

    Shape:
        * Input: integers of any shape
        * Output: the input's shape, and embedding_dim

    Raises:
        TypeError: embedding is not a torch.nn.Embedding
        ValueError: p is not a number in [0, 1]
    """

    def __init__(self, embedding: torch.nn.Embedding, p: float = 0.1) -> None:
        if not isinstance(embedding, torch.nn.Embedding):
            raise TypeError(f"embedding should be a torch.nn.Embedding, got: {type(embedding).__name__}")
        _check_probability(p)
        super().__init__()
        self.embedding = embedding
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, input: Tensor) -> Tensor:
        words = self.embedding(input)
        if not self.training or self.p == 0:
            return words
        # The words looked up are masked, not the matrix: the same numbers without a second matrix.
        kept = torch.nn.functional.dropout(words.new_ones(self.embedding.num_embeddings, 1), self.p)
        return words * torch.nn.functional.embedding(input, kept)


def _check_probability(p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p!r}")
