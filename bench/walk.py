"""The way through a text that the updates take."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fused_lstm import TruncatedBPTT


class Walk:
    """Truncated backpropagation through a text, again and again; each pass begins at the top, without a state.

    Args:
        text: (rows, N), as of `corpus.columns`
        length: steps a chunk, or a function that returns the next one
        drop_last: leave out the rest of the text where it is shorter than a chunk

    Attributes:
        position: steps read in this pass
        state: what the next chunk begins with, detached
    """

    def __init__(self, text: Tensor, length: int | Callable[[], int], *, drop_last: bool) -> None:
        self._text = text
        self._length = length
        self._drop_last = drop_last
        self.begin(0, None)

    def begin(self, position: int, state: Any) -> None:
        """Goes on from another place in the text, with the state that belongs there."""
        self.position = position
        self.state = state
        self._chunks = self._passes()

    @contextlib.contextmanager
    def chunk(self) -> Iterator[Any]:
        """The next chunk of a `TruncatedBPTT`: its data are input and target; its state must be handed back."""
        chunk = next(self._chunks)
        yield chunk
        self.position += chunk.size
        self.state = self._pass.state

    def _passes(self) -> Iterator[Any]:
        while True:
            text = self._text[self.position :]
            if len(text) > 1:  # a pass may have been left at its very end
                pair = text[:-1], text[1:]
                self._pass = TruncatedBPTT(pair, self._length, self.state, drop_last=self._drop_last)
                yield from self._pass
            self.position, self.state = 0, None
