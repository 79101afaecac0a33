"""detach_state: the same numbers in the same containers, cut from the graph."""

from typing import NamedTuple

import pytest
import torch

import fused_lstm
from fused_lstm import detach_state


class State(NamedTuple):
    h: torch.Tensor
    c: torch.Tensor | None


def part() -> torch.Tensor:
    return torch.ones(2, requires_grad=True) * 3


@pytest.mark.parametrize(
    "state",
    [None, part(), (part(), part()), [part()], [(part(), [None]), ()], State(part(), None), (State(part(), part()),)],
    ids=lambda state: type(state).__name__,
)
def test_containers_are_kept(state):
    def check(found, given):
        assert type(found) is type(given)
        if isinstance(given, torch.Tensor):
            assert given.requires_grad
            assert not found.requires_grad
            assert found.data_ptr() == given.data_ptr()
        elif given is not None:
            assert len(found) == len(given)
            for pair in zip(found, given, strict=True):
                check(*pair)

    check(detach_state(state), state)


@pytest.mark.parametrize(("state", "name"), [({"h": part()}, "dict"), ((part(), 1), "int"), ("h", "str")])
def test_anything_else_is_an_error(state, name):
    with pytest.raises(TypeError, match=f"^state should be a tensor, None, or tuples and lists of them, got: {name}$"):
        detach_state(state)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_end_between_chunks(backend, device):
    """The second chunk's gradients are those of a run that starts from the state as given numbers."""
    module = fused_lstm.LSTM(3, 4, backend=backend, device=device, dtype=torch.float64)
    x = torch.ones(6, 2, 3, dtype=torch.float64, device=device)
    leaf = x.clone().requires_grad_()
    _, state = module(leaf[:3])
    module(leaf[3:], detach_state(state))[0].sum().backward()
    assert not leaf.grad[:3].any()
    assert leaf.grad[3:].any()
    with pytest.raises(RuntimeError, match="does not require grad"):
        detach_state(state)[0].sum().backward()
