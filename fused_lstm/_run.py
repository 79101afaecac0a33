"""One layer on its way to autograd: checked already, cast, drawn for and cleared past each row's end."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm import _autograd
from fused_lstm._backends import select_backend
from fused_lstm._options import CellOptions, draw
from fused_lstm._ragged import Ragged
from fused_lstm.reference import Parameters


class Resets(NamedTuple):
    """reset (T, N) bool: where set, h (N, P) and c (N, H) enter the step; None for zeros."""

    reset: Tensor
    h: Tensor | None = None
    c: Tensor | None = None


def is_autocast_enabled(device: torch.device) -> bool:
    """Is autocast on for device? For meta, which it does not know, torch's own question is an error."""
    # not torch.amp.is_autocast_available: Dynamo cannot trace it before torch 2.13
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _autocast_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on and input is not float64, else input's."""
    if is_autocast_enabled(input.device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def select_layer_backend(
    backend: str,
    input: Tensor,
    hidden_size: int,
    batch_size: int,
    options: CellOptions,
    training: bool,
    others: dict[str, bool],
    **features: bool,
) -> str:
    """The backend's name for a layer on input (·, ·, I) or packed (·, I).

    Under torch.compile the decision is left to the operators, lest the graph depend on the sizes: "auto" stays "auto".

    Args:
        others: by name, what torch's LSTM does not have beside the cell's options, and whether it is in use
        features: as `select_backend` names them
    """
    if torch.compiler.is_compiling() and backend != "torch":
        return backend
    return select_backend(
        backend,
        device=input.device,
        dtype=_autocast_dtype(input),
        hidden_size=hidden_size,
        batch_size=batch_size,
        layer_norm=options.layer_norm,
        options=(*options.in_use(training), *(name for name, used in others.items() if used)),
        compiling=torch.compiler.is_compiling(),
        **features,
    ).name


def run_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    parameters: tuple[Parameters, ...],
    options: CellOptions,
    training: bool,
    resets: Resets | None,
    ragged: Ragged | None,
    reverse: bool,
    backend: str,
    recompute: bool,
    states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer, all directions.

    Args:
        input: (T, N, I), zero past each row's end if ragged
        h0: (D, N, P)
        c0: (D, N, H)
        parameters: one for each direction
        reverse: walk from each row's last step to its first; of two directions the second one does
        backend: one of `fused_lstm.BACKENDS` but "torch", or "auto"
        states: return c of all steps

    Returns:
        output (T, N, D * P); h_n (D, N, P); c_n (D, N, H); c of all steps (D, T, N, H), else empty; zero past each end
    """
    dtype = _autocast_dtype(input)
    input, h0, c0 = input.to(dtype), h0.to(dtype), c0.to(dtype)
    masks, drawn = [], []
    for d, own in enumerate(parameters):
        draws = draw(options, training, own.weight_hh, input.size(0), h0[d], c0[d])
        masks += [draws.recurrent_mask, draws.zoneout_h, draws.zoneout_c]
        # parameters of norms and peepholes stay in their dtype: no product takes them
        cast = [None if p is None else p.to(dtype) for p in own._replace(weight_hh=draws.weight_hh)[:5]]
        drawn.append(Parameters(*cast, *own[5:]))
    reset = reset_h = reset_c = None
    if resets is not None:
        reset, reset_h, reset_c = resets
        reset_h = h0.new_zeros(h0.shape[1:]) if reset_h is None else reset_h.to(dtype)
        reset_c = c0.new_zeros(c0.shape[1:]) if reset_c is None else reset_c.to(dtype)
        if ragged is not None:
            reset = reset & ragged.mask[:, :, 0]
    call = _autograd.LayerCall(
        input,
        h0,
        c0,
        reset_h,
        reset_c,
        reset,
        tuple(masks),
        (0.0, 0.0) if training else options.zoneout,
        ragged,
        options.layer_norm,
        reverse,
        backend,
        recompute,
        states,
    )
    output, h_n, c_n, c_all = _autograd.layer(call, tuple(drawn))
    if ragged is not None:
        output = ragged.clear(output)
        if states:
            c_all = torch.where(ragged.mask, c_all, 0)
    return output, h_n, c_n, c_all
