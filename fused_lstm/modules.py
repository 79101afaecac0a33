"""LSTM: torch's module with another engine, and with the options that torch's does not have."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_lstm._backends import check_backend_name
from fused_lstm._compile import let_dynamo_trace
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
    check_rate,
    check_zoneout,
)
from fused_lstm._ragged import Packing, Ragged, check_lengths
from fused_lstm._run import Resets, is_autocast_enabled, run_layer, select_layer_backend
from fused_lstm.functional import check_resets, check_two_states
from fused_lstm.reference import Parameters


class LSTM(torch.nn.LSTM):
    """A `torch.nn.LSTM` that trains faster: same arguments, parameters, results, errors and checkpoints.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as torch.nn.LSTM's
        layer_norm: None, or where norms over the H units stand (eps 1e-5, statistics in float32 or better):
            "gates": one for each gate, on the sum of both products and the biases, and one on c' on its way to h, while
                the raw c' goes on to the next step (labml_nn's LSTMCell);
            "projections": one over 4H on W_ih x and one on W_hh h, each with a weight and no bias, before the biases,
                and one on c' on its way to h (Haste's LayerNormLSTM);
            "projections_cell": the same, each with weight and bias, and the normalised c' is the one that goes on
                (torch's fastrnns, NeMo)
        peephole: i and f also see c, and o the new c', each through a weight a unit (TensorFlow Addons, ONNX)
        forget_bias: where the forget gate's bias starts (Keras: 1.0); None: as torch's. Initialisation only.
        zoneout: the probability that an element of h keeps its old value in a step, or two, for h and for c; in
            evaluation old and new are mixed by it. In training it takes T * N bytes for each element of h and of c that
            has one (Krueger et al. 2017)
        recurrent_dropout: the probability that an element of the h that enters W_hh is zero, drawn once a sequence,
            layer
            and direction: N elements for each of h (Gal & Ghahramani 2016)
        weight_dropout: the probability that an element of W_hh is zero, drawn once a forward: one more W_hh (AWD-LSTM)
        locked_dropout: `dropout` between layers draws one mask a sequence: N elements for each of h (AWD-LSTM)
        recompute: keep h and c only for the backward (and of norms the moments of each row), which computes the gates
            again, for all steps in one product: 6 bytes per step, row and unit in a 2-byte dtype instead of 14
        backend: "auto", which also listens to the environment variable FUSED_LSTM_BACKEND, or one of
            `fused_lstm.BACKENDS`

    Inputs: input, hx, reset, reset_state, lengths
        * **input**: (T, N, I), (N, T, I) with batch_first, (T, I) unbatched, or a PackedSequence
        * **hx**: h_0 (num_layers * D, N, P) and c_0 (num_layers * D, N, H), or (num_layers * D, ·) unbatched; zeros
          if None; D is 2 if bidirectional, else 1; P is proj_size, or H without
        * **reset**: (T, N), (N, T) with batch_first, (T,) unbatched, any dtype: where it is not zero, the state that
          enters the step, in every layer, is zero, or reset_state; no gradient goes across. Not with bidirectional, nor
          with a PackedSequence
        * **reset_state**: shaped as hx
        * **lengths**: (N,) int32 or int64, 1 <= length <= T: the steps of each row of a padded input. Computed as if
          packed, without sorting; nothing that lies in the padding has an effect

    Outputs: output, (h_n, c_n)
        * **output**: (T, N, D * P) in input's layout, zero past each length
        * **h_n**, **c_n**: shaped as hx, each row's after its last step

    Parameters beside torch's, for each layer k and direction (suffix ``_l{k}``, ``_l{k}_reverse``):
        * **norm_gates_weight**, **norm_gates_bias** (4H), order i | f | g | o, under "gates"
        * **norm_ih_weight**, **norm_hh_weight** (4H) under "projections" and "projections_cell"; **norm_ih_bias**,
          **norm_hh_bias** (4H) under "projections_cell"
        * **norm_cell_weight**, **norm_cell_bias** (H) under each of the three
        * **weight_ph** (3H), order i | f | o, with peephole

    Raises:
        ValueError, RuntimeError: in the cases and words of torch.nn.LSTM; ValueError for an option, lengths, reset or
            reset_state that does not fit, and for a backend that cannot run the case, which says why
    """

    def __init__(
        self,
        *args,
        layer_norm: str | None = None,
        peephole: bool = False,
        forget_bias: float | None = None,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        locked_dropout: bool = False,
        recompute: bool = False,
        backend: str = "auto",
        **kwargs,
    ) -> None:
        check_layer_norm(layer_norm)
        check_bool("peephole", peephole)
        check_zoneout(zoneout)
        check_rate("recurrent_dropout", recurrent_dropout)
        check_rate("weight_dropout", weight_dropout)
        check_bool("locked_dropout", locked_dropout)
        check_bool("recompute", recompute)
        check_backend_name(backend)
        let_dynamo_trace(LSTM)
        super().__init__(*args, **kwargs)
        check_forget_bias(forget_bias, self.bias, layer_norm)
        self.layer_norm = layer_norm
        self.peephole = peephole
        self.forget_bias = forget_bias
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        self.locked_dropout = locked_dropout
        self.recompute = recompute
        self.backend = backend
        add_parameters(self)
        reset_option_parameters(self)

    def reset_parameters(self) -> None:
        reset_torch_parameters(self)
        if "layer_norm" in vars(self):  # torch's constructor calls this before ours has come to its options
            reset_option_parameters(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        let_dynamo_trace(LSTM)

    @property
    def _directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        reset: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        name = self._select_backend(input, reset, reset_state, lengths, states=False)
        if name == "torch":
            return super().forward(input, hx)
        output, h_n, c_n, _ = self._run(input, hx, reset, reset_state, lengths, name, states=False)
        return output, (h_n, c_n)

    def states(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        reset: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The states after every step of every layer, by input position in both directions; arguments as `forward`'s.

        Returns:
            h (num_layers * D, T, N, P) and c (num_layers * D, T, N, H); (num_layers * D, N, T, ·) with batch_first,
            (num_layers * D, T, ·) unbatched; for a PackedSequence the padded layout, in the caller's order of rows.
            Zero past each end; after zoneout and before dropout. Under the same seed the draws are forward's.
        """
        name = self._select_backend(input, reset, reset_state, lengths, states=True)
        _, _, _, layers = self._run(input, hx, reset, reset_state, lengths, name, states=True)
        h, c = (torch.cat(each) for each in zip(*layers, strict=True))
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                h, c = (state.index_select(2, input.unsorted_indices) for state in (h, c))
        elif input.dim() == 2:
            return h[:, :, 0], c[:, :, 0]
        return (h.transpose(1, 2), c.transpose(1, 2)) if self.batch_first else (h, c)

    def _options(self) -> CellOptions:
        """Read at each forward, as torch reads `dropout`: rates may be set on the module."""
        return CellOptions(
            self.layer_norm,
            self.peephole,
            check_zoneout(self.zoneout),
            check_rate("recurrent_dropout", self.recurrent_dropout),
            check_rate("weight_dropout", self.weight_dropout),
        )

    def _select_backend(self, input, reset, reset_state, lengths, states: bool) -> str:
        """The backend's name for a call, whose arguments are checked as far as no backend does it."""
        packed = isinstance(input, PackedSequence)
        data = input.data if packed else input
        if not packed and data.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {data.dim()}D instead")
        batch_size = self._batch_size(input)
        self._check_lengths(input, lengths, batch_size)
        self._check_resets(input, reset, reset_state, batch_size)
        if not data.dtype.is_floating_point:  # no backend takes it: torch says so in terms of the weights
            self._check_input(data, data.dim(), read_parameters(self, 0).weight_ih)
        between_layers = self.training and self.dropout > 0 and self.num_layers > 1
        return select_layer_backend(
            self.backend,
            data,
            self.hidden_size,
            batch_size,
            self._options(),
            self.training,
            {
                "locked_dropout": self.locked_dropout and between_layers,
                "reset": reset is not None,
                "states": states,
            },
            projection=self.proj_size > 0,
            lengths=lengths is not None,
            recompute=self.recompute,
        )

    def _batch_size(self, input: Tensor | PackedSequence) -> int:
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0])
        return 1 if input.dim() == 2 else input.size(0 if self.batch_first else 1)

    def _check_lengths(self, input: Tensor | PackedSequence, lengths: Tensor | None, batch_size: int) -> None:
        if lengths is None:
            return
        if isinstance(input, PackedSequence):
            raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
        if input.dim() == 2:
            raise ValueError("lengths needs a batched input, got a 2D one")
        check_lengths(lengths, batch_size, input.size(1 if self.batch_first else 0))

    def _check_resets(self, input, reset, reset_state, batch_size: int) -> None:
        if reset is not None and self.bidirectional:
            raise ValueError("reset cannot be given to a bidirectional LSTM: its other direction comes from the future")
        if reset is not None and isinstance(input, PackedSequence):
            raise ValueError("reset cannot be given with a PackedSequence; pad the input and give lengths")
        if reset is None and reset_state is None:
            return
        batched = isinstance(input, PackedSequence) or input.dim() == 3
        count = self.num_layers * self._directions
        state = (count, batch_size) if batched else (count,)
        size = () if reset is None else tuple(input.shape[: 2 if batched else 1])
        check_resets(reset, reset_state, size, (*state, self.proj_size or self.hidden_size), (*state, self.hidden_size))

    def _check_input(self, input: Tensor, dim: int, weight: Tensor) -> None:
        if input.dtype != weight.dtype and not is_autocast_enabled(input.device):
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        if input.dim() != dim:
            raise RuntimeError(f"input must have {dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )
        if input.device != weight.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{input.device} and parameter tensor at {weight.device}"
            )

    def _state(self, hx: tuple[Tensor, Tensor] | None, input: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """h_0 and c_0, checked, or zeros."""
        count = self.num_layers * self._directions
        h_size = (count, batch_size, self.proj_size or self.hidden_size)
        c_size = (count, batch_size, self.hidden_size)
        if hx is None:
            return input.new_zeros(h_size), input.new_zeros(c_size)
        h0, c0 = hx[0], hx[1]
        self.check_hidden_size(h0, h_size, "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(c0, c_size, "Expected hidden[1] size {}, got {}")
        if not is_autocast_enabled(input.device):
            for state in (h0, c0):
                if state.device != input.device:
                    raise RuntimeError(
                        "Input and hidden tensors are not at the same device, found input tensor at "
                        f"{input.device} and hidden tensor at {state.device}"
                    )
                if state.dtype != input.dtype:
                    raise RuntimeError(
                        "Input and hidden tensors are not the same dtype, found input tensor with "
                        f"{input.dtype} and hidden tensor with {state.dtype}"
                    )
        return h0, c0

    def _run(self, input, hx, reset, reset_state, lengths, backend: str, states: bool):
        """output, h_n and c_n as forward returns them; and each layer's h and c of all steps, if states."""
        if hx is not None:
            check_two_states(hx, "lstm")
        parameters = [read_parameters(self, index) for index in range(self.num_layers * self._directions)]
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, parameters, backend, states)
        return self._run_padded(input, hx, reset, reset_state, lengths, parameters, backend, states)

    def _run_padded(self, input, hx, reset, reset_state, lengths, parameters, backend, states):
        batched = input.dim() == 3
        if hx is not None and any(state.dim() != input.dim() for state in hx):
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should "
                f"also be {input.dim()}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        if not batched:
            input = input[:, None]
            hx, reset_state = (None if s is None else (s[0][:, None], s[1][:, None]) for s in (hx, reset_state))
            reset = None if reset is None else reset[:, None]
        elif self.batch_first:
            input = input.transpose(0, 1)
            reset = None if reset is None else reset.transpose(0, 1)
        self._check_input(input, 3, parameters[0].weight_ih)
        h0, c0 = self._state(hx, input, input.size(1))
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        ragged = None
        if lengths is not None:
            ragged = Ragged.from_lengths(lengths, input.size(0), input.device)
            input = ragged.clear(input)
        resets = None
        if reset is not None:
            resets = Resets((reset != 0).contiguous(), *((None, None) if reset_state is None else reset_state))
        output, h_n, c_n, layers = self._run_layers(input, h0, c0, parameters, resets, ragged, None, backend, states)
        if not batched:
            return output[:, 0], h_n[:, 0], c_n[:, 0], layers
        return output.transpose(0, 1) if self.batch_first else output, h_n, c_n, layers

    def _run_packed(self, input, hx, parameters, backend, states):
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self._check_input(data, 2, parameters[0].weight_ih)
        packing, ragged = Packing.from_batch_sizes(batch_sizes, data.device)
        h0, c0 = self.permute_hidden(self._state(hx, data, packing.batch_size), sorted_indices)
        output, h_n, c_n, layers = self._run_layers(
            packing.pad(data), h0, c0, parameters, None, ragged, packing, backend, states
        )
        output = PackedSequence(packing.pack(output), batch_sizes, sorted_indices, unsorted_indices)
        h_n, c_n = self.permute_hidden((h_n, c_n), unsorted_indices)
        return output, h_n, c_n, layers

    def _run_layers(
        self,
        input: Tensor,
        h0: Tensor,
        c0: Tensor,
        parameters: list[Parameters],
        resets: Resets | None,
        ragged: Ragged | None,
        packing: Packing | None,
        backend: str,
        states: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """input (T, N, I) -> output (T, N, D * P), h_n and c_n (num_layers * D, N, ·); each layer's h and c of all
        steps, (D, T, N, ·), if states."""
        D = self._directions
        options = self._options()
        h_n, c_n, layers = [], [], []
        for first in range(0, len(parameters), D):
            own = slice(first, first + D)
            of_layer = None
            if resets is not None:
                of_layer = Resets(resets.reset, *(None if s is None else s[first] for s in resets[1:]))
            output, h, c, c_all = run_layer(
                input,
                h0[own],
                c0[own],
                tuple(parameters[own]),
                options,
                self.training,
                of_layer,
                ragged,
                False,
                backend,
                self.recompute,
                states,
            )
            h_n.append(h)
            c_n.append(c)
            if states:
                layers.append((output.unflatten(2, (D, -1)).permute(2, 0, 1, 3), c_all))
            input = output if first + D == len(parameters) else self._dropout(output, packing)
        return input, torch.cat(h_n), torch.cat(c_n), layers

    def _dropout(self, output: Tensor, packing: Packing | None) -> Tensor:
        """Between layers; drawn on the packed rows where the input was packed, as torch's own LSTM does."""
        if self.dropout == 0 or not self.training:
            return output
        if self.locked_dropout:
            return output * torch.nn.functional.dropout(torch.ones_like(output[:1]), self.dropout)
        if packing is None:
            return torch.nn.functional.dropout(output, self.dropout)
        return packing.pad(torch.nn.functional.dropout(packing.pack(output), self.dropout))
