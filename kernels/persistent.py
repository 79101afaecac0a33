"""The persistent backend: one launch a layer walks all time steps of all its directions, W_hh stays on chip.

The way back through layer norms takes twice the registers of all others, so that some grids serve the way forward
only. There it is the stepwise one, a product and a kernel a step: it fills the same buffers from the same buffers.
"""

from typing import Any

from fused_lstm.kernels import persistent_backward, persistent_launch, stepwise
from fused_lstm.kernels.persistent_forward import recurrence_forward
from fused_lstm.kernels.persistent_options import backward_burden

__all__ = ["recurrence_backward", "recurrence_forward"]


def recurrence_backward(walk: Any, gradients: Any) -> None:
    """Fills a `fused_lstm.recurrence.Gradients`, from a Walk that has been filled with save."""
    gates, burden, kernels = walk.gates, backward_burden(walk), persistent_backward
    if burden == "norms":  # else the grid is the forward's
        hidden_size = gates.size(3) // 4
        if persistent_launch.obstacle(gates.device, gates.dtype, hidden_size, gates.size(2), burden):
            kernels = stepwise
    kernels.recurrence_backward(walk, gradients)
