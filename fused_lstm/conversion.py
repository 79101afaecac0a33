"""Models that exist already: swap their LSTMs for ours, and back."""

import inspect
import logging
import warnings
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from fused_lstm._compile import let_dynamo_trace
from fused_lstm._module_options import (
    add_parameters,
    changing_options,
    remove_parameters,
    reset_option_parameters,
)
from fused_lstm._options import check_forget_bias
from fused_lstm.cells import LSTMCell
from fused_lstm.modules import LSTM

Model = TypeVar("Model", bound=torch.nn.Module)

_log = logging.getLogger("fused_lstm")
_OURS = {torch.nn.LSTM: LSTM, torch.nn.LSTMCell: LSTMCell}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Model, *, to: str = "fused_lstm", **options: Any) -> Model:
    """Swap every `torch.nn.LSTM` and `torch.nn.LSTMCell` in model for ours, in place.

    The module objects stay the same objects, so every reference to them sees the change, the model itself included.
    Parameters, buffers, hooks, training flag, device, dtype, names and whatever else was set on a module stay; an
    optimiser made before goes on. Weights that are computed (parametrizations, weight_norm, pruning, a plain tensor in
    a parameter's place) stay so. A second call changes nothing but the options. What an option adds to a module is
    initialised, what it no longer needs is taken away; no other parameter changes.

    Args:
        model: any module; it may be an LSTM itself
        to: "fused_lstm", or "torch" to undo it
        options: keyword arguments of `fused_lstm.LSTM` for every module swapped (`layer_norm`, `backend`, …); those
            that `fused_lstm.LSTMCell` does not take reach the LSTMs only

    Returns:
        model

    Raises:
        ValueError: `to` is none of the two, an option's value is wrong, or to="torch" of a module with an option that
            torch's does not have
        TypeError: an option that LSTM does not take, or any with to="torch"

    Warns:
        UserWarning: subclasses of torch's modules are left alone; it names them
    """
    if to not in ("fused_lstm", "torch"):
        raise ValueError(f"to should be 'fused_lstm' or 'torch', got {to!r}")
    known = _options(LSTM)
    for name in options:
        if name not in known or to == "torch":
            raise TypeError(f"convert(to={to!r}) got an unexpected keyword argument {name!r}")
    for module_type in _THEIRS:
        # A wrong value fails here, before anything is swapped; on meta, where parameters draw no random numbers.
        module_type(1, 1, device="meta", **_taken_by(module_type, options))
    for name, module in model.named_modules():
        own_type = parametrize.type_before_parametrizations(module)
        if to == "torch" and own_type in _THEIRS and (options_in_use := changing_options(module)):
            raise ValueError(f"{name or 'the model itself'} cannot become torch's: {', '.join(options_in_use)}")
        if to == "fused_lstm" and own_type in (*_OURS, *_THEIRS):
            forget_bias, layer_norm = (options.get(n, getattr(module, n, None)) for n in ("forget_bias", "layer_norm"))
            check_forget_bias(forget_bias, module.bias, layer_norm)
    targets = _OURS if to == "fused_lstm" else _THEIRS
    already = tuple(_THEIRS) if to == "fused_lstm" else ()  # ours are subclasses of torch's too
    swapped, left = [], []
    for name, module in model.named_modules():
        own_type = parametrize.type_before_parametrizations(module)
        if own_type in targets:
            _set_type(module, own_type, targets[own_type])
            swapped.append(name or type(model).__name__)
            if to == "torch":
                for option in known & vars(module).keys():
                    delattr(module, option)
        elif isinstance(module, tuple(targets)) and not isinstance(module, already):
            left.append(f"{name or 'the model itself'} ({own_type.__module__}.{own_type.__qualname__})")
        if to == "fused_lstm" and own_type in (*_OURS, *_THEIRS):
            _set_options(module, options)
    if left:
        warnings.warn(f"subclasses of torch's modules were left alone: {', '.join(left)}", stacklevel=2)
    _log.info("swapped %d modules for %s's: %s", len(swapped), to, ", ".join(swapped) or "none")
    return model


def _options(module_type: type) -> set[str]:
    """The keyword-only arguments of ours, which torch's module does not have."""
    parameters = inspect.signature(module_type.__init__).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _taken_by(module_type: type, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in _options(module_type)}


def _set_type(module: torch.nn.Module, own_type: type, target: type) -> None:
    """Give module the type target, under the class that a parametrization has put over its own."""
    if type(module) is own_type:
        module.__class__ = target
    else:
        # A parametrized module has a class of its own, whose properties compute the weights; copies of the module
        # share it, so it is made anew rather than given another base.
        body = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{target.__name__}", (target,), body)
    let_dynamo_trace(LSTM)


def _set_options(module: torch.nn.Module, options: dict[str, Any]) -> None:
    """Set what was given; what was not keeps its value, or starts at its default."""
    module_type = parametrize.type_before_parametrizations(module)
    parameters = inspect.signature(module_type.__init__).parameters
    for name in _options(module_type):
        if name in options:
            setattr(module, name, options[name])
        elif name not in vars(module):
            setattr(module, name, parameters[name].default)
    remove_parameters(module)
    reset_option_parameters(module, add_parameters(module))
