"""The kernels whose cost is budgeted, for each target: what the backends launch on its devices."""

from collections.abc import Iterator

from fused_lstm.kernels.devices import KNOWN_DEVICES
from fused_lstm.kernels.persistent_cases import persistent_cases
from fused_lstm.kernels.resources import Case
from fused_lstm.kernels.stepwise_cases import stepwise_cases

DEVICES = {80: "a100", 90: "h100", 100: "b200", 120: "rtx5090"}


def cases(capability: int) -> Iterator[Case]:
    """Every kernel in every dtype; variants and further sizes in bfloat16."""
    yield from stepwise_cases()
    yield from persistent_cases(KNOWN_DEVICES[DEVICES[capability]])
