"""The persistent backend's kernels as they are launched, for the budget of each."""

from collections.abc import Iterator
from typing import Any

from fused_lstm.kernels.devices import Device
from fused_lstm.kernels.persistent_backward import backward_kernel, backward_tiling, sums_tiling
from fused_lstm.kernels.persistent_configs import Burden, DoesNotFit, PersistentConfig, persistent_config
from fused_lstm.kernels.persistent_forward import forward_kernel, forward_tiling
from fused_lstm.kernels.persistent_launch import compile_options, is_masked
from fused_lstm.kernels.resources import Case


def persistent_cases(device: Device) -> Iterator[Case]:
    """Every kernel in every dtype that fits the device; options and further sizes in bfloat16."""
    yield from filter(None, _walks(device))


def _walks(device: Device) -> Iterator[Case | None]:
    sizes = [("bf16", hidden_size, 16) for hidden_size in (40, 100, 128, 256, 512, 768, 1024, 1536)]
    sizes += [("bf16", hidden_size, 64) for hidden_size in (768, 1024, 1536)]
    sizes += [("bf16", hidden_size, 128) for hidden_size in (512, 768, 1024)]
    sizes += [("fp16", 512, 16), ("fp32", 256, 16), ("fp32", 512, 16), ("fp32", 768, 16), ("fp32", 512, 128)]
    for size in sizes:
        yield forward_case(device, *size)
        yield backward_case(device, *size)
    for option in ("peephole", "zoneout masks", "recurrent mask", "reset"):
        yield forward_case(device, "bf16", 1024, 64, option)
        yield backward_case(device, "bf16", 1024, 64, option)
    yield forward_case(device, "bf16", 512, 16, save=False)
    yield forward_case(device, "bf16", 512, 16, directions=2)
    yield backward_case(device, "bf16", 512, 16, directions=2)
    for option in _FORWARD_OPTIONS:
        yield forward_case(device, "bf16", 512, 16, option)
    for option in _BACKWARD_OPTIONS:
        yield backward_case(device, "bf16", 512, 16, option)
    for size in ("bf16", 1024, 16), ("bf16", 1024, 64), ("bf16", 40, 16), ("fp32", 512, 16):
        for option in ("gates", "projections"):
            yield forward_case(device, *size, option)
            yield backward_case(device, *size, option)
    # What fills the registers: all options at once, in the tallest tiles that they have, whole and ragged.
    tallest = [("bf16", 512, 128), ("bf16", 650, 64), ("bf16", 1024, 64), ("bf16", 1536, 24), ("fp32", 512, 96)]
    for size in tallest:
        for option in (_ALL, "gates, " + _ALL, "projections_cell, " + _ALL):
            yield forward_case(device, *size, option)
            yield backward_case(device, *size, option)


_LAYER_NORMS = ("gates", "projections", "projections_cell")
_ALL = "every option"


def _with_all(kinds: dict[str, dict]) -> dict[str, dict]:
    """Also all elementwise options together, alone and beside a norm."""
    together = {name: kind for option in kinds if option not in _LAYER_NORMS for name, kind in kinds[option].items()}
    return kinds | {_ALL: together} | {f"{norm}, {_ALL}": kinds[norm] | together for norm in _LAYER_NORMS}


_NORM_POINTERS = ("norm_weight_ptr", "norm_bias_ptr", "norm_cell_weight_ptr", "norm_cell_bias_ptr", "moments_ptr")
_NORMS = dict.fromkeys((*_NORM_POINTERS, "statistics_ptr"), "*fp32")
_PROJECTIONS = {"norm_hh_weight_ptr": "*fp32", "product_ptr": None}
# Pointers that an option of the forward kernel has and the plain one has not, by their types; None: the layer's own.
_FORWARD_OPTIONS = _with_all(
    {
        "peephole": {"weight_ph_ptr": "*fp32"},
        "zoneout masks": {"zoneout_h_ptr": "*u8", "zoneout_c_ptr": "*u8", "h0_ptr": None},
        "zoneout rates": {"h0_ptr": None},
        "recurrent mask": {"recurrent_mask_ptr": None, "entered_ptr": None},
        "reset": {"reset_ptr": "*u8", "reset_h_ptr": None, "reset_c_ptr": None, "entered_ptr": None},
        "gates": _NORMS,
        "projections": _NORMS | _PROJECTIONS,
        "projections_cell": _NORMS | _PROJECTIONS,
    }
)
# Likewise of the backward kernel.
_BACK_NORM_POINTERS = (
    *(*_NORM_POINTERS, "cell_sums_ptr", "gate_sums_ptr"),
    *("d_norm_weight_ptr", "d_norm_bias_ptr", "d_norm_cell_weight_ptr", "d_norm_cell_bias_ptr"),
)
_BACK_NORMS = dict.fromkeys(_BACK_NORM_POINTERS, "*fp32") | {"sums_counter_ptr": "*i32"}
_BACK_PROJECTIONS = {"norm_hh_weight_ptr": "*fp32", "product_ptr": None}
_BACK_PROJECTIONS |= {"d_norm_hh_weight_ptr": "*fp32", "d_input_ptr": None}
_BACKWARD_OPTIONS = _with_all(
    {
        "d_c_all": {"d_c_all_ptr": "*fp32"},
        "peephole": {"weight_ph_ptr": "*fp32", "d_weight_ph_ptr": "*fp32"},
        "zoneout masks": {"zoneout_h_ptr": "*u8", "zoneout_c_ptr": "*u8"},
        "zoneout rates": {},
        "recurrent mask": {"recurrent_mask_ptr": None},
        "reset": {"reset_ptr": "*u8", "reset_c_ptr": None, "d_reset_h_ptr": "*fp32", "d_reset_c_ptr": "*fp32"},
        "gates": _BACK_NORMS,
        "projections": _BACK_NORMS | _BACK_PROJECTIONS,
        "projections_cell": _BACK_NORMS | _BACK_PROJECTIONS,
    }
)


def forward_case(
    device: Device,
    dtype: str,
    hidden_size: int,
    batch_size: int,
    option: str = "",
    save: bool = True,
    directions: int = 1,
) -> Case | None:
    """The kernel with one of `_FORWARD_OPTIONS` or none; None if its grid does not fit."""
    config = _config(device, dtype, hidden_size, batch_size, _burden(option))
    if config is None:
        return None
    masked = is_masked(config, hidden_size, batch_size)
    constants = forward_tiling(config, hidden_size, masked) | _constants(dtype, option, _FORWARD_OPTIONS, directions)
    constants |= {"OUTPUT_PITCH": directions * hidden_size, "SAVE": save}
    types = _pointer_types(dtype, _FORWARD_OPTIONS, "c_ptr") | {"counter_ptr": "*i32"}
    variant = ", inference" * (not save) + _variant(option, directions, masked)
    name = f"persistent forward, {dtype}, H {hidden_size}, {config.rows} rows{variant}"
    options = compile_options(device, _layer_norm(option))
    return Case(name, forward_kernel, constants, types, config.num_warps, loops=True, options=options)


def backward_case(
    device: Device, dtype: str, hidden_size: int, batch_size: int, option: str = "", directions: int = 1
) -> Case | None:
    """Likewise, with one of `_BACKWARD_OPTIONS`."""
    layer_norm = _layer_norm(option)
    config = _config(device, dtype, hidden_size, batch_size, "norms" if layer_norm is not None else _burden(option))
    if config is None:
        return None
    masked = is_masked(config, hidden_size, batch_size)
    constants = backward_tiling(config, hidden_size, masked) | _constants(dtype, option, _BACKWARD_OPTIONS, directions)
    constants |= {"D_OUTPUT_PITCH": directions * hidden_size, **sums_tiling(layer_norm)}
    types = _pointer_types(dtype, _BACKWARD_OPTIONS, "c_ptr", "d_h_ptr", "d_c_ptr", "partial_ptr")
    types |= {"d_gates_counter_ptr": "*i32", "partial_counter_ptr": "*i32"}
    variant = _variant(option, directions, masked)
    name = f"persistent backward, {dtype}, H {hidden_size}, {config.rows} rows{variant}"
    options = compile_options(device, layer_norm)
    return Case(name, backward_kernel, constants, types, config.num_warps, loops=True, options=options)


def _config(device: Device, dtype: str, hidden_size: int, batch_size: int, burden: Burden) -> PersistentConfig | None:
    try:
        return persistent_config(device, 4 if dtype == "fp32" else 2, hidden_size, batch_size, burden=burden)
    except DoesNotFit:
        return None


def _burden(option: str) -> Burden:
    if option in ("", "d_c_all"):
        return "none"
    return "options" if _ALL in option or _layer_norm(option) is not None else "option"


def _layer_norm(option: str) -> str | None:
    norm = option.removesuffix(", " + _ALL)
    return norm if norm in _LAYER_NORMS else None


def _constants(dtype: str, option: str, kinds: dict[str, dict], directions: int) -> dict[str, Any]:
    """Compile-time arguments that both kernels have, and the pointers that are None."""
    zoneout = "mask" if option == "zoneout masks" or _ALL in option else "rate" if option == "zoneout rates" else None
    absent = {name: None for pointers in kinds.values() for name in pointers if name not in kinds.get(option, {})}
    if directions == 1:
        absent["second_weight_ptr"] = None
    return absent | {
        "ZONEOUT_H": zoneout,
        "ZONEOUT_C": zoneout,
        "LAYER_NORM": _layer_norm(option),
        "PRECISION": "tf32",
        "APPROX": dtype == "bf16",
    }


def _pointer_types(dtype: str, kinds: dict[str, dict], *states: str) -> dict[str, str]:
    named = {name: kind for pointers in kinds.values() for name, kind in pointers.items() if kind is not None}
    return {"*": f"*{dtype}", **dict.fromkeys(states, "*fp32"), **named}


def _variant(option: str, directions: int, masked: bool) -> str:
    return ", ragged" * masked + ", both directions" * (directions == 2) + (option and f", {option}")
