"""The cells that cuDNN does not have, as people write them today: torch's operations, in a Python loop over the steps.

A cell is given the weights of one layer and direction, called as `fused_lstm.LSTM` calls them, and gives the function
of one step: x (N, I), h and c (N, H) to the next h and c.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm, linear
from torch.utils.checkpoint import checkpoint

Weights = Mapping[str, Tensor]
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Cell = Callable[[Weights], Step]


def torch_cell(w: Weights) -> Step:
    """What torch.nn.LSTMCell runs."""
    weights = w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"]

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return torch.lstm_cell(x, (h, c), *weights)

    return step


def checkpointed_cell(w: Weights) -> Step:
    """The same, keeping x, h and c alone for the backward, which runs the step again."""
    step = torch_cell(w)

    def checkpointed(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(step, x, h, c, use_reentrant=False, preserve_rng_state=False)

    return checkpointed


def gate_norm_cell(w: Weights) -> Step:
    """A norm for each gate, and one for c on its way to h, as in labml_nn."""
    weights, biases = w["norm_gates_weight"].chunk(4), w["norm_gates_bias"].chunk(4)

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = linear(x, w["weight_ih"], w["bias_ih"]) + linear(h, w["weight_hh"], w["bias_hh"])
        i, f, g, o = (
            layer_norm(gate, gate.shape[1:], weight, bias)
            for gate, weight, bias in zip(gates.chunk(4, dim=1), weights, biases, strict=True)
        )
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = layer_norm(c, c.shape[1:], w["norm_cell_weight"], w["norm_cell_bias"])
        return torch.sigmoid(o) * torch.tanh(normed), c

    return step


def projection_norm_cell(w: Weights) -> Step:
    """A norm for each product, and one for c on its way to h, as in Haste."""
    bias = w["bias_ih"] + w["bias_hh"]

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        from_x, from_h = linear(x, w["weight_ih"]), linear(h, w["weight_hh"])
        from_x = layer_norm(from_x, from_x.shape[1:], w["norm_ih_weight"])
        from_h = layer_norm(from_h, from_h.shape[1:], w["norm_hh_weight"])
        i, f, g, o = (from_x + from_h + bias).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = layer_norm(c, c.shape[1:], w["norm_cell_weight"], w["norm_cell_bias"])
        return torch.sigmoid(o) * torch.tanh(normed), c

    return step


def carried_norm_cell(w: Weights) -> Step:
    """A norm for each product, and one for the c that goes on, as in torch's fastrnns."""
    bias = w["bias_ih"] + w["bias_hh"]

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        from_x, from_h = linear(x, w["weight_ih"]), linear(h, w["weight_hh"])
        from_x = layer_norm(from_x, from_x.shape[1:], w["norm_ih_weight"], w["norm_ih_bias"])
        from_h = layer_norm(from_h, from_h.shape[1:], w["norm_hh_weight"], w["norm_hh_bias"])
        i, f, g, o = (from_x + from_h + bias).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        c = layer_norm(c, c.shape[1:], w["norm_cell_weight"], w["norm_cell_bias"])
        return torch.sigmoid(o) * torch.tanh(c), c

    return step


def peephole_cell(w: Weights) -> Step:
    """i and f see c, o the new one, as in TensorFlow Addons."""
    peep_i, peep_f, peep_o = w["weight_ph"].chunk(3)

    def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = linear(x, w["weight_ih"], w["bias_ih"]) + linear(h, w["weight_hh"], w["bias_hh"])
        i, f, g, o = gates.chunk(4, dim=1)
        c_new = torch.sigmoid(f + peep_f * c) * c + torch.sigmoid(i + peep_i * c) * torch.tanh(g)
        return torch.sigmoid(o + peep_o * c_new) * torch.tanh(c_new), c_new

    return step


class Draws(NamedTuple):
    """What a layer and direction draws for one walk; None is nothing.

    weight_hh (4H, H), dropped out; recurrent_mask (N, H); zoneout_h, zoneout_c (T, N, H) bool: which keep their value
    """

    weight_hh: Tensor | None
    recurrent_mask: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None


def draw(options: Mapping, weight_hh: Tensor, steps: int, state: Tensor) -> Draws:
    """In the order and the shapes in which `fused_lstm.LSTM` draws; state (N, H).

    Args:
        options: of `fused_lstm.LSTM`: weight_dropout, recurrent_dropout and zoneout, of h and of c, of those in use
    """
    weight = dropout(weight_hh, options["weight_dropout"]) if "weight_dropout" in options else None
    mask = None
    if "recurrent_dropout" in options:
        mask = dropout(torch.ones_like(state), options["recurrent_dropout"])
    zoneouts = [
        torch.empty((steps, *state.shape), dtype=torch.bool, device=state.device).bernoulli_(rate)
        for rate in options.get("zoneout", ())
    ]
    return Draws(weight, mask, *(zoneouts or (None, None)))


def by_layer(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Weights by what ends the names of a layer and direction ("_l0", "_l0_reverse", ...), by their names without."""
    suffixes = [name.removeprefix("weight_ih") for name in weights if name.startswith("weight_ih")]
    return {
        suffix: {name.removesuffix(suffix): weight for name, weight in weights.items() if name.endswith(suffix)}
        for suffix in suffixes
    }


class Conditions(NamedTuple):
    """What else a call is given; None is nothing.

    reset (T, N) bool: where the state that enters the step is zero.
    lengths (N,): the steps of each row, after which it keeps its state, and its output is zero.
    """

    reset: Tensor | None = None
    lengths: Tensor | None = None


def walk(
    cell: Cell,
    layers: Mapping[str, Weights],
    draws: Sequence[Draws],
    conditions: Conditions,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of all layers.

    Args:
        layers: as `by_layer` gives them
        draws: one for each of layers
        input: (T, N, I)
        h_0, c_0: (L * D, N, H)

    Returns:
        output (T, N, D * H), h_n and c_n (L * D, N, H)
    """
    directions = 2 if "_l0_reverse" in layers else 1
    h_n, c_n, outputs = [], [], []
    for index, (suffix, weights) in enumerate(layers.items()):
        reverse = suffix.endswith("_reverse")
        output, h, c = _walk_layer(cell, weights, draws[index], conditions, input, h_0[index], c_0[index], reverse)
        h_n.append(h)
        c_n.append(c)
        outputs.append(output)
        if len(outputs) == directions:
            input = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
            outputs = []
    return input, torch.stack(h_n), torch.stack(c_n)


def _walk_layer(
    cell: Cell,
    weights: Weights,
    draws: Draws,
    conditions: Conditions,
    input: Tensor,
    h: Tensor,
    c: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction: output (T, N, H), h_n and c_n (N, H)."""
    step = cell(weights if draws.weight_hh is None else {**weights, "weight_hh": draws.weight_hh})
    keep = running = None  # (T, N, 1): a factor on the state that enters, and which rows have not ended
    if conditions.reset is not None:
        keep = (1 - conditions.reset.to(input.dtype))[:, :, None]
    if conditions.lengths is not None:
        running = (torch.arange(len(input), device=input.device)[:, None] < conditions.lengths)[:, :, None]
    hs = []
    xs = list(enumerate(input.unbind(0)))
    for t, x in reversed(xs) if reverse else xs:
        if keep is not None:
            h, c = h * keep[t], c * keep[t]
        h_new, c_new = step(x, h if draws.recurrent_mask is None else h * draws.recurrent_mask, c)
        if draws.zoneout_h is not None:
            h_new = torch.where(draws.zoneout_h[t], h, h_new)
            c_new = torch.where(draws.zoneout_c[t], c, c_new)
        if running is not None:
            h_new, c_new = torch.where(running[t], h_new, h), torch.where(running[t], c_new, c)
        h, c = h_new, c_new
        hs.append(h)
    output = torch.stack(hs[::-1] if reverse else hs)
    return output if running is None else output * running, h, c
