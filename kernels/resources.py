"""What every kernel costs, counted from the code that the compiler makes: no GPU is needed.

    python -m fused_lstm.kernels.resources            prints the table and fails where a number is worse than its budget
    python -m fused_lstm.kernels.resources --write    makes today's numbers the budgets

The budgets stand in budgets.json beside this file, counted with the Triton version named there. Spills are an error
with any version and on any target.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lstm.kernels import stepwise
from fused_lstm.kernels.configs import pointwise_config
from fused_lstm.kernels.interpretation import INTERPRETED

BUDGETS = Path(__file__).with_name("budgets.json")
CAPABILITIES = (80, 90, 100, 120)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_DTYPES = ("bf16", "fp16", "fp32", "fp64")


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched: its compile-time arguments, the types of its pointers, and its warps."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    pointer_types: dict[str, str]  # by argument; "*" for all others
    num_warps: int


def cases() -> Iterator[Case]:
    """Every kernel in every dtype; its variants, and the larger block, in bfloat16."""
    for dtype in _DTYPES:
        yield _stepwise_forward(dtype, 512, save=True)
        yield _stepwise_backward(dtype, 512, d_output=True)
    yield _stepwise_forward("bf16", 1024, save=True)
    yield _stepwise_backward("bf16", 1024, d_output=True)
    yield _stepwise_forward("bf16", 512, save=False)
    yield _stepwise_backward("bf16", 512)
    yield _stepwise_backward("bf16", 512, d_output=True, lengths=True)
    yield _stepwise_backward("bf16", 512, projection=True)
    yield _stepwise_backward("bf16", 512, lengths=True, projection=True)


def _stepwise_forward(dtype: str, hidden_size: int, save: bool) -> Case:
    config = pointwise_config(hidden_size)
    return Case(
        f"stepwise forward, {dtype}, block {config.block}" + ", inference" * (not save),
        stepwise.cell_forward_kernel,
        {"SAVE": save, "BLOCK": config.block},
        _pointer_types(dtype, "c_ptr"),
        config.num_warps,
    )


def _stepwise_backward(
    dtype: str, hidden_size: int, d_output: bool = False, lengths: bool = False, projection: bool = False
) -> Case:
    config = pointwise_config(hidden_size)
    variant = ", d_output" * d_output + ", lengths" * lengths + ", projection" * projection
    return Case(
        f"stepwise backward, {dtype}, block {config.block}{variant}",
        stepwise.cell_backward_kernel,
        {"HAS_D_OUTPUT": d_output, "HAS_LENGTHS": lengths, "HAS_PROJECTION": projection, "BLOCK": config.block},
        {**_pointer_types(dtype, "c_ptr", "d_c_ptr", "d_c_n_ptr"), "lengths_ptr": "*i64"},
        config.num_warps,
    )


def _pointer_types(dtype: str, *states: str) -> dict[str, str]:
    return {"*": f"*{dtype}", **dict.fromkeys(states, "*fp64" if dtype == "fp64" else "*fp32")}


def compile_case(case: Case, capability: int) -> Any:
    """The compiled kernel for a compute capability (90 for sm_90), with sizes that are multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = case.pointer_types.get(name, case.pointer_types["*"])
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name == "hidden_size":
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def count(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory, and what one warp issues from start to end."""
    usage = _tool(compiled, "cuobjdump", "--dump-resource-usage")
    opcodes = collections.Counter(_opcodes(_tool(compiled, "nvdisasm", "-c")))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "instructions": sum(opcodes.values()),
        "barriers": opcodes["BAR"],
        "loads": opcodes["LDG"],
        "stores": opcodes["STG"],
        "special": opcodes["MUFU"],
    }


def _tool(compiled: Any, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _opcodes(disassembly: str) -> Iterator[str]:
    """The opcode of each instruction, without predicate and suffixes, up to the padding behind the last."""
    for line in disassembly.splitlines():
        if match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", line):
            if match[1] == "NOP":
                continue
            yield match[1]


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make today's numbers the budgets")
    write = parser.parse_args(arguments).write
    if INTERPRETED:
        print("kernels are interpreted, not compiled: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    wanted = [(capability, case) for capability in CAPABILITIES for case in cases()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time goes into the assembler's processes
        counts = list(pool.map(lambda pair: count(compile_case(pair[1], pair[0])), wanted))
    found = {
        f"sm_{capability} {case.name}": numbers for (capability, case), numbers in zip(wanted, counts, strict=True)
    }
    width = max(map(len, found))
    print(" " * width, *next(iter(found.values())), sep="  ")
    for name, numbers in found.items():
        print(name.ljust(width), *(str(value).rjust(len(key)) for key, value in numbers.items()), sep="  ")
    failures = [f"{name}: spills {numbers['spilled']} bytes" for name, numbers in found.items() if numbers["spilled"]]
    if write:
        BUDGETS.write_text(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1) + "\n")
    else:
        budgets = json.loads(BUDGETS.read_text())
        if budgets["triton"] == triton.__version__:
            failures += compare(found, budgets["kernels"])
        else:
            print(f"budgets are for Triton {budgets['triton']}, this is {triton.__version__}: only spills are checked")
    print(f"{len(found)} kernels compiled, {len(failures)} over budget")
    print("\n".join(failures), file=sys.stderr, end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
