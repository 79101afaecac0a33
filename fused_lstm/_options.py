"""What a layer can have beyond torch's cell: checked, with its parameters and what it draws."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm.reference import LAYER_NORMS, Parameters


class CellOptions(NamedTuple):
    """The options that change what is computed in a step, checked.

    zoneout: the probabilities that an element of h, and one of c, keeps its old value.
    """

    layer_norm: str | None = None
    peephole: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0

    def in_use(self, training: bool) -> tuple[str, ...]:
        """The names of those that make the cell another than torch's; layer_norm has a keyword of its own."""
        named = {
            "layer_norm": self.layer_norm is not None,
            "peephole": self.peephole,
            "zoneout": any(self.zoneout),
            "recurrent_dropout": training and self.recurrent_dropout > 0,
            "weight_dropout": training and self.weight_dropout > 0,
        }
        return tuple(name for name, used in named.items() if used)


def check_layer_norm(layer_norm: str | None) -> str | None:
    if layer_norm is not None and layer_norm not in LAYER_NORMS:
        expected = ", ".join(repr(name) for name in (None, *LAYER_NORMS))
        raise ValueError(f"layer_norm should be one of {expected}, got {layer_norm!r}")
    return layer_norm


def check_bool(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    return value


def check_rate(name: str, rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {rate!r}")
    return float(rate)


def check_zoneout(zoneout: float | tuple[float, float]) -> tuple[float, float]:
    """The rates of h and c; one number is that of h."""
    if not isinstance(zoneout, (tuple, list)):
        return check_rate("zoneout", zoneout), 0.0
    if len(zoneout) != 2:
        raise ValueError(f"zoneout should be a number or two, for h and c, got {len(zoneout)}")
    return check_rate("zoneout[0]", zoneout[0]), check_rate("zoneout[1]", zoneout[1])


def check_forget_bias(forget_bias: float | None, bias: bool, layer_norm: str | None) -> float | None:
    if forget_bias is None:
        return None
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float)):
        raise ValueError(f"forget_bias should be a number or None, got {forget_bias!r}")
    if not bias and layer_norm != "gates":
        raise ValueError("forget_bias needs bias=True, or layer_norm='gates' with its own biases")
    return float(forget_bias)


def parameter_sizes(hidden_size: int, layer_norm: str | None, peephole: bool) -> dict[str, int]:
    """The parameters that the options add to a layer and direction, in their order, with their sizes."""
    gates = {
        None: (),
        "gates": ("norm_gates_weight", "norm_gates_bias"),
        "projections": ("norm_ih_weight", "norm_hh_weight"),
        "projections_cell": ("norm_ih_weight", "norm_ih_bias", "norm_hh_weight", "norm_hh_bias"),
    }[layer_norm]
    cell = () if layer_norm is None else ("norm_cell_weight", "norm_cell_bias")
    sizes = dict.fromkeys(gates, 4 * hidden_size) | dict.fromkeys(cell, hidden_size)
    return sizes | {"weight_ph": 3 * hidden_size} if peephole else sizes


OPTION_PARAMETERS = Parameters._fields[5:]


@torch.no_grad()
def initialize(name: str, parameter: Tensor, hidden_size: int) -> None:
    """The start of one of the parameters that options add; name without its layer."""
    if name == "weight_ph":
        parameter.uniform_(-(hidden_size**-0.5), hidden_size**-0.5)
    else:
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)


@torch.no_grad()
def initialize_forget_bias(parameters: Parameters, forget_bias: float) -> None:
    """Set the forget gate's bias, where a norm does not remove it."""
    hidden_size = parameters.weight_ih.size(0) // 4
    forget = slice(hidden_size, 2 * hidden_size)
    if parameters.norm_gates_bias is not None:
        parameters.norm_gates_bias[forget] = forget_bias
    else:
        parameters.bias_ih[forget] = forget_bias
        parameters.bias_hh[forget] = 0.0


class Draws(NamedTuple):
    """What one direction of a layer draws for one call; None is nothing.

    weight_hh (4H, P), after its dropout; recurrent_mask (N, P) in h's dtype; zoneout_h (T, N, P), zoneout_c (T, N, H)
    bool
    """

    weight_hh: Tensor
    recurrent_mask: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None


def draw(options: CellOptions, training: bool, weight_hh: Tensor, steps: int, h0: Tensor, c0: Tensor) -> Draws:
    """The random parts of one direction in training, always in this order; h0 (N, P) and c0 (N, H) give sizes."""
    if not training:
        return Draws(weight_hh, None, None, None)
    if options.weight_dropout > 0:
        weight_hh = torch.nn.functional.dropout(weight_hh, options.weight_dropout)
    recurrent_mask = None
    if options.recurrent_dropout > 0:
        recurrent_mask = torch.nn.functional.dropout(torch.ones_like(h0), options.recurrent_dropout)
    zoneouts = [
        None
        if rate == 0
        else torch.empty((steps, *state.shape), dtype=torch.bool, device=state.device).bernoulli_(rate)
        for rate, state in zip(options.zoneout, (h0, c0), strict=True)
    ]
    return Draws(weight_hh, recurrent_mask, *zoneouts)
