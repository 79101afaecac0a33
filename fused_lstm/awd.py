"""The AWD-LSTM, a language model that is regularised without a change to the LSTM's step."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_lstm._options import check_bool, check_rate
from fused_lstm.modules import LSTM
from fused_lstm.regularization import EmbeddingDropout, LockedDropout

State = list[tuple[Tensor, Tensor]]


class AWDLSTM(torch.nn.Module):
    """The AWD-LSTM (Merity, Keskar and Socher 2017, "Regularizing and Optimizing LSTM Language Models").

    Embedding, LSTM layers, decoder, with five dropouts, each drawn once a call: of whole words and of W_hh, for the
    whole batch; of the words' features, between layers and of the last output, for each row, the same at all T steps.
    As in the authors' code (salesforce/awd-lstm-lm), embedding and decoder start at U(-0.1, 0.1), the decoder's bias at
    0. In a loop, with `NTASGD` for an optimiser:

        walk = TruncatedBPTT((text[:-1], text[1:]), 70)
        for chunk in walk:
            input, target = chunk.data
            logits, chunk.state, raw, dropped = model(input, chunk.state)
            loss = cross_entropy(logits.flatten(0, 1), target.flatten())
            loss = loss + AWDLSTM.regularization(raw, dropped, alpha=2, beta=1)

    The defaults are the paper's for the Penn Treebank, by words (section 5): 24 million parameters for its 10,000.

    Args:
        num_embeddings: V, words
        embedding_dim: E, features of a word
        hidden_size: H, units of every layer but, with tie_weights, the last, which has E
        num_layers: L
        dropout: rate on the output of the last layer
        hidden_dropout: rate between layers
        input_dropout: rate on the words' features
        embedding_dropout: rate of whole words, wherever they occur
        weight_dropout: rate on W_hh of every layer
        tie_weights: the decoder's weight is the embedding's matrix, one parameter
        backend: as `LSTM`'s
        device, dtype: of the parameters

    Inputs: input, state
        * **input**: (T, N) integers, the words
        * **state**: a list of (h, c) a layer, as returned; None: zeros

    Outputs: logits, state, raw, dropped
        * **logits**: (T, N, V)
        * **state**: a list of (h, c) a layer, each (1, N, H), or (1, N, E) of a last layer with tie_weights
        * **raw**, **dropped**: lists of each layer's output (T, N, ·), before and after its dropout; in eval the same

    Raises:
        ValueError: a size is less than 1, a rate is not in [0, 1], the backend is unknown; input is not 2D, state has
            not one entry a layer
        TypeError: tie_weights is no bool
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int = 400,
        hidden_size: int = 1150,
        num_layers: int = 3,
        *,
        dropout: float = 0.4,
        hidden_dropout: float = 0.3,
        input_dropout: float = 0.4,
        embedding_dropout: float = 0.1,
        weight_dropout: float = 0.5,
        tie_weights: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_size("num_embeddings", num_embeddings)
        _check_size("embedding_dim", embedding_dim)
        _check_size("hidden_size", hidden_size)
        _check_size("num_layers", num_layers)
        check_bool("tie_weights", tie_weights)
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.embedding = EmbeddingDropout(
            torch.nn.Embedding(num_embeddings, embedding_dim, **place),
            check_rate("embedding_dropout", embedding_dropout),
        )
        self.input_dropout = LockedDropout(check_rate("input_dropout", input_dropout))
        sizes = [embedding_dim, *[hidden_size] * (num_layers - 1), embedding_dim if tie_weights else hidden_size]
        self.layers = torch.nn.ModuleList(
            LSTM(*pair, weight_dropout=weight_dropout, backend=backend, **place) for pair in itertools.pairwise(sizes)
        )
        self.hidden_dropout = LockedDropout(check_rate("hidden_dropout", hidden_dropout))
        self.dropout = LockedDropout(check_rate("dropout", dropout))
        self.decoder = torch.nn.Linear(sizes[-1], num_embeddings, **place)
        if tie_weights:
            self.decoder.weight = self.embedding.embedding.weight
        torch.nn.init.uniform_(self.embedding.embedding.weight, -0.1, 0.1)
        torch.nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        torch.nn.init.zeros_(self.decoder.bias)

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State, list[Tensor], list[Tensor]]:
        if input.dim() != 2:
            raise ValueError(f"AWDLSTM: Expected input to be 2D, (T, N), got {input.dim()}D instead")
        entering = [None] * len(self.layers) if state is None else state
        if len(entering) != len(self.layers):
            raise ValueError(f"Expected state to be a list of (h, c), {len(self.layers)} of them, got {len(entering)}")
        leaving, raw, dropped = [], [], []
        output = self.input_dropout(self.embedding(input))
        for layer, hx in zip(self.layers, entering, strict=True):
            output, hx = layer(output, hx)
            raw.append(output)
            output = (self.dropout if len(raw) == len(self.layers) else self.hidden_dropout)(output)
            dropped.append(output)
            leaving.append(hx)
        return self.decoder(output), leaving, raw, dropped

    @staticmethod
    def regularization(
        raw: Sequence[Tensor], dropped: Sequence[Tensor], alpha: float = 2.0, beta: float = 1.0
    ) -> Tensor:
        """What the paper adds to the loss, section 4.6, in float32 or better.

        Args:
            raw, dropped: as `forward` returns them; only their last ones, (T, N, ·), count
            alpha: of AR, the mean square of the last layer's output after dropout: large outputs
            beta: of TAR, the mean squared difference between its successive steps before dropout: fast ones; 0 at T = 1

        Returns:
            alpha * AR + beta * TAR

        Raises:
            ValueError: alpha or beta is negative or NaN, or there is no layer
        """
        for name, factor in (("alpha", alpha), ("beta", beta)):
            if not factor >= 0:
                raise ValueError(f"{name} should be a number of at least 0, got {factor!r}")
        if not raw or not dropped:
            raise ValueError("Expected raw and dropped to hold a tensor a layer, got none")
        raw_output, dropped_output = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (raw[-1], dropped[-1]))
        change = raw_output.diff(dim=0)
        return alpha * dropped_output.square().mean() + beta * change.square().sum() / max(change.numel(), 1)


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} should be an integer of at least 1, got {size!r}")
