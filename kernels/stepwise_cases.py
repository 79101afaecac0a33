"""The stepwise backend's kernels as they are launched, for the budget of each."""

from collections.abc import Iterator
from typing import Any

from fused_lstm.kernels.configs import PointwiseConfig, cell_config, pointwise_config
from fused_lstm.kernels.resources import Case
from fused_lstm.kernels.stepwise_backward import cell_backward_kernel, projected_backward_kernel
from fused_lstm.kernels.stepwise_forward import cell_forward_kernel, projected_forward_kernel
from fused_lstm.kernels.stepwise_launch import NORM_SLOTS

_EVERY = ("peephole", "zoneout masks", "recurrent mask", "reset", "d_c_all")
# The pointers that an option adds, of whichever kernel has them.
_ZONEOUT = ("zoneout_h_ptr", "zoneout_c_ptr", "h_old_ptr", "d_h_old_ptr")
_RESET = ("reset_ptr", "reset_h_ptr", "reset_c_ptr", "d_reset_h_ptr", "d_reset_c_ptr", "entered_ptr")
_PARAMETERS = ("parameters_ptr", "d_parameters_ptr")
_POINTERS = {
    "d_output": ("d_output_ptr",),
    "d_c_all": ("d_c_all_ptr",),
    "projection": ("hidden_ptr",),
    "peephole": _PARAMETERS,
    "zoneout masks": _ZONEOUT,
    "zoneout rates": _ZONEOUT,
    "recurrent mask": ("recurrent_mask_ptr", "entered_ptr"),
    "reset": _RESET,
    "gates": _PARAMETERS,
    "projections": (*_PARAMETERS, "product_ptr", "d_product_ptr"),
    "projections_cell": (*_PARAMETERS, "product_ptr", "d_product_ptr"),
}
_OPTIONAL = {name for names in _POINTERS.values() for name in names}
_OF_C = ("c_ptr", "reset_c_ptr", "parameters_ptr", "zoneout_h_ptr", "zoneout_c_ptr")
_OF_C += ("d_c_ptr", "d_c_all_ptr", "d_h_old_ptr", "d_reset_h_ptr", "d_reset_c_ptr", "d_parameters_ptr")


def stepwise_cases() -> Iterator[Case]:
    """Every kernel in every dtype; variants and further sizes in bfloat16."""
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        yield _forward(dtype, 512)
        yield _backward(dtype, 512, "d_output")
        yield _projected("forward", projected_forward_kernel, dtype, {"SAVE": True, "H_APART": 0})
        yield _projected("backward", projected_backward_kernel, dtype, {"D_OUTPUT_APART": 0})
    yield _forward("bf16", 1024)
    yield _backward("bf16", 1024, "d_output")
    yield _forward("bf16", 512, save=False)
    yield _forward("bf16", 512, directions=2)
    yield _backward("bf16", 512)
    yield _backward("bf16", 512, "projection")
    yield _backward("bf16", 512, "d_output", directions=2)
    yield _backward("bf16", 512, "d_output", "d_c_all")
    for option in ("peephole", "zoneout masks", "zoneout rates", "recurrent mask", "reset", "every option"):
        yield _forward("bf16", 512, option)
        yield _backward("bf16", 512, "d_output", option)
    for norm in ("gates", "projections", "projections_cell"):
        for hidden_size in (512, 1024):
            yield _forward("bf16", hidden_size, norm)
            yield _backward("bf16", hidden_size, "d_output", norm)
            yield _forward("bf16", hidden_size, norm, "every option")
            yield _backward("bf16", hidden_size, "d_output", norm, "every option")


def _forward(dtype: str, hidden_size: int, *options: str, save: bool = True, directions: int = 1) -> Case:
    constants = {"SAVE": save, "H_APART": 16 if directions == 2 else 0}
    told = [*options, *["inference"] * (not save), *["both directions"] * (directions == 2)]
    return _cell("forward", cell_forward_kernel, dtype, hidden_size, options, constants, told)


def _backward(dtype: str, hidden_size: int, *options: str, directions: int = 1) -> Case:
    constants = {"D_OUTPUT_APART": 16 if directions == 2 else 0}
    told = [*options, *["both directions"] * (directions == 2)]
    return _cell("backward", cell_backward_kernel, dtype, hidden_size, options, constants, told)


def _cell(
    name: str,
    kernel: Any,
    dtype: str,
    hidden_size: int,
    options: tuple[str, ...],
    constants: dict[str, Any],
    told: list[str],
) -> Case:
    norm = next((option for option in options if option in NORM_SLOTS), None)
    config = cell_config(norm, hidden_size)
    if "every option" in options:
        options = (*options, *_EVERY)
    slot = NORM_SLOTS[norm] if "peephole" in options else None
    constants |= {"LAYER_NORM": norm, "PEEPHOLE": slot, "BLOCK": config.block}
    if kernel is cell_backward_kernel:
        constants["SLOTS"] = NORM_SLOTS[norm] + (0 if slot is None else 3)
    variant = "".join(f", {each}" for each in told)
    return _case(f"stepwise {name}, {dtype}, block {config.block}{variant}", kernel, dtype, options, constants, config)


def _projected(name: str, kernel: Any, dtype: str, constants: dict[str, Any]) -> Case:
    config = pointwise_config(512)
    constants = {**constants, "BLOCK": config.block}
    options = ("d_output", *_EVERY)
    return _case(f"stepwise projected {name}, {dtype}, block {config.block}", kernel, dtype, options, constants, config)


def _case(
    name: str, kernel: Any, dtype: str, options: tuple[str, ...], constants: dict[str, Any], config: PointwiseConfig
) -> Case:
    present = {pointer for option in options for pointer in _POINTERS.get(option, ())}
    constants = {pointer: None for pointer in kernel.arg_names if pointer in _OPTIONAL - present} | constants
    types = {"*": f"*{dtype}", "reset_ptr": "*u8"} | dict.fromkeys(_OF_C, "*fp64" if dtype == "fp64" else "*fp32")
    if "zoneout masks" in options:
        types |= {"zoneout_h_ptr": "*u8", "zoneout_c_ptr": "*u8"}
    return Case(name, kernel, constants, types, config.num_warps)
