"""The option --device."""

import torch

from fused_lstm.bench.errors import UserError


def find_device(name: str) -> torch.device:
    """The device that a name means; "auto" is CUDA if there, else the CPU.

    Raises:
        UserError: there is no such device here
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device", "give cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported", "give cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}, but torch sees {torch.cuda.device_count()} CUDA devices",
            "leave --device out to use what is there",
        )
    return device
