"""Truncated backpropagation through time."""

from typing import TypeVar

import torch

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
    if isinstance(state, torch.Tensor):
        return state.detach()
    if isinstance(state, (tuple, list)):
        parts = [detach_state(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    raise TypeError(f"state should be a tensor, None, or tuples and lists of them, got: {type(state).__name__}")
