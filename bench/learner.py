"""A model that is trained: its updates, its validations, its losses."""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_lstm import TruncatedBPTT, detach_state
from fused_lstm.bench.options import DTYPES, TrainingOptions


class Learner:
    """A character model under Adam.

    Args:
        model: on the CPU, in float32
        options: of the run
        device: where it trains

    Attributes:
        losses: one a step, nats per character, or per word of a text in words
        validation_losses: one a validation, likewise
        seconds: wall time of each step of this process, up to the end of its work on the device; a step of another
            length than `options.sequence_length` counts as if it had that
        averaging_from: the step from which weights are averaged; None: they are not
    """

    def __init__(self, model: nn.Module, options: TrainingOptions, device: torch.device) -> None:
        dtype = DTYPES[options.dtype]
        half = dtype in (torch.bfloat16, torch.float16)
        self.model = model.to(device, torch.float32 if half else dtype)
        self.optimizer = self._make_optimizer(options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.losses: list[float] = []
        self.validation_losses: list[float] = []
        self.seconds: list[float] = []
        self.averaging_from: int | None = None
        self._options = options
        self._device = device
        self._autocast = functools.partial(torch.autocast, device.type, dtype=dtype if half else None, enabled=half)

    def step(self, input: Tensor, target: Tensor, state: Any) -> Any:
        """One update, of a step size in proportion to the length: the loss is a mean over it.

        Args:
            input, target: int64 (T, N); the input goes on where that of the last step ended
            state: what the last step returned; None: zeros

        Returns:
            the state after the last of T, detached
        """
        self._synchronize()
        start = time.perf_counter()
        share = len(input) / self._options.sequence_length
        with self._autocast():
            logits, state, *outputs = self.model(input, state)
            loss = _cross_entropy(logits, target) / target.numel()
            objective = self._objective(loss, *outputs)
        self._set_rates(share)
        self.optimizer.zero_grad()
        self.scaler.scale(objective).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self._options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.append(loss.item())
        self._synchronize()
        self.seconds.append((time.perf_counter() - start) / share)
        return detach_state(state)

    @torch.no_grad()
    def evaluate(self, text: Tensor, sequence_length: int) -> float:
        """The mean loss on a text that is read from its start to its end, in nats per character.

        Args:
            text: int64 (rows, N), as of `corpus.columns`
            sequence_length: characters read at once; no more than a matter of memory
        """
        total = torch.zeros((), dtype=torch.float64, device=text.device)
        with self.result():
            self.model.eval()
            for chunk in TruncatedBPTT((text[:-1], text[1:]), sequence_length):
                input, target = chunk.data
                with self._autocast():
                    logits, chunk.state, *_ = self.model(input, chunk.state)
                    total += _cross_entropy(logits, target)
            self.model.train()
        return total.item() / text[1:].numel()

    def take_note(self, validation_loss: float) -> None:
        """Keeps what `evaluate` gave."""
        self.validation_losses.append(validation_loss)

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """While the block lasts, the model has the weights that the training has come to."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, save the text's state and the generators, and the losses so far."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "validation_losses": self.validation_losses,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; the rates stay those of this run's options."""
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scaler.load_state_dict(state_dict["scaler"])
        self.losses = state_dict["losses"]
        self.validation_losses = state_dict["validation_losses"]

    def _make_optimizer(self, options: TrainingOptions) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)

    def _objective(self, loss: Tensor, *_: Any) -> Tensor:
        """What is minimised, from the loss and what the model returns beside logits and state."""
        return loss

    def _set_rates(self, share: float) -> None:
        # At each step, from the options: an optimiser that was loaded has those of the run it came from.
        for group in self.optimizer.param_groups:
            group["lr"] = self._options.learning_rate * share

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    # In float32 or better: a half type's sum over a whole window would lose what one update changes.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
