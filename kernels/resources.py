"""What a kernel costs, counted from the code that the compiler makes: no GPU is needed."""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What multiplies tiles, where it is not mma.sync: wgmma, tcgen05.
_MATRIX_OPCODES = {90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "UTCOMMA")}


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched.

    constants: its compile-time arguments; pointer_types: of its pointers by name, "*" for all others; num_warps: of a
    program; loops: its longest loop walks the time steps, and one turn of it is what counts; options: all else that
    the compiler is told.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    pointer_types: dict[str, str]
    num_warps: int
    loops: bool = False
    options: dict[str, Any] = field(default_factory=lambda: {"num_stages": 1})


def compile_case(case: Case, capability: int) -> Any:
    """The compiled kernel for a compute capability (90 for sm_90), with sizes that are multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = case.pointer_types.get(name, case.pointer_types["*"])
            if not case.kernel.params[index].do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = case.kernel.params[index].annotation_type or "i32"
            if name in ("hidden_size", "output_size"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.num_warps} | case.options
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def count(case: Case, compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory; and what one warp issues, from the kernel's start to
    its end or in one turn of its time loop. products: of tiles, by the target's own instruction."""
    usage = _tool(compiled, "cuobjdump", "--dump-resource-usage")
    code = _time_loop if case.loops else _whole
    opcodes = collections.Counter(code(_tool(compiled, "nvdisasm", "-c")))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "instructions": sum(opcodes.values()),
        "barriers": opcodes["BAR"],
        "loads": opcodes["LDG"],
        "stores": opcodes["STG"],
        "special": opcodes["MUFU"],
        "products": sum(opcodes[name] for name in _MATRIX_OPCODES.get(compiled.metadata.target.arch, ("HMMA",))),
    }


def allocations_in_loop(compiled: Any) -> list[str]:
    """The shapes of what the kernel's first loop copies into shared memory in each turn, as its TTGIR says."""
    _, loop = compiled.asm["ttgir"].split("scf.for", 1)
    return re.findall(r"ttg\.local_alloc %.*?-> !ttg\.memdesc<(\w+?)x(?:bf16|f16|f32|tf32),", loop)


def _tool(compiled: Any, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(disassembly: str) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    """(predicate, opcode without suffixes, its operands) in order, without the padding; and where each label is."""
    code, labels = [], {}
    for line in disassembly.splitlines():
        if match := re.match(r"\s*(\.L_\S+):", line):
            labels[match[1]] = len(code)
        match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(\w+)(.*?);", line)
        if match and match[2] != "NOP":
            code.append((match[1] or "", match[2], match[3]))
    return code, labels


def _whole(disassembly: str) -> list[str]:
    return [opcode for _, opcode, _ in _instructions(disassembly)[0]]


def _time_loop(disassembly: str) -> list[str]:
    """The opcodes of the longest backward branch, from its target to itself.

    A branch back over the kernel's end is none: so comes back what is rarely done and therefore stands behind it.
    """
    code, labels = _instructions(disassembly)
    turns = [
        (labels[match[1]], end)
        for end, (_, opcode, operands) in enumerate(code)
        if opcode == "BRA" and (match := re.search(r"`\((\.L_\S+)\)", operands)) and labels[match[1]] < end
    ]
    ends = [end for end, (predicate, opcode, _) in enumerate(code) if opcode == "EXIT" and not predicate]
    turns = [(start, end) for start, end in turns if not any(start < other < end for other in ends)]
    start, end = max(turns, key=lambda turn: turn[1] - turn[0])
    return [opcode for _, opcode, _ in code[start : end + 1]]
