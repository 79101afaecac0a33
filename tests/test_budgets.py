"""The tool that counts a kernel's cost and holds it to its budget; the budgets themselves are a step of CI."""

import json
import subprocess
import sys
from types import SimpleNamespace

from fused_lstm.kernels import budgets, resources

DISASSEMBLY = """
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @P0  LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/            @!UP1  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @P2  BRA `(.L_x_2) ;
        /*0040*/                   MUFU.EX2 R5, R4 ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
        /*0078*/                   BRA `(.L_x_1) ;
        /*0080*/                   NOP ;
"""

TTGIR = """
%0 = ttg.local_alloc %w : (tensor<64x512xbf16>) -> !ttg.memdesc<64x512xbf16, #shared, #smem>
scf.for %step = %c0 to %steps step %c1 {
  %1 = ttg.local_alloc %h : (tensor<512x16xbf16>) -> !ttg.memdesc<512x16xbf16, #shared, #smem>
}
"""

COUNT_ONE_OF_EACH = """
import json
from fused_lstm.kernels import budgets
from fused_lstm.kernels.resource_cases import cases

wanted = {case.name: case for case in cases(90)}
found = {}
for name in ("stepwise forward, bf16, block 128", "persistent forward, bf16, H 128, 16 rows"):
    numbers, wrong = budgets._measure(90, wanted[name])
    assert not wrong, wrong
    found["sm_90 " + name] = numbers
print(json.dumps(found))
"""


def test_opcodes_are_counted_without_predicates_suffixes_and_padding():
    assert resources._whole(DISASSEMBLY) == ["LDC", "LDG", "BAR", "BRA", "MUFU", "BRA", "EXIT", "BRA", "BRA"]


def test_the_time_loop_is_the_longest_backward_branch_within_the_kernel():
    assert resources._time_loop(DISASSEMBLY) == ["LDG", "BAR", "BRA", "MUFU", "BRA"]


def test_what_a_loop_copies_into_shared_memory_is_told():
    class Compiled:
        asm = {"ttgir": TTGIR}  # noqa: RUF012

    assert resources.allocations_in_loop(Compiled()) == ["512x16"]


def test_a_worse_number_a_new_kernel_and_a_lost_one_are_told():
    kept = {"a": {"registers": 10, "instructions": 5}, "lost": {"registers": 1, "instructions": 1}}
    found = {"a": {"registers": 11, "instructions": 4}, "new": {"registers": 1, "instructions": 1}}
    assert budgets.compare(found, kept) == [
        "a: registers 11, budget 10",
        "new: has no budget",
        "lost: a budget for no kernel",
    ]
    assert budgets.compare({"a": kept["a"]}, {"a": kept["a"]}) == []


def test_what_no_budget_allows_is_told(monkeypatch):
    numbers = {"spilled": 8, "shared": 166_913, "products": 0}
    monkeypatch.setattr(budgets, "compile_case", lambda *_: None)
    monkeypatch.setattr(budgets, "count", lambda *_: numbers)
    monkeypatch.setattr(budgets, "allocations_in_loop", lambda _: ["64x512", "512x16"])
    case = resources.Case("walk", None, {"ROWS": 16}, {}, 8, loops=True)
    assert budgets._measure(80, case)[1] == [
        "spills 8 bytes",
        "takes 166913 bytes of shared memory, where a block has 166912",
        "copies 64x512 into shared memory in each step",
        "multiplies without the target's matrix instruction",
    ]
    numbers.update(spilled=0, shared=166_912, products=1)
    monkeypatch.setattr(budgets, "allocations_in_loop", lambda _: ["512x16"])
    assert budgets._measure(80, case)[1] == []


def test_products_are_the_targets_own(monkeypatch):
    code = "\n".join(
        f"  /*00{i}0*/  {name} R0, R1 ;" for i, name in enumerate(("HMMA.1", "HGMMA.2", "HGMMA.3", "UTCHMMA"))
    )
    monkeypatch.setattr(resources, "_tool", lambda _compiled, tool, *_: code if tool == "nvdisasm" else "REG:8 STACK:0")
    case = resources.Case("product", None, {}, {}, 8)
    for capability, products in ((80, 1), (90, 2), (100, 1), (120, 1)):
        target = SimpleNamespace(arch=capability)
        compiled = SimpleNamespace(metadata=SimpleNamespace(shared=0, target=target))
        assert resources.count(case, compiled)["products"] == products


def test_one_kernel_of_each_family_has_its_budgeted_numbers(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-P", "-c", COUNT_ONE_OF_EACH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    kept = json.loads(budgets.BUDGETS.read_text())["kernels"]
    assert budgets.compare(found, {name: kept[name] for name in found}) == []
    # one turn of the loop multiplies 128 units' h once: 8 products of 16 each
    assert found["sm_90 persistent forward, bf16, H 128, 16 rows"]["products"] == 8


def test_interpreted_kernels_cannot_be_counted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-P", "-m", "fused_lstm.kernels.budgets"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unset TRITON_INTERPRET" in done.stderr
