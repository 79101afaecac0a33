"""Every option of the LSTM from its definition alone: one vector a step, one sequence at a time, no batch.

Plain torch operations on float64 vectors, differentiated by autograd. What a module drew is given to the oracle
(`variants.record`). Gates in torch's order: 4H = i | f | g | o.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
