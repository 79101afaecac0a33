"""Whether float32 products use TF32: an LSTM asks torch's switch for LSTMs, and leaves the one for products as it was.

The switches are flags of the process, there without a GPU too; only a tensor that says it is on one must be made up.
"""

from types import SimpleNamespace

import pytest
import torch

from fused_lstm import _ops, _precision, convert
from fused_lstm._precision import lstm_matmul_precision, tf32_allowed

BACKENDS = torch.backends
ON_CUDA = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


@pytest.fixture(autouse=True)
def default_switches():
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.mkldnn.matmul.fp32_precision = BACKENDS.cuda.matmul.fp32_precision = "none"
    BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = True


@pytest.fixture
def old_torch(monkeypatch):
    """As in torch 2.8 and before, which has the older pair of switches alone."""
    monkeypatch.setattr(_precision, "_has_fp32_precision", lambda: False)


def test_lstms_may_by_default():
    assert tf32_allowed()
    assert not BACKENDS.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_asks_the_switch_for_lstms(allowed):
    BACKENDS.cuda.matmul.fp32_precision = "ieee" if allowed else "tf32"
    BACKENDS.cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"
    assert tf32_allowed() is allowed
    BACKENDS.cudnn.allow_tf32 = not allowed
    assert tf32_allowed() is not allowed


@pytest.mark.parametrize("of_lstms", ["tf32", "ieee"])
@pytest.mark.parametrize("of_products", ["none", "tf32", "ieee"])
def test_products_follow_inside_and_are_restored(of_products, of_lstms):
    BACKENDS.cudnn.rnn.fp32_precision, BACKENDS.cuda.matmul.fp32_precision = of_lstms, of_products
    with lstm_matmul_precision(ON_CUDA):
        assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") == (of_lstms == "tf32")
    assert BACKENDS.cuda.matmul.fp32_precision == of_products
    assert BACKENDS.cudnn.rnn.fp32_precision == of_lstms


@pytest.mark.parametrize("of_lstms", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_older_switches_stay_readable(precision, of_lstms):
    """torch raises where the older and newer switches disagree; they do not, afterwards."""
    torch.set_float32_matmul_precision(precision)
    BACKENDS.cudnn.allow_tf32 = of_lstms
    with lstm_matmul_precision(ON_CUDA):
        assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") is of_lstms
    assert torch.get_float32_matmul_precision() == precision
    assert BACKENDS.cuda.matmul.allow_tf32 is (precision != "highest")
    assert BACKENDS.cudnn.allow_tf32 is of_lstms


@pytest.mark.usefixtures("old_torch")
@pytest.mark.parametrize("of_lstms", [True, False])
@pytest.mark.parametrize("of_products", [True, False])
def test_older_torch(of_products, of_lstms):
    BACKENDS.cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32 = of_lstms, of_products
    assert tf32_allowed() is of_lstms
    with lstm_matmul_precision(ON_CUDA):
        assert BACKENDS.cuda.matmul.allow_tf32 is of_lstms
    assert BACKENDS.cuda.matmul.allow_tf32 is of_products


def test_restored_after_an_exception():
    BACKENDS.cuda.matmul.fp32_precision = "ieee"

    def fail():
        with lstm_matmul_precision(ON_CUDA):
            assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert BACKENDS.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cuda", torch.bfloat16), ("cuda", torch.float16), ("cuda", torch.float64), ("cpu", torch.float32)],
)
def test_only_float32_on_cuda(device, dtype):
    """Where TF32 means nothing, nothing is touched."""
    BACKENDS.cuda.matmul.fp32_precision = "ieee"
    with lstm_matmul_precision(SimpleNamespace(device=torch.device(device), dtype=dtype)):
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"


def test_operators_run_under_it(monkeypatch, device):
    """Both of them, for the tensors that they got."""
    seen = []
    inside = _ops.lstm_matmul_precision
    monkeypatch.setattr(_ops, "lstm_matmul_precision", lambda tensor: (seen.append(tensor.shape), inside(tensor))[1])
    module = torch.nn.LSTM(3, 4, device=device)
    convert(module, backend="reference")(torch.zeros(5, 2, 3, device=device))[0].sum().backward()
    assert len(seen) == 2
    assert seen[0] == (5, 2, 3)
