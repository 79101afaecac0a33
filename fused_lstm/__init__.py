"""A drop-in torch.nn.LSTM on fused Triton kernels."""

from fused_lstm._backends import BACKENDS, BackendChoice, select_backend
from fused_lstm.conversion import convert
from fused_lstm.functional import lstm_cell, lstm_layer
from fused_lstm.modules import LSTM, LSTMCell
from fused_lstm.truncation import detach_state

__all__ = [
    "BACKENDS",
    "LSTM",
    "BackendChoice",
    "LSTMCell",
    "convert",
    "detach_state",
    "lstm_cell",
    "lstm_layer",
    "select_backend",
]
