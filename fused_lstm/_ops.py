"""The two opaque operators of a layer: its forward, and its backward.

To torch.compile each is one node, whatever the number of steps. A backend brings the recurrence alone
(`recurrence_forward` and `recurrence_backward`, as reference.py defines them); everything that need not be in the loop
stands here, as products over all steps at once: the input product before it, weight, bias and input gradients after it.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from fused_lstm import reference
from fused_lstm._backends import select_backend
from fused_lstm._precision import lstm_matmul_precision


def _recurrence(
    backend: str, input: Tensor, weight_ih: Tensor, weight_hr: Tensor | None, lengths: Tensor | None
) -> ModuleType:
    """The module that walks the steps: decided here, where also a compiled graph knows the sizes."""
    name = select_backend(
        backend,
        device=input.device,
        dtype=input.dtype,
        hidden_size=weight_ih.size(0) // 4,
        batch_size=input.size(1),
        projection=weight_hr is not None,
        lengths=lengths is not None,
        compiling=True,  # torch's own LSTM is no choice in here
    ).name
    if name == "reference":
        return reference
    return importlib.import_module(f"fused_lstm.kernels.{name}")  # only here: Triton is optional where no kernel runs


@contextmanager
def _op_body(tensor: Tensor) -> Iterator[None]:
    """What both operators run under: no autocast (the caller has cast), the LSTM's precision, the tensors' device."""
    # Triton launches on the current device, which need not be the tensors' one
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with torch.autocast(tensor.device.type, enabled=False), lstm_matmul_precision(tensor), device:
        yield


def _input_product(input: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor:
    """W_ih x + b_ih + b_hh of all steps, as one product: (T, N, 4H)."""
    steps, batch_size, input_size = input.shape
    rows = input.reshape(steps * batch_size, input_size)
    if bias_ih is None and bias_hh is None:
        gates = rows @ weight_ih.t()
    else:
        bias = bias_hh if bias_ih is None else bias_ih if bias_hh is None else bias_ih + bias_hh
        gates = torch.addmm(bias, rows, weight_ih.t())
    return gates.view(steps, batch_size, weight_ih.size(0))


def _entered(output: Tensor, reverse: bool) -> tuple[int, slice, Tensor]:
    """What h entered which step: the step that h0 entered; all the others; and what entered those (T - 1, N, P)."""
    return (-1, slice(None, -1), output[1:]) if reverse else (0, slice(1, None), output[:-1])


def _activated_gates(gates: Tensor, h0: Tensor, weight_hh: Tensor, output: Tensor, reverse: bool) -> Tensor:
    """The gates of all steps from their input product, which is overwritten, and the h that entered them."""
    first, inner, entered = _entered(output, reverse)
    gates[first].addmm_(h0, weight_hh.t())
    gates[inner].flatten(0, 1).addmm_(entered.flatten(0, 1), weight_hh.t())
    i_f, g, o = gates.tensor_split((gates.size(2) // 2, gates.size(2) // 4 * 3), dim=2)
    i_f.sigmoid_()
    g.tanh_()
    o.sigmoid_()
    return gates


@torch.library.custom_op("fused_lstm::layer_forward", mutates_args=())
def layer_forward(
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
    save: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, one direction, forward.

    Saved for backward, in bytes per (step, row, unit) in a 2-byte dtype (in float32): the activated gates 8 (16), which
    lie where the input product was, unless recompute; c 4 (4); and the output 2 (4), which the caller has anyway.

    Args:
        input, h0, c0, weights, biases, lengths, reverse: as in `fused_lstm.reference.lstm_layer`, all of one dtype
        backend: one of `fused_lstm.BACKENDS` but "torch", or "auto"
        save: keep what the backward needs
        recompute: let the backward compute the gates again rather than keep them

    Returns:
        output (T, N, P), h_n (N, P), c_n (N, H); gates (T, N, 4H) if save and not recompute, else empty; and c
        (T + 1, N, H) if save, else empty
    """
    with _op_body(input):
        gates = _input_product(input, weight_ih, bias_ih, bias_hh)
        # c of every step is kept for lengths too: the rows' final states lie in it
        output, c = _recurrence(backend, input, weight_ih, weight_hr, lengths).recurrence_forward(
            gates, h0, c0, weight_hh, weight_hr, reverse, save or lengths is not None
        )
        if lengths is None:
            h_n, c_n = output[0 if reverse else -1].clone(), c[0 if reverse else -1]
        else:
            row = torch.arange(input.size(1), device=input.device)
            h_n, c_n = output[lengths - 1, row], c[lengths, row]
        # c_n must be a copy: it is returned beside c, and belongs to the caller
        c_n = c_n.to(input.dtype, copy=True)
        if not save:
            c = c.new_empty(0)
        if not save or recompute:
            gates = gates.new_empty(0)
    return output, h_n, c_n, gates, c


@layer_forward.register_fake
def _(
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse, backend, save, recompute
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, batch_size, _ = input.shape
    hidden_size = weight_ih.size(0) // 4
    return (
        input.new_empty(steps, batch_size, h0.size(1)),
        input.new_empty(batch_size, h0.size(1)),
        input.new_empty(batch_size, hidden_size),
        input.new_empty((steps, batch_size, 4 * hidden_size) if save and not recompute else 0),
        input.new_empty(
            (steps + 1, batch_size, hidden_size) if save else 0, dtype=reference.compute_dtype(input.dtype)
        ),
    )


@torch.library.custom_op("fused_lstm::layer_backward", mutates_args=())
def layer_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    output: Tensor,
    gates: Tensor,
    c: Tensor,
    reverse: bool,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, one direction, backward.

    Args:
        d_output (T, N, P), d_h_n (N, P), d_c_n (N, H): gradients of the forward's results; None is zero
        input, h0, weights, biases, lengths, reverse, backend: as the forward got them
        output, gates, c: as the forward returned them; where gates are empty, they are computed again
        needs: which results are wanted, in their order

    Returns:
        gradients of input (T, N, I), h0 (N, P), c0 (N, H), weight_ih (4H, I), weight_hh (4H, P), each bias (4H) and
        weight_hr (P, H); empty where not wanted
    """
    steps, batch_size, input_size = input.shape
    size = steps * batch_size
    with _op_body(input):
        if gates.dim() == 1:
            gates = _activated_gates(_input_product(input, weight_ih, bias_ih, bias_hh), h0, weight_hh, output, reverse)
        # an expanded gradient (of a sum, say) has strides of 0; the kernels index a dense one
        d_results = (None if d is None else d.contiguous() for d in (d_output, d_h_n, d_c_n))
        walk_back = _recurrence(backend, input, weight_ih, weight_hr, lengths).recurrence_backward
        d_gates, d_h0, d_c0, d_h_all, hidden_all = walk_back(
            *d_results, gates, c, weight_hh, weight_hr, lengths, reverse
        )
        gate_size, hidden_size, output_size = weight_ih.size(0), c.size(2), output.size(2)
        d_rows = d_gates.view(size, gate_size)
        need_input, need_h0, need_c0, need_weight_ih, need_weight_hh, need_bias, need_weight_hr = needs
        d_weight_hh = d_bias = d_weight_ih = d_weight_hr = d_input = None
        if need_weight_hh:
            first, inner, entered = _entered(output, reverse)
            d_weight_hh = d_gates[first].t() @ h0
            d_weight_hh.addmm_(d_gates[inner].flatten(0, 1).t(), entered.flatten(0, 1))
        if need_weight_ih:
            d_weight_ih = d_rows.t() @ input.reshape(size, input_size)
        if need_bias:
            d_bias = d_rows.sum(0)
        if need_weight_hr and d_h_all is not None and hidden_all is not None:
            d_weight_hr = d_h_all.view(size, output_size).t() @ hidden_all.view(size, hidden_size)
        if need_input:
            d_input = (d_rows @ weight_ih).view(steps, batch_size, input_size)
        results = (
            d_input,
            d_h0 if need_h0 else None,
            d_c0.to(input.dtype) if need_c0 else None,
            d_weight_ih,
            d_weight_hh,
            d_bias,
            d_weight_hr,
        )
    return tuple(gates.new_empty(0) if result is None else result for result in results)


@layer_backward.register_fake
def _(
    d_output,
    d_h_n,
    d_c_n,
    input,
    h0,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    weight_hr,
    lengths,
    output,
    gates,
    c,
    reverse,
    backend,
    needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (
        input.shape,
        h0.shape,
        c.shape[1:],
        weight_ih.shape,
        weight_hh.shape,
        weight_ih.shape[:1],
        (0,) if weight_hr is None else weight_hr.shape,
    )
    return tuple(input.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
