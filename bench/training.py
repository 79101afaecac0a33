"""A training run: updates, validations and its state; free of printing."""

import contextlib
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from fused_lstm.bench.corpus import Corpus, columns
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.interrupts import shielded
from fused_lstm.bench.learners import OURS, make_learners
from fused_lstm.bench.lengths import RandomLengths
from fused_lstm.bench.options import TrainingOptions
from fused_lstm.bench.walk import Walk


class Training:
    """One model on its walk through a text, or two beside each other.

    Seeds the global generators of torch. With `options.compare`, `torch.nn.LSTM` starts from the same weights, reads
    the same batches and draws the same dropout, and `fused_lstm.LSTM` computes what it would have alone.

    Args:
        options: checked already
        corpus: the text
        device: where it trains

    Attributes:
        learners: by name; the last is always `OURS`
        step: updates so far
        validation_steps: the steps at which the learners' `validation_losses` were taken

    Raises:
        UserError: the text is too short for the sizes
    """

    def __init__(self, options: TrainingOptions, corpus: Corpus, device: torch.device) -> None:
        corpus.require_length(options.batch_size, options.sequence_length)
        self.options = options
        self.device = device
        self.step = 0
        self.validation_steps: list[int] = []
        self._validation_text = columns(corpus.validation, options.batch_size).to(device)
        text = columns(corpus.training, options.batch_size).to(device)
        self._lengths = RandomLengths(options.sequence_length, options.seed) if options.model == "awd" else None
        if self._lengths is not None:
            self._walk = Walk(text, self._lengths, drop_last=False)
        else:
            self._walk = Walk(text, options.sequence_length, drop_last=True)
        torch.manual_seed(options.seed)
        self.learners = make_learners(options, len(corpus.vocabulary), device)

    @property
    def model(self) -> torch.nn.Module:
        """The model on `fused_lstm.LSTM`."""
        return self.learners[OURS].model

    @property
    def done(self) -> bool:
        """Whether all steps of the options are behind us."""
        return self.step >= self.options.steps

    @property
    def validation_due(self) -> bool:
        """Whether `validate` belongs here: every so many steps and at the end, but not twice."""
        here = self.done or (self.step > 0 and self.step % self.options.validate_every == 0)
        return here and self.step not in self.validation_steps[-1:]

    def advance(self) -> None:
        """One update of each learner. Ctrl-C waits for its end.

        Raises:
            UserError: a loss is not finite
        """
        with shielded():
            with self._walk.chunk() as chunk:
                states = []
                for learner, state in zip(self.learners.values(), self._states(), strict=True):
                    last = learner is self.learners[OURS]
                    with contextlib.nullcontext() if last else torch.random.fork_rng(devices=self._cuda_devices):
                        states.append(learner.step(*chunk.data, state))
                chunk.state = states
            self.step += 1
        self._require_finite({name: learner.losses[-1] for name, learner in self.learners.items()})

    def validate(self) -> None:
        """Takes the loss of each learner on the validation text.

        Raises:
            UserError: a loss is not finite
        """
        losses = {
            name: learner.evaluate(self._validation_text, self.options.sequence_length)
            for name, learner in self.learners.items()
        }
        self._require_finite(losses)
        with shielded():
            for name, loss in losses.items():
                self.learners[name].take_note(loss)
            self.validation_steps.append(self.step)

    def characters_per_second(self) -> dict[str, float]:
        """How many characters, or words of a text in words, each learner trains on in a second: by its median step, as
        the first ones compile."""
        characters = self.options.batch_size * self.options.sequence_length
        return {name: characters / statistics.median(learner.seconds) for name, learner in self.learners.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, beside the options and the text."""
        generators = {
            "cpu": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self._cuda_devices],
        }
        if self._lengths is not None:
            generators["lengths"] = self._lengths.get_state()
        return {
            "step": self.step,
            "position": self._walk.position,
            "validation_steps": self.validation_steps,
            "learners": {
                name: {**learner.state_dict(), "state": state}
                for (name, learner), state in zip(self.learners.items(), self._states(), strict=True)
            },
            "generators": generators,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; the next steps give the numbers they would have given there."""
        for name, learner in self.learners.items():
            learner.load_state_dict(state_dict["learners"][name])
        states = [_to(state_dict["learners"][name]["state"], self.device) for name in self.learners]
        self._walk.begin(state_dict["position"], states)
        self.step = state_dict["step"]
        self.validation_steps = state_dict["validation_steps"]
        generators = state_dict["generators"]
        torch.set_rng_state(generators["cpu"])
        # A run that moves between devices keeps the draws of the device it comes to.
        for device, state in zip(self._cuda_devices, generators["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)
        if self._lengths is not None:
            self._lengths.set_state(generators["lengths"])

    def _states(self) -> list[Any]:
        """Each learner's state in the text; None at its top."""
        return self._walk.state or [None] * len(self.learners)

    def _require_finite(self, losses: dict[str, float]) -> None:
        for name, loss in losses.items():
            if not math.isfinite(loss):
                cause = f"the loss of {name} is {loss} after {self.step} steps"
                raise UserError(cause, "lower --learning-rate or --clip")

    @property
    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []


def _to(state: Any, device: torch.device) -> Any:
    """A state on another device: a tensor, None, or tuples and lists of them."""
    if state is None:
        return None
    return state.to(device) if isinstance(state, Tensor) else type(state)(_to(part, device) for part in state)
