"""NTASGD: its steps and averages in NumPy float64, its trigger by hand, and what an optimiser of torch's must do."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from runs import randn

from fused_lstm.ntasgd import NTASGD

SHAPES = [(3, 4), (5,), ()]


def make_params(shapes=SHAPES, dtype=torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(*shape, seed=seed, dtype=dtype)) for seed, shape in enumerate(shapes)]


def set_grads(params, step: int) -> None:
    for index, param in enumerate(params):
        param.grad = randn(*param.shape, seed=100 * step + index, dtype=param.dtype)


def train(optimizer, params, steps) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def values(params) -> list[np.ndarray]:
    return [param.detach().double().numpy().copy() for param in params]


def trigger(optimizer) -> None:
    """Logs losses that start the averaging."""
    for loss in range(20):
        optimizer.log(float(loss))
    assert optimizer.averaging


def averages(optimizer, params) -> list[np.ndarray]:
    optimizer.swap()
    found = values(params)
    optimizer.swap()
    return found


def assert_close(found, expected, rtol=1e-13) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def mean(iterates: list[list[np.ndarray]]) -> list[np.ndarray]:
    """By parameter."""
    return [np.mean(each, axis=0) for each in zip(*iterates, strict=True)]


def oracle(start, lrs, weight_decays, first) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each step of SGD with gradients as of set_grads, and the mean of the iterates after step `first` and later ones.

    Args:
        lrs: by step; weight_decays: by parameter
    """
    weights, iterates = list(start), []
    for step, lr in enumerate(lrs):
        for index, weight in enumerate(weights):
            gradient = randn(*weight.shape, seed=100 * step + index).numpy()
            weights[index] = weight - lr * (gradient + weight_decays[index] * weight)
        if step >= first:
            iterates.append(list(weights))
    return weights, mean(iterates) or weights


@pytest.mark.parametrize("weight_decay", [0, 0.25])
@pytest.mark.parametrize("first", [0, 4, 9])
def test_steps_and_averages(first, weight_decay):
    """lr is another at each step, as where it is scaled by the length of the sequence."""
    lrs = [0.5 / (1 + step % 3) for step in range(10)]
    params = make_params()
    start = values(params)
    optimizer = NTASGD(params, lr=0.5, weight_decay=weight_decay)
    for step, lr in enumerate(lrs):
        if step == first:
            trigger(optimizer)
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, params, [step])
    weights, means = oracle(start, lrs, [weight_decay] * len(SHAPES), first)
    assert_close(values(params), weights)
    assert_close(averages(optimizer, params), means)
    assert_close(values(params), weights)


def test_before_the_trigger_it_is_torchs_sgd():
    ours, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer = NTASGD(ours, lr=0.1, weight_decay=0.3)
    train(optimizer, ours, range(5))
    train(torch.optim.SGD(theirs, lr=0.1, weight_decay=0.3), theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        assert a.equal(b)
    assert not optimizer.state


def test_groups_have_their_own_rates():
    params = make_params()
    start = values(params)
    groups = [{"params": params[:1], "lr": 0.2}, {"params": params[1:], "weight_decay": 0.5}]
    optimizer = NTASGD(groups, lr=0.4, n=2, weight_decay=0.125)
    trigger(optimizer)
    train(optimizer, params, range(4))
    slow = oracle(start, [0.2] * 4, [0.125] * 3, 0)
    fast = oracle(start, [0.4] * 4, [0.5] * 3, 0)
    weights, means = ([*a[:1], *b[1:]] for a, b in zip(slow, fast, strict=True))
    assert_close(values(params), weights)
    assert_close(averages(optimizer, params), means)


def test_an_lr_tensor():
    params, twins = make_params(), make_params()
    train(NTASGD(params, torch.tensor(0.25)), params, range(3))
    train(NTASGD(twins, 0.25), twins, range(3))
    assert_close(values(params), values(twins))


def test_a_parameter_without_gradient_stays_and_is_averaged():
    """Its value after each step is an iterate as well, though it was another's gradient that moved."""
    params = make_params()
    optimizer = NTASGD(params, lr=0.1)
    trigger(optimizer)
    iterates = []
    for step in range(4):
        set_grads(params, step)
        if step % 2 == 0:
            params[0].grad = None
        before = values(params)
        optimizer.step()
        iterates.append(values(params))
        assert (iterates[-1][0] == before[0]).all() == (step % 2 == 0)
        assert (iterates[-1][1] != before[1]).all()
    assert_close(averages(optimizer, params), mean(iterates))


def by_the_paper(logged: list[float], n: int) -> int | None:
    """The index of the loss that starts the averaging: t > n and v above the best of logs but for its last n."""
    logs = []
    for index, v in enumerate(logged):
        t = len(logs)
        earlier = [logs[k] for k in range(t) if k < t - n]
        if t > n and v > min(earlier):
            return index
        logs.append(v)
    return None


@pytest.mark.parametrize("n", [0, 1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_trigger_rule(n, seed):
    losses = (np.random.default_rng(seed).normal(size=14) * 0.3 - 0.1 * np.arange(14)).tolist()
    optimizer = NTASGD(make_params(), lr=1, n=n)
    started = [optimizer.log(loss) or optimizer.averaging for loss in losses]
    expected = by_the_paper(losses, n)
    assert started == [expected is not None and index >= expected for index in range(len(losses))]


@pytest.mark.parametrize(
    ("n", "losses", "index"),
    [
        (5, [9, 8, 7, 6, 5, 4, 10], 6),  # the first that can start it: above 9
        (5, [9, 8, 7, 6, 5, 4, 9], None),  # as good as the best is not above it
        (5, [9, 8, 7, 6, 5, 4, 8.5], None),  # above all of the last five, and below the one before them
        (5, [1, 2, 3, 4, 5, 6], None),  # too early: five logged before the sixth
        (2, [3, 1, 5, 2, 1.5], 4),  # above 1, which the fourth did not have to beat yet
        (2, [3, 1, 5, 0.5, 1], None),  # the best is one of the last two
        (0, [3, 2, 2, 1, 1.5], 4),
        (0, [3, 3.5], 1),
        (1, [2, 1, math.inf], 2),
        (1, [math.inf, math.inf, math.inf, 5], None),
    ],
)
def test_trigger_examples(n, losses, index):
    assert by_the_paper(losses, n) == index
    optimizer = NTASGD(make_params(), lr=1, n=n)
    for number, loss in enumerate(losses):
        assert not optimizer.averaging
        optimizer.log(loss)
        assert optimizer.averaging == (number == index)
        if optimizer.averaging:
            break


def test_the_default_n_is_the_papers():
    assert NTASGD(make_params(), lr=1).param_groups[0]["n"] == 5


def test_averaging_goes_on_when_losses_get_better():
    params = make_params()
    start = values(params)
    optimizer = NTASGD(params, lr=0.5)
    trigger(optimizer)
    for step in range(6):
        train(optimizer, params, [step])
        optimizer.log(-float(step))
        assert optimizer.averaging
    assert_close(averages(optimizer, params), oracle(start, [0.5] * 6, [0, 0, 0], 0)[1])


@pytest.mark.parametrize("number", [2.5, 2, np.float32(2.5), torch.tensor(2.5), torch.tensor([2.5])], ids=repr)
def test_losses_are_any_numbers(number):
    optimizer = NTASGD(make_params(), lr=1, n=0)
    optimizer.log(1.75)
    optimizer.log(number)
    assert optimizer.averaging
    assert optimizer.param_groups[0]["losses"] == (1.75, float(number))
    assert type(optimizer.param_groups[0]["losses"][1]) is float


@pytest.mark.parametrize("nan", [math.nan, torch.tensor(math.nan), np.float64("nan")], ids=repr)
def test_a_nan_loss_is_an_error(nan):
    optimizer = NTASGD(make_params(), lr=1, n=0)
    optimizer.log(1.0)
    with pytest.raises(ValueError, match=r"^Expected validation_loss to be a number, got nan$"):
        optimizer.log(nan)
    assert optimizer.param_groups[0]["losses"] == (1.0,)
    assert not optimizer.averaging


@pytest.mark.parametrize("bad", ["2.5", None, True, [2.5], torch.ones(2), 1j], ids=repr)
def test_a_loss_that_is_no_number_is_an_error(bad):
    optimizer = NTASGD(make_params(), lr=1)
    with pytest.raises(TypeError, match=f"^validation_loss should be a number, got: {type(bad).__name__}$"):
        optimizer.log(bad)


def test_swapping_twice_is_the_identity():
    params = make_params(dtype=torch.float32)
    optimizer = NTASGD(params, lr=0.1)
    trigger(optimizer)
    train(optimizer, params, range(7))
    weights, addresses = values(params), [param.data_ptr() for param in params]
    optimizer.swap()
    means = values(params)
    assert all((a != b).all() for a, b in zip(weights, means, strict=True))
    assert optimizer.swapped
    optimizer.swap()
    assert not optimizer.swapped
    for a, b in zip(values(params), weights, strict=True):
        assert (a == b).all()
    for a, b in zip(averages(optimizer, params), means, strict=True):
        assert (a == b).all()
    assert [param.data_ptr() for param in params] == addresses
    assert {key for state in optimizer.state.values() for key in state} == {"count", "average"}  # no third copy stays


def test_swap_before_averaging_changes_no_number():
    params = make_params()
    optimizer = NTASGD(params, lr=0.1)
    train(optimizer, params, range(2))
    before = values(params)
    for _ in range(3):
        optimizer.swap()
        assert_close(values(params), before, rtol=0)
    assert optimizer.swapped


@pytest.mark.parametrize("averaging", [False, True])
def test_no_step_while_swapped(averaging):
    """Before averaging too: a forgotten swap shows at once. The closure is not called."""
    params = make_params()
    optimizer = NTASGD(params, lr=0.1)
    if averaging:
        trigger(optimizer)
    train(optimizer, params, range(2))
    optimizer.swap()
    before = values(params)
    with pytest.raises(RuntimeError, match=r"^NTASGD cannot step while the averages are swapped in: "):
        optimizer.step(lambda: pytest.fail("called"))
    assert_close(values(params), before, rtol=0)
    optimizer.swap()
    optimizer.step()


def test_averaging_that_starts_between_swaps():
    """The loss of an evaluation is logged before the weights are back."""
    params = make_params()
    start = values(params)
    optimizer = NTASGD(params, lr=0.5)
    train(optimizer, params, range(3))
    optimizer.swap()
    trigger(optimizer)
    optimizer.swap()
    train(optimizer, params, range(3, 8))
    weights, means = oracle(start, [0.5] * 8, [0, 0, 0], 3)
    assert_close(values(params), weights)
    assert_close(averages(optimizer, params), means)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    """The mean of 3000 values near 1 and 2: in half precision it stood still at the first few hundred."""
    param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = NTASGD([param], lr=1)
    trigger(optimizer)
    for step in range(3000):
        param.grad = torch.full_like(param, -1.0 if step == 1000 else 0.0)
        optimizer.step()
    assert param.eq(2).all()
    average = optimizer.state[param]["average"]
    assert average.dtype == torch.float32
    np.testing.assert_allclose(average.numpy(), (1000 * 1 + 2000 * 2) / 3000, rtol=1e-4)
    optimizer.swap()
    assert param.equal(average.to(dtype))
    optimizer.swap()
    assert param.eq(2).all()
    loaded = NTASGD([copy.deepcopy(param)], lr=1)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[loaded.param_groups[0]["params"][0]]["average"].equal(average)


def test_one_group_of_several_dtypes():
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.half)]
    optimizer = NTASGD(params, lr=0.5, weight_decay=0.5)
    trigger(optimizer)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        assert param.eq(-0.3125).all()  # 1 - 0.5 * 1.5 = 0.25, 0.25 - 0.5 * 1.125
    assert_close(averages(optimizer, params), [np.full(3, -0.03125)] * 3)


def test_closure():
    """Called once with gradients enabled, its value is returned."""
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = NTASGD([param], lr=0.25)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 9.0
    assert calls == [True]
    assert param.item() == 1.5
    assert optimizer.step() is None


def test_sparse_gradients_are_refused_before_anything_changes():
    dense, embedding = torch.nn.Parameter(torch.ones(2)), torch.nn.Embedding(5, 2, sparse=True)
    optimizer = NTASGD([dense, *embedding.parameters()], lr=1)
    trigger(optimizer)
    (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match=r"^NTASGD does not support sparse gradients$"):
        optimizer.step()
    assert dense.eq(1).all()
    assert not optimizer.state
    optimizer.zero_grad()
    assert dense.grad is None
    optimizer.step()


BAD_ARGUMENTS = [
    ({"lr": -0.1}, "^Invalid learning rate: -0.1$"),
    ({"lr": math.nan}, "^Invalid learning rate: nan$"),
    ({"lr": 1, "weight_decay": -1}, "^Invalid weight_decay value: -1$"),
    ({"lr": 1, "weight_decay": math.nan}, "^Invalid weight_decay value: nan$"),
    *(({"lr": 1, "n": n}, f"^Invalid n: {n!r}$") for n in (-1, 2.0, True, None)),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NTASGD(make_params(), **arguments)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1}, "^Invalid learning rate: -1$"),
        ({"weight_decay": -1}, "^Invalid weight_decay value: -1$"),
        ({"n": 3}, "^Expected one n for all groups, 5, got 3$"),
    ],
    ids=str,
)
def test_bad_groups(group, message):
    params = make_params()
    optimizer = NTASGD(params[:1], lr=1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **group})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match=r"^param_group must be a dict"):
        optimizer.add_param_group(params[1:])


def test_a_group_added_late():
    """Its averages start with it, while the others' go on."""
    params = make_params()
    start = values(params)
    optimizer = NTASGD(params[:1], lr=0.5, n=2)
    trigger(optimizer)
    train(optimizer, params, range(3))
    optimizer.swap()
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.param_groups[1]["losses"] == optimizer.param_groups[0]["losses"] != ()
    assert_close(values(params[1:]), start[1:], rtol=0)
    with pytest.raises(RuntimeError, match="swapped in"):
        optimizer.step()
    optimizer.swap()
    iterates = []
    for step in range(3, 6):
        train(optimizer, params, [step])
        iterates.append(values(params[1:]))
    assert_close(averages(optimizer, params)[:1], oracle(start[:1], [0.5] * 6, [0], 0)[1])
    assert_close(averages(optimizer, params)[1:], mean(iterates))
    first, second = ({**group, "params": None} for group in optimizer.param_groups)
    assert first == second


def test_an_lr_scheduler():
    params, twins = make_params(), make_params()
    optimizer, twin = NTASGD(params, lr=1.0), NTASGD(twins, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(4):
        train(optimizer, params, [step])
        scheduler.step()
        twin.param_groups[0]["lr"] = 0.5**step
        train(twin, twins, [step])
    assert_close(values(params), values(twins))


def test_named_parameters():
    module = torch.nn.Linear(2, 3)
    optimizer = NTASGD(module.named_parameters(), lr=1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


LOSSES = [5.0, 4.0, 3.0, 3.5, 2.0, 2.5, 3.0, 3.2, 1.0]  # with n = 2, the eighth starts the averaging


def trained(steps: int) -> tuple[NTASGD, list[torch.nn.Parameter]]:
    params = make_params()
    optimizer = NTASGD([{"params": params[:2]}, {"params": params[2:], "lr": 0.25}], lr=0.5, n=2, weight_decay=0.1)
    go_on(optimizer, params, range(steps))
    return optimizer, params


def go_on(optimizer, params, steps) -> None:
    for step in steps:
        train(optimizer, params, [step])
        optimizer.log(LOSSES[step % len(LOSSES)])


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("steps", [0, 4, 8, 12], ids=lambda steps: f"after {steps}")
def test_a_run_is_taken_up_where_it_ended(steps, swapped):
    """To the bit: the state_dict in a fresh optimiser over fresh parameters, through a file, swapped in or not."""
    assert [index for index in range(9) if trained(index)[0].averaging][:1] == [8]
    optimizer, params = trained(steps)
    if swapped:
        optimizer.swap()
    saved = through_a_file({"params": params, "optimizer": optimizer.state_dict()})
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in saved["params"]]
    loaded = NTASGD([{"params": fresh[:2]}, {"params": fresh[2:]}], lr=77, n=9)
    loaded.load_state_dict(saved["optimizer"])
    assert loaded.swapped == swapped
    assert loaded.averaging == (steps >= 8)
    for run, its_params in ((optimizer, params), (loaded, fresh)):
        if swapped:
            run.swap()
        go_on(run, its_params, range(steps, 15))
        assert run.averaging
    assert_close(values(fresh), values(params), rtol=0)
    assert_close(averages(loaded, fresh), averages(optimizer, params), rtol=0)
    assert [group["n"] for group in loaded.param_groups] == [2, 2]


def test_loading_shares_nothing():
    """Two optimisers, one from the other's state_dict, do not write into each other's averages."""
    optimizer, params = trained(12)
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded = NTASGD([{"params": fresh[:2]}, {"params": fresh[2:]}], lr=1)
    loaded.load_state_dict(optimizer.state_dict())
    before = averages(loaded, fresh)
    go_on(optimizer, params, range(12, 15))
    assert_close(averages(loaded, fresh), before, rtol=0)
    assert len(loaded.param_groups[0]["losses"]) == 12


def test_sgds_state_is_taken_up():
    params = make_params()
    sgd = torch.optim.SGD(params, lr=0.5)
    train(sgd, params, range(3))
    optimizer = NTASGD(params, lr=1, n=3)
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["n"] == 3
    assert not optimizer.averaging
    trigger(optimizer)
    train(optimizer, params, range(3, 5))
    assert_close(averages(optimizer, params), oracle(values(make_params()), [0.5] * 5, [0, 0, 0], 3)[1])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies(copied):
    pair = trained(12)
    optimizer, params = copied(pair)
    assert optimizer.param_groups[0]["params"][0] is params[0]
    go_on(optimizer, params, range(12, 15))
    go_on(*pair, range(12, 15))
    assert_close(averages(optimizer, params), averages(*pair), rtol=0)
    assert_close(values(params), values(pair[1]), rtol=0)


def test_a_skipped_step_of_a_gradient_scaler_is_no_iterate():
    params = make_params(dtype=torch.float32)
    optimizer = NTASGD(params, lr=0.5)
    trigger(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    iterates = []
    for step in range(3):
        set_grads(params, step)
        for param in params:
            param.grad *= math.inf if step == 1 else scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            iterates.append(values(params))
    assert_close(averages(optimizer, params), mean(iterates), rtol=1e-6)


def test_training_evaluation_training():
    """A small LSTM, ten epochs: its weights are SGD's throughout, and once triggered it is evaluated at the mean of
    the weights after each step since. A twin under torch's SGD keeps all its iterates and the books."""
    torch.manual_seed(0)
    model = torch.nn.LSTM(3, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    optimizer, sgd = NTASGD(model.parameters(), lr=1.0, n=1), torch.optim.SGD(twin.parameters(), lr=1.0)

    def loss_of(run, x):
        return (run(x)[0] - x.sum(-1, keepdim=True)).square().mean()

    iterates, evaluated, expected = [], [], []
    for epoch in range(10):
        for step in range(3):
            x = randn(6, 2, 3, seed=10 * epoch + step)
            for trained_model, its_optimizer in ((model, optimizer), (twin, sgd)):
                its_optimizer.zero_grad()
                loss_of(trained_model, x).backward()
                its_optimizer.step()
            if by_the_paper(expected, 1) is not None:
                iterates.append(values(twin.parameters()))
        x = randn(6, 2, 3, seed=1000 + epoch)
        optimizer.swap()
        with torch.no_grad():
            evaluated.append(loss_of(model, x).item())
        optimizer.log(evaluated[-1])
        optimizer.swap()
        weights = mean(iterates) or values(twin.parameters())
        state = dict(zip(dict(twin.named_parameters()), map(torch.from_numpy, weights), strict=True))
        expected.append(loss_of(lambda x, state=state: torch.func.functional_call(twin, state, x), x).item())
        np.testing.assert_allclose(evaluated, expected, rtol=1e-10)
        assert_close(values(model.parameters()), values(twin.parameters()), rtol=1e-10)
    assert 3 < len(iterates) < 30  # triggered, and not at once
