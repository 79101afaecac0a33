"""The persistent backend: one launch a layer and direction walks all time steps, W_hh stays on chip."""

from fused_lstm.kernels.persistent_backward import recurrence_backward
from fused_lstm.kernels.persistent_forward import recurrence_forward

__all__ = ["recurrence_backward", "recurrence_forward"]
