"""What is said of the machine and the checkout."""

import os
import platform
import subprocess

import pytest
import torch

from fused_lstm.bench import machine


def git(folder, *arguments):
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], env=os.environ | names, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_cpu():
    facts = machine.describe_machine("cpu")
    assert facts["device"] == "cpu"
    assert facts["gpu"] is facts["driver"] is facts["gpu_memory_bytes"] is None
    assert (facts["torch"], facts["python"]) == (torch.__version__, platform.python_version())
    assert facts["triton"] == machine.triton_version()
    assert facts["cpu"]
    assert facts["cpu_cores"] == os.cpu_count()


def test_facts_are_the_callers_own():
    machine.describe_machine("cpu")["commit"] = "changed"
    assert machine.describe_machine("cpu")["commit"] != "changed"


def test_commit_and_changes(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert machine.git_commit(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("two")
    assert machine.git_commit(tmp_path) == (commit, True)
    (tmp_path / "inner").mkdir()
    assert machine.git_commit(tmp_path / "inner") == (None, None)  # another's repository says nothing of it


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.12.05  Thu Jan  1\nGCC version: 13\n", "580.12.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release\n", "550.54.15"),
        ("", None),
    ],
)
def test_the_driver_without_nvidia_smi(tmp_path, monkeypatch, text, version):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(machine, "_output", lambda *_: None)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "version")
    assert machine.driver_version() == version


def test_the_driver_from_nvidia_smi(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *_: "580.1\n580.1")
    assert machine.driver_version() == "580.1"
