"""One LSTM layer and one LSTM step as functions of their weights."""

import torch
from torch import Tensor

from fused_lstm._options import (
    CellOptions,
    check_bool,
    check_layer_norm,
    check_rate,
    check_zoneout,
    parameter_sizes,
)
from fused_lstm._ragged import Ragged, check_lengths
from fused_lstm._run import Resets, is_autocast_enabled, run_layer, select_layer_backend
from fused_lstm.reference import Parameters


def check_two_states(hx: tuple[Tensor, ...], function: str) -> None:
    """RuntimeError, in torch's words, unless hx is h and c."""
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")


def _check_sizes(input: Tensor, h0: Tensor, c0: Tensor, parameters: Parameters) -> None:
    """RuntimeError with the first argument whose size or dtype does not fit the others; input is (..., N, I)."""
    weight_ih = parameters.weight_ih
    if weight_ih.dim() != 2 or weight_ih.size(0) % 4:
        raise RuntimeError(f"Expected weight_ih size (4*hidden_size, input_size), got {list(weight_ih.shape)}")
    if input.size(-1) != weight_ih.size(1):
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weight_ih.size(1)}, got {input.size(-1)}"
        )
    gate_size, batch_size = weight_ih.size(0), input.size(-2)
    hidden_size = gate_size // 4
    weight_hr = parameters.weight_hr
    output_size = hidden_size if weight_hr is None else weight_hr.size(0)
    expected = {
        "weight_hh": (parameters.weight_hh, (gate_size, output_size)),
        "bias_ih": (parameters.bias_ih, (gate_size,)),
        "bias_hh": (parameters.bias_hh, (gate_size,)),
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


def _option_parameters(
    hidden_size: int,
    layer_norm: str | None,
    peephole: bool | None,
    given: dict[str, Tensor | None],
    device: torch.device,
) -> bool:
    """ValueError unless given holds just the parameters that the options have. Returns whether there are peepholes."""
    has_peephole = given["weight_ph"] is not None if peephole is None else check_bool("peephole", peephole)
    sizes = parameter_sizes(hidden_size, check_layer_norm(layer_norm), has_peephole)
    for name, tensor in given.items():
        options = f"layer_norm={layer_norm!r} and peephole={has_peephole}"
        if (tensor is not None) != (name in sizes):
            raise ValueError(f"{options} {'need a' if name in sizes else 'take no'} {name}")
        if tensor is None:
            continue
        if tensor.shape != (sizes[name],):
            raise ValueError(f"Expected {name} size {(sizes[name],)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise RuntimeError(f"Expected {name} on the input's device {device}, got {tensor.device}")
    return has_peephole


def check_resets(
    reset: Tensor | None,
    reset_state: tuple[Tensor, Tensor] | None,
    size: tuple[int, ...],
    h_size: tuple[int, ...],
    c_size: tuple[int, ...],
) -> None:
    """ValueError unless reset is a tensor of size, and reset_state two of h_size and c_size."""
    if reset is not None and (not isinstance(reset, Tensor) or reset.shape != size):
        got = tuple(reset.shape) if isinstance(reset, Tensor) else type(reset).__name__
        raise ValueError(f"Expected reset size {size}, got {got}")
    if reset_state is None:
        return
    if not isinstance(reset_state, (tuple, list)) or len(reset_state) != 2:
        raise ValueError("reset_state should be two tensors, h and c, as hx")
    for index, (state, expected) in enumerate(zip(reset_state, (h_size, c_size), strict=True)):
        if not isinstance(state, Tensor) or state.shape != expected:
            got = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(f"Expected reset_state[{index}] size {expected}, got {got}")


def lstm_layer(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    layer_norm: str | None = None,
    peephole: bool | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    weight_ph: Tensor | None = None,
    norm_gates_weight: Tensor | None = None,
    norm_gates_bias: Tensor | None = None,
    norm_ih_weight: Tensor | None = None,
    norm_ih_bias: Tensor | None = None,
    norm_hh_weight: Tensor | None = None,
    norm_hh_bias: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    training: bool = False,
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
        layer_norm, zoneout, recurrent_dropout, weight_dropout, recompute: as `fused_lstm.LSTM`'s
        peephole: has the cell peepholes? None: it has if weight_ph is given
        weight_ph: (3H), order i | f | o
        norm_*: (4H), and norm_cell_* (H): the parameters that layer_norm names, in any dtype, no others
        reset: (T, N), any dtype; where it is not zero, the state that enters the step is zero, or reset_state. Unlike
            in
            LSTM it may go with reverse: the state enters a step from the one after it then.
        reset_state: h (N, P) and c (N, H)
        lengths: (N,) int32 or int64, 1 <= length <= T: the steps of each row; the rest of input is padding
        training: draw for zoneout and the dropouts
        reverse: walk from each row's last step to its first
        backend: "auto", or one of `fused_lstm.BACKENDS`

    Returns:
        output (T, N, P), at the input's positions, zero past each end, and (h_n (N, P), c_n (N, H))

    Raises:
        RuntimeError, ValueError: sizes, dtypes or devices that do not fit; parameters that the options do not have or
            do need; a rate outside [0, 1]; a backend that cannot run the case

    Source: torch.nn.LSTM, whose gates, biases and projection these are; `fused_lstm.LSTM` tells that of each option.
    """
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    check_two_states(hx, "lstm")
    h0, c0 = hx
    parameters = Parameters(
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        weight_hr,
        weight_ph,
        norm_gates_weight,
        norm_gates_bias,
        norm_ih_weight,
        norm_ih_bias,
        norm_hh_weight,
        norm_hh_bias,
        norm_cell_weight,
        norm_cell_bias,
    )
    _check_sizes(input, h0, c0, parameters)
    steps, batch_size = input.shape[:2]
    hidden_size = weight_ih.size(0) // 4
    given = dict(zip(Parameters._fields[5:], parameters[5:], strict=True))
    has_peephole = _option_parameters(hidden_size, layer_norm, peephole, given, input.device)
    check_bool("recompute", recompute)
    options = CellOptions(
        layer_norm,
        has_peephole,
        check_zoneout(zoneout),
        check_rate("recurrent_dropout", recurrent_dropout),
        check_rate("weight_dropout", weight_dropout),
    )
    check_resets(reset, reset_state, (steps, batch_size), tuple(h0.shape), tuple(c0.shape))
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    ragged = None
    if lengths is not None:
        check_lengths(lengths, batch_size, steps)
        ragged = Ragged.from_lengths(lengths, steps, input.device)
        input = ragged.clear(input)
    name = select_layer_backend(
        backend,
        input,
        hidden_size,
        batch_size,
        options,
        training,
        {"reset": reset is not None},
        projection=weight_hr is not None,
        lengths=lengths is not None,
        recompute=recompute,
    )
    if name == "torch":
        output, h_n, c_n = _torch_layer(input, h0, c0, parameters, reverse)
        return output, (h_n, c_n)
    resets = None
    if reset is not None:
        resets = Resets(reset != 0, *((None, None) if reset_state is None else reset_state))
        if ragged is not None and reverse:
            resets = resets._replace(reset=ragged.mirror(resets.reset[:, :, None])[:, :, 0])
    output, h_n, c_n, _ = run_layer(
        input, h0[None], c0[None], (parameters,), options, training, resets, ragged, reverse, name, recompute
    )
    return output, (h_n[0], c_n[0])


def _none_or_both(weight_ih, bias_ih, bias_hh):
    """torch knows no bias or two; on CUDA its cell takes no notice of a second one alone."""
    if bias_ih is None and bias_hh is None:
        return None, None
    return tuple(torch.zeros_like(weight_ih[:, 0]) if bias is None else bias for bias in (bias_ih, bias_hh))


def _torch_layer(input, h0, c0, parameters, reverse):
    """torch's own layer, which knows one bias only as two, and no reverse direction alone."""
    flat = [parameters.weight_ih, parameters.weight_hh]
    bias_ih, bias_hh = _none_or_both(parameters.weight_ih, parameters.bias_ih, parameters.bias_hh)
    has_biases = bias_ih is not None
    if has_biases:
        flat += [bias_ih, bias_hh]
    if parameters.weight_hr is not None:
        flat.append(parameters.weight_hr)
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
    layer_norm: str | None = None,
    peephole: bool | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    weight_ph: Tensor | None = None,
    norm_gates_weight: Tensor | None = None,
    norm_gates_bias: Tensor | None = None,
    norm_ih_weight: Tensor | None = None,
    norm_ih_bias: Tensor | None = None,
    norm_hh_weight: Tensor | None = None,
    norm_hh_bias: Tensor | None = None,
    norm_cell_weight: Tensor | None = None,
    norm_cell_bias: Tensor | None = None,
    training: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as `torch.lstm_cell`.

    Args:
        input: (N, I)
        hx: h and c, each (N, H)
        w_ih: (4H, I), rows i | f | g | o
        w_hh: (4H, H)
        b_ih, b_hh: (4H), or None
        layer_norm, peephole, zoneout, weight_ph, norm_*, training: as in `lstm_layer`
        backend: "auto", or one of `fused_lstm.BACKENDS`

    Returns:
        the next h and c, each (N, H)

    Raises:
        RuntimeError, ValueError: sizes, dtypes or devices that do not fit; parameters that the options do not have or
            do need; a rate outside [0, 1]; a backend that cannot run the case
    """
    given = {
        "weight_ph": weight_ph,
        "norm_gates_weight": norm_gates_weight,
        "norm_gates_bias": norm_gates_bias,
        "norm_ih_weight": norm_ih_weight,
        "norm_ih_bias": norm_ih_bias,
        "norm_hh_weight": norm_hh_weight,
        "norm_hh_bias": norm_hh_bias,
        "norm_cell_weight": norm_cell_weight,
        "norm_cell_bias": norm_cell_bias,
    }
    has_peephole = _option_parameters(w_ih.size(0) // 4, layer_norm, peephole, given, input.device)
    options = CellOptions(layer_norm, has_peephole, check_zoneout(zoneout))
    name = select_layer_backend(backend, input, w_ih.size(0) // 4, input.size(0), options, training, {})
    if name == "torch":
        return torch.lstm_cell(input, hx, w_ih, w_hh, *_none_or_both(w_ih, b_ih, b_hh))
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
    check_two_states(hx, "lstm_cell")
    h, c = hx
    parameters = Parameters(w_ih, w_hh, b_ih, b_hh, None, **given)
    _check_sizes(input, h, c, parameters)
    _, h, c, _ = run_layer(
        input[None], h[None], c[None], (parameters,), options, training, None, None, False, name, False
    )
    return h[0], c[0]
