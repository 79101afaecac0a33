"""A drop-in torch.nn.LSTM on fused Triton kernels."""

from fused_lstm._backends import BACKENDS, BackendChoice, select_backend
from fused_lstm.awd import AWDLSTM
from fused_lstm.cells import LSTMCell
from fused_lstm.conversion import convert
from fused_lstm.functional import lstm_cell, lstm_layer
from fused_lstm.gate_orders import load_weights, reorder_gates
from fused_lstm.kernels.devices import KNOWN_DEVICES, Device, cuda_device
from fused_lstm.kernels.persistent_configs import DoesNotFit, PersistentConfig, persistent_config
from fused_lstm.modules import LSTM
from fused_lstm.ntasgd import NTASGD
from fused_lstm.regularization import EmbeddingDropout, LockedDropout
from fused_lstm.truncation import TruncatedBPTT, detach_state

__all__ = [
    "AWDLSTM",
    "BACKENDS",
    "KNOWN_DEVICES",
    "LSTM",
    "NTASGD",
    "BackendChoice",
    "Device",
    "DoesNotFit",
    "EmbeddingDropout",
    "LSTMCell",
    "LockedDropout",
    "PersistentConfig",
    "TruncatedBPTT",
    "convert",
    "cuda_device",
    "detach_state",
    "load_weights",
    "lstm_cell",
    "lstm_layer",
    "persistent_config",
    "reorder_gates",
    "select_backend",
]
