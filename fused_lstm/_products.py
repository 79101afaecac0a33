"""What a layer computes outside its walk over the time steps: products over all of them at once."""

import torch
from torch import Tensor

from fused_lstm.recurrence import Gradients, Walk
from fused_lstm.reference import Parameters


def input_product(rows: Tensor, parameters: Parameters, layer_norm: str | None, out: Tensor) -> None:
    """out (rows, 4H) = W_ih x for all rows (rows, I), with the biases unless they come after a norm."""
    bias_ih, bias_hh = parameters.bias_ih, parameters.bias_hh
    if layer_norm not in (None, "gates") or (bias_ih is None and bias_hh is None):
        torch.mm(rows, parameters.weight_ih.t(), out=out)
    else:
        bias = bias_hh if bias_ih is None else bias_ih if bias_hh is None else bias_ih + bias_hh
        torch.addmm(bias, rows, parameters.weight_ih.t(), out=out)


def recompute_walk(walk: Walk) -> Walk:
    """The walk as its forward left it, from the input products in its gates, which change, its output and c."""
    if walk.product is not None:
        walk = walk._replace(product=torch.empty_like(walk.gates))
    if walk.entered is not None:
        walk = walk._replace(entered=torch.stack([_entered(walk, d) for d in range(walk.gates.size(0))]))
    for d in range(walk.gates.size(0)):
        if walk.product is not None:
            _multiply_entered(walk, d, walk.product[d], accumulate=False)
        else:
            _multiply_entered(walk, d, walk.gates[d], accumulate=True)
            if walk.layer_norm is None:
                _activate(walk, d)
    return walk


def _before(walk: Walk, d: int) -> tuple[int, slice, Tensor]:
    """Of h, which entered which step: the step that h0 entered; all others; and what entered those (T - 1, N, P)."""
    output = walk.output[:, :, d]
    return (-1, slice(None, -1), output[1:]) if walk.reverse[d] else (0, slice(1, None), output[:-1])


def _c_before(walk: Walk, d: int) -> Tensor:
    """The c that entered each step: (T, N, H)."""
    c = walk.c[d, 1:] if walk.reverse[d] else walk.c[d, :-1]
    reset = walk.conditions[d].reset
    return c if reset is None else torch.where(reset[:, :, None], walk.conditions[d].reset_c.to(c.dtype), c)


def _entered(walk: Walk, d: int) -> Tensor:
    conditions = walk.conditions[d]
    first, inner, before = _before(walk, d)
    entered = walk.gates.new_empty(walk.output[:, :, d].shape)
    entered[first] = walk.h0[d]
    entered[inner] = before
    if conditions.reset is not None:
        entered = torch.where(conditions.reset[:, :, None], conditions.reset_h, entered)
    return entered if conditions.recurrent_mask is None else entered.mul_(conditions.recurrent_mask)


def _multiply_entered(walk: Walk, d: int, out: Tensor, accumulate: bool) -> None:
    """out (T, N, 4H) = or += W_hh h of all steps."""
    weight, beta = walk.parameters[d].weight_hh.t(), int(accumulate)
    if walk.entered is not None:
        out.flatten(0, 1).addmm_(walk.entered[d].flatten(0, 1), weight, beta=beta)
    else:
        first, inner, before = _before(walk, d)
        out[first].addmm_(walk.h0[d], weight, beta=beta)
        out[inner].flatten(0, 1).addmm_(before.flatten(0, 1), weight, beta=beta)


def _activate(walk: Walk, d: int) -> None:
    """The gates from their sums, in place."""
    gates = walk.gates[d]
    hidden_size = gates.size(2) // 4
    i_f, g, o = gates.tensor_split((2 * hidden_size, 3 * hidden_size), dim=2)
    peepholes = walk.parameters[d].weight_ph
    if peepholes is not None:
        c = _c_before(walk, d)
        peep_i, peep_f, peep_o = peepholes.to(c.dtype).chunk(3)
        i, f = i_f.chunk(2, dim=2)
        i += peep_i * c
        f += peep_f * c
    i_f.sigmoid_()
    g.tanh_()
    if peepholes is not None:
        i, f = i_f.chunk(2, dim=2)
        o += peep_o * torch.addcmul(f * c, i, g)  # the new c, before a zoneout
    o.sigmoid_()


def weight_hh_gradient(walk: Walk, gradients: Gradients, d: int) -> Tensor:
    """(4H, P)."""
    d_product = gradients.d_product[d]
    if walk.entered is not None:
        return d_product.flatten(0, 1).t() @ walk.entered[d].flatten(0, 1)
    first, inner, before = _before(walk, d)
    gradient = d_product[first].t() @ walk.h0[d]
    return gradient.addmm_(d_product[inner].flatten(0, 1).t(), before.flatten(0, 1))
