"""A layer as autograd sees it: one node over the two operators, differentiable any number of times."""

import torch
from torch import Tensor

from fused_lstm import _ops, reference

_FIRST_OPTION = 8  # forward's arguments: eight tensors that can have a gradient, then lengths and the options


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, backend, recompute):
        tensors = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths)
        return _ops.layer_forward(*tensors, reverse, backend, save=True, recompute=recompute)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, reverse, backend, _recompute = inputs
        out, _h_n, _c_n, gates, c = output
        ctx.mark_non_differentiable(gates, c)
        ctx.save_for_backward(*tensors, out, gates, c)
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.backend = reverse, backend

    @staticmethod
    def backward(ctx, d_output, d_h_n, d_c_n, _d_gates, _d_c):
        *tensors, lengths, output, gates, c = ctx.saved_tensors
        needs = ctx.needs_input_grad[:_FIRST_OPTION]
        d_results = (d_output, d_h_n, d_c_n)
        if torch.is_grad_enabled():  # create_graph=True: somebody will differentiate what is returned here
            grads = _differentiable_backward(tensors, lengths, ctx.reverse, d_results, needs)
        else:
            grads = _fused_backward(ctx, tensors, lengths, d_results, needs, (output, gates, c))
        return *grads, None, None, None, None


def _fused_backward(ctx, tensors, lengths, d_results, needs, saved):
    input, h0, _c0, *weights = tensors
    need_input, need_h0, need_c0, need_weight_ih, need_weight_hh, need_bias_ih, need_bias_hh, need_weight_hr = needs
    wanted = [
        need_input,
        need_h0,
        need_c0,
        need_weight_ih,
        need_weight_hh,
        need_bias_ih or need_bias_hh,
        need_weight_hr,
    ]
    grads = _ops.layer_backward(*d_results, input, h0, *weights, lengths, *saved, ctx.reverse, ctx.backend, wanted)
    d_input, d_h0, d_c0, d_weight_ih, d_weight_hh, d_bias, d_weight_hr = grads
    # both biases stand in the same sum, so theirs is one gradient
    ordered = (d_input, d_h0, d_c0, d_weight_ih, d_weight_hh, d_bias, d_bias, d_weight_hr)
    return [grad if need else None for grad, need in zip(ordered, needs, strict=True)]


def _differentiable_backward(tensors, lengths, reverse, d_results, needs):
    """The same gradients through the reference, which autograd can differentiate again."""
    # views: gradients must stop at this layer's inputs, also where one of them was made from another
    tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    results = reference.lstm_layer(*tensors, lengths, reverse)
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


def layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    backend: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_lstm.reference.lstm_layer`, on backend (not "torch"); all tensors are of one dtype."""
    arguments = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, backend)
    differentiable = any(tensor is not None and tensor.requires_grad for tensor in arguments[:_FIRST_OPTION])
    if torch.is_grad_enabled() and differentiable:
        return _Layer.apply(*arguments, recompute)[:3]
    return _ops.layer_forward(*arguments, save=False, recompute=False)[:3]
