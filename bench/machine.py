"""Where and on what a number was measured."""

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent


def describe_machine(device: torch.device | str) -> dict:
    """The hardware and the versions that a measurement depends on, JSON-ready; null where there is none.

    Args:
        device: the one that is measured; `gpu`, `driver` and what else concerns a GPU are null for a CPU
    """
    return {**_facts(str(device))}


@functools.cache  # asking the driver and git takes a second or so, and nothing of it changes
def _facts(device: str) -> dict:
    commit, dirty = git_commit(_ROOT)
    return {
        "device": device,
        **_describe_gpu(torch.device(device)),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
    }


def now() -> str:
    """The date and time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def driver_version() -> str | None:
    """The NVIDIA driver's version."""
    version = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if version:
        return version.splitlines()[0].strip()
    try:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1.2  ..."
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[0].isdigit() and "." in word), None)


def git_commit(root: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out at root, and whether files differ from it; (None, None) outside a checkout."""
    if not (root / ".git").exists():  # else git would answer for another repository that root happens to lie in
        return None, None
    # the checkout may have been copied by another user, whom git would distrust
    git = "git", "-c", "safe.directory=*", "-C", str(root)
    commit = _output(*git, "rev-parse", "HEAD")
    status = _output(*git, "status", "--porcelain")
    return commit or None, None if status is None else bool(status)


def _describe_gpu(device: torch.device) -> dict:
    if device.type != "cuda":
        return dict.fromkeys(("gpu", "gpu_memory_bytes", "multiprocessors", "compute_capability", "driver"))
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or platform.machine() or None


def _output(*command: str) -> str | None:
    """What command prints, or None where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
