"""The character model: embedding, LSTM, output."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class CharModel(nn.Module):
    """Predicts each next character of a text.

    Args:
        make_lstm: `nn.LSTM`, or what takes its arguments
        vocabulary_size: V
        embedding_size: E
        hidden_size: H
        num_layers: LSTM layers
        dropout: rate on the embedding, between the layers and on the output of the last
        tied: the output uses the embedding's matrix as its weight, which needs E = H
    """

    def __init__(
        self,
        make_lstm: Callable[..., nn.LSTM],
        *,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if tied and embedding_size != hidden_size:
            raise ValueError(f"tied needs embedding_size = hidden_size, got {embedding_size} and {hidden_size}")
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.dropout = nn.Dropout(dropout)
        # With one layer there is nothing between layers, and torch warns about a rate that has no effect.
        between_layers = dropout if num_layers > 1 else 0.0
        self.lstm = make_lstm(embedding_size, hidden_size, num_layers, dropout=between_layers)
        self.output = nn.Linear(hidden_size, vocabulary_size)
        if tied:
            # Rows of length about 1, so that the first logits are as small as an untied output's.
            nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
            self.output.weight = self.embedding.weight

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Reads T characters in each of N columns.

        Args:
            input: int64 (T, N)
            state: h and c after the characters before, each (num_layers, N, H); None: zeros

        Returns:
            logits (T, N, V) of each next character, and the state after the last one
        """
        output, state = self.lstm(self.dropout(self.embedding(input)), state)
        return self.output(self.dropout(output)), state


@torch.no_grad()
def sample(model: nn.Module, prompt: Tensor, length: int, *, seed: int) -> Tensor:
    """Lets the model write on.

    Args:
        model: a `CharModel`, or what returns logits and state likewise, and anything after them
        prompt: int64 (characters,), at least one
        length: how many characters to write
        seed: the same seed draws the same characters; the global generators are left alone

    Returns:
        int64 (length,), without the prompt, on the CPU
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    written: list[Tensor] = []
    input, state = prompt, None
    for _ in range(length):
        logits, state, *_ = model(input.to(device).unsqueeze(1), state)
        probabilities = logits[-1, 0].double().softmax(dim=0).cpu()
        input = probabilities.multinomial(1, generator=generator)
        written.append(input)
    model.train(training)
    return torch.cat(written) if written else prompt.new_empty(0, device="cpu")
