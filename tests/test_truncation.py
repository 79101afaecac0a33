"""detach_state: the same numbers in the same containers, cut from the graph. TruncatedBPTT: the loop around it."""

import random
from typing import NamedTuple

import pytest
import torch
from runs import randn

import fused_lstm
from fused_lstm import detach_state
from fused_lstm.truncation import TruncatedBPTT


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


STEPS, ROWS, FEATURES, HIDDEN = 11, 2, 3, 4


class TwoLayers(torch.nn.Module):
    """As the AWD-LSTM: a module a layer, and a list of their (h, c) for a state."""

    def __init__(self):
        super().__init__()
        sizes = [(FEATURES, HIDDEN), (HIDDEN, FEATURES)]
        self.layers = torch.nn.ModuleList([torch.nn.LSTM(*size, dtype=torch.float64) for size in sizes])

    def forward(self, input, state=None):
        state = [None] * 2 if state is None else state
        leaving = []
        for layer, entering in zip(self.layers, state, strict=True):
            input, left = layer(input, entering)
            leaving.append(left)
        return input, leaving


def lstm(**options) -> torch.nn.LSTM:
    return torch.nn.LSTM(FEATURES, FEATURES, num_layers=2, dtype=torch.float64, **options)


MODELS = {"state tuple": lstm, "list of tuples": TwoLayers}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)

# What chunk_size may be, and where the chunks of 11 steps then begin and end.
CHUNKINGS = {
    "equal": (lambda: 4, [(0, 4), (4, 8), (8, 11)]),
    "of one": (lambda: 1, [(step, step + 1) for step in range(STEPS)]),
    "in one": (lambda: 50, [(0, 11)]),
    "exact": (lambda: 11, [(0, 11)]),
    "list": (lambda: [2, 5, 4], [(0, 2), (2, 7), (7, 11)]),
    "long list": (lambda: (2, 5, 9, 3), [(0, 2), (2, 7), (7, 11)]),
    "generator": (lambda: (size for size in (3, 1, 6, 2, 7)), [(0, 3), (3, 4), (4, 10), (10, 11)]),
    "tensor": (lambda: torch.tensor([6, 6]), [(0, 6), (6, 11)]),
    "function": (lambda: iter([7, 3, 1, 1]).__next__, [(0, 7), (7, 10), (10, 11)]),
}
chunkings = pytest.mark.parametrize(("make_size", "bounds"), CHUNKINGS.values(), ids=CHUNKINGS)


def by_hand(model, x, target, bounds, state, dim=0):
    """Losses and the last state of a loop that slices and detaches by itself; gradients add up in the leaves."""
    losses = []
    for start, end in bounds:
        index = (slice(None),) * dim + (slice(start, end),)
        output, state = model(x[index], state)
        losses.append((output - target[index]).square().sum())
        losses[-1].backward()
        state = detach_state(state)
    return losses, state


def leaves_of(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [leaf for part in state or [] for leaf in leaves_of(part)]


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b)


@models
@chunkings
def test_a_loop_is_the_loop_by_hand(make, make_size, bounds):
    """Losses, states, gradients of weights and of the input, to the bit."""
    model = make()
    weights = list(model.parameters())
    x, target = randn(STEPS, ROWS, FEATURES, requires_grad=True), randn(STEPS, ROWS, FEATURES, seed=1)
    expected_losses, expected_state = by_hand(model, x, target, bounds, None)
    expected = [leaf.grad for leaf in (x, *weights)]
    model.zero_grad()
    x.grad = None
    losses, seen = [], []
    walk = TruncatedBPTT((x, target), make_size())
    for chunk in walk:
        seen.append((chunk.start, chunk.start + chunk.size))
        chunk_x, chunk_target = chunk.data
        output, chunk.state = model(chunk_x, chunk.state)
        losses.append((output - chunk_target).square().sum())
        losses[-1].backward()
    assert seen == bounds
    assert_same(losses, expected_losses)
    assert_same([leaf.grad for leaf in (x, *weights)], expected)
    assert_same(leaves_of(walk.state), leaves_of(expected_state))
    assert not any(leaf.requires_grad for leaf in leaves_of(walk.state))


@models
def test_a_state_given_gets_its_gradient(make):
    """From the first chunk alone: it is where the graph begins, not a cut."""
    model = make()
    x, target = randn(STEPS, ROWS, FEATURES), randn(STEPS, ROWS, FEATURES, seed=1)
    states = []
    for _ in range(2):
        _, state = model(x[:1])
        states.append(detach_state(state))
        for leaf in leaves_of(states[-1]):
            leaf.requires_grad_()
    by_hand(model, x, target, [(0, 5), (5, 10), (10, 11)], states[0])
    walk = TruncatedBPTT([x, target], 5, states[1])
    assert walk.state is states[1]
    for chunk in walk:
        output, chunk.state = model(chunk.data[0], chunk.state)
        (output - chunk.data[1]).square().sum().backward()
    assert_same([leaf.grad for leaf in leaves_of(states[1])], [leaf.grad for leaf in leaves_of(states[0])])
    assert all(leaf.grad.any() for leaf in leaves_of(states[1]))


@pytest.mark.parametrize("dim", [1, -2])
def test_batch_first(dim):
    model = lstm(batch_first=True)
    x, target = randn(ROWS, STEPS, FEATURES, requires_grad=True), randn(ROWS, STEPS, FEATURES, seed=1)
    _, expected = by_hand(model, x, target, [(0, 4), (4, 8), (8, 11)], None, dim=1)
    gradient, x.grad = x.grad, None
    walk = TruncatedBPTT((x, target), 4, dim=dim)
    for chunk in walk:
        output, chunk.state = model(chunk.data[0], chunk.state)
        (output - chunk.data[1]).square().sum().backward()
    assert_same([*leaves_of(walk.state), x.grad], [*leaves_of(expected), gradient])


@pytest.mark.parametrize(
    ("chunk_size", "starts"),
    [(4, [0, 4]), (11, [0]), (12, []), ([5, 5, 5], [0, 5]), (iter([5, 6, 1]).__next__, [0, 5])],
)
def test_drop_last(chunk_size, starts):
    walk, seen = TruncatedBPTT(torch.arange(STEPS), chunk_size, torch.zeros(()), drop_last=True), []
    for chunk in walk:
        seen.append(chunk.start)
        chunk.state = chunk.data.sum()
    assert seen == starts
    last = seen[-1] if seen else None
    assert walk.state.item() == (0 if last is None else torch.arange(STEPS)[last:][: chunk.size].sum().item())


def test_containers_of_the_sequence_are_kept():
    """Views of the sequence: whatever is written into a chunk is written into it."""
    sequence = State(torch.arange(STEPS), (torch.arange(STEPS) * 10, [None, torch.arange(2 * STEPS).view(STEPS, 2)]))
    for chunk in TruncatedBPTT(sequence, 7):
        chunk.state = None
        steps = slice(chunk.start, chunk.start + chunk.size)
        assert type(chunk.data) is State
        assert type(chunk.data.c) is tuple
        assert type(chunk.data.c[1]) is list
        assert chunk.data.c[1][0] is None
        found = [chunk.data.h, chunk.data.c[0], chunk.data.c[1][1]]
        whole = [sequence.h, sequence.c[0], sequence.c[1][1]]
        assert_same(found, [tensor[steps] for tensor in whole])
        assert [part.data_ptr() for part in found] == [tensor[steps].data_ptr() for tensor in whole]


@pytest.mark.parametrize("forgets_at", [0, 4, 8])
def test_forgetting_the_state_is_an_error(forgets_at):
    """Also at the last chunk."""
    walk = iter(TruncatedBPTT(torch.arange(STEPS), 4))
    for start in range(0, forgets_at, 4):
        chunk = next(walk)
        assert chunk.start == start
        chunk.state = torch.zeros(1)
    assert next(walk).start == forgets_at
    with pytest.raises(RuntimeError, match=r"^the last turn handed no state back: assign chunk.state, None to begin"):
        next(walk)


def test_none_begins_anew():
    entering = []
    for chunk in TruncatedBPTT(torch.arange(STEPS), 4, torch.ones(1)):
        entering.append(chunk.state)
        chunk.state = torch.full((1,), 2.0) if chunk.start == 4 else None
    assert [state if state is None else state.item() for state in entering] == [1.0, None, 2.0]


def test_what_was_assigned_is_read_back_with_its_graph():
    """A loss on the state itself belongs into its own turn."""
    for chunk in TruncatedBPTT(torch.arange(4), 2):
        assert chunk.state is None or not chunk.state.requires_grad
        chunk.state = state = part()
        assert chunk.state is state
        chunk.state.sum().backward()


def test_a_walk_goes_on_where_another_ended():
    """Also where a loop was left early: with the state that its last turn had handed back."""
    model, x = lstm(), randn(STEPS, ROWS, FEATURES)
    expected, _ = model(x)
    first = TruncatedBPTT(x, 3)
    for chunk in first:
        output, chunk.state = model(chunk.data, chunk.state)
        if chunk.start == 3:
            break
    torch.testing.assert_close(output, expected[3:6], rtol=1e-12, atol=1e-12)
    assert not any(leaf.requires_grad for leaf in leaves_of(first.state))
    for chunk in TruncatedBPTT(x[6:], 5, first.state):
        output, chunk.state = model(chunk.data, chunk.state)
    torch.testing.assert_close(output, expected[6:], rtol=1e-12, atol=1e-12)


def test_a_second_loop_begins_at_the_start():
    walk = TruncatedBPTT(torch.arange(STEPS), 6, torch.zeros(()))
    for _ in range(2):
        seen = []
        for chunk in walk:
            seen.append((chunk.data.tolist(), chunk.state.item()))
            chunk.state = chunk.state + chunk.data.sum()
        assert seen == [([0, 1, 2, 3, 4, 5], 0), ([6, 7, 8, 9, 10], 15)]
        assert walk.state.item() == 55


def test_sizes_are_drawn_one_a_chunk():
    """A function that draws them is called once a chunk, when the chunk begins: no number is drawn ahead."""
    drawn = []

    def draw():
        drawn.append(random.Random(len(drawn)).randint(1, 4))
        return drawn[-1]

    walk = TruncatedBPTT(torch.arange(STEPS), draw)
    assert drawn == []
    sizes = []
    for chunk in walk:
        chunk.state = None
        sizes.append(chunk.size)
        assert len(drawn) == len(sizes)
    assert sum(sizes) == STEPS
    assert sizes[:-1] == drawn[:-1]
    assert len(set(sizes)) > 1


packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])


@pytest.mark.parametrize(
    ("sequence", "error", "message"),
    [
        ({"x": part()}, TypeError, "^sequence should be a tensor, or tuples and lists of them, got: dict$"),
        ((part(), [3]), TypeError, "^sequence should be a tensor, or tuples and lists of them, got: int$"),
        (packed, TypeError, "^sequence should be a tensor, or tuples and lists of them, got: PackedSequence$"),
        ((packed, part()), TypeError, "got: PackedSequence$"),
        ((None, ()), ValueError, "^Expected sequence to hold a tensor, got none$"),
        (torch.tensor(1.0), ValueError, "^Expected tensors that have dim 0, got a 0D one$"),
        (
            (torch.ones(3), torch.ones(4)),
            ValueError,
            "equally many steps, got 3 and 4 along dim 0$",
        ),
        (torch.ones(0, 2), ValueError, "^Expected sequence length to be larger than 0$"),
    ],
)
def test_bad_sequences(sequence, error, message):
    with pytest.raises(error, match=message):
        TruncatedBPTT(sequence, 2)


@pytest.mark.parametrize("dim", [2, -3])
def test_bad_dimensions(dim):
    with pytest.raises(ValueError, match=f"^Expected tensors that have dim {dim}, got a 2D one$"):
        TruncatedBPTT(torch.ones(3, 2), 2, dim=dim)


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", True, None], ids=repr)
def test_bad_sizes(size):
    """At once where they are known, else when their turn comes."""
    bad_int = isinstance(size, int) and not isinstance(size, bool)
    error = ValueError if bad_int else TypeError
    message = f"at least 1, got {size}$" if bad_int else f"^chunk_size should be an int, got: {type(size).__name__}$"
    if not isinstance(size, str):
        with pytest.raises(error, match=message):
            TruncatedBPTT(torch.ones(5), size)
    with pytest.raises(error, match=message):
        TruncatedBPTT(torch.ones(5), [3, size])
    for later in (iter([3, size]), iter([3, size]).__next__):
        walk = iter(TruncatedBPTT(torch.ones(5), later))
        next(walk).state = None
        with pytest.raises(error, match=message):
            next(walk)


def test_sizes_that_end_too_early():
    message = r"^Expected chunk sizes of at least 11 steps together, got 10$"
    with pytest.raises(ValueError, match=message):
        TruncatedBPTT(torch.arange(STEPS), [5, 5])
    walk = iter(TruncatedBPTT(torch.arange(STEPS), iter([5, 5])))
    for start in (0, 5):
        chunk = next(walk)
        assert chunk.start == start
        chunk.state = None
    with pytest.raises(ValueError, match=message):
        next(walk)


def test_bad_states():
    """Where the walk is made, and on the line that assigns one."""
    message = r"^state should be a tensor, None, or tuples and lists of them, got: dict$"
    with pytest.raises(TypeError, match=message):
        TruncatedBPTT(torch.ones(3), 2, {"h": part()})
    chunk = next(iter(TruncatedBPTT(torch.ones(3), 2)))
    with pytest.raises(TypeError, match=message):
        chunk.state = {"h": part()}
