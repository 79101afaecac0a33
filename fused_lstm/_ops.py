"""The two opaque operators of a layer: its forward, and its backward.

To torch.compile each is one node, whatever the number of steps. A backend brings the walk over the steps alone
(recurrence.py); everything that need not be in the loop stands here, as products over all steps at once.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from fused_lstm import reference_recurrence
from fused_lstm._backends import select_backend
from fused_lstm._precision import lstm_matmul_precision
from fused_lstm._products import input_product, recompute_walk, weight_hh_gradient
from fused_lstm.recurrence import MOMENTS, Gradients, Walk, new_gradients, new_walk
from fused_lstm.reference import Conditions, Parameters, compute_dtype

# The gradients of one direction's parameters, as `layer_backward` returns them. The two biases have one, since they
# stand in one sum; so have the norms of the gates and of the input product, of which a layer has one, and their biases.
GRADIENTS = (
    "weight_ih",
    "weight_hh",
    "bias",
    "weight_hr",
    "weight_ph",
    "norm_weight",
    "norm_hh_weight",
    "norm_bias",
    "norm_cell_weight",
    "norm_cell_bias",
)
MASKS = 3  # of one direction: recurrent_mask, zoneout_h, zoneout_c
_WIDTH = len(Parameters._fields)


def _recurrence(backend: str, walk: Walk, lengths: Tensor | None) -> ModuleType:
    """The module that walks the steps: decided here, where also a compiled graph knows the sizes."""
    name = select_backend(
        backend,
        device=walk.gates.device,
        dtype=walk.gates.dtype,
        hidden_size=walk.c.size(3),
        batch_size=walk.c.size(2),
        projection=walk.parameters[0].weight_hr is not None,
        lengths=lengths is not None,
        layer_norm=walk.layer_norm,
        options=walk.options(),
        compiling=True,  # torch's own LSTM is no choice in here
    ).name
    if name == "reference":
        return reference_recurrence
    return importlib.import_module(f"fused_lstm.kernels.{name}")  # only here: Triton is optional where no kernel runs


@contextmanager
def _op_body(tensor: Tensor) -> Iterator[None]:
    """What both operators run under: no autocast (the caller has cast), the LSTM's precision, the tensors' device."""
    # Triton launches on the current device, which need not be the tensors' one
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with torch.autocast(tensor.device.type, enabled=False), lstm_matmul_precision(tensor), device:
        yield


class Directions:
    """Which way each direction of a layer goes.

    With lengths, a direction that starts at each row's own end walks forward, on rows whose steps were mirrored.
    """

    def __init__(self, count: int, reverse: bool, lengths: Tensor | None, flip: Tensor | None) -> None:
        backwards = (False, True) if count == 2 else (reverse,)
        self.flip = flip
        self.mirrored = tuple(each and lengths is not None for each in backwards)
        self.reverse = tuple(each and lengths is None for each in backwards)

    def mirror(self, x: Tensor) -> Tensor:
        """x (T, N, ·), each row's steps in reverse order."""
        return x.reshape(-1, x.size(2)).index_select(0, self.flip).view(x.shape)

    def inputs(self, input: Tensor) -> list[Tensor]:
        """What each direction walks over."""
        return [self.mirror(input) if mirrored else input for mirrored in self.mirrored]

    def mirror_(self, x: Tensor, dim: int) -> Tensor:
        """x with D at dim, the mirrored directions put into the input's order or back, in place."""
        for d, mirrored in enumerate(self.mirrored):
            if mirrored:
                x.select(dim, d).copy_(self.mirror(x.select(dim, d)))
        return x


def _input_products(inputs: list[Tensor], parameters: tuple[Parameters, ...], layer_norm: str | None) -> Tensor:
    """(D, T, N, 4H)."""
    steps, batch_size, input_size = inputs[0].shape
    gates = inputs[0].new_empty(len(inputs), steps, batch_size, parameters[0].weight_ih.size(0))
    for input, own, out in zip(inputs, parameters, gates.unbind(0), strict=True):
        input_product(input.reshape(-1, input_size), own, layer_norm, out.flatten(0, 1))
    return gates


def unflatten(parameters: list[Tensor | None]) -> tuple[Parameters, ...]:
    """One for each direction."""
    return tuple(Parameters(*parameters[start : start + _WIDTH]) for start in range(0, len(parameters), _WIDTH))


def conditions_of(
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    masks: list[Tensor | None],
    rates: list[float],
) -> tuple[Conditions, ...]:
    """One for each direction: zoneout by its mask, or by its rate where there is none."""
    found = []
    for start in range(0, len(masks), MASKS):
        recurrent_mask, *zoneouts = masks[start : start + MASKS]
        zoneouts = [mask if mask is not None else rate or None for mask, rate in zip(zoneouts, rates, strict=True)]
        found.append(Conditions(reset, reset_h, reset_c, recurrent_mask, *zoneouts))
    return tuple(found)


@torch.library.custom_op("fused_lstm::layer_forward", mutates_args=())
def layer_forward(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    parameters: list[Tensor | None],
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    masks: list[Tensor | None],
    rates: list[float],
    lengths: Tensor | None,
    flip: Tensor | None,
    layer_norm: str | None,
    reverse: bool,
    backend: str,
    save: bool,
    recompute: bool,
    states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, all directions, forward.

    Saved for backward, in bytes per (step, row, unit) in a 2-byte dtype (in float32): gates 8 (16), which lie where the
    input product was; c 4 (4); the output 2 (4), which the caller has anyway; with a norm of the projections W_hh h, 8
    (16); with a reset or a recurrent mask the h that entered each step, 2 (4). With recompute c and the output only.
    Norms take 24 or 40 bytes more for each (step, row).

    Args:
        input (T, N, I), h0 (D, N, P), c0 (D, N, H): of one dtype
        parameters: those of `fused_lstm.reference.Parameters`, for each direction one after the other
        reset, reset_h, reset_c: as in `fused_lstm.reference.Conditions`, or None
        masks: recurrent_mask, zoneout_h and zoneout_c, for each direction one after the other
        rates: zoneout's mix for h and for c, where there are no masks; 0 for none
        lengths (N,) int64: the steps of each row; flip: as in `fused_lstm._ragged.Ragged`; or None
        layer_norm: as in `fused_lstm.reference.lstm_cell`
        reverse: walk from each row's last step to its first; of two directions the second one does
        backend: one of `fused_lstm.BACKENDS` but "torch", or "auto"
        save: keep what the backward needs
        recompute: let the backward compute again what can be, rather than keep it
        states: return c of all steps

    Returns:
        output (T, N, D * P), h_n (D, N, P), c_n (D, N, H), and c of all steps (D, T, N, H) if states; then what the
        backward needs: gates (D, T, N, 4H), product (D, T, N, 4H), entered (D, T, N, P), moments (D, T, N, ·) and
        c (D, T + 1, N, H); empty is what is not there or was not asked for
    """
    directions = Directions(h0.size(0), reverse, lengths, flip)
    own = unflatten(parameters)
    steps, batch_size, _ = input.shape
    # no result may be a view: autograd would let nobody change it in place
    output = input.new_empty(steps, batch_size, h0.size(0) * h0.size(2))
    with _op_body(input):
        walk = new_walk(
            _input_products(directions.inputs(input), own, layer_norm),
            output.view(steps, batch_size, *h0.shape[::2]),
            h0,
            c0,
            own,
            conditions_of(reset, reset_h, reset_c, masks, rates),
            layer_norm,
            directions.reverse,
            save or states or lengths is not None,  # the rows' final states lie in c of every step
        )
        _recurrence(backend, walk, lengths).recurrence_forward(walk)
        c = walk.c
        h_n, c_n = torch.empty_like(walk.h0), input.new_empty(c0.shape)
        row = torch.arange(batch_size, device=input.device)
        for d, back in enumerate(directions.reverse):
            last = (0 if back else -1) if lengths is None else (lengths - 1, row)
            h_n[d] = walk.output[:, :, d][last]
            c_n[d] = (c[d, :-1] if back else c[d, 1:])[last] if walk.save else c[d, 0]
        none = input.new_empty(0)
        c_all = none
        if states:
            c_all = input.new_empty(h0.size(0), steps, *c0.shape[1:])
            for d, back in enumerate(directions.reverse):
                c_all[d] = c[d, :-1] if back else c[d, 1:]
            directions.mirror_(c_all, 0)
        directions.mirror_(walk.output, 2)
        keep = save and not recompute
        kept = [
            buffer if buffer is not None and keep else none.clone()
            for buffer in (walk.gates, walk.product, walk.entered)
        ]
        kept += [buffer if buffer is not None and save else c.new_empty(0) for buffer in (walk.moments, c)]
    return output, h_n, c_n, c_all, *kept


@layer_forward.register_fake
def _(
    input,
    h0,
    c0,
    parameters,
    reset,
    reset_h,
    reset_c,
    masks,
    rates,
    lengths,
    flip,
    layer_norm,
    reverse,
    backend,
    save,
    recompute,
    states,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, batch_size, _ = input.shape
    directions, _, hidden_size = c0.shape
    output_size = h0.size(2)
    gates = (directions, steps, batch_size, 4 * hidden_size)
    keep = save and not recompute
    enters = reset is not None or masks[0] is not None
    return (
        input.new_empty(steps, batch_size, directions * output_size),
        input.new_empty(h0.shape),
        input.new_empty(c0.shape),
        input.new_empty((directions, steps, batch_size, hidden_size) if states else 0),
        input.new_empty(gates if keep else 0),
        input.new_empty(gates if keep and layer_norm not in (None, "gates") else 0),
        input.new_empty((directions, steps, batch_size, output_size) if keep and enters else 0),
        input.new_empty(
            (directions, steps, batch_size, MOMENTS[layer_norm]) if save and layer_norm is not None else 0,
            dtype=compute_dtype(input.dtype),
        ),
        input.new_empty(
            (directions, steps + 1, batch_size, hidden_size) if save else 0, dtype=compute_dtype(input.dtype)
        ),
    )


def _arriving(
    walk: Walk,
    directions: Directions,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_c_all: Tensor | None,
    lengths: Tensor | None,
    reset_state: bool,
) -> Gradients:
    """The gradients of a layer's results as the walk takes them."""
    mirrors = any(directions.mirrored)
    if d_output is not None:
        # an expanded gradient (of a sum, say) has strides of 0; the kernels index a dense one
        d_output = d_output.contiguous().view(walk.output.shape)
        if mirrors or (lengths is not None and d_h_n is not None):
            d_output = directions.mirror_(d_output.clone(), 2)
    if d_c_all is not None:
        d_c_all = directions.mirror_(d_c_all.to(walk.c.dtype, copy=True), 0).contiguous()
    if lengths is not None:  # rows end at steps that differ: their final states' gradients join those of all steps
        row = torch.arange(lengths.size(0), device=lengths.device)
        if d_h_n is not None:
            d_output = torch.zeros_like(walk.output) if d_output is None else d_output
            d_output[lengths - 1, row] += d_h_n.transpose(0, 1)
        if d_c_n is not None:
            if d_c_all is None:
                d_c_all = walk.c.new_zeros(walk.c.size(0), walk.output.size(0), *walk.c.shape[2:])
            d_c_all[:, lengths - 1, row] += d_c_n
        d_h_n = d_c_n = None
    return new_gradients(walk, d_output, d_c_all, d_h_n, d_c_n, reset_state)


@torch.library.custom_op("fused_lstm::layer_backward", mutates_args=())
def layer_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_c_all: Tensor | None,
    input: Tensor,
    h0: Tensor,
    parameters: list[Tensor | None],
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    masks: list[Tensor | None],
    rates: list[float],
    lengths: Tensor | None,
    flip: Tensor | None,
    output: Tensor,
    gates: Tensor,
    product: Tensor,
    entered: Tensor,
    moments: Tensor,
    c: Tensor,
    layer_norm: str | None,
    reverse: bool,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """One layer, all directions, backward.

    Args:
        d_output (T, N, D * P), d_h_n (D, N, P), d_c_n (D, N, H), d_c_all (D, T, N, H): gradients of the forward's
            results; None is zero
        input, h0, parameters, …, lengths, flip, layer_norm, reverse, backend: as the forward got them
        output, gates, product, entered, moments, c: as the forward returned them; where gates are empty, they are
            computed again
        needs: which are wanted of the gradients of input, h0, c0, reset_h, reset_c and, for each direction, of
            `GRADIENTS`

    Returns:
        gradients of input (T, N, I), h0 (D, N, P), c0 (D, N, H), reset_h (N, P), reset_c (N, H); and, for each
        direction, of `GRADIENTS`; empty where not wanted
    """
    steps, batch_size, input_size = input.shape
    directions = Directions(h0.size(0), reverse, lengths, flip)
    own = unflatten(parameters)
    conditions = conditions_of(reset, reset_h, reset_c, masks, rates)
    need_input, need_h0, need_c0, need_reset_h, need_reset_c, *need_parameters = needs
    with _op_body(input):
        inputs = directions.inputs(input)
        output = output.view(steps, batch_size, *h0.shape[::2])
        recompute = gates.dim() == 1
        walk = Walk(
            _input_products(inputs, own, layer_norm) if recompute else gates,
            product if layer_norm not in (None, "gates") else None,
            directions.mirror_(output.clone(), 2) if any(directions.mirrored) else output,
            entered if reset is not None or masks[0] is not None else None,
            moments if layer_norm is not None else None,
            c,
            h0.contiguous(),
            own,
            conditions,
            layer_norm,
            directions.reverse,
            True,
        )
        if recompute:
            walk = recompute_walk(walk)
        gradients = _arriving(walk, directions, d_output, d_h_n, d_c_n, d_c_all, lengths, need_reset_h or need_reset_c)
        _recurrence(backend, walk, lengths).recurrence_backward(walk, gradients)
        d_input = None
        if need_input:
            for d, mirrored in enumerate(directions.mirrored):
                rows = gradients.d_gates[d].flatten(0, 1)
                if mirrored or d_input is None:
                    part = rows @ own[d].weight_ih
                    part = directions.mirror(part.view(input.shape)).flatten(0, 1) if mirrored else part
                    d_input = part if d_input is None else d_input.add_(part)
                else:
                    d_input.addmm_(rows, own[d].weight_ih)
            d_input = d_input.view(steps, batch_size, input_size)
        states = (
            (need_h0, gradients.d_h, input.dtype),
            (need_c0, gradients.d_c, input.dtype),
            (need_reset_h, None if gradients.d_reset_h is None else gradients.d_reset_h[0], input.dtype),
            (need_reset_c, None if gradients.d_reset_c is None else gradients.d_reset_c[0], input.dtype),
        )
        none = input.new_empty(0)
        d_states = [d.to(dtype) if need else none.clone() for need, d, dtype in states]
        width = len(GRADIENTS)
        d_parameters = []
        for d, rows in enumerate(inputs):
            wanted = need_parameters[d * width : (d + 1) * width]
            d_parameters += _parameter_gradients(walk, gradients, d, rows.reshape(-1, input_size), wanted)
    return none.clone() if d_input is None else d_input, *d_states, d_parameters


def _parameter_gradients(walk: Walk, gradients: Gradients, d: int, rows: Tensor, needs: list[bool]) -> list[Tensor]:
    """The `GRADIENTS` of direction d, whose input was rows (T * N, I)."""
    d_gates = gradients.d_gates[d].flatten(0, 1)

    def made(name: str) -> Tensor:
        if name == "weight_ih":
            return d_gates.t() @ rows
        if name == "weight_hh":
            return weight_hh_gradient(walk, gradients, d)
        if name == "bias":
            return d_gates.sum(0)
        if name == "weight_hr":
            return gradients.d_projected[d].flatten(0, 1).t() @ gradients.hidden[d].flatten(0, 1)
        return getattr(gradients, f"d_{name}")[d].clone()

    return [made(name) if need else rows.new_empty(0) for name, need in zip(GRADIENTS, needs, strict=True)]


@layer_backward.register_fake
def _(
    d_output,
    d_h_n,
    d_c_n,
    d_c_all,
    input,
    h0,
    parameters,
    reset,
    reset_h,
    reset_c,
    masks,
    rates,
    lengths,
    flip,
    output,
    gates,
    product,
    entered,
    moments,
    c,
    layer_norm,
    reverse,
    backend,
    needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    directions, _, batch_size, hidden_size = c.shape
    state, gate_size = (batch_size, hidden_size), (4 * hidden_size,)
    shapes = [input.shape, h0.shape, (directions, *state), h0.shape[1:], state]
    dtypes = [input.dtype] * len(shapes)
    for own in unflatten(parameters):
        weight_hr = (0,) if own.weight_hr is None else own.weight_hr.shape
        shapes += [own.weight_ih.shape, own.weight_hh.shape, gate_size, weight_hr, (3 * hidden_size,)]
        shapes += [gate_size] * 3 + [(hidden_size,)] * 2
        dtypes += [input.dtype] * 4 + [c.dtype] * 6
    results = [
        input.new_empty(shape, dtype=dtype) if need else input.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    ]
    return *results[:5], results[5:]
