"""One LSTM layer and one LSTM step as functions of their weights."""

import torch
from torch import Tensor

from fused_lstm import _autograd
from fused_lstm._backends import select_backend
from fused_lstm._ragged import Ragged, check_lengths


def is_autocast_enabled(device: torch.device) -> bool:
    """Is autocast on for device? For meta, which it does not know, torch's own question is an error."""
    # not torch.amp.is_autocast_available: Dynamo cannot trace it before torch 2.13
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _autocast_dtype(input: Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on and input is not float64, else input's."""
    if is_autocast_enabled(input.device) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def check_two_states(hx: tuple[Tensor, ...], function: str) -> None:
    """RuntimeError, in torch's words, unless hx is h and c."""
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")


def select_layer_backend(backend: str, input: Tensor, hidden_size: int, batch_size: int, **features: bool) -> str:
    """The backend's name for a layer on input (·, ·, I) or packed (·, I); features as `select_backend` names them.

    Under torch.compile the decision is left to the operators, lest the graph depend on the sizes: "auto" stays "auto".
    """
    if torch.compiler.is_compiling() and backend != "torch":
        return backend
    return select_backend(
        backend,
        device=input.device,
        dtype=_autocast_dtype(input),
        hidden_size=hidden_size,
        batch_size=batch_size,
        compiling=torch.compiler.is_compiling(),
        **features,
    ).name


def run_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: tuple[Tensor | None, ...],
    ragged: Ragged | None,
    reverse: bool,
    backend: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction, checked already.

    Args:
        input: (T, N, I), zero past each row's end if ragged
        h0: (N, P)
        c0: (N, H)
        weights: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; None for each that is not there
        backend: one of `fused_lstm.BACKENDS` but "torch", or "auto"

    Returns:
        output (T, N, P), zero past each end; h_n (N, P); c_n (N, H)
    """
    dtype = _autocast_dtype(input)
    input, h0, c0, *weights = (None if tensor is None else tensor.to(dtype) for tensor in (input, h0, c0, *weights))
    if ragged is None:
        return _autograd.layer(input, h0, c0, *weights, None, reverse, backend, recompute)
    if reverse:
        input = ragged.mirror(input)
    output, h_n, c_n = _autograd.layer(input, h0, c0, *weights, ragged.lengths, False, backend, recompute)
    output = ragged.clear(output)
    return ragged.mirror(output) if reverse else output, h_n, c_n


def _check_sizes(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) -> None:
    """RuntimeError with the first argument whose size or dtype does not fit the others; input is (..., N, I)."""
    if weight_ih.dim() != 2 or weight_ih.size(0) % 4:
        raise RuntimeError(f"Expected weight_ih size (4*hidden_size, input_size), got {list(weight_ih.shape)}")
    if input.size(-1) != weight_ih.size(1):
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weight_ih.size(1)}, got {input.size(-1)}"
        )
    gate_size, batch_size = weight_ih.size(0), input.size(-2)
    hidden_size = gate_size // 4
    output_size = hidden_size if weight_hr is None else weight_hr.size(0)
    expected = {
        "weight_hh": (weight_hh, (gate_size, output_size)),
        "bias_ih": (bias_ih, (gate_size,)),
        "bias_hh": (bias_hh, (gate_size,)),
        "weight_hr": (weight_hr, (output_size, hidden_size)),
        "hidden[0]": (h0, (batch_size, output_size)),
        "hidden[1]": (c0, (batch_size, hidden_size)),
    }
    for name, (tensor, size) in expected.items():
        if tensor is not None and tensor.shape != size:
            raise RuntimeError(f"Expected {name} size {size}, got {list(tensor.shape)}")
    if is_autocast_enabled(input.device):
        return
    for name, (tensor, _) in {"weight_ih": (weight_ih, None), **expected}.items():
        if tensor is None:
            continue
        if tensor.dtype != input.dtype:
            raise ValueError(f"Expected {name} to have the input's dtype {input.dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(f"Expected {name} on the input's device {input.device}, got {tensor.device}")


def lstm_layer(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer, one direction, over a whole sequence.

    Args:
        input: (T, N, I): steps, batch, input features
        hx: h_0 (N, P) and c_0 (N, H), where P is H without weight_hr
        weight_ih: (4H, I), rows i | f | g | o
        weight_hh: (4H, P)
        bias_ih, bias_hh: (4H), or None
        weight_hr: (P, H), projects h, or None
        lengths: (N,) int32 or int64, 1 <= length <= T: the steps of each row; the rest of input is padding
        reverse: walk from each row's last step to its first
        recompute: keep h and c only for the backward, which computes the gates again, for all steps in one product
        backend: "auto", or one of `fused_lstm.BACKENDS`

    Returns:
        output (T, N, P), at the input's positions, zero past each end, and (h_n (N, P), c_n (N, H))

    Raises:
        RuntimeError, ValueError: sizes, dtypes or devices that do not fit; a backend that cannot run the case

    Source: torch.nn.LSTM, whose gates, biases and projection these are.
    """
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    check_two_states(hx, "lstm")
    h0, c0 = hx
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    _check_sizes(input, h0, c0, *weights)
    if input.size(0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    ragged = None
    if lengths is not None:
        check_lengths(lengths, input.size(1), input.size(0))
        ragged = Ragged.from_lengths(lengths, input.size(0), input.device)
        input = ragged.clear(input)
    name = select_layer_backend(
        backend,
        input,
        weight_ih.size(0) // 4,
        input.size(1),
        projection=weight_hr is not None,
        lengths=lengths is not None,
        recompute=recompute,
    )
    if name == "torch":
        output, h_n, c_n = _torch_layer(input, h0, c0, weights, reverse)
    else:
        output, h_n, c_n = run_layer(input, h0, c0, weights, ragged, reverse, name, recompute)
    return output, (h_n, c_n)


def _none_or_both(weight_ih, bias_ih, bias_hh):
    """torch knows no bias or two; on CUDA its cell takes no notice of a second one alone."""
    if bias_ih is None and bias_hh is None:
        return None, None
    return tuple(torch.zeros_like(weight_ih[:, 0]) if bias is None else bias for bias in (bias_ih, bias_hh))


def _torch_layer(input, h0, c0, weights, reverse):
    """torch's own layer, which knows one bias only as two, and no reverse direction alone."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    flat = [weight_ih, weight_hh]
    bias_ih, bias_hh = _none_or_both(weight_ih, bias_ih, bias_hh)
    has_biases = bias_ih is not None
    if has_biases:
        flat += [bias_ih, bias_hh]
    if weight_hr is not None:
        flat.append(weight_hr)
    if reverse:
        input = input.flip(0)
    output, h_n, c_n = torch.lstm(input, (h0[None], c0[None]), flat, has_biases, 1, 0.0, False, False, False)
    return output.flip(0) if reverse else output, h_n[0], c_n[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as `torch.lstm_cell`.

    Args:
        input: (N, I)
        hx: h and c, each (N, H)
        w_ih: (4H, I), rows i | f | g | o
        w_hh: (4H, H)
        b_ih, b_hh: (4H), or None
        backend: "auto", or one of `fused_lstm.BACKENDS`

    Returns:
        the next h and c, each (N, H)

    Raises:
        RuntimeError, ValueError: sizes, dtypes or devices that do not fit; a backend that cannot run the case
    """
    name = select_layer_backend(backend, input, w_ih.size(0) // 4, input.size(0))
    if name == "torch":
        return torch.lstm_cell(input, hx, w_ih, w_hh, *_none_or_both(w_ih, b_ih, b_hh))
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
    check_two_states(hx, "lstm_cell")
    h, c = hx
    _check_sizes(input, h, c, w_ih, w_hh, b_ih, b_hh, None)
    _, h, c = run_layer(input[None], h, c, (w_ih, w_hh, b_ih, b_hh, None), None, False, name, False)
    return h, c
