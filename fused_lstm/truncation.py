"""Truncated backpropagation through time."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

State = TypeVar("State")


def detach_state(state: State) -> State:
    """The same state, cut from the graph that made it: what the next chunk of a sequence starts from.

    Args:
        state: a tensor, None, or a tuple or list of such states, nested as deep as you like

    Returns:
        the same containers (named tuples too) of detached tensors; None stays None

    Raises:
        TypeError: something else is in it
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        return _like(state, [detach_state(part) for part in state])
    raise TypeError(f"state should be a tensor, None, or tuples and lists of them, got: {type(state).__name__}")


class Chunk:
    """What one turn of a loop over a `TruncatedBPTT` reads, and where it leaves the new state.

    Attributes:
        data: the steps of this chunk, views in the containers of the sequence
        start: the index of its first step in the sequence
        size: how many steps it has
        state: the state that enters it; assign to it the one that leaves it
    """

    def __init__(self, walk: "TruncatedBPTT", data: Any, start: int, size: int, state: Any) -> None:
        self.data = data
        self.start = start
        self.size = size
        self._walk = walk
        self._state = state
        self._handed_back: list[Any] = []  # the state that leaves, detached; empty until there is one, None included

    @property
    def state(self) -> Any:
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        detached = detach_state(state)
        self._state = state
        self._handed_back = [detached]
        self._walk.state = detached


class TruncatedBPTT:
    """A walk through a long sequence in chunks: the state goes on from each to the next, gradients do not.

        walk = TruncatedBPTT((text[:-1], text[1:]), 70)
        for chunk in walk:
            input, target = chunk.data
            logits, chunk.state = model(input, chunk.state)
            loss = cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    Every turn must assign `chunk.state`, the last one too; None lets the next chunk begin as the model does without a
    state. Each loop over a walk begins at the start of the sequence, with the state that the walk was made with.

    Args:
        sequence: a tensor, or tuples and lists of tensors, nested as deep as you like, with equally many steps along
            dim; None among them stays None
        chunk_size: steps a chunk, at least 1; or an iterable of one size a chunk, or a function that returns the next
            one (AWD-LSTM draws them, and scales the learning rate by `chunk.size`). The last chunk is shorter where the
            sequence ends before it
        state: what enters the first chunk, a tensor, None, or tuples and lists of them; as given, not detached: an
            initial state that is learned gets its gradient
        dim: the time of every tensor; 1 for (N, T, ·)
        drop_last: leave out a last chunk that is shorter than its size

    Attributes:
        state: the last one handed back, detached, where another walk goes on; before that, the one given

    Raises:
        TypeError: sequence, state or a size is of another type, a PackedSequence for instance
        ValueError: there is no step, or not equally many; a size is less than 1; the sizes end before the sequence
        RuntimeError: a turn has handed no state back
    """

    def __init__(
        self,
        sequence: Any,
        chunk_size: int | Iterable[int] | Callable[[], int],
        state: Any = None,
        *,
        dim: int = 0,
        drop_last: bool = False,
    ) -> None:
        detach_state(state)  # raises where it is no state
        self._steps = _count_steps(sequence, dim)
        self._sequence = sequence
        self._dim = dim
        self._drop_last = drop_last
        self._first_state = self.state = state
        if isinstance(chunk_size, (list, tuple)):
            chunk_size = [_checked_size(size) for size in chunk_size]
            self._check_total(sum(chunk_size))
        elif not callable(chunk_size) and not isinstance(chunk_size, Iterable):
            chunk_size = _checked_size(chunk_size)
        self._chunk_size = chunk_size

    def __iter__(self) -> Iterator[Chunk]:
        state = self.state = self._first_state
        start = 0
        for wanted in self._sizes():
            size = min(_checked_size(wanted), self._steps - start)
            if self._drop_last and size < wanted:
                return
            data = _map_tensors(self._sequence, lambda x, start=start, size=size: x.narrow(self._dim, start, size))
            chunk = Chunk(self, data, start, size, state)
            yield chunk
            if not chunk._handed_back:
                raise RuntimeError("the last turn handed no state back: assign chunk.state, None to begin anew")
            (state,) = chunk._handed_back
            start += size
            if start == self._steps:
                return
        self._check_total(start)

    def _sizes(self) -> Iterator[int]:
        if isinstance(self._chunk_size, int):
            return itertools.repeat(self._chunk_size)
        if callable(self._chunk_size):
            return (self._chunk_size() for _ in itertools.count())
        return iter(self._chunk_size)

    def _check_total(self, total: int) -> None:
        if total < self._steps:
            raise ValueError(f"Expected chunk sizes of at least {self._steps} steps together, got {total}")


def _like(container: Any, parts: list[Any]) -> Any:
    """The parts in a tuple, list or named tuple of container's type."""
    return type(container)(*parts) if hasattr(container, "_fields") else type(container)(parts)


def _map_tensors(sequence: Any, function: Callable[[Tensor], Any]) -> Any:
    if sequence is None:
        return None
    if isinstance(sequence, Tensor):
        return function(sequence)
    if isinstance(sequence, (tuple, list)) and not isinstance(sequence, PackedSequence):
        return _like(sequence, [_map_tensors(part, function) for part in sequence])
    raise TypeError(f"sequence should be a tensor, or tuples and lists of them, got: {type(sequence).__name__}")


def _count_steps(sequence: Any, dim: int) -> int:
    tensors: list[Tensor] = []
    _map_tensors(sequence, tensors.append)
    if not tensors:
        raise ValueError("Expected sequence to hold a tensor, got none")
    for tensor in tensors:
        if not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(f"Expected tensors that have dim {dim}, got a {tensor.dim()}D one")
    steps, *others = [tensor.size(dim) for tensor in tensors]
    for other in others:
        if other != steps:
            raise ValueError(f"Expected tensors of equally many steps, got {steps} and {other} along dim {dim}")
    if steps == 0:
        raise ValueError("Expected sequence length to be larger than 0")
    return steps


def _checked_size(size: Any) -> int:
    if isinstance(size, bool) or not hasattr(size, "__index__"):
        raise TypeError(f"chunk_size should be an int, got: {type(size).__name__}")
    size = operator.index(size)
    if size < 1:
        raise ValueError(f"Expected chunk_size to be at least 1, got {size}")
    return size
