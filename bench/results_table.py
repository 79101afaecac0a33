"""Records of `measure` as rows of text."""

from collections.abc import Sequence

from fused_lstm.bench.contenders import CELL_LOOP, TEXTBOOK_LOOP, TORCH, plain_of
from fused_lstm.bench.measure import CANNOT_RUN, MEASURED, last_line, remark
from fused_lstm.bench.variants import PLAIN

# A training step's median in milliseconds, half the distance of its quartiles, how many times faster than torch.nn.LSTM
# and than the loop of cells, the peak memory, the accuracy check.
DETAIL_HEADER = "contender", "ms", "±", "× torch", "× loop", "MiB", "check"

# Of a variant, also: how many times the time of torch.nn.LSTM's plain step and of the contender's own. "× torch" is
# there where torch.nn.LSTM computes the variant.
_OVER_TORCH, _OVER_OWN = "÷ torch\nplain", "÷ own\nplain"
_VARIANT_HEADER = "contender", "ms", "±", "× torch", "× loop", _OVER_TORCH, _OVER_OWN, "MiB", "check"
VARIANT_LEGEND = (
    "× is how many times faster. The rows called plain are yardsticks: they compute torch.nn.LSTM's cell, and are not "
    "checked here. ÷ is how many times their time."
)


def detail_rows(record: dict) -> list[tuple[str, ...]]:
    """A row a contender, in the columns of `detail_header`; all of it as measured, and a dash where nothing was."""
    header = detail_header(record)
    return [_detail_row(entry, header) for entry in record["contenders"]]


def detail_header(record: dict) -> tuple[str, ...]:
    """`DETAIL_HEADER`, or that of a variant."""
    if record["variant"] == PLAIN:
        return DETAIL_HEADER
    torchs_own = any(entry["name"] == TORCH for entry in record["contenders"])
    return tuple(column for column in _VARIANT_HEADER if torchs_own or column != "× torch")


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
    """A line a case, with the median of each contender in milliseconds and how many times faster than torch.nn.LSTM;
    the variants in a table of their own, and there how many times faster than the loop."""
    plain = [record for record in records if record["variant"] == PLAIN]
    variants = [record for record in records if record["variant"] != PLAIN]
    tables = ("ms (times faster)", plain, TORCH), ("ms (times faster than the loop)", variants, TEXTBOOK_LOOP)
    return "\n\n".join(_overview_table(*table) for table in tables if table[1])


def _overview_table(title: str, records: Sequence[dict], baseline: str) -> str:
    names = list(dict.fromkeys(entry["name"] for record in records for entry in record["contenders"]))
    rows = []
    for record in records:
        cells = {entry["name"]: _overview_cell(entry, baseline) for entry in record["contenders"]}
        if record["error"] is not None:
            cells = {baseline: "error"}
        rows.append((record["label"], *(cells.get(name, "") for name in names)))
    return plain_table((title, *map(_short, names)), rows)


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


def _detail_row(entry: dict, header: Sequence[str]) -> tuple[str, ...]:
    if entry["status"] != MEASURED:
        return entry["name"], entry["status"], *["-"] * (len(header) - 2)
    time, memory = entry["time"], entry["peak_memory_bytes"]
    median, lower, upper = time["median_s"], time["lower_quartile_s"], time["upper_quartile_s"]
    ratios = {**(entry["speedup"] or {}), **(entry["over_plain"] or {})}

    def ratio(*names: str) -> str:
        return next((f"{ratios[name]:.2f}" for name in names if name in ratios), "-")

    cells = {
        "contender": entry["name"],
        "ms": _milliseconds(median),
        "±": "-" if lower is None else f"{(upper - lower) / 2 / median:.0%}",
        "× torch": ratio(TORCH),
        "× loop": ratio(CELL_LOOP, TEXTBOOK_LOOP),
        _OVER_TORCH: ratio(plain_of(TORCH)),
        _OVER_OWN: ratio(plain_of(entry["name"])),
        "MiB": "-" if memory is None else f"{memory / 2**20:.1f}",
        "check": "-" if entry["yardstick"] else "passed" if entry["accuracy"]["passed"] else "FAILED",
    }
    return tuple(cells[column] for column in header)


def _overview_cell(entry: dict, baseline: str) -> str:
    if entry["status"] != MEASURED:
        return "n/a" if entry["status"] == CANNOT_RUN else "error"
    milliseconds = _milliseconds(entry["time"]["median_s"])
    if not entry["yardstick"] and not entry["accuracy"]["passed"]:
        return f"{milliseconds} FAILED"
    speedup = (entry["speedup"] or {}).get(baseline)
    return milliseconds if speedup is None else f"{milliseconds} ({speedup:.2f})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _short(name: str) -> str:
    for long, short in (("fused_lstm ", ""), ("torch.nn.LSTM", "nn.LSTM"), ("LSTMCell ", ""), ("textbook ", "")):
        name = name.replace(long, short)
    return name
