"""What importing the library brings with it, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fused_lstm
import fused_lstm.bench
import fused_lstm.kernels

# The rules that cut a grid: no kernel is in them, and no Triton.
RULES = ["fused_lstm.kernels.devices", "fused_lstm.kernels.persistent_configs"]
PACKAGE, KERNELS, BENCH = (Path(module.__path__[0]) for module in (fused_lstm, fused_lstm.kernels, fused_lstm.bench))

IMPORT_ONLY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "matplotlib", "typer", "rich"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
before = set(sys.modules)
import fused_lstm
assert not torch.cuda.is_initialized()
print(*sorted(set(sys.modules) - before))
output, _ = fused_lstm.LSTM(3, 4, backend="reference")(torch.zeros(5, 2, 3))
output.sum().backward()
output, _ = fused_lstm.LSTM(3, 4)(torch.zeros(5, 2, 3), lengths=torch.tensor([5, 2]))
assert not torch.cuda.is_initialized()
"""


def python(program: str) -> str:
    command = [sys.executable, "-P", "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_torch_alone():
    """No Triton, no CUDA, no dynamo, none of the command's libraries; and the CPU backends work without them."""
    names = python(IMPORT_ONLY).split()
    assert "fused_lstm.modules" in names
    for unwanted in ("torch._dynamo", "torch._inductor", "fused_lstm.bench"):
        assert not [name for name in names if name == unwanted or name.startswith(unwanted + ".")]
    assert [name for name in names if name.startswith("fused_lstm.kernels.")] == RULES


def test_kernels_take_triton_only_when_asked():
    program = "import sys, fused_lstm; assert 'triton' not in sys.modules; import fused_lstm.kernels.stepwise; "
    program += "assert 'triton' in sys.modules; import torch; assert not torch.cuda.is_initialized()"
    python(program)


def test_public_names():
    assert fused_lstm.__all__ == sorted(fused_lstm.__all__, key=lambda name: (not name.isupper(), name))
    public = {name for name in vars(fused_lstm) if not name.startswith("_")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {"kernels", "bench"}
    assert public - modules == set(fused_lstm.__all__)


def imported(path: Path) -> set[str]:
    """The full names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def ours(path: Path) -> set[str]:
    """Of these, what is the library's own, without its first name."""
    names = {name for name in imported(path) if name.partition(".")[0] == "fused_lstm"}
    return {name.partition(".")[2] for name in names}


def within(name: str, allowed: list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


# Each file may import from those above its own line; the first line, from nobody.
ORDER = [
    {"_compile", "_precision", "_ragged", "gate_orders", "ntasgd", "reference", "regularization", "truncation"},
    {"_options", "recurrence"},
    {"_backends", "_module_options", "_products", "reference_recurrence"},
    {"_ops"},
    {"_autograd"},
    {"_run"},
    {"functional"},
    {"cells", "modules"},
    {"awd", "conversion"},
    {"__init__"},
]
# Kernels are imported where they run, not before, and only here.
KERNEL_USERS = {"_backends", "_ops"}


def test_every_file_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*ORDER)


@pytest.mark.parametrize("name", sorted(set().union(*ORDER)))
def test_direction_in_the_library(name):
    level = next(index for index, names in enumerate(ORDER) if name in names)
    allowed = [other for names in ORDER[:level] for other in names]
    if name in KERNEL_USERS:
        allowed.append("kernels")
    if name == "__init__":
        allowed += [rule.removeprefix("fused_lstm.") for rule in RULES]
    assert [found for found in ours(PACKAGE / f"{name}.py") if not within(found, allowed)] == []


@pytest.mark.parametrize("name", sorted(KERNEL_USERS))
def test_kernels_are_imported_inside_functions(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    at_the_top = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in at_the_top if within(name, ["fused_lstm.kernels"])]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_kernels(path):
    """Of ours; and of others' torch, triton and what Python brings."""
    assert [name for name in ours(path) if not within(name, ["kernels"])] == []
    others = {name.partition(".")[0] for name in imported(path)} - {"fused_lstm", "torch", "triton"}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", RULES)
def test_rules_are_free_of_triton(name):
    names = imported(KERNELS / f"{name.rpartition('.')[2]}.py")
    assert "triton" not in {found.partition(".")[0] for found in names}
    assert [found for found in names if within(found, ["fused_lstm"]) and not within(found, RULES)] == []


def test_activations_and_configurations_come_first():
    assert ours(KERNELS / "configs.py") == set()
    assert ours(KERNELS / "activations.py") <= {"kernels.interpretation.INTERPRETED"}


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.name)
def test_bench_uses_the_public_interface(path):
    public = set(fused_lstm.__all__)
    for name in imported(path):
        if name.partition(".")[0] == "fused_lstm":
            rest = name.partition(".")[2]
            assert rest == "" or rest in public or within(rest, ["bench"])


def test_reference_is_torch_alone():
    assert {name.partition(".")[0] for name in imported(PACKAGE / "reference.py")} == {"torch", "typing"}
