"""The AWD-LSTM in training: its penalties on activations, and averages of its weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fused_lstm
from fused_lstm.bench.interrupts import shielded
from fused_lstm.bench.learner import Learner
from fused_lstm.bench.options import TrainingOptions


class AWDLearner(Learner):
    """A `fused_lstm.AWDLSTM` under `NTASGD`, with AR and TAR; evaluated with the averages, once there are any."""

    optimizer: fused_lstm.NTASGD

    def take_note(self, validation_loss: float) -> None:
        """Keeps what `evaluate` gave, and starts to average if it has stopped getting better."""
        super().take_note(validation_loss)
        self.optimizer.log(validation_loss)
        if self.optimizer.averaging and self.averaging_from is None:
            self.averaging_from = len(self.losses)

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """While the block lasts, the model has the averages for weights. Ctrl-C leaves it with its own."""
        try:
            with shielded():
                self.optimizer.swap()
            yield
        finally:
            with shielded():
                if self.optimizer.swapped:
                    self.optimizer.swap()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "averaging_from": self.averaging_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.averaging_from = state_dict["averaging_from"]

    def _make_optimizer(self, options: TrainingOptions) -> torch.optim.Optimizer:
        return fused_lstm.NTASGD(self.model.parameters(), options.learning_rate, n=options.non_monotone)

    def _objective(self, loss: Tensor, raw: list[Tensor], dropped: list[Tensor]) -> Tensor:
        return loss + self.model.regularization(raw, dropped, self._options.alpha, self._options.beta)

    def _set_rates(self, share: float) -> None:
        super()._set_rates(share)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self._options.weight_decay
