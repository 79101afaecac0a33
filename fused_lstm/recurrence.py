"""What a backend is given: one layer's walk over the time steps, in buffers that it fills.

Everything that need not be in the loop stands outside: the input product of all steps before it, weight and input
gradients as products after it. A backend has two functions, `recurrence_forward(walk)` and
`recurrence_backward(walk, gradients)`; what they compute is told by `fused_lstm.reference.lstm_cell`, and shown step by
step by `fused_lstm.reference_recurrence`.

Shapes: D directions, T time steps, N rows of the batch, H units, P = projected features, or H without projection.
Gates stand in torch's order: 4H = i | f | g | o. "Time" in a buffer is the order of the input, also in a direction that
walks from the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm.reference import Conditions, Parameters, compute_dtype

# How many numbers of a step's row its norms are made with: of the four gates, or of both products, and of c.
MOMENTS = {"gates": 10, "projections": 6, "projections_cell": 6}


class Walk(NamedTuple):
    """One layer, all directions.

    gates (D, T, N, 4H), contiguous: the input product W_ih x, with the biases unless layer_norm is one of
        "projections…", where they come after the norm. The forward leaves in it what the backward needs: the activated
        gates; under layer_norm="gates" the sums before the norm; under "projections…" it leaves it as it is.
    product (D, T, N, 4H), or (D, 1, N, 4H) if not save: written, W_hh h, under "projections…"; else None
    output (T, N, D, P): written. Rows may lie apart: what goes on are the last two dimensions
    entered (D, T, N, P), or (D, 1, N, P) if not save: written, the h that multiplied W_hh in each step, where that is
        not simply the output of the step before (with a reset or a recurrent mask); else None
    moments (D, T, N, `MOMENTS`), in c's dtype: written, the mean of each of a step's gate norms, then the reciprocal
        deviations of these, then both of c's norm; None without layer_norm, or if not save
    c (D, T + 1, N, H), or (D, 1, N, H) if not save: written, in float32, or float64 for float64; c0 stands in it first,
        where the walk begins: at [d, 0], or at [d, -1] where it begins at the end
    h0 (D, N, P), contiguous
    parameters: one for each direction
    conditions: one for each direction; resets and reset states are the same in all
    layer_norm: as in `fused_lstm.reference.lstm_cell`
    reverse: for each direction, does it walk from the last step to the first?
    save: keep what the backward needs
    """

    gates: Tensor
    product: Tensor | None
    output: Tensor
    entered: Tensor | None
    moments: Tensor | None
    c: Tensor
    h0: Tensor
    parameters: tuple[Parameters, ...]
    conditions: tuple[Conditions, ...]
    layer_norm: str | None
    reverse: tuple[bool, ...]
    save: bool

    def options(self) -> tuple[str, ...]:
        """The names of the options beside layer_norm that change a step."""
        conditions = self.conditions[0]
        in_use = {
            "peephole": self.parameters[0].weight_ph is not None,
            "zoneout": conditions.zoneout_h is not None or conditions.zoneout_c is not None,
            "recurrent_dropout": conditions.recurrent_mask is not None,
            "reset": conditions.reset is not None,
        }
        return tuple(name for name, used in in_use.items() if used)


class Gradients(NamedTuple):
    """What arrives at a walk's results, and where the gradients of what it was made from go.

    Given (each may be None for zeros):
    d_output (T, N, D, P): rows may lie apart, as in the output
    d_c_all (D, T, N, H), in c's dtype: of the c that each step left

    Filled:
    d_gates (D, T, N, 4H): of the input product
    d_product (D, T, N, 4H): of W_hh h; the same tensor as d_gates unless layer_norm is one of "projections…"
    d_h (D, N, P), d_c (D, N, H), in c's dtype: what arrives from behind the last step; of h0 and c0 on return
    d_projected (D, T, N, P), hidden (D, T, N, H): with weight_hr, for its gradient: the whole gradient of what came out
        of the projection in each step, and what went into it; else None

    Filled, as sums over all steps and rows, in c's dtype, or None where the walk has no such thing:
    d_reset_h (D, N, P), d_reset_c (D, N, H): sums over the steps only; also None where they are not wanted
    d_weight_ph (D, 3H)
    d_norm_weight (D, 4H): under "gates" of norm_gates_weight, under "projections…" of norm_ih_weight
    d_norm_hh_weight (D, 4H): under "projections…"
    d_norm_bias (D, 4H), under every layer_norm: the sum of the gradients before the activations, which is that of all
        biases that come after the norm
    d_norm_cell_weight, d_norm_cell_bias (D, H)
    """

    d_output: Tensor | None
    d_c_all: Tensor | None
    d_gates: Tensor
    d_product: Tensor
    d_h: Tensor
    d_c: Tensor
    d_projected: Tensor | None
    hidden: Tensor | None
    d_reset_h: Tensor | None
    d_reset_c: Tensor | None
    d_weight_ph: Tensor | None
    d_norm_weight: Tensor | None
    d_norm_hh_weight: Tensor | None
    d_norm_bias: Tensor | None
    d_norm_cell_weight: Tensor | None
    d_norm_cell_bias: Tensor | None


def new_walk(
    gates: Tensor,
    output: Tensor,
    h0: Tensor,
    c0: Tensor,
    parameters: tuple[Parameters, ...],
    conditions: tuple[Conditions, ...],
    layer_norm: str | None,
    reverse: tuple[bool, ...],
    save: bool,
) -> Walk:
    """The other buffers of a walk, with c0 (D, N, H) where it begins; all else as in `Walk`."""
    directions, steps, batch_size, gate_size = gates.shape
    output_size = h0.size(2)
    c = gates.new_empty(
        directions, steps + 1 if save else 1, batch_size, gate_size // 4, dtype=compute_dtype(gates.dtype)
    )
    for d in range(directions):
        c[d, -1 if reverse[d] else 0].copy_(c0[d])
    product = entered = None
    if layer_norm is not None and layer_norm != "gates":
        product = torch.empty_like(gates) if save else gates.new_empty(directions, 1, batch_size, gate_size)
    if conditions[0].reset is not None or conditions[0].recurrent_mask is not None:
        entered = gates.new_empty(directions, steps if save else 1, batch_size, output_size)
    moments = None
    if layer_norm is not None and save:
        moments = c.new_empty(directions, steps, batch_size, MOMENTS[layer_norm])
    h0 = h0.contiguous()
    return Walk(gates, product, output, entered, moments, c, h0, parameters, conditions, layer_norm, reverse, save)


def new_gradients(
    walk: Walk,
    d_output: Tensor | None,
    d_c_all: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    reset_state: bool,
) -> Gradients:
    """Buffers for a walk's backward; nothing but what is given is in them.

    Args:
        d_output, d_c_all: as in `Gradients`
        d_h_n (D, N, P), d_c_n (D, N, H): what arrives from behind the last step; None for zeros
        reset_state: are the gradients of the reset states wanted?
    """
    directions, steps, batch_size, gate_size = walk.gates.shape
    p, layer_norm = walk.parameters[0], walk.layer_norm
    hidden_size = gate_size // 4
    projections = layer_norm is not None and layer_norm != "gates"

    def of_state(like: Tensor, given: Tensor | None) -> Tensor:
        state = walk.c.new_zeros(like.shape)
        return state if given is None else state.copy_(given)

    def total(wanted: bool, *shape: int) -> Tensor | None:
        return walk.c.new_empty(directions, *shape) if wanted else None

    d_gates = torch.empty_like(walk.gates)
    return Gradients(
        d_output=d_output,
        d_c_all=d_c_all,
        d_gates=d_gates,
        d_product=torch.empty_like(d_gates) if projections else d_gates,
        d_h=of_state(walk.h0, d_h_n),
        d_c=of_state(walk.c[:, 0], d_c_n),
        d_projected=None if p.weight_hr is None else walk.gates.new_empty(directions, steps, *walk.h0.shape[1:]),
        hidden=None if p.weight_hr is None else walk.gates.new_empty(directions, steps, batch_size, hidden_size),
        d_reset_h=total(reset_state, *walk.h0.shape[1:]),
        d_reset_c=total(reset_state, batch_size, hidden_size),
        d_weight_ph=total(p.weight_ph is not None, 3 * hidden_size),
        d_norm_weight=total(layer_norm is not None, gate_size),
        d_norm_hh_weight=total(projections, gate_size),
        d_norm_bias=total(layer_norm is not None, gate_size),
        d_norm_cell_weight=total(layer_norm is not None, hidden_size),
        d_norm_cell_bias=total(layer_norm is not None, hidden_size),
    )
