"""The options of a module: the parameters they add to it, where those start, and how it shows them."""

import torch

from fused_lstm._options import initialize, initialize_forget_bias, parameter_sizes
from fused_lstm.reference import Parameters

Module = torch.nn.LSTM | torch.nn.LSTMCell
_OPTIONS = {  # with their defaults, in the order of the constructors
    "layer_norm": None,
    "peephole": False,
    "forget_bias": None,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "weight_dropout": 0.0,
    "locked_dropout": False,
    "recompute": False,
    "backend": "auto",
}
# Those that a module of torch's cannot have without computing something else.
CHANGING = ("layer_norm", "peephole", "zoneout", "recurrent_dropout", "weight_dropout", "locked_dropout")


def suffixes(module: Module) -> list[str]:
    """What each layer and direction's parameters are called after their own name: "_l0", "_l0_reverse", …"""
    if isinstance(module, torch.nn.LSTMCell):
        return [""]
    return [names[0].removeprefix("weight_ih") for names in module._all_weights]


def _sizes(module: Module) -> dict[str, int]:
    return parameter_sizes(module.hidden_size, module.layer_norm, module.peephole)


def read_parameters(module: Module, index: int) -> Parameters:
    """Those of one layer and direction, read at each forward: they may be parametrized or replaced."""
    suffix = suffixes(module)[index]
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else []), *_sizes(module)]
    if getattr(module, "proj_size", 0):
        names.append("weight_hr")
    return Parameters(**{name: getattr(module, name + suffix) for name in names})


def add_parameters(module: Module) -> list[str]:
    """Register what the options need and the module lacks, uninitialised. Returns the full names of the new ones."""
    sizes = {name + suffix: size for suffix in suffixes(module) for name, size in _sizes(module).items()}
    added = {name: size for name, size in sizes.items() if not hasattr(module, name)}
    if added:
        like = getattr(module, "weight_ih" + suffixes(module)[0])  # not before: a parametrization may change by it
        for name, size in added.items():
            empty = torch.empty(size, device=like.device, dtype=like.dtype)
            module.register_parameter(name, torch.nn.Parameter(empty))
    return list(added)


def option_parameters(module: Module) -> list[str]:
    """The full names of the parameters that a module has beside torch's own."""
    wanted = (name + suffix for suffix in suffixes(module) for name in Parameters._fields[5:])
    return [name for name in wanted if hasattr(module, name)]


def reset_torch_parameters(module: Module) -> None:
    """As torch's `reset_parameters`, which would also draw for what options add."""
    ours = set(option_parameters(module))
    bound = module.hidden_size**-0.5
    for name, parameter in module.named_parameters():
        if name not in ours:
            torch.nn.init.uniform_(parameter, -bound, bound)


def reset_option_parameters(module: Module, names: list[str] | None = None) -> None:
    """Start the parameters that options add, or those of names, and the forget gate's bias."""
    for index, suffix in enumerate(suffixes(module)):
        for name in _sizes(module):
            if names is None or name + suffix in names:
                initialize(name, getattr(module, name + suffix), module.hidden_size)
        starts_bias = names is None or "norm_gates_bias" + suffix in names
        if module.forget_bias is not None and starts_bias:
            initialize_forget_bias(read_parameters(module, index), module.forget_bias)


def remove_parameters(module: Module) -> None:
    """Take away what the options no longer need."""
    needed = {name + suffix for suffix in suffixes(module) for name in _sizes(module)}
    for name in set(option_parameters(module)) - needed:
        delattr(module, name)


def options_repr(module: Module) -> str:
    """The options that differ from their defaults, as the constructor takes them."""
    given = {name: getattr(module, name) for name in _OPTIONS if hasattr(module, name)}
    return "".join(f", {name}={value!r}" for name, value in given.items() if value != _OPTIONS[name])


def changing_options(module: Module) -> list[str]:
    """Of a module's options, those in use that torch's module does not have."""
    found = []
    for name in CHANGING:
        value = getattr(module, name, _OPTIONS[name])
        if any(value) if isinstance(value, (tuple, list)) else value != _OPTIONS[name] and value != 0:
            found.append(name)
    return found
