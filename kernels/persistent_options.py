"""What both persistent kernels are given of a walk's options, by the names of their arguments."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lstm.kernels.persistent_configs import Burden


class Options(NamedTuple):
    """tensors: None where the walk has no such option; rates: of zoneout on h and on c; constants: at compile time."""

    tensors: dict[str, Tensor | None]
    rates: tuple[float, float]
    constants: dict[str, Any]


def forward_burden(walk: Any) -> Burden:
    """Of a `fused_lstm.recurrence.Walk`."""
    if walk.layer_norm is not None:
        return "options"
    return ("none", "option", "options")[min(len(walk.options()), 2)]


def backward_burden(walk: Any) -> Burden:
    return "norms" if walk.layer_norm is not None else forward_burden(walk)


def options_of(walk: Any) -> Options:
    """walk: a `fused_lstm.recurrence.Walk`."""
    parameters, conditions = walk.parameters, walk.conditions
    reset, reset_h, reset_c = conditions[0].reset, conditions[0].reset_h, conditions[0].reset_c
    kind_h, mask_h, rate_h = _zoneout([c.zoneout_h for c in conditions])
    kind_c, mask_c, rate_c = _zoneout([c.zoneout_c for c in conditions])
    of_gates = "norm_gates_weight" if walk.layer_norm == "gates" else "norm_ih_weight"
    tensors = {
        "weight_ph_ptr": _stacked([p.weight_ph for p in parameters]),
        "recurrent_mask_ptr": _stacked([c.recurrent_mask for c in conditions]),
        "zoneout_h_ptr": mask_h,
        "zoneout_c_ptr": mask_c,
        "reset_ptr": None if reset is None else reset.contiguous().view(torch.uint8),
        "reset_h_ptr": None if reset is None else reset_h.contiguous(),
        "reset_c_ptr": None if reset is None else reset_c.contiguous(),
        "norm_weight_ptr": _stacked([getattr(p, of_gates) for p in parameters]),
        "norm_hh_weight_ptr": _stacked([p.norm_hh_weight for p in parameters]),
        "norm_bias_ptr": _norm_biases(walk),
        "norm_cell_weight_ptr": _stacked([p.norm_cell_weight for p in parameters]),
        "norm_cell_bias_ptr": _stacked([p.norm_cell_bias for p in parameters]),
    }
    return Options(tensors, (rate_h, rate_c), {"ZONEOUT_H": kind_h, "ZONEOUT_C": kind_c, "LAYER_NORM": walk.layer_norm})


def _norm_biases(walk: Any) -> Tensor | None:
    """(D, 4H): all that is added behind the norms of the gates, or of the projections, in one."""
    if walk.layer_norm is None:
        return None
    if walk.layer_norm == "gates":
        return _stacked([p.norm_gates_bias for p in walk.parameters])
    names = ("bias_ih", "bias_hh", "norm_ih_bias", "norm_hh_bias")
    of_each = [[getattr(p, name) for name in names if getattr(p, name) is not None] for p in walk.parameters]
    return _stacked([sum(bias.float() for bias in biases) if biases else None for biases in of_each])


def _stacked(of_each: list[Tensor | None]) -> Tensor | None:
    """(D, ...), contiguous; None where the directions have none."""
    if of_each[0] is None:
        return None
    return of_each[0].contiguous()[None] if len(of_each) == 1 else torch.stack(of_each)


def _zoneout(of_each: list[Tensor | float | None]) -> tuple[str | None, Tensor | None, float]:
    """The kernel's flag, the masks (D, T, N, H) in bytes, and the rate, which is the same in all directions."""
    if isinstance(of_each[0], Tensor):
        return "mask", _stacked(of_each).view(torch.uint8), 0.0
    return (None, None, 0.0) if of_each[0] is None else ("rate", None, of_each[0])
