"""LSTMCell: torch's module with another engine, and with the options that concern one step."""

import torch
from torch import Tensor

from fused_lstm._backends import check_backend_name
from fused_lstm._module_options import (
    add_parameters,
    options_repr,
    read_parameters,
    reset_option_parameters,
    reset_torch_parameters,
)
from fused_lstm._options import (
    CellOptions,
    check_bool,
    check_forget_bias,
    check_layer_norm,
    check_zoneout,
)
from fused_lstm._run import select_layer_backend
from fused_lstm.functional import check_two_states, lstm_cell


class LSTMCell(torch.nn.LSTMCell):
    """A `torch.nn.LSTMCell` with another engine: same arguments, parameters, results, errors and checkpoints.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell's
        layer_norm, peephole, forget_bias, zoneout: as `fused_lstm.LSTM`'s; their parameters have the same names and
            sizes, without a suffix
        backend: "auto", which also listens to the environment variable FUSED_LSTM_BACKEND, or one of
            `fused_lstm.BACKENDS`

    Inputs: input (N, I) or (I), hx: h and c, each (N, H) or (H), zeros if None

    Outputs: the next h and c, each (N, H) or (H)

    Raises:
        ValueError, RuntimeError: in the cases and words of torch.nn.LSTMCell; ValueError for an option that does not
            fit, and for a backend that cannot run the case, which says why
    """

    def __init__(
        self,
        *args,
        layer_norm: str | None = None,
        peephole: bool = False,
        forget_bias: float | None = None,
        zoneout: float | tuple[float, float] = 0.0,
        backend: str = "auto",
        **kwargs,
    ) -> None:
        check_layer_norm(layer_norm)
        check_bool("peephole", peephole)
        check_zoneout(zoneout)
        check_backend_name(backend)
        super().__init__(*args, **kwargs)
        check_forget_bias(forget_bias, self.bias, layer_norm)
        self.layer_norm = layer_norm
        self.peephole = peephole
        self.forget_bias = forget_bias
        self.zoneout = zoneout
        self.backend = backend
        add_parameters(self)
        reset_option_parameters(self)

    def reset_parameters(self) -> None:
        reset_torch_parameters(self)
        if "layer_norm" in vars(self):  # torch's constructor calls this before ours has come to its options
            reset_option_parameters(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batch_size = input.size(0) if input.dim() == 2 else 1
        options = CellOptions(self.layer_norm, self.peephole, check_zoneout(self.zoneout))
        name = select_layer_backend(self.backend, input, self.hidden_size, batch_size, options, self.training, {})
        if name == "torch":
            return super().forward(input, hx)
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        for index, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
        check_two_states(hx, "lstm_cell")
        self._check_sizes(input, hx)
        parameters = read_parameters(self, 0)
        options = {
            "layer_norm": self.layer_norm,
            "peephole": self.peephole,
            "zoneout": self.zoneout,
            "training": self.training,
            "backend": name,
            **dict(zip(parameters._fields[5:], parameters[5:], strict=True)),
        }
        if input.dim() == 2:
            return lstm_cell(input, hx, *parameters[:4], **options)
        h, c = lstm_cell(input[None], (hx[0][None], hx[1][None]), *parameters[:4], **options)
        return h[0], c[0]

    def _check_sizes(self, input: Tensor, hx: tuple[Tensor, Tensor]) -> None:
        if input.size(-1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(-1)} expected {self.input_size}")
        batch_size = input.size(0) if input.dim() == 2 else 1
        for index, state in enumerate(hx):
            batched = state if input.dim() == 2 else state[None]
            if batched.size(0) != batch_size:
                raise RuntimeError(
                    f"Input batch size {batch_size} doesn't match hidden{index} batch size {batched.size(0)}"
                )
            if batched.shape[1:] != (self.hidden_size,):
                got = batched.size(1) if batched.dim() > 1 else batched.size(0)
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {got}, expected {self.hidden_size}"
                )
