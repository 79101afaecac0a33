"""What an LSTM layer is, in plain torch operations on any device and dtype: the definition all kernels are held to.

Read top to bottom. `lstm_cell` is one step, `lstm_layer` the loop over it; both are differentiable, any number of
times.

Shapes: T time steps, N rows of the batch, I input features, H units, P = projected features, or H without projection.
Gates stand in torch's order: 4H = i | f | g | o.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

LAYER_NORMS = ("gates", "projections", "projections_cell")
EPS = 1e-5  # of every norm


class Parameters(NamedTuple):
    """Of one layer and direction; None is one that is not there.

    weight_ih (4H, I), weight_hh (4H, P), bias_ih, bias_hh (4H), weight_hr (P, H): torch's own; weight_hr projects h.
    weight_ph (3H): peepholes, i | f | o.
    norm_*: of the norms, (4H) over the gates i | f | g | o and (H) over the cell.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    weight_ph: Tensor | None = None
    norm_gates_weight: Tensor | None = None
    norm_gates_bias: Tensor | None = None
    norm_ih_weight: Tensor | None = None
    norm_ih_bias: Tensor | None = None
    norm_hh_weight: Tensor | None = None
    norm_hh_bias: Tensor | None = None
    norm_cell_weight: Tensor | None = None
    norm_cell_bias: Tensor | None = None


class Conditions(NamedTuple):
    """What else acts on the steps of one call; None is nothing.

    reset (T, N) bool: where set, the state that enters the step is reset_h (N, P) and reset_c (N, H), which come with
        it.
    recurrent_mask (N, P): a factor on the h that enters W_hh, in every step.
    zoneout_h, zoneout_c: which elements of h (T, N, P) and of c (T, N, H) keep their old value, as bool; or, as a
        number, the part of the old value in a mix with the new.
    """

    reset: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | float | None = None
    zoneout_c: Tensor | float | None = None


NOTHING = Conditions()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state between steps, and of what is computed on a gate: its rounding errors add up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Layer norm over the last dimension, in x's dtype; torch's own has no right third derivative."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(variance + EPS) * weight.to(x.dtype)
    return normal if bias is None else normal + bias.to(x.dtype)


def _keep(old: Tensor, new: Tensor, zoneout: Tensor | float | None) -> Tensor:
    if zoneout is None:
        return new
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout, old, new)
    return zoneout * old + (1 - zoneout) * new


def lstm_cell(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    parameters: Parameters,
    layer_norm: str | None = None,
    conditions: Conditions = NOTHING,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        input: (N, I)
        state: h (N, P), c (N, H)
        layer_norm: None; "gates": each gate's sum is normalised over H; "projections": W_ih x and W_hh h are, each over
            4H, before the biases; in both, c is normalised on its way to h; "projections_cell": as before, and the
            normalised c is the one that goes on
        conditions: of this step: masks without their dimension T

    Returns:
        the next h (N, P), in input's dtype, and c (N, H), in float32 or better
    """
    h_old, c_old = state
    dtype = compute_dtype(input.dtype)
    c_old = c_old.to(dtype)
    if conditions.reset is not None:
        h_old = torch.where(conditions.reset[:, None], conditions.reset_h, h_old)
        c_old = torch.where(conditions.reset[:, None], conditions.reset_c.to(dtype), c_old)
    entered = h_old if conditions.recurrent_mask is None else h_old * conditions.recurrent_mask
    p = parameters
    if layer_norm in (None, "gates"):
        gates = (linear(input, p.weight_ih, p.bias_ih) + linear(entered, p.weight_hh, p.bias_hh)).to(dtype)
        i, f, g, o = gates.chunk(4, dim=1)
        if layer_norm == "gates":
            weights, biases = p.norm_gates_weight.chunk(4), p.norm_gates_bias.chunk(4)
            i, f, g, o = (_norm(x, w, b) for x, w, b in zip((i, f, g, o), weights, biases, strict=True))
    else:
        gates = _norm(linear(input, p.weight_ih).to(dtype), p.norm_ih_weight, p.norm_ih_bias)
        gates = gates + _norm(linear(entered, p.weight_hh).to(dtype), p.norm_hh_weight, p.norm_hh_bias)
        for bias in (p.bias_ih, p.bias_hh):
            gates = gates if bias is None else gates + bias.to(dtype)
        i, f, g, o = gates.chunk(4, dim=1)
    if p.weight_ph is not None:
        peep_i, peep_f, peep_o = p.weight_ph.to(dtype).chunk(3)
        i, f = i + peep_i * c_old, f + peep_f * c_old
    c = f.sigmoid() * c_old + i.sigmoid() * g.tanh()
    if layer_norm == "projections_cell":
        c = _norm(c, p.norm_cell_weight, p.norm_cell_bias)
    if p.weight_ph is not None:
        o = o + peep_o * c
    shown = _norm(c, p.norm_cell_weight, p.norm_cell_bias) if layer_norm in ("gates", "projections") else c
    h = (o.sigmoid() * shown.tanh()).to(input.dtype)
    if p.weight_hr is not None:
        h = linear(h, p.weight_hr)
    return _keep(h_old, h, conditions.zoneout_h), _keep(c_old, c, conditions.zoneout_c)


def lstm_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    parameters: Parameters,
    layer_norm: str | None = None,
    conditions: Conditions = NOTHING,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, one direction.

    Args:
        input: (T, N, I)
        h0: (N, P)
        c0: (N, H)
        parameters, layer_norm: as in `lstm_cell`
        conditions: of all steps
        lengths: (N,) int64, 1 <= length <= T, or None: the final state of a row is the one after its length; what the
            later steps put into the results is the caller's to discard. Not together with reverse.
        reverse: walk from the last step to the first

    Returns:
        output (T, N, P), h_n (N, P), c_n (N, H), and c of all steps (T, N, H), all in input's dtype
    """
    h, c = h0, c0
    hs, cs = [], []
    for t in reversed(range(input.size(0))) if reverse else range(input.size(0)):
        of_step = conditions._replace(
            reset=None if conditions.reset is None else conditions.reset[t],
            zoneout_h=_at(conditions.zoneout_h, t),
            zoneout_c=_at(conditions.zoneout_c, t),
        )
        h, c = lstm_cell(input[t], (h, c), parameters, layer_norm, of_step)
        hs.append(h)
        cs.append(c)
    output, c_all = (torch.stack(states[::-1] if reverse else states) for states in (hs, cs))
    if lengths is not None:
        rows = torch.arange(input.size(1), device=input.device)
        h, c = output[lengths - 1, rows], c_all[lengths - 1, rows]
    return output, h, c.to(input.dtype), c_all.to(input.dtype)


def _at(zoneout: Tensor | float | None, t: int) -> Tensor | float | None:
    return zoneout[t] if isinstance(zoneout, Tensor) else zoneout
