"""A layer as autograd sees it: one node over the two operators, differentiable any number of times."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm import _ops, reference
from fused_lstm._ops import GRADIENTS
from fused_lstm._ragged import Ragged
from fused_lstm.reference import Parameters

# Which of the operator's gradients is that of a parameter. Where a bias comes after a norm, it has the norm's bias's.
_GRADIENT_OF = {
    **{name: name for name in ("weight_ih", "weight_hh", "weight_hr", "weight_ph", "norm_hh_weight")},
    **{name: name for name in ("norm_cell_weight", "norm_cell_bias")},
    **dict.fromkeys(("bias_ih", "bias_hh"), "bias"),
    **dict.fromkeys(("norm_gates_weight", "norm_ih_weight"), "norm_weight"),
    **dict.fromkeys(("norm_gates_bias", "norm_ih_bias", "norm_hh_bias"), "norm_bias"),
}
_STATES = 5  # tensors that can have a gradient, before the parameters: input, h0, c0, reset_h, reset_c


class LayerCall(NamedTuple):
    """Everything that a layer is called with but its parameters; tensors as `_ops.layer_forward` takes them."""

    input: Tensor
    h0: Tensor
    c0: Tensor
    reset_h: Tensor | None
    reset_c: Tensor | None
    reset: Tensor | None
    masks: tuple[Tensor | None, ...]
    rates: tuple[float, float]
    ragged: Ragged | None
    layer_norm: str | None
    reverse: bool
    backend: str
    recompute: bool
    states: bool


def layer(call: LayerCall, parameters: tuple[Parameters, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, all directions, on a backend that is not "torch".

    Returns:
        output (T, N, D * P), h_n (D, N, P), c_n (D, N, H), and c of all steps (D, T, N, H) if call.states, else empty;
        the steps past a row's end hold what is the caller's to clear
    """
    flat = [parameter for own in parameters for parameter in own]
    lengths, flip = (None, None) if call.ragged is None else (call.ragged.lengths, call.ragged.flip)
    options = (list(call.rates), call.layer_norm, call.reverse, call.backend, call.recompute, call.states)
    differentiable = (*call[:_STATES], *flat)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        constants = (call.reset, lengths, flip, *call.masks)
        return _Layer.apply(options, len(constants), *call[:_STATES], *constants, *flat)[:4]
    results = _ops.layer_forward(
        call.input,
        call.h0,
        call.c0,
        flat,
        call.reset,
        call.reset_h,
        call.reset_c,
        list(call.masks),
        list(call.rates),
        lengths,
        flip,
        call.layer_norm,
        call.reverse,
        call.backend,
        save=False,
        recompute=False,
        states=call.states,
    )
    return results[:4]


class _Layer(torch.autograd.Function):
    """options: rates, layer_norm, reverse, backend, recompute, states; tensors: the states' five, then count constants
    (reset, lengths, flip and the masks), then the parameters."""

    @staticmethod
    def forward(options, count, *tensors):
        input, h0, c0, reset_h, reset_c, reset, lengths, flip = tensors[: _STATES + 3]
        masks, flat = tensors[_STATES + 3 : _STATES + count], tensors[_STATES + count :]
        rates, layer_norm, reverse, backend, recompute, states = options
        return _ops.layer_forward(
            input,
            h0,
            c0,
            list(flat),
            reset,
            reset_h,
            reset_c,
            list(masks),
            rates,
            lengths,
            flip,
            layer_norm,
            reverse,
            backend,
            save=True,
            recompute=recompute,
            states=states,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.count, *tensors = inputs
        out, _h_n, _c_n, c_all, *saved = output
        ctx.mark_non_differentiable(*saved, *(() if ctx.options[-1] else (c_all,)))
        ctx.save_for_backward(*tensors, out, *saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n, d_c_all, *_):
        *tensors, output, gates, product, entered, moments, c = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        d_results = (d_output, d_h_n, d_c_n, d_c_all if ctx.options[-1] else None)
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate what is returned here
            grads = _differentiable_backward(ctx.options, ctx.count, tensors, d_results, needs)
        else:
            saved = (output, gates, product, entered, moments, c)
            grads = _fused_backward(ctx.options, ctx.count, tensors, d_results, needs, saved)
        return None, None, *grads


def _fused_backward(options, count, tensors, d_results, needs, saved):
    input, h0, _c0, reset_h, reset_c, reset, lengths, flip = tensors[: _STATES + 3]
    masks, flat = tensors[_STATES + 3 : _STATES + count], tensors[_STATES + count :]
    rates, layer_norm, reverse, backend, _recompute, _states = options
    sources = [_gradient_of(name, layer_norm) for name in Parameters._fields]
    width = len(sources)
    need_parameters = needs[_STATES + count :]
    wanted = []
    for start in range(0, len(flat), width):
        own = {source for source, need in zip(sources, need_parameters[start : start + width], strict=True) if need}
        wanted += [name in own for name in GRADIENTS]
    *d_states, d_parameters = _ops.layer_backward(
        *d_results,
        input,
        h0,
        list(flat),
        reset,
        reset_h,
        reset_c,
        list(masks),
        rates,
        lengths,
        flip,
        *saved,
        layer_norm,
        reverse,
        backend,
        [*needs[:_STATES], *wanted],
    )
    found = []
    for d in range(len(flat) // width):
        own = dict(zip(GRADIENTS, d_parameters[d * len(GRADIENTS) :], strict=False))
        found += [own[source] for source in sources]
    found = [d.to(p.dtype) if need else None for d, p, need in zip(found, flat, need_parameters, strict=True)]
    d_states = [d if need else None for d, need in zip(d_states, needs[:_STATES], strict=True)]
    return *d_states, *[None] * count, *found


def _gradient_of(parameter: str, layer_norm: str | None) -> str:
    if parameter in ("bias_ih", "bias_hh") and layer_norm not in (None, "gates"):
        return "norm_bias"
    return _GRADIENT_OF[parameter]


def _differentiable_backward(options, count, tensors, d_results, needs):
    """The same gradients through the reference, which autograd can differentiate again."""
    # views: gradients must stop at this layer's inputs, also where one of them was made from another
    tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    results = _reference_layer(options, count, tensors)
    pairs = [(result, d) for result, d in zip(results, d_results, strict=True) if d is not None]
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    grads = iter(
        torch.autograd.grad(
            [result for result, _ in pairs],
            wanted,
            [d for _, d in pairs],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(grads) if need else None for need in needs]


def _reference_layer(options, count, tensors):
    """What the forward operator returns first, by the definition."""
    input, h0, c0, reset_h, reset_c, reset, lengths, flip = tensors[: _STATES + 3]
    masks, flat = tensors[_STATES + 3 : _STATES + count], tensors[_STATES + count :]
    rates, layer_norm, reverse, *_ = options
    conditions = _ops.conditions_of(reset, reset_h, reset_c, masks, rates)
    directions = _ops.Directions(h0.size(0), reverse, lengths, flip)
    found = []
    for d, own in enumerate(_ops.unflatten(flat)):
        x = directions.mirror(input) if directions.mirrored[d] else input
        output, h_n, c_n, c_all = reference.lstm_layer(
            x, h0[d], c0[d], own, layer_norm, conditions[d], lengths, directions.reverse[d]
        )
        if directions.mirrored[d]:
            output, c_all = directions.mirror(output), directions.mirror(c_all)
        found.append((output, h_n, c_n, c_all))
    outputs, *states = zip(*found, strict=True)
    return torch.cat(outputs, dim=2), *(torch.stack(state) for state in states)
