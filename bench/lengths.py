"""The AWD-LSTM's sequence lengths, drawn anew for each update."""

import torch
from torch import Tensor


class RandomLengths:
    """Draws how many steps the next update reads (Merity et al. 2017, section 4.1).

    Most are near the nominal length, some near its half, so that no chunk's border falls at the same place in every
    pass through a text: a normal number of mean `nominal`, or in 5 of 100 cases nominal / 2, of standard deviation 5,
    without its fraction and at least 5, as in the authors' code.

    Args:
        nominal: the length without chance
        seed: the same seed draws the same lengths, on every device; torch's own generators are left alone
    """

    def __init__(self, nominal: int, seed: int) -> None:
        self._nominal = nominal
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> int:
        halved = torch.rand((), generator=self._generator).item() >= 0.95
        mean = self._nominal / 2 if halved else self._nominal
        return max(5, int(torch.normal(float(mean), 5.0, (), generator=self._generator).item()))

    def get_state(self) -> Tensor:
        """What the next draws depend on."""
        return self._generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Takes up what `get_state` gave."""
        self._generator.set_state(state)
