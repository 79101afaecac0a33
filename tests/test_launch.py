"""What the backends hand to the GPU's driver, launch by launch, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch_recorder import PERSISTENT_WALKS

STEPS, BATCH_SIZE, HIDDEN_SIZE, BLOCK = 3, 2, 160, 128


@pytest.fixture(scope="module")
def recorded():
    script = Path(__file__).with_name("launch_recorder.py")
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_forward_walks_the_steps_with_one_launch_each(recorded):
    launches = [launch for launch in recorded["stepwise"]["launches"] if launch["kernel"] == "cell_forward_kernel"]
    addresses = recorded["stepwise"]["addresses"]
    assert len(launches) == STEPS
    for step, launch in zip((2, 1, 0), launches, strict=True):  # reverse
        assert launch["grid"] == [BATCH_SIZE, 2, 1]  # 160 units are two blocks
        assert launch["stream"] == 1234  # the one that was current
        assert launch["arguments"] == {
            "gates_ptr": [[STEPS, BATCH_SIZE, 4 * HIDDEN_SIZE], "torch.bfloat16", addresses["gates"]],
            "c_ptr": [[STEPS + 1, BATCH_SIZE, HIDDEN_SIZE], "torch.float32", addresses["c"]],
            "h_ptr": [[STEPS, BATCH_SIZE, HIDDEN_SIZE], "torch.bfloat16", addresses["output"]],
            "step": step,
            "c_from": step + 1,
            "c_to": step,
            "h_to": step,
            "batch_size": BATCH_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "SAVE": True,
            "BLOCK": BLOCK,
        }


def test_backward_walks_back_with_one_launch_each(recorded):
    launches = [launch for launch in recorded["stepwise"]["launches"] if launch["kernel"] == "cell_backward_kernel"]
    addresses = recorded["stepwise"]["addresses"]
    assert len(launches) == STEPS
    for step, launch in zip((2, 1, 0), launches, strict=True):
        arguments = launch["arguments"]
        assert launch["grid"] == [BATCH_SIZE, 2, 1]
        assert launch["stream"] == 1234
        assert [arguments[name] for name in ("step", "c_from", "c_to")] == [step, step, step + 1]
        assert arguments["d_output_ptr"][2] == addresses["output"]  # no h_n's gradient: no copy is made
        assert arguments["d_gates_ptr"][2] == addresses["d_gates"]
        assert arguments["lengths_ptr"] == [[BATCH_SIZE], "torch.int64", addresses["lengths"]]
        assert arguments["d_c_n_ptr"][:2] == [[BATCH_SIZE, HIDDEN_SIZE], "torch.float32"]
        flags = [arguments[name] for name in ("HAS_D_OUTPUT", "HAS_LENGTHS", "HAS_PROJECTION", "BLOCK")]
        assert flags == [True, True, False, BLOCK]


def test_nothing_of_the_stepwise_backend_is_cooperative(recorded):
    assert not any(launch["cooperative"] for launch in recorded["stepwise"]["launches"])


def test_persistent_is_one_cooperative_launch_each_way(recorded):
    launches = recorded["persistent"]["launches"]
    assert [launch["kernel"] for launch in launches] == ["forward_kernel", "backward_kernel"] * len(PERSISTENT_WALKS)
    assert all(launch["cooperative"] for launch in launches)
    for launch, (steps, batch_size, reverse) in zip(launches[::2], PERSISTENT_WALKS, strict=True):
        arguments = launch["arguments"]
        assert launch["grid"] == [8, 1, len(reverse)]  # 128 units, 16 a program; 16 rows a tile
        assert [arguments[name] for name in ("steps", "batch_size")] == [steps, batch_size]
        assert arguments["backwards"] == reverse[0] + 2 * reverse[-1] * (len(reverse) > 1)
    for forward, backward in zip(launches[::2], launches[1::2], strict=True):
        assert backward["grid"] == forward["grid"]
        assert [backward["arguments"][name] for name in ("steps", "batch_size")] == [
            forward["arguments"][name] for name in ("steps", "batch_size")
        ]


def test_length_batch_and_order_compile_nothing_new(recorded):
    """One direction and both are two kernels."""
    assert recorded["persistent"]["compilations"] == [2, 2]
