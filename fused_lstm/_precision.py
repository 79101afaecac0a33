"""Whether float32 products may use TF32, for the whole of an LSTM alike.

torch's LSTM asks cuDNN's switch (`torch.backends.cudnn.rnn.fp32_precision`, `torch.backends.cudnn.allow_tf32`), which
is on by default; a plain matrix product asks `torch.backends.cuda.matmul`, which is off. A drop-in LSTM asks the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def _has_fp32_precision() -> bool:
    return hasattr(torch._C, "_get_fp32_precision_getter")  # torch 2.9; reading the older flags can raise since then


def tf32_allowed() -> bool:
    """May an LSTM's float32 products use TF32, as torch's own would?"""
    if _has_fp32_precision():
        return torch.backends.cudnn.rnn.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


@contextmanager
def lstm_matmul_precision(tensor: torch.Tensor) -> Iterator[None]:
    """Inside, float32 products on tensor's device follow the LSTM's switch.

    The switch of products is the process's, not the thread's: a product in another thread may see it meanwhile.
    """
    if tensor.device.type != "cuda" or tensor.dtype != torch.float32:
        yield
        return
    matmul = torch.backends.cuda.matmul
    if _has_fp32_precision():
        name, wanted = "fp32_precision", "tf32" if tf32_allowed() else "ieee"
    else:
        name, wanted = "allow_tf32", tf32_allowed()
    found = getattr(matmul, name)
    same = (found == "tf32") == (wanted == "tf32") if name == "fp32_precision" else found == wanted
    if same:
        yield
        return
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, found)
