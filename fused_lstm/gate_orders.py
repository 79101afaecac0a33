"""Weights of other libraries' LSTMs, whose four gates lie in another order than torch's i, f, g, o."""

from typing import Any, TypeVar

import torch
from torch import Tensor

Module = TypeVar("Module", torch.nn.LSTM, torch.nn.LSTMCell)


def reorder_gates(tensor: Tensor, order: str, to: str = "ifgo", dim: int = 0) -> Tensor:
    """The same four blocks in another order: i, f, g, o are the input, forget, cell and output gate.

    What others call c, j or z is g. Torch and Keras (i, f, c, o) have "ifgo"; Haste, Haiku and TensorFlow 1
    (i, j, f, o) "igfo"; ONNX (i, o, f, c) "iofg"; many cells written by hand "ifog".

    Args:
        tensor: any with 4H along dim
        order: of its blocks, each of the letters once
        to: of those returned
        dim: the one that holds the gates

    Returns:
        a new tensor, differentiable

    Raises:
        ValueError: an order is none, or dim cannot be cut in four
    """
    _check_order(order)
    _check_order(to)
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"Expected a tensor that has dim {dim}, got a {tensor.dim()}D one")
    if tensor.size(dim) % 4 != 0:
        raise ValueError(f"Expected a size divisible by 4 along dim {dim}, got {tensor.size(dim)}")
    blocks = dict(zip(order, tensor.chunk(4, dim), strict=True))
    return torch.cat([blocks[gate] for gate in to], dim)


def load_weights(
    module: Module,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any = None,
    bias_hh: Any = None,
    weight_hr: Any = None,
    *,
    order: str,
    transposed: bool = False,
    layer: int = 0,
    reverse: bool = False,
) -> Module:
    """Copy another library's weights into one layer and direction of an LSTM, or into an LSTMCell, torch's or ours.

        load_weights(lstm, *keras_lstm.get_weights(), order="ifgo", transposed=True)

    All is checked before anything is copied. A bias that is not given is zero; so a single one goes to bias_ih alone.
    What a library adds to the forget gate as it runs (TensorFlow 1 and Haiku: 1.0) is in no stored bias and is not
    added here; Keras's unit_forget_bias is in the stored one.

    Args:
        module: on any device, of any floating dtype
        weight_ih: (4H, I), or (I, 4H) if transposed; a tensor, or whatever torch.tensor takes
        weight_hh: (4H, P), or (P, 4H); P is H without a projection
        bias_ih, bias_hh: (4H)
        weight_hr: (P, H), or (H, P): where the module has a projection, and only there
        order: of the gates of what is given, as `reorder_gates` has it
        transposed: the weights are for input @ weight, as Keras's kernels are
        layer, reverse: which part of an LSTM

    Returns:
        module

    Raises:
        TypeError: module is no LSTM, or something given is of no floating dtype
        ValueError: order is none, a shape does not fit, module has no such layer, direction, bias or projection, or one
            of its weights is computed (parametrized for instance) and not a parameter to be copied into
    """
    _check_order(order)
    suffix = _suffix(module, layer, reverse)
    given = {"weight_ih": weight_ih, "weight_hh": weight_hh}
    if module.bias or bias_ih is not None or bias_hh is not None:
        given.update(bias_ih=bias_ih, bias_hh=bias_hh)
    if getattr(module, "proj_size", 0) > 0 or weight_hr is not None:
        given.update(weight_hr=weight_hr)
    copies = []
    for name, values in given.items():
        parameter = _parameter(module, name + suffix)
        values = _checked(name, values, parameter, transposed)
        copies.append((parameter, values if name == "weight_hr" else reorder_gates(values, order)))
    with torch.no_grad():
        for parameter, values in copies:
            parameter.copy_(values)
    return module


def _check_order(order: str) -> None:
    if not isinstance(order, str) or sorted(order) != sorted("ifgo"):
        raise ValueError(f"Expected an order of the gates i, f, g, o, such as 'ifog', got {order!r}")


def _suffix(module: Module, layer: int, reverse: bool) -> str:
    """What follows the names of the parameters of that layer and direction."""
    if not isinstance(module, (torch.nn.LSTM, torch.nn.LSTMCell)):
        raise TypeError(f"module should be a torch.nn.LSTM or torch.nn.LSTMCell, got: {type(module).__name__}")
    if isinstance(module, torch.nn.LSTMCell):
        if layer != 0 or reverse:
            raise ValueError(f"Expected layer 0 and no reverse for a cell, got layer {layer} and reverse={reverse}")
        return ""
    if layer not in range(module.num_layers):
        raise ValueError(f"Expected layer to be in [0, {module.num_layers}), got {layer}")
    if reverse and not module.bidirectional:
        raise ValueError("Expected a bidirectional LSTM for reverse=True")
    return f"_l{layer}" + ("_reverse" if reverse else "")


def _parameter(module: Module, name: str) -> torch.nn.Parameter:
    parameter = module._parameters.get(name)
    if parameter is None:
        what = "computed, not a parameter to be copied into" if getattr(module, name, None) is not None else "missing"
        raise ValueError(f"{type(module).__name__}.{name} is {what}")
    return parameter


def _checked(name: str, values: Any, parameter: Tensor, transposed: bool) -> Tensor:
    """values in torch's shape."""
    if values is None and name.startswith("bias"):
        return torch.zeros_like(parameter)
    shape = tuple(parameter.shape)[:: -1 if transposed else 1]  # a bias is the same both ways
    if values is None:
        raise ValueError(f"Expected {name} of shape {shape}, got None")
    values = values if isinstance(values, Tensor) else torch.tensor(values)
    if not values.is_floating_point():
        raise TypeError(f"Expected {name} of a floating dtype, got {values.dtype}")
    if tuple(values.shape) != shape:
        raise ValueError(f"Expected {name} of shape {shape}, got {tuple(values.shape)}")
    return values.t() if transposed else values
