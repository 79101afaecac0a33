"""The persistent backend's kernels as they are launched, for the budget of each."""

from collections.abc import Iterator

from fused_lstm.kernels.configs import cell_config
from fused_lstm.kernels.devices import Device
from fused_lstm.kernels.persistent_backward import backward_kernel, backward_tiling
from fused_lstm.kernels.persistent_configs import DoesNotFit, PersistentConfig, persistent_config
from fused_lstm.kernels.persistent_forward import forward_kernel, forward_tiling
from fused_lstm.kernels.persistent_launch import is_masked
from fused_lstm.kernels.persistent_statistics import ROWS, statistics_kernel
from fused_lstm.kernels.persistent_sums import PITCHES
from fused_lstm.kernels.resources import Case
from fused_lstm.kernels.row_statistics import row_statistics_kernel


def persistent_cases(device: Device) -> Iterator[Case]:
    """Every kernel in every dtype that fits the device; options and further sizes in bfloat16."""
    for hidden_size in (512, 1536):
        yield _statistics("gates", hidden_size)
        yield _statistics("projections", hidden_size)
    types = {"x_ptr": "*bf16", "*": "*fp32"}
    yield Case("row statistics, bf16, 2048", row_statistics_kernel, {"SIZE": 2048, "BLOCK": 2048}, types, 4)
    sizes = [("bf16", hidden_size, 16) for hidden_size in (40, 100, 128, 256, 512, 768, 1024, 1536)]
    sizes += [("bf16", hidden_size, 64) for hidden_size in (768, 1024, 1536)]
    sizes += [("bf16", hidden_size, 128) for hidden_size in (512, 768, 1024)]
    sizes += [("fp16", 512, 16), ("fp32", 256, 16), ("fp32", 512, 16), ("fp32", 768, 16), ("fp32", 512, 128)]
    for dtype, hidden_size, batch_size in sizes:
        try:
            config = persistent_config(device, 4 if dtype == "fp32" else 2, hidden_size, batch_size)
        except DoesNotFit:
            continue
        masked = is_masked(config, hidden_size, batch_size)
        yield _persistent_forward(dtype, hidden_size, config, masked)
        yield _persistent_backward(dtype, hidden_size, config, masked)
        if (dtype, hidden_size) == ("bf16", 1024) and batch_size == 16:
            for option in _LAYER_NORMS:
                yield _persistent_forward(dtype, hidden_size, config, masked, option=option)
        if (dtype, hidden_size) == ("bf16", 512) and batch_size == 16:
            yield _persistent_forward(dtype, hidden_size, config, masked, save=False)
            yield _persistent_forward(dtype, hidden_size, config, masked, directions=2)
            for option in _FORWARD_OPTIONS:
                yield _persistent_forward(dtype, hidden_size, config, masked, option=option)
            yield _persistent_backward(dtype, hidden_size, config, masked, directions=2)
            for option in _ELEMENTWISE_OPTIONS:
                yield _persistent_backward(dtype, hidden_size, config, masked, option=option)
            yield _persistent_backward(dtype, hidden_size, config, masked, option=_ALL)
    yield from _persistent_through_norms(device)


def _persistent_through_norms(device: Device) -> Iterator[Case]:
    """Backward, in grids of their own."""
    options = {512: _LAYER_NORMS, 1024: ("gates", "projections", "gates, " + _ALL, "projections, " + _ALL)}
    sizes = [("bf16", 40, 16), ("bf16", 512, 16), ("bf16", 1024, 16), ("bf16", 1024, 64), ("fp32", 512, 16)]
    for dtype, hidden_size, batch_size in sizes:
        try:
            config = persistent_config(device, 4 if dtype == "fp32" else 2, hidden_size, batch_size, through_norms=True)
        except DoesNotFit:
            continue
        masked = is_masked(config, hidden_size, batch_size)
        for option in options.get(hidden_size, ("gates", "projections")):
            yield _persistent_backward(dtype, hidden_size, config, masked, option=option)


_LAYER_NORMS = ("gates", "projections", "projections_cell")
_NORM_POINTERS = ("norm_weight_ptr", "norm_bias_ptr", "norm_cell_weight_ptr", "norm_cell_bias_ptr", "statistics_ptr")
_NORMS = dict.fromkeys(_NORM_POINTERS, "*fp32")
_PROJECTIONS = dict.fromkeys(("norm_hh_weight_ptr", "input_mean_ptr", "input_scale_ptr"), "*fp32")
_PROJECTIONS |= {"product_ptr": None}
# Pointers that an option of the forward kernel has and the plain one has not, by their types; None: the layer's own.
_FORWARD_OPTIONS = {
    "peephole": {"weight_ph_ptr": "*fp32"},
    "zoneout masks": {"zoneout_h_ptr": "*u8", "zoneout_c_ptr": "*u8", "h0_ptr": None},
    "zoneout rates": {"h0_ptr": None},
    "recurrent mask": {"recurrent_mask_ptr": None, "entered_ptr": None},
    "reset": {"reset_ptr": "*u8", "reset_h_ptr": None, "reset_c_ptr": None, "entered_ptr": None},
    "gates": _NORMS,
    "projections": _NORMS | _PROJECTIONS,
    "projections_cell": _NORMS | _PROJECTIONS,
}


def _persistent_forward(
    dtype: str,
    hidden_size: int,
    config: PersistentConfig,
    masked: bool,
    save: bool = True,
    directions: int = 1,
    option: str | None = None,
) -> Case:
    zoneout = {"zoneout masks": "mask", "zoneout rates": "rate"}.get(option)
    constants = forward_tiling(config, hidden_size, masked) | {
        "OUTPUT_PITCH": directions * hidden_size,
        "SAVE": save,
        "ZONEOUT_H": zoneout,
        "ZONEOUT_C": zoneout,
        "LAYER_NORM": option if option in _LAYER_NORMS else None,
        "PRECISION": "tf32",
        "APPROX": dtype == "bf16",
    }
    pointers = {name: kind for kinds in _FORWARD_OPTIONS.values() for name, kind in kinds.items()}
    present = _FORWARD_OPTIONS.get(option, {})
    constants |= {name: None for name in pointers if name not in present}
    if directions == 1:
        constants["second_weight_ptr"] = None
    variant = ", inference" * (not save) + ", both directions" * (directions == 2)
    variant += "" if option is None else f", {option}"
    name = f"persistent forward, {dtype}, H {hidden_size}, {config.rows} rows{variant}"
    types = _pointer_types(dtype, "c_ptr") | {"counter_ptr": "*i32"}
    types |= {name: kind for name, kind in pointers.items() if kind is not None}
    return Case(name, forward_kernel, constants, types, config.num_warps, loops=True)


# Likewise of the backward kernel.
_BACK_NORM_POINTERS = (
    *("norm_weight_ptr", "norm_bias_ptr", "norm_cell_weight_ptr", "norm_cell_bias_ptr", "statistics_ptr", "sums_ptr"),
    *("d_norm_weight_ptr", "d_norm_bias_ptr", "d_norm_cell_weight_ptr", "d_norm_cell_bias_ptr"),
)
_BACK_NORMS = dict.fromkeys(_BACK_NORM_POINTERS, "*fp32") | {"sums_counter_ptr": "*i32"}
_BACK_PROJECTIONS = {"norm_hh_weight_ptr": "*fp32", "product_ptr": None}
_BACK_PROJECTIONS |= {"d_norm_hh_weight_ptr": "*fp32", "d_input_ptr": None}
_ELEMENTWISE_OPTIONS = {
    "d_c_all": {"d_c_all_ptr": "*fp32"},
    "peephole": {"weight_ph_ptr": "*fp32", "d_weight_ph_ptr": "*fp32"},
    "zoneout masks": {"zoneout_h_ptr": "*u8", "zoneout_c_ptr": "*u8"},
    "zoneout rates": {},
    "recurrent mask": {"recurrent_mask_ptr": None},
    "reset": {"reset_ptr": "*u8", "reset_c_ptr": None, "d_reset_h_ptr": "*fp32", "d_reset_c_ptr": "*fp32"},
}
_ALL = "every option"
_OF_ALL = {name: kind for kinds in _ELEMENTWISE_OPTIONS.values() for name, kind in kinds.items()}
_BACKWARD_OPTIONS = _ELEMENTWISE_OPTIONS | {
    "gates": _BACK_NORMS,
    "projections": _BACK_NORMS | _BACK_PROJECTIONS,
    "projections_cell": _BACK_NORMS | _BACK_PROJECTIONS,
    _ALL: _OF_ALL,
    "gates, " + _ALL: _BACK_NORMS | _OF_ALL,
    "projections, " + _ALL: _BACK_NORMS | _BACK_PROJECTIONS | _OF_ALL,
}


def _persistent_backward(
    dtype: str,
    hidden_size: int,
    config: PersistentConfig,
    masked: bool,
    directions: int = 1,
    option: str = "",
) -> Case:
    zoneout = "rate" if option == "zoneout rates" else "mask" if option == "zoneout masks" or _ALL in option else None
    layer_norm = next((norm for norm in _LAYER_NORMS if norm == option.removesuffix(", " + _ALL)), None)
    constants = backward_tiling(config, hidden_size, masked) | {
        "D_OUTPUT_PITCH": directions * hidden_size,
        "ZONEOUT_H": zoneout,
        "ZONEOUT_C": zoneout,
        "LAYER_NORM": layer_norm,
        "PITCH": PITCHES.get(layer_norm),
        "PRECISION": "tf32",
        "APPROX": dtype == "bf16",
    }
    pointers = {name: kind for kinds in _BACKWARD_OPTIONS.values() for name, kind in kinds.items()}
    present = _BACKWARD_OPTIONS.get(option, {})
    constants |= {name: None for name in pointers if name not in present}
    if directions == 1:
        constants["second_weight_ptr"] = None
    variant = ", both directions" * (directions == 2) + (option and f", {option}")
    name = f"persistent backward, {dtype}, H {hidden_size}, {config.rows} rows{variant}"
    types = _pointer_types(dtype, "c_ptr", "d_h_ptr", "d_c_ptr", "partial_ptr")
    types |= {"d_gates_counter_ptr": "*i32", "partial_counter_ptr": "*i32"}
    types |= {name: kind for name, kind in pointers.items() if kind is not None}
    return Case(name, backward_kernel, constants, types, config.num_warps, loops=True)


def _statistics(layer_norm: str, hidden_size: int) -> Case:
    config = cell_config(layer_norm, hidden_size)
    constants = {
        "H": hidden_size,
        "PITCH": PITCHES[layer_norm],
        "ROWS": ROWS,
        "BLOCK": config.block,
        "LAYER_NORM": layer_norm,
        "APPROX": True,
    }
    options = ("weight_ph_ptr", "reset_ptr", "reset_c_ptr")
    constants |= dict.fromkeys(options if layer_norm != "gates" else (*options, "product_ptr", "norm_hh_weight_ptr"))
    types = {"*": "*fp32", "gates_ptr": "*bf16", "product_ptr": "*bf16"}
    name = f"statistics before the way back, bf16, H {hidden_size}, {layer_norm}"
    return Case(name, statistics_kernel, constants, types, config.num_warps)


def _pointer_types(dtype: str, *states: str) -> dict[str, str]:
    return {"*": f"*{dtype}", **dict.fromkeys(states, "*fp64" if dtype == "fp64" else "*fp32")}
