"""What every test runs under: the kernels interpreted where there is no CUDA device, and a fixed environment."""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a worker for each core already; its processes keep to it too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def _interpret_kernels() -> None:
    """Let Triton's kernels run in Python, in this process alone: a test's subprocess sets its own environment.

    Triton reads TRITON_INTERPRET when a kernel is decorated, its own library's functions included, and its knob while
    a kernel runs.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    import fused_lstm.kernels.stepwise  # noqa: F401

    propagated, triton.knobs.propagate_env = triton.knobs.propagate_env, False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = propagated
    del os.environ["TRITON_INTERPRET"]
    _round_bfloat16_to_nearest()


def _round_bfloat16_to_nearest() -> None:
    """Triton's interpreter truncates float32 to bfloat16, one ulp low; the hardware rounds to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def convert_float(input, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return truncating(input, input_dtype, output_dtype, rounding_mode)
        rounded = torch.tensor(input, dtype=torch.float32).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert_float


if HAS_CUDA:
    # deterministic algorithms (poisoned_memory turns them on) ask for it, before cuBLAS is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    _interpret_kernels()
os.environ.pop("FUSED_LSTM_BACKEND", None)
torch.set_num_threads(1)  # the tensors are small: threads would only wait for each other


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = "interpreter" if HAS_CUDA else "gpu"
    deselected = [item for item in items if item.get_closest_marker(elsewhere)]
    items[:] = [item for item in items if not item.get_closest_marker(elsewhere)]
    config.hook.pytest_deselected(items=deselected)


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture
def poisoned_memory():
    """What torch.empty and its relatives return is full of NaN: whatever is left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
