"""Hold every kernel to its budget: what it costs as compiled, for four targets, without a GPU.

    python -m fused_lstm.kernels.budgets            prints the table and fails where a number is worse than its budget
    python -m fused_lstm.kernels.budgets --write    makes today's numbers the budgets

The budgets stand in budgets.json beside this file, counted with the Triton version named there. With any version and
on any target a spill is an error, and so is a time loop that copies W_hh into shared memory anew in each turn.
Instructions are those that one warp issues: from start to end, or in one turn of a persistent kernel's time loop.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton

from fused_lstm.kernels.devices import KNOWN_DEVICES
from fused_lstm.kernels.interpretation import INTERPRETED
from fused_lstm.kernels.resource_cases import DEVICES, cases
from fused_lstm.kernels.resources import Case, allocations_in_loop, compile_case, count

BUDGETS = Path(__file__).with_name("budgets.json")


def compare(found: dict[str, dict[str, int]], budgets: dict[str, dict[str, int]]) -> list[str]:
    """One line for each number that is worse than its budget, each kernel without one, each budget without a kernel."""
    worse = []
    for name, numbers in found.items():
        if name not in budgets:
            worse.append(f"{name}: has no budget")
            continue
        worse += [
            f"{name}: {key} {value}, budget {budgets[name][key]}"
            for key, value in numbers.items()
            if value > budgets[name][key]
        ]
    return worse + [f"{name}: a budget for no kernel" for name in budgets if name not in found]


def _measure(capability: int, case: Case) -> tuple[dict[str, int], list[str]]:
    """The case's numbers, and what is wrong with them whatever the budget."""
    compiled = compile_case(case, capability)
    numbers = count(case, compiled)
    wrong = [f"spills {numbers['spilled']} bytes"] if numbers["spilled"] else []
    limit = KNOWN_DEVICES[DEVICES[capability]].shared_memory
    if numbers["shared"] > limit:
        wrong.append(f"takes {numbers['shared']} bytes of shared memory, where a block has {limit}")
    if case.loops:
        rows = case.constants["ROWS"]
        copied = [shape for shape in allocations_in_loop(compiled) if int(shape.split("x")[-1]) != rows]
        wrong += [f"copies {shape} into shared memory in each step" for shape in copied]
        if not numbers["products"]:
            wrong.append("multiplies without the target's matrix instruction")
    return numbers, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make today's numbers the budgets")
    write = parser.parse_args(arguments).write
    if INTERPRETED:
        print("kernels are interpreted, not compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    wanted = {
        f"sm_{capability} {case.name}": (capability, case) for capability in DEVICES for case in cases(capability)
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time goes into the assembler's processes
        measured = dict(zip(wanted, pool.map(lambda pair: _measure(*pair), wanted.values()), strict=True))
    found = {name: numbers for name, (numbers, _) in measured.items()}
    width = max(map(len, found))
    print(" " * width, *next(iter(found.values())), sep="  ")
    for name, numbers in found.items():
        print(name.ljust(width), *(str(value).rjust(len(key)) for key, value in numbers.items()), sep="  ")
    failures = [f"{name}: {text}" for name, (_, wrong) in measured.items() for text in wrong]
    if write:
        BUDGETS.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1) + "\n")
    else:
        budgets = json.loads(BUDGETS.read_text())
        if budgets["triton"] == triton.__version__:
            failures += compare(found, budgets["kernels"])
        else:
            print(f"budgets are for Triton {budgets['triton']}, this is {triton.__version__}: numbers are not compared")
    print(f"{len(found)} kernels compiled, {len(failures)} over budget")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
