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
    for step, after, launch in zip((2, 1, 0), (1, 0, 0), launches, strict=True):  # reverse
        assert launch["grid"] == [BATCH_SIZE, 2, 1]  # 160 units are two blocks
        assert launch["stream"] == 1234  # the one that was current
        arguments = {name: argument for name, argument in launch["arguments"].items() if argument is not None}
        assert arguments == {
            "gates_ptr": addresses["gates"],
            "c_ptr": addresses["c"],
            "h_ptr": addresses["output"],
            "step": step,
            "c_from": step + 1,
            "c_to": step,
            "h_to": step,
            "batch_size": BATCH_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "step_after": after,
            "h_step_stride": BATCH_SIZE * HIDDEN_SIZE,
            "h_row_stride": HIDDEN_SIZE,
            "SAVE": True,
            "H_APART": 0,
            "BLOCK": BLOCK,
        }


def test_backward_walks_back_with_one_launch_each(recorded):
    launches = [launch for launch in recorded["stepwise"]["launches"] if launch["kernel"] == "cell_backward_kernel"]
    addresses = recorded["stepwise"]["addresses"]
    assert len(launches) == STEPS
    for step, after, launch in zip((2, 1, 0), (2, 2, 1), launches, strict=True):
        arguments = launch["arguments"]
        assert launch["grid"] == [BATCH_SIZE, 2, 1]
        assert launch["stream"] == 1234
        names = ("step", "c_from", "c_to", "step_after")
        assert [arguments[name] for name in names] == [step, step, step + 1, after]
        for name in ("gates", "c", "d_output", "d_c_all", "d_gates", "d_c"):
            assert arguments[f"{name}_ptr"] == addresses[name]  # nothing is copied
        absent = {name for name, argument in arguments.items() if name.endswith("_ptr") and argument is None}
        assert absent == {
            *("hidden_ptr", "product_ptr", "d_product_ptr", "d_h_old_ptr", "reset_ptr", "reset_c_ptr"),
            *("d_reset_h_ptr", "d_reset_c_ptr", "recurrent_mask_ptr", "zoneout_h_ptr", "zoneout_c_ptr"),
            *("parameters_ptr", "d_parameters_ptr"),
        }
        flags = [arguments[name] for name in ("LAYER_NORM", "PEEPHOLE", "SLOTS", "D_OUTPUT_APART", "BLOCK")]
        assert flags == [None, None, 0, 0, BLOCK]


def test_length_batch_and_rate_compile_nothing_new_of_the_stepwise_backend(recorded):
    """Forward, after its projection, backward, before its projection: one kernel each, for both directions."""
    without_projection, with_projection = recorded["stepwise"]["compilations"]
    assert without_projection == [1, 0, 1, 0]
    assert with_projection == [1, 1, 1, 1]


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
