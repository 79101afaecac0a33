"""Modules with options, and how they and the oracle are run on the same numbers, masks included."""

from typing import NamedTuple

import torch
import variant_oracle as oracle
from runs import randn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from variant_oracle import Drawn, Masks

import fused_lstm
from fused_lstm import _run

BACKENDS = ["reference"]  # on which everything is shown
KERNELS = ["stepwise"]  # on which it is shown in test_variants_on_kernels
RESULTS = ("output", "h_n", "c_n")
KINDS = ["batched", "unbatched", "lengths", "packed"]  # of input
STEPS, ROWS, LENGTHS = 5, 3, [2, 4, 1]
H = 4
SIZES = {"input_size": 3, "hidden_size": H}
_draw, _dropout = _run.draw, fused_lstm.LSTM._dropout

NORMS = {  # the parameters of each layer_norm, with their sizes
    None: {},
    "gates": {"norm_gates_weight": 4 * H, "norm_gates_bias": 4 * H, "norm_cell_weight": H, "norm_cell_bias": H},
    "projections": {"norm_ih_weight": 4 * H, "norm_hh_weight": 4 * H, "norm_cell_weight": H, "norm_cell_bias": H},
    "projections_cell": {
        **{"norm_ih_weight": 4 * H, "norm_hh_weight": 4 * H, "norm_cell_weight": H, "norm_cell_bias": H},
        **{"norm_ih_bias": 4 * H, "norm_hh_bias": 4 * H},
    },
}
DRAWING = {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.3, "weight_dropout": 0.3}
VARIANTS = {
    "gates": {"layer_norm": "gates"},
    "projections": {"layer_norm": "projections"},
    "projections_cell": {"layer_norm": "projections_cell"},
    "peephole": {"peephole": True},
    "zoneout": {"zoneout": (0.3, 0.2)},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_dropout": {"weight_dropout": 0.3},
    "locked_dropout": {"num_layers": 2, "dropout": 0.3, "locked_dropout": True},
    "recompute": {"recompute": True, "peephole": True},
    **{
        f"all_{name}": {
            **{"layer_norm": name, "peephole": True, **DRAWING, "recompute": True, "num_layers": 2, "proj_size": 2},
            **{"dropout": 0.3, "locked_dropout": True},
        }
        for name in NORMS
    },
}


def build(device="cpu", dtype=torch.float64, seed=0, **options) -> fused_lstm.LSTM:
    """A module whose parameters are all random: no norm starts at one and zero."""
    module = fused_lstm.LSTM(**{**SIZES, **options}, device=device, dtype=dtype)
    return scramble(module, seed)


@torch.no_grad()
def scramble(module, seed=0):
    for index, (name, parameter) in enumerate(module.named_parameters()):
        shift = 1.0 if "norm" in name and "weight" in name else 0.0
        parameter.copy_(shift + 0.5 * randn(*parameter.shape, seed=100 * seed + index))
    return module


def cell_of(variant, device, **more) -> fused_lstm.LSTMCell:
    """A random cell with those of a variant's options that a cell takes."""
    options = {name: variant[name] for name in ("layer_norm", "peephole", "zoneout") if name in variant}
    return scramble(fused_lstm.LSTMCell(3, H, **options, **more, device=device, dtype=torch.float64))


def record(monkeypatch) -> Drawn:
    """From now on, and until the next call of this function, everything that modules draw in training."""
    drawn = Drawn([], [])

    def recording_draw(*args):
        draws = _draw(*args)
        options, training = args[:2]
        if training:
            weight = draws.weight_hh != 0 if options.weight_dropout > 0 else None
            recurrent = None if draws.recurrent_mask is None else draws.recurrent_mask != 0
            drawn.masks.append(Masks(weight, recurrent, draws.zoneout_h, draws.zoneout_c))
        return draws

    def recording_dropout(self, output, packing):
        if self.training and self.dropout > 0:
            with torch.random.fork_rng():
                drawn.between.append(_dropout(self, torch.ones_like(output), packing).detach() != 0)
        return _dropout(self, output, packing)

    monkeypatch.setattr(_run, "draw", recording_draw)
    monkeypatch.setattr(fused_lstm.LSTM, "_dropout", recording_dropout)
    return drawn


class Call(NamedTuple):
    """The arguments of a forward, leaves that want gradients; in the layout that the module takes.

    kind: one of KINDS
    """

    kind: str
    input: Tensor
    hx: tuple[Tensor, Tensor] | None
    reset: Tensor | None
    reset_state: tuple[Tensor, Tensor] | None
    lengths: list[int] | None

    def leaves(self, module) -> dict[str, Tensor]:
        found = {"input": self.input}
        for name, states in (("h_0 c_0", self.hx), ("reset_h reset_c", self.reset_state)):
            found.update(zip(name.split(), states or (), strict=states is not None))
        return {**found, **dict(module.named_parameters())}

    def keywords(self) -> dict:
        """What forward and states are given beside input and hx."""
        found = {"reset": self.reset, "reset_state": self.reset_state}
        if self.kind == "lengths":
            found["lengths"] = torch.tensor(self.lengths, device=self.input.device)
        return {name: value for name, value in found.items() if value is not None}

    def given(self, module) -> Tensor | PackedSequence:
        """The input as forward and states take it."""
        if self.kind != "packed":
            return self.input
        return pack_padded_sequence(self.input, self.lengths, module.batch_first, enforce_sorted=False)

    def time_major(self, batch_first: bool) -> dict:
        """The oracle's arguments."""

        def turned(x, unbatched_dim=1):
            if x is None or self.kind == "unbatched":
                return None if x is None else x.unsqueeze(unbatched_dim)
            return x.transpose(0, 1) if batch_first else x

        def batched(states):
            return [s.unsqueeze(1) for s in states] if states is not None and self.kind == "unbatched" else states

        return {
            "input": turned(self.input),
            "hx": batched(self.hx),
            "reset": turned(self.reset),
            "reset_state": batched(self.reset_state),
            "lengths": self.lengths,
        }


def make_call(module, kind="batched", *, hx=True, reset=False, reset_state=False, steps=STEPS, rows=ROWS) -> Call:
    """Random arguments; with reset, some rows are reset, one of them at step 0."""
    weight = next(module.parameters())
    options = {"dtype": weight.dtype, "device": weight.device, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if kind == "unbatched" else (rows,)
    shape = (*batch, steps) if module.batch_first else (steps, *batch)
    sizes = [(count, *batch, module.proj_size or module.hidden_size), (count, *batch, module.hidden_size)]
    at = None
    if reset:
        at = torch.rand((steps, rows), generator=torch.Generator().manual_seed(8)) < 0.4
        at[:, :1] = False
        at[[0, steps // 2], :1] = True
        at = at[:, 0] if kind == "unbatched" else at.t() if module.batch_first else at
    return Call(
        kind,
        randn(*shape, module.input_size, seed=1, **options),
        tuple(randn(*size, seed=2 + i, **options) for i, size in enumerate(sizes)) if hx else None,
        None if at is None else at.to(weight.device),
        tuple(randn(*size, seed=4 + i, **options) for i, size in enumerate(sizes)) if reset_state else None,
        LENGTHS if kind in ("lengths", "packed") else None,
    )


def gradients(results: list[Tensor], leaves: dict[str, Tensor], seed=20) -> dict[str, Tensor]:
    """From a random gradient of each result; zeros where there is none."""
    given = [randn(*r.shape, seed=seed + i, dtype=r.dtype, device=r.device) for i, r in enumerate(results)]
    found = torch.autograd.grad(results, list(leaves.values()), given, allow_unused=True, retain_graph=True)
    return {
        f"d_{name}": torch.zeros_like(leaf) if d is None else d
        for (name, leaf), d in zip(leaves.items(), found, strict=True)
    }


def run(module, call: Call, states=False, seed=9) -> dict[str, Tensor]:
    """Forward, or states, and backward of the module: results, padded again if packed, and all gradients."""
    torch.manual_seed(seed)
    if states:
        found = dict(zip("hc", module.states(call.given(module), call.hx, **call.keywords()), strict=True))
    else:
        output, (h_n, c_n) = module(call.given(module), call.hx, **call.keywords())
        if isinstance(output, PackedSequence):
            steps = call.input.size(1 if module.batch_first else 0)
            output, _ = pad_packed_sequence(output, module.batch_first, total_length=steps)
        found = {"output": output, "h_n": h_n, "c_n": c_n}
    return {**found, **gradients(list(found.values()), call.leaves(module))}


def run_oracle(module, call: Call, drawn: Drawn | None = None, states=False) -> dict[str, Tensor]:
    """The same of the oracle, in the same layout."""
    if drawn is not None and call.kind == "packed":  # it draws for the rows in the order of their lengths
        drawn = drawn.rows(call.given(module).unsorted_indices)
    found = oracle.lstm(module, **call.time_major(module.batch_first), drawn=drawn)
    if states:
        found = {name: found[name] for name in "hc"}
        if call.kind == "packed":
            found = {name: state[:, : max(call.lengths)] for name, state in found.items()}
        if module.batch_first and call.kind != "unbatched":
            found = {name: state.transpose(1, 2) for name, state in found.items()}
    else:
        found = {name: found[name] for name in RESULTS}
        if module.batch_first and call.kind != "unbatched":
            found["output"] = found["output"].transpose(0, 1)
    if call.kind == "unbatched":
        found = {name: r.squeeze(2 if states else 1) for name, r in found.items()}
    return {**found, **gradients(list(found.values()), call.leaves(module))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance=1e-10) -> None:
    """|actual - expected| <= tolerance * max(1, max|expected|) for each of the numbers; NaN fails."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == value.dtype, name
        if value.numel() > 0:
            error = (actual[name] - value).abs().max().item()
            assert error <= tolerance * max(1.0, value.abs().max().item()) < float("inf"), f"{name}: {error:.1e}"


def assert_near(found, expected, tolerance) -> None:
    """The same in a low precision; also of some of the numbers."""
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), name


def assert_start(module, names) -> None:
    """Norm weights are 1, their biases 0, peepholes uniform."""
    for name in names:
        value = getattr(module, name)
        if name.startswith("weight_ph"):
            assert (value.abs() <= H**-0.5).all()
            assert value.unique().numel() == value.numel()
        else:
            assert (value == (1 if "weight" in name else 0)).all()


def torchs(**options) -> torch.nn.LSTM:
    """torch's module of the same sizes."""
    return torch.nn.LSTM(**SIZES, **options, dtype=torch.float64)
