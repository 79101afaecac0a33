"""What an LSTM layer is, in plain torch operations on any device and dtype: the definition all kernels are held to.

Read top to bottom. `lstm_cell` is one step, `lstm_layer` the loop over it; both are differentiable, any number of
times. `recurrence_forward` and `recurrence_backward` compute the same with a backward written by hand: they walk
over the time steps and leave every product that need not be in the loop (input product, weight gradients) to their
caller. Every backend implements this pair.

Shapes: T time steps, N rows of the batch, I input features, H units, P = projected features, or H without projection.
Gates stand in torch's order: 4H = i | f | g | o.
"""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state between steps, and of what is computed on a gate: its rounding errors add up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lstm_cell(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM.

    Args:
        input: (N, I)
        state: h (N, P), c (N, H)
        weight_ih: (4H, I), rows i | f | g | o
        weight_hh: (4H, P)
        bias_ih, bias_hh: (4H), or None
        weight_hr: (P, H), or None: no projection, P = H

    Returns:
        the next h (N, P), in input's dtype, and c (N, H), in float32 or better
    """
    h, c = state
    gates = torch.nn.functional.linear(input, weight_ih, bias_ih) + torch.nn.functional.linear(h, weight_hh, bias_hh)
    i, f, g, o = gates.to(compute_dtype(gates.dtype)).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = (o.sigmoid() * c.tanh()).to(input.dtype)
    if weight_hr is not None:
        h = torch.nn.functional.linear(h, weight_hr)
    return h, c


def lstm_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, one direction.

    Args:
        input: (T, N, I)
        h0: (N, P)
        c0: (N, H)
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr: as in `lstm_cell`
        lengths: (N,) int64, 1 <= length <= T, or None: the final state of a row is the one after its length; what the
            later steps put into output is the caller's to discard. Not together with reverse.
        reverse: walk from the last step to the first

    Returns:
        output (T, N, P), h_n (N, P), c_n (N, H), all in input's dtype
    """
    h, c = h0, c0.to(compute_dtype(c0.dtype))
    hs, cs = [], []
    for x in reversed(input.unbind(0)) if reverse else input.unbind(0):
        h, c = lstm_cell(x, (h, c), weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
        hs.append(h)
        cs.append(c)
    output = torch.stack(hs[::-1] if reverse else hs)
    if lengths is not None:
        rows = torch.arange(input.size(1), device=input.device)
        h, c = output[lengths - 1, rows], torch.stack(cs)[lengths - 1, rows]
    return output, h, c.to(input.dtype)


def recurrence_forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The steps of one layer, given the input product of all of them.

    Args:
        gates: (T, N, 4H), contiguous: W_ih x + b_ih + b_hh; overwritten with the activated gates
        h0: (N, P)
        c0: (N, H)
        weight_hh: (4H, P)
        weight_hr: (P, H), or None
        reverse: walk from the last step to the first
        save: keep c of every step, as the backward needs it

    Returns:
        output (T, N, P) in gates' dtype; c in float32 or better: (T + 1, N, H) in the order of time, c0 first (last if
        reverse), if save, else the final one, (1, N, H)
    """
    steps, batch_size, hidden_size = gates.size(0), gates.size(1), gates.size(2) // 4
    dtype = compute_dtype(gates.dtype)
    output = gates.new_empty(steps, batch_size, h0.size(1))
    c = gates.new_empty(steps + 1 if save else 1, batch_size, hidden_size, dtype=dtype)
    c_prev, h_prev = c[-1 if reverse else 0], h0
    c_prev.copy_(c0)
    for t in reversed(range(steps)) if reverse else range(steps):
        c_next = c[(t if reverse else t + 1) if save else 0]
        # not addmm_: a CPU's product accumulates onto its addend term by term, and rounds each time at the sum's size
        pre = gates[t].add_(h_prev @ weight_hh.t()).to(dtype)
        i, f = pre[:, : 2 * hidden_size].sigmoid_().chunk(2, dim=1)
        g = pre[:, 2 * hidden_size : 3 * hidden_size].tanh_()
        o = pre[:, 3 * hidden_size :].sigmoid_()
        torch.mul(f, c_prev, out=c_next).addcmul_(i, g)
        hidden = torch.tanh(c_next).mul_(o)
        if weight_hr is None:
            output[t].copy_(hidden)
        else:
            torch.mm(hidden.to(gates.dtype), weight_hr.t(), out=output[t])
        if pre.dtype != gates.dtype:
            gates[t].copy_(pre)
        h_prev, c_prev = output[t], c_next
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
    """The gradients of `recurrence_forward`, step by step from its end.

    Args:
        d_output: (T, N, P), or None for zeros; so are d_h_n (N, P) and d_c_n (N, H)
        gates: (T, N, 4H), activated, as the forward left them
        c: (T + 1, N, H), as the forward returned it
        weight_hh: (4H, P)
        weight_hr: (P, H), or None
        lengths: (N,) int64, or None: where each row's h_n and c_n were taken; the caller has made d_output zero beyond
        reverse: as in the forward

    Returns:
        d_gates (T, N, 4H), before the activations; d_h0 (N, P); d_c0 (N, H); and with weight_hr, for its gradient, the
        whole gradient of each step's projected h (T, N, P) and the h before the projection (T, N, H), else None
    """
    steps, batch_size, hidden_size = gates.size(0), gates.size(1), gates.size(2) // 4
    dtype = c.dtype
    d_gates = torch.empty_like(gates)
    d_h_all = gates.new_zeros(steps, batch_size, weight_hh.size(1)) if d_output is None else d_output.clone()
    hidden_all = None if weight_hr is None else gates.new_empty(steps, batch_size, hidden_size)
    d_c = c.new_zeros(batch_size, hidden_size)
    rows = torch.arange(batch_size, device=gates.device)
    last = (0 if reverse else steps - 1) if lengths is None else lengths - 1
    if d_h_n is not None:
        d_h_all[last, rows] += d_h_n
    if d_c_n is not None and lengths is None:
        d_c += d_c_n
    d_h0 = gates.new_zeros(batch_size, weight_hh.size(1))
    for t in range(steps) if reverse else reversed(range(steps)):
        i, f, g, o = gates[t].to(dtype).chunk(4, dim=1)
        c_prev, c_next = (c[t + 1], c[t]) if reverse else (c[t], c[t + 1])
        if d_c_n is not None and lengths is not None:
            d_c = torch.where((lengths == t + 1)[:, None], d_c + d_c_n, d_c)
        tanh_c = c_next.tanh()
        d_hidden = d_h_all[t]
        if weight_hr is not None:
            d_hidden = d_hidden @ weight_hr
            hidden_all[t] = o * tanh_c
        d_hidden = d_hidden.to(dtype)
        d_c = d_c + d_hidden * o * (1 - tanh_c * tanh_c)
        d_i, d_f, d_g, d_o = d_gates[t].chunk(4, dim=1)
        d_i.copy_(d_c * g * i * (1 - i))
        d_f.copy_(d_c * c_prev * f * (1 - f))
        d_g.copy_(d_c * i * (1 - g * g))
        d_o.copy_(d_hidden * tanh_c * o * (1 - o))
        d_c = d_c * f
        before = t + 1 if reverse else t - 1
        # not addmm_, as in the forward
        (d_h_all[before] if 0 <= before < steps else d_h0).add_(d_gates[t] @ weight_hh)
    return d_gates, d_h0, d_c, None if weight_hr is None else d_h_all, hidden_all
