"""Every option of the cell on a GPU, on both kinds of kernels: real sizes, against the reference in float64."""

import copy

import pytest
import torch
from tolerance import assert_as_accurate

import fused_lstm
from fused_lstm import _run

pytestmark = pytest.mark.gpu

STEPS = 63
VARIANTS = {
    "gates": {"layer_norm": "gates"},
    "projections": {"layer_norm": "projections"},
    "projections_cell": {"layer_norm": "projections_cell"},
    "peephole": {"peephole": True},
    "zoneout": {"zoneout": (0.1, 0.2)},
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "weight_dropout": {"weight_dropout": 0.5},
    "reset": {},
    "lengths": {},
    "elementwise": {"peephole": True, "zoneout": 0.1, "recurrent_dropout": 0.25},
    "all": {
        "layer_norm": "gates",
        "peephole": True,
        "zoneout": (0.1, 0.1),
        "recurrent_dropout": 0.25,
        "recompute": True,
    },
    "all_of_projections": {"layer_norm": "projections", "peephole": True, "zoneout": (0.1, 0.1), "recompute": True},
    "both_directions": {"layer_norm": "projections_cell", "bidirectional": True, "recurrent_dropout": 0.25},
}
RESETS = ("reset", "elementwise", "all", "all_of_projections")
LENGTHS = ("lengths", "all", "both_directions")
# every variant here; the telling ones in the other sizes too: each case compiles kernels, and that takes seconds
CASES = [
    *((name, torch.bfloat16, 16, 512) for name in VARIANTS),
    *((name, torch.float32, 65, 500) for name in VARIANTS),
    *((name, torch.float16, 64, 512) for name in ("gates", "elementwise")),
    *(
        (name, torch.bfloat16, *size)
        for name in ("gates", "projections_cell", "elementwise", "all")
        for size in ((3, 100), (64, 1024), (16, 40))
    ),
]


class Replay:
    """What the first run draws, for all others, in their dtype."""

    def __init__(self, monkeypatch) -> None:
        self._draw, self._drawn, self._next = _run.draw, [], None
        monkeypatch.setattr(_run, "draw", self)

    def again(self) -> None:
        self._next = iter(self._drawn)

    def __call__(self, options, training, weight_hh, steps, h0, c0):
        if self._next is None:
            found = self._draw(options, training, torch.ones_like(weight_hh), steps, h0, c0)
            self._drawn.append(found)
        else:
            found = next(self._next)
        mask = None if found.recurrent_mask is None else found.recurrent_mask.to(h0.dtype)
        return found._replace(weight_hh=weight_hh * found.weight_hh.to(weight_hh.dtype), recurrent_mask=mask)


def build(name, backend, batch_size, hidden_size, dtype, device="cuda"):
    torch.manual_seed(0)
    module = fused_lstm.LSTM(64, hidden_size, device=device, dtype=dtype, backend=backend, **VARIANTS[name])
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    directions = 2 if module.bidirectional else 1
    state = (directions, batch_size, hidden_size)
    arguments = {"hx": tuple(torch.randn(state, device=device, dtype=dtype) for _ in range(2))}
    if name in RESETS:
        arguments["reset"] = torch.rand(STEPS, batch_size, device=device) < 0.1
        arguments["reset_state"] = tuple(torch.randn(state, device=device, dtype=dtype) for _ in range(2))
    if name in LENGTHS:
        arguments["lengths"] = torch.randint(1, STEPS + 1, (batch_size,))
    return module, torch.randn(STEPS, batch_size, 64, device=device, dtype=dtype), arguments


def train(module, input, arguments) -> dict[str, torch.Tensor]:
    """The results, and the gradients of everything that has one."""
    dtype = module.weight_ih_l0.dtype

    def leaf(tensor):
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    leaves = {"input": leaf(input)}
    given = dict(arguments)
    for name in ("hx", "reset_state"):
        if name in given:
            given[name] = tuple(leaf(state) for state in given[name])
            leaves |= {f"{name}[{index}]": state for index, state in enumerate(given[name])}
    output, (h_n, c_n) = module(leaves["input"], given.pop("hx"), **given)
    generator = torch.Generator(input.device).manual_seed(1)
    weights = [torch.randn(r.shape, generator=generator, device=r.device) for r in (output, h_n, c_n)]
    loss = sum((r * w.to(dtype)).sum() for r, w in zip((output, h_n, c_n), weights, strict=True))
    leaves |= dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    return found | {f"gradient of {name}": d for name, d in zip(leaves, gradients, strict=True)}


def runs_here(backend, module, batch_size) -> bool:
    """False where no grid fits this device, which it must say."""
    reason = None
    try:
        fused_lstm.select_backend(
            backend,
            device=module.weight_ih_l0.device,
            dtype=module.weight_ih_l0.dtype,
            hidden_size=module.hidden_size,
            batch_size=batch_size,
            layer_norm=module.layer_norm,
        )
    except ValueError as error:
        reason = str(error)
    assert reason is None or backend == "persistent"
    assert reason is None or "more than" in reason or "does not fit" in reason
    return reason is None


@pytest.mark.parametrize("backend", ["stepwise", "persistent"])
@pytest.mark.parametrize(("name", "dtype", "batch_size", "hidden_size"), CASES, ids=str)
def test_as_accurate_as_the_reference(name, dtype, batch_size, hidden_size, backend, monkeypatch):
    module, input, arguments = build(name, backend, batch_size, hidden_size, dtype)
    if not runs_here(backend, module, batch_size):
        return
    replay = Replay(monkeypatch)
    actual = train(module, input, arguments)
    replay.again()
    same = copy.deepcopy(module)
    same.backend = "reference"
    same_dtype = train(same, input, arguments)
    replay.again()
    exact = train(same.double(), input, arguments)
    for result, value in exact.items():
        try:
            assert_as_accurate(actual[result], same_dtype[result], value)
        except AssertionError as error:
            raise AssertionError(f"{result}: {error}") from None


@pytest.mark.parametrize("backend", ["stepwise", "persistent"])
@pytest.mark.parametrize("name", VARIANTS)
def test_many_launches_give_the_same_bits(name, backend):
    module, input, arguments = build(name, backend, 16, 256, torch.bfloat16)
    found = []
    for _ in range(100):
        torch.manual_seed(3)
        found.append(train(module, input, arguments))
    for result, value in found[0].items():
        assert all(torch.equal(other[result], value) for other in found[1:]), result


@pytest.mark.parametrize("backend", ["stepwise", "persistent"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in LENGTHS])
def test_never_waits_for_the_device(name, backend):
    module, input, arguments = build(name, backend, 16, 256, torch.bfloat16)
    train(module, input, arguments)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(module, input, arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
