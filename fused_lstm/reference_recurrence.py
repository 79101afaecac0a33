"""The backend "reference": a layer's walk in plain torch operations, with a backward written by hand.

It runs on any device and in any dtype, and shows step by step what the kernels do. Every operation of a step is on
whole (N, ·) tensors, so that a CPU spends its time in the products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm.recurrence import Gradients, Walk
from fused_lstm.reference import EPS, Conditions, Parameters, compute_dtype


class _Direction(NamedTuple):
    """A walk's buffers of one direction, without their dimension D."""

    gates: Tensor
    product: Tensor | None
    output: Tensor
    entered: Tensor | None
    moments: Tensor | None
    c: Tensor
    h0: Tensor
    parameters: Parameters
    conditions: Conditions
    layer_norm: str | None
    reverse: bool
    save: bool

    @property
    def order(self) -> list[int]:
        """The indices of time in the order of the walk."""
        steps = range(self.gates.size(0))
        return list(reversed(steps) if self.reverse else steps)

    def c_around(self, t: int) -> tuple[Tensor, Tensor]:
        """What c is before step t, and where it is put after it."""
        if not self.save:
            return self.c[0], self.c[0]
        return (self.c[t + 1], self.c[t]) if self.reverse else (self.c[t], self.c[t + 1])


def _directions(walk: Walk) -> list[_Direction]:
    return [
        _Direction(
            walk.gates[d],
            None if walk.product is None else walk.product[d],
            walk.output[:, :, d],
            None if walk.entered is None else walk.entered[d],
            None if walk.moments is None else walk.moments[d],
            walk.c[d],
            walk.h0[d],
            walk.parameters[d],
            walk.conditions[d],
            walk.layer_norm,
            walk.reverse[d],
            walk.save,
        )
        for d in range(walk.gates.size(0))
    ]


def recurrence_forward(walk: Walk) -> None:
    """Fills the walk's buffers."""
    for direction in _directions(walk):
        _forward(direction)


def recurrence_backward(walk: Walk, gradients: Gradients) -> None:
    """Fills the gradients' buffers, from a walk that recurrence_forward has filled with save."""
    for d, direction in enumerate(_directions(walk)):
        d_output, *others = gradients
        own = (None if buffer is None else buffer[d] for buffer in others)
        _backward(direction, Gradients(None if d_output is None else d_output[:, :, d], *own))


class _Norm:
    """A layer norm with its parameters in one dtype, forward and backward, one call of torch each."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.size = list(weight.shape)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised x; and the mean and the reciprocal of the deviation that the backward takes."""
        return torch.native_layer_norm(x, self.size, self.weight, self.bias, EPS)

    def backward(self, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, of the weight, and of a bias, whether there is one or not."""
        bias = self.weight if self.bias is None else self.bias
        return torch.ops.aten.native_layer_norm_backward(
            d, x, self.size, mean, rstd, self.weight, bias, [True, True, True]
        )


class _GateNorms:
    """One norm for each gate: on (N, 4, H), as one norm without weights, and the weights after it."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)
        self.size = [weight.size(0) // 4]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised and weighted sums (N, 4H); the normalised ones, the means and the reciprocal deviations."""
        normal, mean, rstd = torch.native_layer_norm(x.view(-1, 4, *self.size), self.size, None, None, EPS)
        normal = normal.view_as(x)
        return torch.addcmul(self.bias, normal, self.weight), normal, mean, rstd

    def backward(self, d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """The gradient of x (N, 4H)."""
        d_normal, x = ((d * self.weight).view(-1, 4, *self.size), x.view(-1, 4, *self.size))
        d_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            d_normal, x, self.size, mean, rstd, None, None, [True, False, False]
        )
        return d_x.view_as(d)


def _select(reset: Tensor | None, at_reset: Tensor | None, state: Tensor) -> Tensor:
    return state if reset is None else torch.where(reset[:, None], at_reset, state)


def _keep_(old: Tensor, new: Tensor, zoneout: Tensor | float | None, t: int) -> Tensor:
    if zoneout is None:
        return new
    if isinstance(zoneout, Tensor):
        return torch.where(zoneout[t], old, new)
    return torch.lerp(new, old, zoneout)


class _Cell:
    """What the steps of a direction share: parameters in the dtype that gates are computed in, and how c goes on."""

    def __init__(self, walk: _Direction) -> None:
        self.walk = walk
        self.dtype = dtype = compute_dtype(walk.gates.dtype)
        self.hidden_size = walk.gates.size(2) // 4
        p = walk.parameters
        biases = [bias.to(dtype) for bias in (p.bias_ih, p.bias_hh) if bias is not None]
        self.bias = sum(biases) if biases else None
        self.weight_ph = None if p.weight_ph is None else p.weight_ph.to(dtype)
        self.norm_gates = self.norm_ih = self.norm_hh = self.norm_cell = None
        if walk.layer_norm is not None:
            self.norm_cell = _Norm(p.norm_cell_weight, p.norm_cell_bias, dtype)
        if walk.layer_norm == "gates":
            self.norm_gates = _GateNorms(p.norm_gates_weight, p.norm_gates_bias, dtype)
        elif walk.layer_norm is not None:
            self.norm_ih = _Norm(p.norm_ih_weight, p.norm_ih_bias, dtype)
            self.norm_hh = _Norm(p.norm_hh_weight, p.norm_hh_bias, dtype)
        conditions = walk.conditions
        self.reset_c = None if conditions.reset is None else conditions.reset_c.to(dtype)
        self.carries_norm = walk.layer_norm == "projections_cell"
        # the c that h was made from is not the one that went on, or is not known by what was saved
        self.hides_c = walk.layer_norm is not None or conditions.zoneout_c is not None

    def c_before(self, t: int) -> Tensor:
        conditions = self.walk.conditions
        return _select(
            None if conditions.reset is None else conditions.reset[t], self.reset_c, self.walk.c_around(t)[0]
        )

    def activate(self, pre: Tensor, c_before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gates i, f, g, o, in place of their sums (N, 4H); o only where no peephole is to come first."""
        H = self.hidden_size
        i_f, g, o = pre[:, : 2 * H], pre[:, 2 * H : 3 * H], pre[:, 3 * H :]
        if self.weight_ph is not None:
            i_f.view(-1, 2, H).addcmul_(self.weight_ph[: 2 * H].view(2, H), c_before[:, None])
        else:
            o.sigmoid_()
        i, f = i_f.sigmoid_().chunk(2, dim=1)
        return i, f, g.tanh_(), o

    def peep_o(self, o: Tensor, c: Tensor) -> Tensor:
        """o, in place, which with a peephole waits for the new c."""
        return o if self.weight_ph is None else o.addcmul_(self.weight_ph[2 * self.hidden_size :], c).sigmoid_()


def _forward(walk: _Direction) -> None:
    cell = _Cell(walk)
    p, conditions = walk.parameters, walk.conditions
    h_old = walk.h0
    for t in walk.order:
        at = t if walk.save else 0
        reset = None if conditions.reset is None else conditions.reset[t]
        h_old = _select(reset, conditions.reset_h, h_old)
        entered = h_old if conditions.recurrent_mask is None else h_old * conditions.recurrent_mask
        if walk.entered is not None:
            walk.entered[at].copy_(entered)
        gates = walk.gates[t]
        # not addmm_: a CPU's product accumulates onto its addend term by term, and rounds each time at the sum's size
        product = entered @ p.weight_hh.t()
        if cell.norm_ih is None:
            pre = gates.add_(product).to(cell.dtype)
            if cell.norm_gates is not None:
                pre, _, *moments = cell.norm_gates(pre)
        else:
            walk.product[at].copy_(product)
            pre, mean, scale = cell.norm_ih(gates.to(cell.dtype))
            normal_h, mean_h, scale_h = cell.norm_hh(product.to(cell.dtype))
            pre, moments = pre + normal_h, (mean, mean_h, scale, scale_h)
            if cell.bias is not None:
                pre += cell.bias
        c_before, c_after = cell.c_before(t), walk.c_around(t)[1]
        i, f, g, o = cell.activate(pre, c_before)
        if cell.hides_c:
            c = (f * c_before).addcmul_(i, g)
            if cell.norm_cell is not None:
                shown, *moments_c = cell.norm_cell(c)
                if cell.carries_norm:
                    c = shown
            c_after.copy_(_keep_(c_before, c, conditions.zoneout_c, t))
        else:
            c = torch.mul(f, c_before, out=c_after).addcmul_(i, g)
        o = cell.peep_o(o, c)
        hidden = torch.tanh(c if cell.norm_cell is None else shown).mul_(o)
        if walk.moments is not None:
            torch.cat([each.flatten(1) for each in (*moments, *moments_c)], 1, out=walk.moments[t])
        if p.weight_hr is not None:
            hidden = hidden.to(gates.dtype) @ p.weight_hr.t()
        walk.output[t].copy_(_keep_(h_old, hidden.to(gates.dtype), conditions.zoneout_h, t))
        if walk.layer_norm is None and walk.save and pre.dtype != gates.dtype:
            gates.copy_(pre)
        h_old = walk.output[t]


def _backward(walk: _Direction, gradients: Gradients) -> None:
    cell = _Cell(walk)
    p, conditions, dtype = walk.parameters, walk.conditions, cell.dtype
    H = cell.hidden_size
    sums = {name: buffer for name in _SUMS if (buffer := getattr(gradients, name)) is not None}
    for buffer in sums.values():
        buffer.zero_()
    d_h, d_c = gradients.d_h, gradients.d_c  # what arrives from behind; then, what goes before
    d_pre = torch.empty(walk.gates.shape[1:], dtype=dtype, device=walk.gates.device)
    d_i, d_f, d_g, d_o = d_pre.chunk(4, dim=1)
    # of the gates' norms, row by row; summed over the rows at the end
    d_weights, d_biases = (
        (torch.zeros_like(d_pre), torch.zeros_like(d_pre)) if cell.norm_gates is not None else (None, None)
    )
    for t in reversed(walk.order):
        if gradients.d_output is not None:
            d_h = d_h + gradients.d_output[t]
        if gradients.d_c_all is not None:
            d_c = d_c + gradients.d_c_all[t]
        d_h, d_h_kept = _split(d_h, conditions.zoneout_h, t)
        d_c, d_c_kept = _split(d_c, conditions.zoneout_c, t)
        c_before, c = cell.c_before(t), walk.c_around(t)[1]

        # the step again, from what was kept
        if walk.layer_norm is None:
            i, f, g, o = walk.gates[t].to(dtype).chunk(4, dim=1)
            if cell.hides_c:
                c = (f * c_before).addcmul_(i, g)
        else:
            if cell.norm_gates is not None:
                sums_of_gates = walk.gates[t].to(dtype)
                pre, normal_gates, *saved_gates = cell.norm_gates(sums_of_gates)
            else:
                from_input, from_h = walk.gates[t].to(dtype), walk.product[t].to(dtype)
                pre, *saved_input = cell.norm_ih(from_input)
                normal_h, *saved_h = cell.norm_hh(from_h)
                pre = pre.add_(normal_h)
                if cell.bias is not None:
                    pre += cell.bias
            i, f, g, o = cell.activate(pre, c_before)
            raw = (f * c_before).addcmul_(i, g)
            normal_c, *saved_c = cell.norm_cell(raw)
            c = normal_c if cell.carries_norm else raw
            o = cell.peep_o(o, c)
        shown = c if cell.norm_cell is None else normal_c
        tanh_c = shown.tanh()

        d_hidden = d_h
        if p.weight_hr is not None:
            gradients.d_projected[t].copy_(d_h)
            gradients.hidden[t].copy_(o * tanh_c)
            d_hidden = (gradients.d_projected[t] @ p.weight_hr).to(dtype)
        _sigmoid_backward(d_hidden * tanh_c, o, grad_input=d_o)
        d_shown = torch.ops.aten.tanh_backward(d_hidden * o, tanh_c)
        if cell.norm_cell is not None and not cell.carries_norm:
            d_shown = _norm_cell_backward(cell, gradients, d_shown, raw, saved_c)
        d_c = d_c + d_shown
        if cell.weight_ph is not None:
            d_c = d_c.addcmul(d_o, cell.weight_ph[2 * H :])
            gradients.d_weight_ph[2 * H :] += (d_o * c).sum(0)
        if cell.carries_norm:
            d_c = _norm_cell_backward(cell, gradients, d_c, raw, saved_c)
        _sigmoid_backward(d_c * g, i, grad_input=d_i)
        _sigmoid_backward(d_c * c_before, f, grad_input=d_f)
        _tanh_backward(d_c * i, g, grad_input=d_g)
        d_c = d_c * f
        if cell.weight_ph is not None:
            d_i_f = d_pre[:, : 2 * H].view(-1, 2, H)
            gradients.d_weight_ph[: 2 * H] += (d_i_f * c_before[:, None]).sum(0).view(-1)
            d_c = d_c + (d_i_f * cell.weight_ph[: 2 * H].view(2, H)).sum(1)
        if d_c_kept is not None:
            d_c = d_c + d_c_kept

        if cell.norm_ih is not None:
            d_input, d_weight, d_bias = cell.norm_ih.backward(d_pre, from_input, *saved_input)
            gradients.d_norm_weight.add_(d_weight)
            gradients.d_norm_bias.add_(d_bias)
            d_product, d_weight, _ = cell.norm_hh.backward(d_pre, from_h, *saved_h)
            gradients.d_norm_hh_weight.add_(d_weight)
            gradients.d_gates[t].copy_(d_input)
            gradients.d_product[t].copy_(d_product)
        elif cell.norm_gates is not None:
            d_weights.addcmul_(d_pre, normal_gates)
            d_biases.add_(d_pre)
            gradients.d_gates[t].copy_(cell.norm_gates.backward(d_pre, sums_of_gates, *saved_gates))
        else:
            gradients.d_gates[t].copy_(d_pre)

        d_h = (gradients.d_product[t] @ p.weight_hh).to(dtype)
        if conditions.recurrent_mask is not None:
            d_h = d_h * conditions.recurrent_mask
        if d_h_kept is not None:
            d_h = d_h + d_h_kept
        if conditions.reset is not None:
            reset = conditions.reset[t][:, None]
            d_h, d_c = (_stop(reset, d, total) for d, total in ((d_h, gradients.d_reset_h), (d_c, gradients.d_reset_c)))
    gradients.d_h.copy_(d_h)
    gradients.d_c.copy_(d_c)
    if cell.norm_gates is not None:
        torch.sum(d_weights, 0, out=gradients.d_norm_weight)
        torch.sum(d_biases, 0, out=gradients.d_norm_bias)


_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (d, y): d * y * (1 - y)
_tanh_backward = torch.ops.aten.tanh_backward.grad_input  # (d, y): d * (1 - y * y)
_SUMS = [
    "d_reset_h",
    "d_reset_c",
    "d_weight_ph",
    "d_norm_weight",
    "d_norm_hh_weight",
    "d_norm_bias",
    "d_norm_cell_weight",
    "d_norm_cell_bias",
]


def _split(d: Tensor, zoneout: Tensor | float | None, t: int) -> tuple[Tensor, Tensor | None]:
    """A state's gradient: the part of the new value, and that of the old one."""
    if zoneout is None:
        return d, None
    if isinstance(zoneout, Tensor):
        return d.masked_fill(zoneout[t], 0), d.masked_fill(~zoneout[t], 0)
    return d * (1 - zoneout), d * zoneout


def _norm_cell_backward(cell: _Cell, gradients: Gradients, d: Tensor, raw: Tensor, saved: list[Tensor]) -> Tensor:
    d_raw, d_weight, d_bias = cell.norm_cell.backward(d, raw, *saved)
    gradients.d_norm_cell_weight.add_(d_weight)
    gradients.d_norm_cell_bias.add_(d_bias)
    return d_raw


def _stop(reset: Tensor, d: Tensor, at_reset: Tensor | None) -> Tensor:
    """Where a state was reset, its gradient is the reset state's and goes no further."""
    if at_reset is not None:
        at_reset.add_(torch.where(reset, d, 0))
    return torch.where(reset, 0, d)
