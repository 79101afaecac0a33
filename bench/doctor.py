"""The command `fused-lstm doctor`."""

import copy
import os
import platform
import traceback
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import fused_lstm
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.machine import describe_machine, triton_version
from fused_lstm.bench.measure import last_line

# What `select_backend` is asked beside the device.
_CASES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "float32, with lengths": {"dtype": torch.float32, "lengths": True},
    "bfloat16, with lengths": {"dtype": torch.bfloat16, "lengths": True},
    "float32, under torch.compile": {"dtype": torch.float32, "compiling": True},
    "bfloat16, under torch.compile": {"dtype": torch.bfloat16, "compiling": True},
    "bfloat16, layer_norm='gates'": {"dtype": torch.bfloat16, "layer_norm": "gates"},
    "bfloat16, zoneout and reset": {"dtype": torch.bfloat16, "options": ("zoneout", "reset")},
}
_SIZES = {"hidden_size": 512, "batch_size": 16}


# Sizes whose persistent grid is shown: H by N.
_GRID_COLUMNS = (
    *("H", "N", "grid", "rows", "K in chunks", "h at once", "shared KB"),
    *("rows of two", "with options", "back through norms"),
)
_GRID_HIDDEN_SIZES = (64, 128, 256, 512, 650, 768, 1024, 1150, 1536)
_GRID_BATCH_SIZES = (1, 16, 64, 128)


def doctor(
    device_name: Annotated[
        str | None, typer.Option(help=f"Show the persistent kernels' grids on {', '.join(fused_lstm.KNOWN_DEVICES)}.")
    ] = None,
) -> None:
    """Say what is installed, whether Triton works, and which backend a layer would get here, and why.

    The exit code is 1 where there is a CUDA device on which Triton's kernels do not run.
    """
    console = Console(highlight=False, markup=False)
    if device_name is not None:
        if device_name not in fused_lstm.KNOWN_DEVICES:
            raise UserError(
                f"no device is called {device_name!r}", f"name one of {', '.join(fused_lstm.KNOWN_DEVICES)}"
            )
        _print_grids(console, fused_lstm.KNOWN_DEVICES[device_name])
        return
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    console.print(_versions(devices))
    working = [_print_triton(console, device) for device in devices]
    if not devices:
        console.print("No CUDA device here: Triton's kernels can run in its interpreter only, for tests.")
    for device in (*devices, torch.device("cpu")):
        console.print(_choices(device))
    for device in devices:
        _print_grids(console, fused_lstm.cuda_device(device.index))
    if not all(working):
        raise typer.Exit(1)


def _versions(devices: list[torch.device]) -> Table:
    facts = describe_machine("cpu")
    table = Table(show_header=False, box=None)
    rows = {
        "Python": facts["python"],
        "system": platform.platform(),
        "torch": facts["torch"],
        "Triton": facts["triton"] or "not installed",
        "CUDA": facts["cuda"] or "none: this torch is for the CPU only",
        "cuDNN": facts["cudnn"] or "none",
        "CPU": f"{facts['cpu']}, {facts['cpu_cores']} cores",
    }
    for device in devices:
        gpu = describe_machine(device)
        rows |= {
            str(device): f"{gpu['gpu']}, {gpu['gpu_memory_bytes'] / 2**30:.0f} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, compute capability {gpu['compute_capability']}",
            "driver": gpu["driver"] or "unknown",
        }
    rows["FUSED_LSTM_BACKEND"] = os.environ.get("FUSED_LSTM_BACKEND", "not set")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _print_triton(console: Console, device: torch.device) -> bool:
    """Prints whether Triton's kernels run on device; returns it."""
    failure = "it is not installed" if triton_version() is None else _failure(device)
    console.print(f"Triton on {device}: {'works' if failure is None else f'does not work: {failure}'}")
    return failure is None


def _failure(device: torch.device) -> str | None:
    """What is wrong with a small training step on our kernels, or None."""
    torch.manual_seed(0)
    # of a size whose persistent grid has programs that wait for each other
    theirs = torch.nn.LSTM(8, 128, device=device)
    input = torch.randn(5, 4, 8, device=device)
    sizes = {"device": device, "dtype": torch.float32, "hidden_size": 128, "batch_size": 4}
    try:
        theirs(input)[0].square().sum().backward()
        for backend in ("stepwise", "persistent"):
            try:
                fused_lstm.select_backend(backend, **sizes)
            except ValueError:
                if backend == "stepwise":
                    raise
                continue  # it need not fit every device; the table of grids says why
            ours = fused_lstm.convert(copy.deepcopy(theirs), backend=backend)
            ours.zero_grad()
            ours(input)[0].square().sum().backward()
            actual, expected = ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad
            error = ((actual - expected).abs().max() / expected.abs().max()).item()
            # wide enough for TF32: this asks whether kernels run; how accurate they are is for `fused-lstm bench`
            if not error < 0.01:
                return f"a gradient of {backend} is {error:.0%} off torch's"
    except Exception as error:
        return last_line("".join(traceback.format_exception_only(error)))
    return None


def _choices(device: torch.device) -> Table:
    title = f"backend='auto' on {device}, H={_SIZES['hidden_size']}, N={_SIZES['batch_size']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("backend", "for", "why"):
        table.add_column(column)
    inputs: dict[tuple[str, str], list[str]] = {}
    for name, options in _CASES.items():
        try:
            answer = tuple(fused_lstm.select_backend("auto", device=device, **_SIZES, **options))
        except ValueError as error:
            answer = "none", str(error)
        inputs.setdefault(answer, []).append(name)
    for (backend, why), names in inputs.items():
        table.add_row(backend, "\n".join(names), why, end_section=True)
    return table


def _print_grids(console: Console, device: fused_lstm.Device) -> None:
    console.print(
        f"{device.name}: {device.multiprocessors} multiprocessors, {device.shared_memory // 1024} KB of shared memory "
        "a block. The persistent kernels' grid, programs by batch tiles of so many rows, where it fits at once; the "
        "rows of a tile where two directions walk at once in one grid, or - where one walks after the other; its rows "
        "with options; and back through layer norms, or - where these are stepwise:"
    )
    for name, element_size in (("bfloat16, float16", 2), ("float32 (TF32)", 4)):
        table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD)
        for column in (*_GRID_COLUMNS, "or why not"):
            table.add_column(column)
        for hidden_size in _GRID_HIDDEN_SIZES:
            for batch_size in _GRID_BATCH_SIZES:
                table.add_row(str(hidden_size), str(batch_size), *_grid(device, element_size, hidden_size, batch_size))
        console.print(table)


def _grid(device: fused_lstm.Device, element_size: int, hidden_size: int, batch_size: int) -> list[str]:
    try:
        config = fused_lstm.persistent_config(device, element_size, hidden_size, batch_size)
    except fused_lstm.DoesNotFit as reason:
        return [*[""] * (len(_GRID_COLUMNS) - 2), str(reason)]
    both = fused_lstm.persistent_config(device, element_size, hidden_size, batch_size, directions=2)
    rows = []
    for burden in ("options", "norms"):
        try:
            laden = fused_lstm.persistent_config(device, element_size, hidden_size, batch_size, burden=burden)
            rows.append(str(laden.rows))
        except fused_lstm.DoesNotFit:
            rows.append("-")
    return [
        f"{config.programs} x {config.batch_tiles}",
        str(config.rows),
        " + ".join(map(str, config.backward_k)),
        "yes" if config.at_once else "no",
        str(config.shared_memory // 1024),
        str(both.rows) if both.directions == 2 else "-",
        *rows,
        "",
    ]
