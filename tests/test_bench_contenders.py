"""Every contender does the same work on the same numbers: what autograd says it is."""

import sys
import types

import pytest
import torch

import fused_lstm
from fused_lstm.bench import contenders as module
from fused_lstm.bench.contenders import (
    CELL_LOOP,
    TORCH,
    CannotRun,
    Model,
    Step,
    chosen_backends,
    contenders_for,
    exact_step,
)
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.workload import Case, Workload

CASE = Case(hidden_size=12, batch_size=5, steps=6, input_size=7)
STACK = Case(hidden_size=12, batch_size=5, steps=6, input_size=7, layers=2, bidirectional=True)


def step_of(contender, workload):
    return Step(contender.build(workload), workload)


def autograd(workload):
    """torch.nn.LSTM's results and, by backward() of the scalar product with the upstream gradients, its gradients."""
    lstm = workload.case.lstm()
    lstm.load_state_dict(workload.weights)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in workload.leaves]
    output, (h_n, c_n) = lstm(leaves[0], (leaves[1], leaves[2]))
    results = output, h_n, c_n
    sum((result * upstream).sum() for result, upstream in zip(results, workload.upstream, strict=True)).backward()
    named = dict(zip(("output", "h_n", "c_n"), results, strict=True))
    named |= {f"gradient of {name}": leaf.grad for name, leaf in zip(("input", "h_0", "c_0"), leaves, strict=True)}
    return named | {f"gradient of {name}": parameter.grad for name, parameter in lstm.named_parameters()}


@pytest.mark.parametrize("case", [CASE, STACK], ids=["one layer", "stack"])
@pytest.mark.parametrize("name", [TORCH, CELL_LOOP, "fused_lstm reference"])
def test_a_step_is_what_autograd_says(name, case):
    workload = Workload.draw(case, seed=1)
    [contender] = (c for c in contenders_for(case, ["reference"]) if c.name == name)
    step = step_of(contender, workload)
    expected = autograd(workload)
    assert step.names == tuple(expected)
    for results in (dict(zip(step.names, step(), strict=True)), step.checked()):
        for quantity, value in expected.items():
            torch.testing.assert_close(results[quantity], value, rtol=1e-4, atol=1e-5, msg=quantity)


def test_the_exact_step_is_float64_on_the_same_numbers():
    workload = Workload.draw(Case(12, 5, 6, dtype="bfloat16"), seed=2)
    step = exact_step(workload, "cpu")
    exact = dict(zip(step.names, step(), strict=True))
    twin = workload.as_float64("cpu")
    assert {value.dtype for value in exact.values()} == {torch.float64}
    for name, value in autograd(twin).items():
        torch.testing.assert_close(exact[name], value)
    assert torch.equal(twin.input, workload.input.double())


def test_all_read_the_same_tensors_and_refill_gives_fresh_numbers():
    workload = Workload.draw(CASE, seed=3)
    step = step_of(contenders_for(CASE, [])[0], workload)
    before = step()[0].clone()
    address, numbers, weight = workload.input.data_ptr(), workload.input.clone(), workload.weights["weight_hh_l0"]
    kept = weight.clone()
    workload.refill(4)
    assert workload.input.data_ptr() == address
    assert not torch.equal(workload.input, numbers)
    assert torch.equal(weight, kept)
    assert not torch.allclose(step()[0], before)


@pytest.mark.parametrize("name", ["input", "h_0", "c_0", "d_output", "d_h_n", "d_c_n"])
def test_numbers_are_random_in_every_tensor(name):
    values = getattr(Workload.draw(Case(64, 8, 16), seed=5), name).detach()
    assert abs(values.mean().item()) < 0.2
    assert 0.8 < values.std().item() < 1.2
    assert values.unique().numel() > values.numel() / 2


def test_weights_are_drawn_as_torch_draws_them():
    weights = Workload.draw(Case(64, 8, 16), seed=6).weights
    assert list(weights) == [name for name, _ in torch.nn.LSTM(64, 64).named_parameters()]
    for weight in weights.values():
        assert weight.abs().max() <= 1 / 8
        assert weight.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.2)


def test_a_seed_gives_the_same_numbers_again():
    first, second = (Workload.draw(STACK, seed=7) for _ in range(2))
    assert torch.equal(first.d_c_n, second.d_c_n)
    assert torch.equal(first.weights["weight_hh_l1_reverse"], second.weights["weight_hh_l1_reverse"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, [TORCH, "fused_lstm reference", "fused_lstm torch", CELL_LOOP]),
        ({"loop": False}, [TORCH, "fused_lstm reference", "fused_lstm torch"]),
        (
            {"compile_loop": True},
            [TORCH, "fused_lstm reference", "fused_lstm torch", CELL_LOOP, f"{CELL_LOOP} compiled"],
        ),
    ],
)
def test_who_takes_part_on_a_cpu(options, names):
    assert [c.name for c in contenders_for(CASE, ["reference", "torch"], **options)] == names


def test_who_takes_part_on_cuda(monkeypatch):
    installed = {"flashrnn": object(), "torchrl": None}
    monkeypatch.setattr(module.importlib.util, "find_spec", installed.__getitem__)
    case = Case(12, 5, 6, device="cuda")
    assert [(c.name, c.ours, c.graph) for c in contenders_for(case, ["stepwise"])] == [
        (TORCH, False, False),
        ("fused_lstm stepwise", True, False),
        (f"{TORCH} graph", False, True),
        ("fused_lstm stepwise graph", True, True),
        (CELL_LOOP, False, False),
        ("FlashRNN", False, False),
    ]
    few = contenders_for(case, ["stepwise"], graphs=False, loop=False, others=False)
    assert [c.name for c in few] == [TORCH, "fused_lstm stepwise"]


def test_other_libraries_decline_what_they_are_not_compared_in():
    workload = Workload.draw(STACK, seed=8)
    for build in (module._flashrnn, module._torchrl):
        with pytest.raises(CannotRun, match="one layer and direction only"):
            build(workload)


def flashrnn(Wx, R, b, states, function, dtype):
    """FlashRNN's interface: gates (N, T, 4, heads, H), R (4, heads, H, H), states (2, N, 1, heads, H)."""
    assert (function, dtype) == ("lstm", "float32")
    gates = (Wx + b)[:, :, :, 0]
    h, c = states[:, :, 0, 0]
    all_states = []
    for t in range(gates.size(1)):
        i, f, g, o = (gates[:, t] + torch.einsum("ghp,np->ngh", R[:, 0], h)).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        all_states.append(torch.stack((h, c))[:, :, None])
    all_states = torch.stack(all_states, dim=2)  # (2, N, T, heads, H)
    return all_states, all_states[:, :, -1:]


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, *, compute_dtype, input_precision):
    """TorchRL's interface: batch first, h and c (N, T, H) of which the first step is the initial state."""
    assert x.shape[:2] == hidden.shape[:2] == cell.shape[:2] == is_init.shape
    assert not is_init.any()
    assert (compute_dtype, input_precision) == (torch.float32, "tf32")
    weights = {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh, "bias_ih_l0": b_ih, "bias_hh_l0": b_hh}
    lstm = torch.nn.LSTM(x.size(2), hidden.size(2), batch_first=True)
    output, (h, c) = torch.func.functional_call(lstm, weights, (x, (hidden[None, :, 0], cell[None, :, 0])))
    return output, None, h[0], c[0]


@pytest.mark.parametrize(
    ("build", "path", "theirs"),
    [
        (module._flashrnn, "flashrnn.flashrnn", flashrnn),
        (module._torchrl, "torchrl.modules.tensordict_module._rnn_triton", lstm_triton),
    ],
    ids=["FlashRNN", "TorchRL"],
)
def test_other_libraries_are_given_the_same_work(build, path, theirs, monkeypatch):
    """Against stand-ins of their interfaces."""
    names = path.split(".")
    for depth in range(1, len(names) + 1):
        name = ".".join(names[:depth])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[path], theirs.__name__, theirs)
    workload = Workload.draw(CASE, seed=8)
    step = Step(build(workload), workload)
    expected = autograd(workload)
    assert step.names == tuple(expected)
    for quantity, value in zip(step.names, step(), strict=True):
        torch.testing.assert_close(value, expected[quantity], rtol=1e-4, atol=1e-5, msg=quantity)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    def refuse(backend, **_):
        raise ValueError(f"backend {backend!r} cannot run this: no room")

    monkeypatch.setattr(fused_lstm, "select_backend", refuse)
    with pytest.raises(CannotRun, match="cannot run this: no room"):
        contenders_for(CASE, ["reference"])[1].build(Workload.draw(CASE, seed=9))


def test_ours_say_which_backend_runs():
    workload = Workload.draw(CASE, seed=10)
    assert step_of(contenders_for(CASE, ["auto"])[1], workload).backend.name == "torch"
    assert step_of(contenders_for(CASE, ["reference"])[1], workload).backend.name == "reference"
    assert step_of(contenders_for(CASE, [])[0], workload).backend is None


def test_default_backends():
    assert chosen_backends(None, "cpu") == ["reference"]
    kernels = chosen_backends([], "cuda")
    assert "stepwise" in kernels
    assert not {"torch", "reference", "auto"} & set(kernels)
    assert chosen_backends(["torch", "auto", "torch"], "cuda") == ["torch", "auto"]
    with pytest.raises(UserError, match="--backend is 'fast'; give one of auto, "):
        chosen_backends(["reference", "fast"], "cpu")


def test_the_check_runs_in_memory_that_held_nan(monkeypatch):
    """Between two runs, a block of NaN for each result is taken from the allocator and given back."""
    workload = Workload.draw(CASE, seed=11)
    events = []

    def forward(input, h_0, c_0):
        events.append("step")
        return input[..., :1].expand(6, 5, 12) * 1, h_0 * 1, c_0 * 1

    full = torch.full

    def recorded(shape, value, **options):
        events.append((tuple(shape), str(value), options["dtype"]))
        return full(shape, value, **options)

    monkeypatch.setattr(torch, "full", recorded)
    step = Step(Model(forward, {}), workload)
    step.checked()
    shapes = [(6, 5, 12), (1, 5, 12), (1, 5, 12), (6, 5, 7), (1, 5, 12), (1, 5, 12)]
    assert events == ["step", *((shape, "nan", torch.float32) for shape in shapes), "step"]
