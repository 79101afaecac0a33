"""Mean and deviation of every row at once."""

import pytest
import torch
from tolerance import assert_as_accurate

from fused_lstm.kernels.row_statistics import row_statistics

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(2, 30, 4), (1, 2, 30, 68), (65, 400), (20, 2048)], ids=str)
def test_equals_torch(shape, shift, dtype, device):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + shift).to(device, dtype)
    mean, scale = row_statistics(x)

    def of(x):
        variance, mean = torch.var_mean(x, -1, correction=0)
        return mean, (variance + 1e-5).rsqrt()

    for actual, same_dtype, exact in zip((mean, scale), of(x.float()), of(x.double()), strict=True):
        assert_as_accurate(actual, same_dtype, exact)


def test_no_rows(device):
    mean, scale = row_statistics(torch.empty(3, 0, 8, device=device))
    assert mean.shape == scale.shape == (3, 0)
