"""Records of `measure` as rows of text."""

from collections.abc import Sequence

from fused_lstm.bench.contenders import CELL_LOOP, TORCH
from fused_lstm.bench.measure import CANNOT_RUN, MEASURED, last_line, remark

# A training step's median in milliseconds, half the distance of its quartiles, how many times faster than torch.nn.LSTM
# and than the loop of cells, the peak memory, the accuracy check.
DETAIL_HEADER = "contender", "ms", "±", "× torch", "× loop", "MiB", "check"


def detail_rows(record: dict) -> list[tuple[str, ...]]:
    """A row a contender, in the columns of `DETAIL_HEADER`; all of it as measured, and a dash where nothing was."""
    return [_detail_row(entry) for entry in record["contenders"]]


def remarks(record: dict) -> list[str]:
    """What the numbers do not say, a line each: who failed, who cannot run, and why."""
    if record["error"] is not None:
        return [f"the case failed: {last_line(record['error'])}"]
    lines = []
    for entry in record["contenders"]:
        if entry["name"] == "fused_lstm auto" and entry["backend"] is not None:
            lines.append(f"{entry['name']} is {entry['backend']['name']}: {entry['backend']['reason']}")
        if remark(entry) is not None:
            lines.append(remark(entry))
    return lines


def overview(records: Sequence[dict]) -> str:
    """A line a case, with the median of each contender in milliseconds and how many times faster than torch.nn.LSTM."""
    names = list(dict.fromkeys(entry["name"] for record in records for entry in record["contenders"]))
    rows = []
    for record in records:
        cells = {entry["name"]: _overview_cell(entry) for entry in record["contenders"]}
        if record["error"] is not None:
            cells = {TORCH: "error"}
        rows.append((record["label"], *(cells.get(name, "") for name in names)))
    return plain_table(("ms (times faster)", *map(_short, names)), rows)


def machine_line(machine: dict) -> str:
    """The hardware and the versions in one line."""
    words = [machine["gpu"] or machine["cpu"] or "unknown processor", f"torch {machine['torch']}"]
    named = {"triton": "Triton", "driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN", "commit": "commit"}
    words += [f"{name} {machine[key]}" for key, name in named.items() if machine[key] is not None]
    if machine["dirty"]:
        words[-1] += " with changes"
    return ", ".join(words)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        first, *others = zip(line, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join(map(text, lines))


def _detail_row(entry: dict) -> tuple[str, ...]:
    if entry["status"] != MEASURED:
        return entry["name"], entry["status"], *["-"] * (len(DETAIL_HEADER) - 2)
    time, speedup, memory = entry["time"], entry["speedup"] or {}, entry["peak_memory_bytes"]
    median, lower, upper = time["median_s"], time["lower_quartile_s"], time["upper_quartile_s"]
    return (
        entry["name"],
        _milliseconds(median),
        "-" if lower is None else f"{(upper - lower) / 2 / median:.0%}",
        *(f"{speedup[name]:.2f}" if name in speedup else "-" for name in (TORCH, CELL_LOOP)),
        "-" if memory is None else f"{memory / 2**20:.1f}",
        "passed" if entry["accuracy"]["passed"] else "FAILED",
    )


def _overview_cell(entry: dict) -> str:
    if entry["status"] != MEASURED:
        return "n/a" if entry["status"] == CANNOT_RUN else "error"
    milliseconds = _milliseconds(entry["time"]["median_s"])
    if not entry["accuracy"]["passed"]:
        return f"{milliseconds} FAILED"
    speedup = (entry["speedup"] or {}).get(TORCH)
    return milliseconds if speedup is None else f"{milliseconds} ({speedup:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _short(name: str) -> str:
    for long, short in (("fused_lstm ", ""), ("torch.nn.LSTM", "nn.LSTM"), ("LSTMCell ", "")):
        name = name.replace(long, short)
    return name
