"""The persistent backend: one launch a layer walks all time steps of all its directions, W_hh stays on chip.

Forward it knows every option of the cell. Backward it knows the plain cell; where a walk has options, its backward is
the stepwise one, a product and a kernel a step: both fill the same buffers from the same buffers.
"""

from typing import Any

from fused_lstm.kernels import persistent_backward, stepwise
from fused_lstm.kernels.persistent_forward import recurrence_forward

__all__ = ["recurrence_backward", "recurrence_forward"]


def recurrence_backward(walk: Any, gradients: Any) -> None:
    """Fills a `fused_lstm.recurrence.Gradients`, from a Walk that has been filled with save."""
    has_options = (
        walk.layer_norm is not None
        or walk.parameters[0].weight_ph is not None
        or any(option is not None for option in walk.conditions[0])
    )
    kernels = stepwise if has_options else persistent_backward
    kernels.recurrence_backward(walk, gradients)
