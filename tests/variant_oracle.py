"""Every option of the LSTM from its definition alone: one vector a step, one sequence at a time, no batch.

Plain torch operations on float64 vectors, differentiated by autograd. What a module drew is recorded and given to the
oracle. Gates in torch's order: 4H = i | f | g | o.
"""

from typing import NamedTuple

import torch
from runs import randn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_lstm
from fused_lstm import _run

BACKENDS = ["reference"]  # that know every option
_draw, _dropout = _run.draw, fused_lstm.LSTM._dropout
RESULTS = ("output", "h_n", "c_n")


class Masks(NamedTuple):
    """What one layer and direction drew; None is nothing.

    weight (4H, P), recurrent (N, P): what a dropout leaves; zoneout_h (T, N, P), zoneout_c (T, N, H): what keeps its
    old value. In the order of the input's steps, or, with lengths, in the order in which the direction takes them.
    """

    weight: Tensor | None = None
    recurrent: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None


class Drawn(NamedTuple):
    """masks: of each layer and direction, in the order of the parameters; between (T, N, D * P): of each layer but the
    last, what the dropout after it leaves."""

    masks: list[Masks]
    between: list[Tensor]

    def rows(self, order: Tensor) -> "Drawn":
        """The same with the rows of the batch in another order."""
        masks = [
            Masks(own.weight, *(None if mask is None else mask.index_select(mask.dim() - 2, order) for mask in own[1:]))
            for own in self.masks
        ]
        return Drawn(masks, [mask.index_select(1, order) for mask in self.between])


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


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Layer norm of a vector."""
    centred = x - x.mean()
    normal = centred / torch.sqrt((centred * centred).mean() + 1e-5) * weight
    return normal if bias is None else normal + bias


def scale(kept: Tensor, rate: float) -> Tensor:
    """The factors of an inverted dropout."""
    return kept.double() / (1 - rate) if rate < 1 else torch.zeros_like(kept, dtype=torch.float64)


def cell(x: Tensor, h: Tensor, c: Tensor, own: dict[str, Tensor], layer_norm: str | None, factor=1) -> tuple:
    """One step of one sequence, x (I,), h (P,), c (H,), to the new h and c, which zoneout has not seen yet.

    own: the parameters by their names, those that are there; factor (P,): on the h that enters W_hh
    """
    from_x, from_h = own["weight_ih"] @ x, own["weight_hh"] @ (h * factor)
    bias = sum(own[name] for name in ("bias_ih", "bias_hh") if name in own)
    if layer_norm in ("projections", "projections_cell"):
        from_x = norm(from_x, own["norm_ih_weight"], own.get("norm_ih_bias"))
        from_h = norm(from_h, own["norm_hh_weight"], own.get("norm_hh_bias"))
    gates = list((from_x + from_h + bias).chunk(4))
    if layer_norm == "gates":
        weights, biases = own["norm_gates_weight"].chunk(4), own["norm_gates_bias"].chunk(4)
        gates = [norm(*each) for each in zip(gates, weights, biases, strict=True)]
    i, f, g, o = gates
    peep_i, peep_f, peep_o = own["weight_ph"].chunk(3) if "weight_ph" in own else (0, 0, 0)
    i, f, g = sigmoid(i + peep_i * c), sigmoid(f + peep_f * c), torch.tanh(g)
    c = f * c + i * g
    shown = c
    if layer_norm is not None:
        shown = norm(c, own["norm_cell_weight"], own["norm_cell_bias"])
        c = shown if layer_norm == "projections_cell" else c
    h = sigmoid(o + peep_o * c) * torch.tanh(shown)
    return (own["weight_hr"] @ h if "weight_hr" in own else h), c


def keep(old: Tensor, new: Tensor, rate: float, kept: Tensor | None, training: bool) -> Tensor:
    """Zoneout."""
    if rate == 0:
        return new
    return torch.where(kept, old, new) if training else rate * old + (1 - rate) * new


class Layer(NamedTuple):
    """One layer and direction.

    own: as `cell`'s; masks: None in evaluation; zoneout: the rates of h and of c
    """

    own: dict[str, Tensor]
    layer_norm: str | None = None
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    masks: Masks | None = None

    def row(self, n: int, x, h, c, length, reverse, reset, reset_h, reset_c) -> tuple[dict, dict, Tensor, Tensor]:
        """Row n: x(t) (I,), from h (P,) and c (H,); reset(t) says whether reset_h and reset_c enter step t.

        Returns h and c after each step, by the step, and after the last.
        """
        own, factor, masks = dict(self.own), 1, self.masks
        if masks is not None and self.weight_dropout > 0:
            own["weight_hh"] = own["weight_hh"] * scale(masks.weight, self.weight_dropout)
        if masks is not None and self.recurrent_dropout > 0:
            factor = scale(masks.recurrent[n], self.recurrent_dropout)
        hs, cs = {}, {}
        for count, t in enumerate(reversed(range(length[0])) if reverse else range(length[0])):
            if reset(t):
                h, c = reset_h, reset_c
            h_new, c_new = cell(x(t), h, c, own, self.layer_norm, factor)
            at = count if length[1] else t
            kept = [None if m is None else m[at, n] for m in (masks[2:] if masks is not None else (None, None))]
            h = keep(h, h_new, self.zoneout[0], kept[0], masks is not None)
            c = keep(c, c_new, self.zoneout[1], kept[1], masks is not None)
            hs[t], cs[t] = h, c
        return hs, cs, h, c


def layer(x, h0, c0, definition: Layer, reset=None, reset_state=None, lengths=None, reverse=False):
    """x (T, N, I), h0 (N, P), c0 (N, H), reset (T, N), reset_state (N, P) and (N, H), lengths a list.

    Returns h (T, N, P) and c (T, N, H) of all steps, zero past each end, h_n (N, P) and c_n (N, H).
    """
    steps, rows = x.shape[:2]
    if reset_state is None:
        reset_state = torch.zeros_like(h0), torch.zeros_like(c0)
    h_all, c_all, h_n, c_n = [], [], [], []
    for n in range(rows):
        found = definition.row(
            n,
            lambda t, n=n: x[t, n],
            h0[n],
            c0[n],
            (steps if lengths is None else lengths[n], lengths is not None),
            reverse,
            lambda t, n=n: reset is not None and bool(reset[t, n] != 0),
            reset_state[0][n],
            reset_state[1][n],
        )
        for walked, padded, zero in ((found[0], h_all, h0[n]), (found[1], c_all, c0[n])):
            padded.append(torch.stack([walked.get(t, torch.zeros_like(zero)) for t in range(steps)]))
        h_n.append(found[2])
        c_n.append(found[3])
    return torch.stack(h_all, 1), torch.stack(c_all, 1), torch.stack(h_n), torch.stack(c_n)


def lstm(module, input, hx, drawn: Drawn | None = None, reset=None, reset_state=None, lengths=None):
    """What module computes, from its options and parameters: input (T, N, I), all else as for a (T, N, I) input.

    drawn: what it drew; None in evaluation.

    Returns a dict of output, h_n, c_n, and h and c of all steps, (num_layers * D, T, N, ·)
    """
    parameters = dict(module.named_parameters())
    directions = 2 if module.bidirectional else 1
    zoneout = tuple(module.zoneout) if isinstance(module.zoneout, (tuple, list)) else (module.zoneout, 0.0)
    if hx is None:
        size = (module.num_layers * directions, input.size(1))
        hx = input.new_zeros(*size, module.proj_size or module.hidden_size), input.new_zeros(*size, module.hidden_size)
    found = {name: [] for name in ("h", "c", "h_n", "c_n")}
    x = input
    for k in range(module.num_layers):
        outputs = []
        for d in range(directions):
            suffix, index = f"_l{k}" + "_reverse" * d, k * directions + d
            own = {name.removesuffix(suffix): p for name, p in parameters.items() if name.endswith(suffix)}
            masks = None if drawn is None else drawn.masks[index]
            definition = Layer(own, module.layer_norm, zoneout, module.recurrent_dropout, module.weight_dropout, masks)
            own_reset_state = None if reset_state is None else [state[index] for state in reset_state]
            results = layer(x, hx[0][index], hx[1][index], definition, reset, own_reset_state, lengths, reverse=d == 1)
            for name, result in zip(("h", "c", "h_n", "c_n"), results, strict=True):
                found[name].append(result)
            outputs.append(results[0])
        output = x = torch.cat(outputs, 2)
        if drawn is not None and module.dropout > 0 and k + 1 < module.num_layers:
            factors = scale(drawn.between[k], module.dropout)  # of a packed input, as long as its longest row
            x = x * torch.cat((factors, factors.new_zeros(x.size(0) - factors.size(0), *factors.shape[1:])))
    return {"output": output, **{name: torch.stack(each) for name, each in found.items()}}


# How a module and the oracle are run on the same numbers.

SIZES = {"input_size": 3, "hidden_size": 4}
STEPS, ROWS = 5, 3
LENGTHS = [2, 4, 1]
KINDS = ["batched", "unbatched", "lengths", "packed"]


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
    found = lstm(module, **call.time_major(module.batch_first), drawn=drawn)
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
