"""A drop-in torch.nn.LSTM on fused Triton kernels."""

from fused_lstm._backends import BACKENDS, BackendChoice, select_backend
from fused_lstm.cells import LSTMCell
from fused_lstm.conversion import convert
from fused_lstm.functional import lstm_cell, lstm_layer
from fused_lstm.kernels.devices import KNOWN_DEVICES, Device, cuda_device
from fused_lstm.kernels.persistent_configs import DoesNotFit, PersistentConfig, persistent_config
from fused_lstm.modules import LSTM
from fused_lstm.truncation import detach_state

__all__ = [
    "BACKENDS",
    "KNOWN_DEVICES",
    "LSTM",
    "BackendChoice",
    "Device",
    "DoesNotFit",
    "LSTMCell",
    "PersistentConfig",
    "convert",
    "cuda_device",
    "detach_state",
    "lstm_cell",
    "lstm_layer",
    "persistent_config",
    "select_backend",
]
