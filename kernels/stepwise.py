"""One cuBLAS product and one fused pointwise kernel a time step.

Memory is in torch's own order: gates and their gradients (T, N, 4H) as i | f | g | o, output (T, N, P), c (T + 1, N, H)
in the order of time. The product `h @ W_hh^T` accumulates onto the input product, and the kernel activates the gates in
place, so the forward moves every gate once in each direction. Both launchers walk the time steps on the host, but
allocate, slice and compile everything before the first one.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_lstm.kernels.activations import sigmoid, tanh
from fused_lstm.kernels.configs import pointwise_config
from fused_lstm.kernels.interpretation import INTERPRETED


@triton.jit(do_not_specialize=["step", "c_from", "c_to", "h_to", "batch_size"])
def cell_forward_kernel(
    gates_ptr,  # (T, N, 4H): before the activations; after them on return, if SAVE
    c_ptr,  # (., N, H), float32 or float64: read at c_from, written at c_to, which may be the same
    h_ptr,  # (., N, H): written at h_to
    step,  # index of time into gates
    c_from,
    c_to,
    h_to,
    batch_size,
    hidden_size,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: step * batch_size * 4 * hidden_size can pass 2**31
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < hidden_size
    gate_ptrs = gates_ptr + (step.to(tl.int64) * batch_size + row) * 4 * hidden_size + unit
    dtype = c_ptr.dtype.element_ty
    i = sigmoid(tl.load(gate_ptrs, mask=mask, other=0.0).to(dtype))
    f = sigmoid(tl.load(gate_ptrs + hidden_size, mask=mask, other=0.0).to(dtype))
    g = tanh(tl.load(gate_ptrs + 2 * hidden_size, mask=mask, other=0.0).to(dtype))
    o = sigmoid(tl.load(gate_ptrs + 3 * hidden_size, mask=mask, other=0.0).to(dtype))
    c = tl.load(c_ptr + (c_from.to(tl.int64) * batch_size + row) * hidden_size + unit, mask=mask, other=0.0)
    c = f * c + i * g
    h = o * tanh(c)
    tl.store(h_ptr + (h_to.to(tl.int64) * batch_size + row) * hidden_size + unit, h, mask=mask)
    tl.store(c_ptr + (c_to.to(tl.int64) * batch_size + row) * hidden_size + unit, c, mask=mask)
    if SAVE:
        tl.store(gate_ptrs, i, mask=mask)
        tl.store(gate_ptrs + hidden_size, f, mask=mask)
        tl.store(gate_ptrs + 2 * hidden_size, g, mask=mask)
        tl.store(gate_ptrs + 3 * hidden_size, o, mask=mask)


@triton.jit(do_not_specialize=["step", "c_from", "c_to", "batch_size"])
def cell_backward_kernel(
    d_output_ptr,  # (T, N, H), or unused
    d_h_ptr,  # (N, H): what arrives from the step after
    d_c_ptr,  # (N, H), float32 or float64: what arrives from the step after; what leaves for the one before on return
    d_c_n_ptr,  # (N, H), dtype of d_c: joins at each row's last step, if HAS_LENGTHS
    lengths_ptr,  # (N,) int64, or unused
    gates_ptr,  # (T, N, 4H), activated
    c_ptr,  # (T + 1, N, H), float32 or float64
    d_gates_ptr,  # (T, N, 4H): written
    hidden_ptr,  # (T, N, H): h before a projection, written if HAS_PROJECTION
    step,  # index of time into d_output, gates, d_gates, hidden
    c_from,  # index into c of the state that entered the step
    c_to,  # and of the one that left it
    batch_size,
    hidden_size,
    HAS_D_OUTPUT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_PROJECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # int64: step * batch_size * 4 * hidden_size can pass 2**31
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < hidden_size
    state = row * hidden_size + unit
    step_row = step.to(tl.int64) * batch_size + row
    gates = step_row * 4 * hidden_size + unit
    dtype = c_ptr.dtype.element_ty
    i = tl.load(gates_ptr + gates, mask=mask, other=0.0).to(dtype)
    f = tl.load(gates_ptr + gates + hidden_size, mask=mask, other=0.0).to(dtype)
    g = tl.load(gates_ptr + gates + 2 * hidden_size, mask=mask, other=0.0).to(dtype)
    o = tl.load(gates_ptr + gates + 3 * hidden_size, mask=mask, other=0.0).to(dtype)
    c_before = tl.load(c_ptr + (c_from.to(tl.int64) * batch_size + row) * hidden_size + unit, mask=mask, other=0.0)
    c_after = tl.load(c_ptr + (c_to.to(tl.int64) * batch_size + row) * hidden_size + unit, mask=mask, other=0.0)
    d_h = tl.load(d_h_ptr + state, mask=mask, other=0.0).to(dtype)
    if HAS_D_OUTPUT:
        d_h += tl.load(d_output_ptr + step_row * hidden_size + unit, mask=mask, other=0.0).to(dtype)
    d_c = tl.load(d_c_ptr + state, mask=mask, other=0.0)
    if HAS_LENGTHS:
        ends_here = tl.load(lengths_ptr + row) == step + 1
        d_c += tl.load(d_c_n_ptr + state, mask=mask & ends_here, other=0.0)
    tanh_c = tanh(c_after)
    d_c += d_h * o * (1.0 - tanh_c * tanh_c)
    tl.store(d_gates_ptr + gates, d_c * g * i * (1.0 - i), mask=mask)
    tl.store(d_gates_ptr + gates + hidden_size, d_c * c_before * f * (1.0 - f), mask=mask)
    tl.store(d_gates_ptr + gates + 2 * hidden_size, d_c * i * (1.0 - g * g), mask=mask)
    tl.store(d_gates_ptr + gates + 3 * hidden_size, d_h * tanh_c * o * (1.0 - o), mask=mask)
    tl.store(d_c_ptr + state, d_c * f, mask=mask)
    if HAS_PROJECTION:
        tl.store(hidden_ptr + step_row * hidden_size + unit, o * tanh_c, mask=mask)


def _step_launcher(kernel, tensors: list[Tensor | None], sizes: tuple[int, int], flags: dict) -> Callable[..., None]:
    """A function of the step's indices that launches kernel, with everything else looked up here, once."""
    batch_size, hidden_size = sizes
    config = pointwise_config(hidden_size)
    grid = (batch_size, triton.cdiv(hidden_size, config.block), 1)
    if batch_size == 0:  # an empty grid is an error
        return lambda *_: None
    present = next(tensor for tensor in tensors if tensor is not None)
    tensors = [present if tensor is None else tensor for tensor in tensors]  # never read: the flags say so
    constants = {**flags, "BLOCK": config.block}
    if INTERPRETED:
        return lambda *indices: kernel[grid](*tensors, *indices, *sizes, **constants)
    indices = [name for name in kernel.arg_names if name in ("step", "c_from", "c_to", "h_to")]
    compiled = kernel.warmup(*tensors, *[0] * len(indices), *sizes, **constants, grid=grid, num_warps=config.num_warps)
    launch = compiled[grid]
    stream = torch.cuda.current_stream(present.device).cuda_stream
    return lambda *indices: launch(*tensors, *indices, *sizes, *constants.values(), stream=stream)


def _accumulate_on_cpu(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c += a b. A CPU's addmm_ rounds after each term at the size of the sum; cuBLAS adds c once, as this does."""
    c.add_(a @ b)


def recurrence_forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """As `fused_lstm.reference.recurrence_forward`: shapes, order and dtypes are told there."""
    steps, batch_size, hidden_size = gates.size(0), gates.size(1), gates.size(2) // 4
    state_dtype = torch.float64 if gates.dtype == torch.float64 else torch.float32
    output = gates.new_empty(steps, batch_size, h0.size(1))
    c = gates.new_empty(steps + 1 if save else 1, batch_size, hidden_size, dtype=state_dtype)
    c[-1 if reverse else 0].copy_(c0)
    hidden = output if weight_hr is None else gates.new_empty(1, batch_size, hidden_size)
    launch = _step_launcher(cell_forward_kernel, [gates, c, hidden], (batch_size, hidden_size), {"SAVE": save})

    order = range(steps - 1, -1, -1) if reverse else range(steps)
    gate_steps, output_steps = gates.unbind(0), output.unbind(0)
    weight_hh_t = weight_hh.t()
    weight_hr_t, hidden_step = (None, None) if weight_hr is None else (weight_hr.t(), hidden[0])
    accumulate = Tensor.addmm_ if gates.is_cuda else _accumulate_on_cpu
    h_prev = h0
    for t in order:
        accumulate(gate_steps[t], h_prev, weight_hh_t)
        c_from, c_to = ((t + 1, t) if reverse else (t, t + 1)) if save else (0, 0)
        launch(t, c_from, c_to, t if weight_hr is None else 0)
        h_prev = output_steps[t]
        if weight_hr_t is not None:
            torch.mm(hidden_step, weight_hr_t, out=h_prev)
    return output, c


def recurrence_backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    gates: Tensor,
    c: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `fused_lstm.reference.recurrence_backward`: shapes, order and dtypes are told there."""
    steps, batch_size, hidden_size = gates.size(0), gates.size(1), gates.size(2) // 4
    d_gates = torch.empty_like(gates)
    d_c = c.new_zeros(batch_size, hidden_size)
    if d_c_n is not None and lengths is None:
        d_c.copy_(d_c_n)
    # A copy of d_output is worth its memory only where something is added to it: the gradient that the steps hand on
    # (with a projection, whose gradient wants it all), or h_n's at ends that differ from row to row.
    collect = weight_hr is not None or (lengths is not None and d_h_n is not None)
    if collect:
        d_output = gates.new_zeros(steps, batch_size, weight_hh.size(1)) if d_output is None else d_output.clone()
        if d_h_n is not None:
            last = (0 if reverse else steps - 1) if lengths is None else lengths - 1
            d_output[last, torch.arange(batch_size, device=gates.device)] += d_h_n
    d_h = gates.new_zeros(batch_size, hidden_size)
    if d_h_n is not None and not collect:
        d_h.copy_(d_h_n)
    hidden = None if weight_hr is None else gates.new_empty(steps, batch_size, hidden_size)
    has_lengths = lengths is not None and d_c_n is not None
    launch = _step_launcher(
        cell_backward_kernel,
        [
            d_output if weight_hr is None else None,
            d_h,
            d_c,
            d_c_n.to(c.dtype) if has_lengths else None,
            lengths if has_lengths else None,
            gates,
            c,
            d_gates,
            hidden,
        ],
        (batch_size, hidden_size),
        {
            "HAS_D_OUTPUT": d_output is not None and weight_hr is None,
            "HAS_LENGTHS": has_lengths,
            "HAS_PROJECTION": weight_hr is not None,
        },
    )

    order = range(steps) if reverse else range(steps - 1, -1, -1)
    d_gate_steps = d_gates.unbind(0)
    if weight_hr is None:
        for t in order:
            launch(t, *((t + 1, t) if reverse else (t, t + 1)))
            torch.mm(d_gate_steps[t], weight_hh, out=d_h)
        return d_gates, d_h, d_c, None, None

    d_h0 = gates.new_zeros(batch_size, weight_hh.size(1))
    d_h_steps = d_output.unbind(0)
    d_h_before = [*d_h_steps[1:], d_h0] if reverse else [d_h0, *d_h_steps[:-1]]
    accumulate = Tensor.addmm_ if gates.is_cuda else _accumulate_on_cpu
    for t in order:
        torch.mm(d_h_steps[t], weight_hr, out=d_h)
        launch(t, *((t + 1, t) if reverse else (t, t + 1)))
        accumulate(d_h_before[t], d_gate_steps[t], weight_hh)
    return d_gates, d_h0, d_c, d_output, hidden
