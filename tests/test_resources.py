"""The kernels' cost as compiled, and the tool that counts it."""

import subprocess
import sys

from fused_lstm.kernels import resources

DISASSEMBLY = """
.L_x_0:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P0  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/            @!UP1  BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/                   EXIT ;
        /*0050*/                   NOP ;
"""


def test_kernels_keep_their_budgets(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-P", "-m", "fused_lstm.kernels.resources"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith(" kernels compiled, 0 over budget\n")
    assert {line[:5] for line in done.stdout.splitlines()} >= {"sm_80", "sm_90", "sm_10", "sm_12"}


def test_opcodes_are_counted_without_predicates_suffixes_and_padding():
    assert list(resources._opcodes(DISASSEMBLY)) == ["LDC", "LDG", "BAR", "MUFU", "EXIT"]


def test_a_worse_number_a_new_kernel_and_a_lost_one_are_told():
    budgets = {"a": {"registers": 10, "instructions": 5}, "lost": {"registers": 1, "instructions": 1}}
    found = {"a": {"registers": 11, "instructions": 4}, "new": {"registers": 1, "instructions": 1}}
    assert resources.compare(found, budgets) == [
        "a: registers 11, budget 10",
        "new: has no budget",
        "lost: a budget for no kernel",
    ]
    assert resources.compare({"a": budgets["a"]}, {"a": budgets["a"]}) == []
