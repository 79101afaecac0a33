"""A Triton driver without a GPU: kernels are compiled for sm_90 for real, and every launch is recorded, not run.

Run as a script it prints, as JSON, what the stepwise backend launches for one small layer, and how many kernels it
compiles for several lengths, batches and rates; and what the persistent one launches for several lengths and batches on
an H100. Each launch is the kernel's name, its grid, its stream, whether it is cooperative, and its arguments by name: a
tensor as [shape, dtype, address], or as its address where that is how it was given.
"""

import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import walks

STREAM = 1234
# with resets, whose masks lie unaligned; and where a projection's own kernels are needed
STEPWISE_VARIANTS = [
    walks.Variant("gates", True, "rates", True, True, False, True),
    walks.Variant(None, False, "masks", False, True, True),
]
# (steps, rows, does a direction walk backwards?): ragged tiles all
PERSISTENT_WALKS = [
    (1, 1, (False,)),
    (2, 3, (True,)),
    (16, 15, (False,)),
    (17, 1, (True,)),
    (1, 1, (False, True)),
    (16, 3, (True, False)),
]


class Recorder:
    """Stands in for the launcher that Triton compiles for a kernel."""

    launches: list = []  # noqa: RUF012

    def __init__(self, src, metadata):
        self.kernel = src.fn
        self.cooperative = metadata.launch_cooperative_grid

    def __call__(self, *args):
        *grid, stream, _function, _packed, _metadata, _enter, _exit = args[:9]
        arguments = {
            name: [list(arg.shape), str(arg.dtype), arg.data_ptr()] if isinstance(arg, torch.Tensor) else arg
            for name, arg in zip(self.kernel.arg_names, args[9:], strict=True)
        }
        launch = {"kernel": self.kernel.__name__, "grid": grid, "stream": stream, "arguments": arguments}
        self.launches.append({**launch, "cooperative": self.cooperative})


class _Utils:
    def load_binary(self, *_):
        return object(), object(), 0, 0, 1024

    def get_device_properties(self, _device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class _Driver:
    launcher_cls = Recorder
    utils = _Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class _Stream:
    cuda_stream = STREAM


def record_stepwise() -> dict:
    from fused_lstm.kernels import stepwise
    from fused_lstm.kernels.stepwise_backward import cell_backward_kernel, projected_backward_kernel
    from fused_lstm.kernels.stepwise_forward import cell_forward_kernel, projected_forward_kernel

    inputs = walks.make_inputs(3, 2, 160, walks.Variant(d_c_all=True), reverse=(True,), dtype=torch.bfloat16)
    walk = walks.walk_of(inputs)
    stepwise.recurrence_forward(walk)
    gradients = walks.gradients_of(walk, inputs)
    stepwise.recurrence_backward(walk._replace(reverse=(False,)), gradients)
    launches = Recorder.launches.copy()
    addresses = {name: getattr(walk, name).data_ptr() for name in ("gates", "c", "output")}
    addresses |= {name: getattr(gradients, name).data_ptr() for name in ("d_output", "d_c_all", "d_gates", "d_c")}

    kernels = (cell_forward_kernel, projected_forward_kernel, cell_backward_kernel, projected_backward_kernel)
    compilations = []
    for variant in STEPWISE_VARIANTS:
        before = [_compilations(kernel) for kernel in kernels]
        for steps, batch_size, rate in ((1, 1, 0.0), (2, 3, 1.0), (16, 16, 0.5), (17, 1, 0.25)):
            options = {"dtype": torch.bfloat16, "output_size": 48}
            inputs = walks.make_inputs(steps, batch_size, 64, variant, **options, reverse=(False, True))
            rates = {name: rate for name in ("zoneout_h", "zoneout_c") if variant.zoneout == "rates"}
            inputs = inputs._replace(conditions=tuple(c._replace(**rates) for c in inputs.conditions))
            walks.run(stepwise, inputs)
        compilations.append([_compilations(kernel) - count for kernel, count in zip(kernels, before, strict=True)])
    return {"launches": launches, "addresses": addresses, "compilations": compilations}


def _compilations(kernel) -> int:
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def record_persistent() -> dict:
    from fused_lstm.kernels import persistent, persistent_launch
    from fused_lstm.kernels.devices import KNOWN_DEVICES
    from fused_lstm.kernels.persistent_backward import backward_kernel
    from fused_lstm.kernels.persistent_forward import forward_kernel
    from fused_lstm.recurrence import new_gradients, new_walk
    from fused_lstm.reference import NOTHING, Parameters

    persistent_launch.cuda_device = lambda _index: KNOWN_DEVICES["h100"]
    torch.cuda.current_device = lambda: 0
    Recorder.launches.clear()
    hidden_size = 128
    half = {"dtype": torch.bfloat16}
    weight_hh = torch.zeros(4 * hidden_size, hidden_size, **half)
    parameters = Parameters(weight_hh, weight_hh)
    for steps, batch_size, reverse in PERSISTENT_WALKS:
        directions = len(reverse)
        gates = torch.zeros(directions, steps, batch_size, 4 * hidden_size, **half)
        output = torch.zeros(steps, batch_size, directions, hidden_size, **half)
        state = torch.zeros(directions, batch_size, hidden_size, **half)
        of_each = (parameters,) * directions, (NOTHING,) * directions
        walk = new_walk(gates, output, state, state, *of_each, None, reverse, True)
        persistent.recurrence_forward(walk)
        persistent.recurrence_backward(walk, new_gradients(walk, output, None, None, state, False))
    compilations = [_compilations(kernel) for kernel in (forward_kernel, backward_kernel)]
    return {"launches": Recorder.launches.copy(), "compilations": compilations}


def main() -> None:
    driver.set_active(_Driver())
    torch.cuda.current_stream = lambda _device=None: _Stream()
    print(json.dumps({"stepwise": record_stepwise(), "persistent": record_persistent()}))


if __name__ == "__main__":
    main()
