"""The command `fused-lstm bench`."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fused_lstm.bench.atomic import check_writable, write_atomically
from fused_lstm.bench.contenders import choose_backend, chosen_backends, contenders_for
from fused_lstm.bench.devices import find_device
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.measure import measure, problems, remark
from fused_lstm.bench.options import LARGEST_SIZE
from fused_lstm.bench.results_table import VARIANT_LEGEND, detail_header, detail_rows, machine_line, remarks
from fused_lstm.bench.variants import PLAIN, VARIANTS
from fused_lstm.bench.workload import DTYPES, Case, fresh_seed

_LIST = "; a list, 256,512, for a grid."


def bench(
    hidden_size: Annotated[str, typer.Option(help="H, units of a layer" + _LIST)] = "512",
    batch_size: Annotated[str, typer.Option(help="N, rows of the batch" + _LIST)] = "16",
    steps: Annotated[
        str | None, typer.Option(help="T, time steps" + _LIST + " Default: 512 on CUDA, 64 on a CPU.")
    ] = None,
    input_size: Annotated[int | None, typer.Option(help="I, input features. Default: the hidden size.")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the stack.")] = 1,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Both directions.")] = False,
    variant: Annotated[
        str, typer.Option(help=f"Of the cell: {', '.join(VARIANTS)}; a list for a grid.", metavar="NAME")
    ] = PLAIN,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(DTYPES)}; a list for a grid. Default: bfloat16 and float32 on CUDA, float32 on a CPU."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: cuda if there.")] = "auto",
    backend: Annotated[
        list[str] | None,
        typer.Option(help="A backend of ours; may be repeated. Default: all that have kernels, reference on a CPU."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Samples of each. Default: 20 on CUDA, 5 on a CPU.")] = None,
    warmup: Annotated[int, typer.Option(help="Steps of each before the first sample.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and inputs. Default: a fresh one.")] = None,
    tf32: Annotated[bool, typer.Option("--tf32/--no-tf32", help="May float32 products use TF32, on CUDA?")] = True,
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="CUDA graphs of torch's and ours, too.")] = True,
    loop: Annotated[bool, typer.Option("--loop/--no-loop", help="The Python loop over a cell.")] = True,
    compile_loop: Annotated[
        bool, typer.Option("--compile-loop", help="That loop under torch.compile: takes minutes to compile.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Where to write all that was measured.", metavar="FILE")
    ] = None,
) -> None:
    """Time a training step, forward and backward, against torch.nn.LSTM and a Python loop of torch.nn.LSTMCell.

    Every result is held to float64 first. A speed-up is shown only beside a check that passed, which allows twice the
    error of torch's own and one eps; else the row says FAILED, and where it is ours, the exit code is 1.

    A variant is a cell that torch.nn.LSTM does not have, or a way to call it. It is timed, and its accuracy measured,
    against the Python loop that people write for it; the plain cell, torch's and ours, stands beside as a yardstick.
    """
    torch_device = find_device(device)
    on_cuda = torch_device.type == "cuda"
    cases = [
        Case(hidden, batch, time, input_size, layers, bidirectional, dtype_name, str(torch_device), tf32, variant_name)
        for variant_name, dtype_name, hidden, batch, time in itertools.product(
            _variants(variant, bidirectional, loop),
            _dtypes(dtype or ("bfloat16,float32" if on_cuda else "float32")),
            _sizes("--hidden-size", hidden_size),
            _sizes("--batch-size", batch_size),
            _sizes("--steps", steps or ("512" if on_cuda else "64")),
        )
    ]
    for option, value in (("--input-size", input_size), ("--layers", layers), ("--warmup", warmup)):
        if value is not None:
            _check_size(option, value)
    repeats = repeats if repeats is not None else (20 if on_cuda else 5)
    _check_size("--repeats", repeats)
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UserError(f"--seed is {seed}", "give a whole number from 0 to 2**63 - 1")
    backends = chosen_backends(backend, torch_device)
    for name in backends:
        _check_runs(name, cases)
    if json_path is not None:
        check_writable(json_path)

    console = Console(highlight=False, markup=False)
    records = []
    for case in cases:
        contenders = contenders_for(case, backends, graphs=graphs, loop=loop, compile_loop=compile_loop)
        with console.status(case.label) as status:
            record = measure(
                case,
                contenders,
                repeats=repeats,
                warmup=warmup,
                seed=fresh_seed() if seed is None else seed,
                on_turn=lambda name, stage, label=case.label: status.update(f"{label}: {name}: {stage}"),
            )
        if not records:
            console.print(machine_line(record["machine"]), soft_wrap=True)
        records.append(record)
        console.print(_table(record))
        for line in remarks(record):
            console.print(line, soft_wrap=True)
        if json_path is not None:
            write_atomically(json_path, (json.dumps({"records": records}, indent=1) + "\n").encode())
        if record["device_lost"] is not None:
            console.print(f"{record['device_lost']} left the device unusable: the cases after this one are not run")
            break
    if any(record["variant"] != PLAIN for record in records):
        console.print(VARIANT_LEGEND, soft_wrap=True)
    if not on_cuda:
        console.print("Peak memory is measured on CUDA only.")
    if any(map(problems, records)):
        raise typer.Exit(1)


def _table(record: dict) -> Table:
    table = Table(title=record["label"], title_justify="left", box=box.SIMPLE_HEAD)
    for column in detail_header(record):
        table.add_column(column, justify="left" if column in ("contender", "check") else "right", no_wrap=True)
    for row, entry in zip(detail_rows(record), record["contenders"], strict=True):
        table.add_row(*row, style=None if remark(entry) is None else "red")
    return table


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option} is {text!r}", "give a value, or several with a comma between two")
    return parts


def _sizes(option: str, text: str) -> list[int]:
    sizes = []
    for part in _parts(option, text):
        try:
            sizes.append(int(part))
        except ValueError as error:
            raise UserError(f"{option} is {part!r}", "give whole numbers, as in 256,512") from error
        _check_size(option, sizes[-1])
    return sizes


def _check_size(option: str, value: int) -> None:
    if not 1 <= value <= LARGEST_SIZE:
        raise UserError(f"{option} is {value}", f"give a whole number from 1 to {LARGEST_SIZE}")


def _dtypes(text: str) -> list[str]:
    names = _parts("--dtype", text)
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtype is {name!r}", "give one of " + ", ".join(DTYPES))
    return names


def _variants(text: str, bidirectional: bool, loop: bool) -> list[str]:
    names = _parts("--variant", text)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--variant is {name!r}", "give one of " + ", ".join(VARIANTS))
        if VARIANTS[name].given == "reset" and bidirectional:
            raise UserError(
                f"--variant {name} cannot be --bidirectional: the other direction comes from the future",
                "leave one out",
            )
        if name != PLAIN and not loop:
            raise UserError(f"--variant {name} is checked against the loop", "leave --no-loop out")
    return names


def _check_runs(name: str, cases: Sequence[Case]) -> None:
    """
    Raises:
        UserError: the backend cannot run any of the cases
    """
    obstacle = None
    for case in cases:
        try:
            choose_backend(name, case)
        except ValueError as error:
            obstacle = str(error)
        else:
            return
    raise UserError(obstacle, "leave --backend out for what can run here")
