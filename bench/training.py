"""Truncated backpropagation through time with a carried, detached state; free of printing."""

import functools
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import fused_lstm
from fused_lstm.bench.char_model import CharModel, State
from fused_lstm.bench.corpus import Corpus, columns
from fused_lstm.bench.errors import UserError
from fused_lstm.bench.interrupts import shielded
from fused_lstm.bench.options import DTYPES, TrainingOptions

OURS = "fused_lstm"
TORCHS = "torch.nn.LSTM"


class Learner:
    """A model, its optimiser and its state in the text, with the losses so far.

    Args:
        model: on the CPU, in float32
        options: of the run
        device: where it trains

    Attributes:
        losses: one a step, nats per character
        validation_losses: one a validation, nats per character
        seconds: wall time of each step of this process, up to the end of its work on the device
    """

    def __init__(self, model: CharModel, options: TrainingOptions, device: torch.device) -> None:
        dtype = DTYPES[options.dtype]
        half = dtype in (torch.bfloat16, torch.float16)
        self.model = model.to(device, torch.float32 if half else dtype)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.state: State | None = None
        self.losses: list[float] = []
        self.validation_losses: list[float] = []
        self.seconds: list[float] = []
        self._clip = options.clip
        self._device = device
        self._autocast = functools.partial(torch.autocast, device.type, dtype=dtype if half else None, enabled=half)

    def step(self, input: Tensor, target: Tensor) -> None:
        """One update.

        Args:
            input, target: int64 (T, N); the input goes on where that of the last step ended
        """
        self._synchronize()
        start = time.perf_counter()
        with self._autocast():
            logits, state = self.model(input, self.state)
            loss = _cross_entropy(logits, target) / target.numel()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.state = fused_lstm.detach_state(state)
        self.losses.append(loss.item())
        self._synchronize()
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, text: Tensor, sequence_length: int) -> float:
        """The mean loss on a text that is read from its start to its end, in nats per character.

        Args:
            text: int64 (rows, N), as of `corpus.columns`
            sequence_length: characters read at once; no more than a matter of memory
        """
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=text.device)
        state = None
        for start in range(0, len(text) - 1, sequence_length):
            target = text[start + 1 : start + 1 + sequence_length]
            with self._autocast():
                logits, state = self.model(text[start : start + len(target)], state)
                total += _cross_entropy(logits, target)
        self.model.train()
        return total.item() / text[1:].numel()

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, save the generators, and the losses so far."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "state": self.state,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; the learning rate stays the one of this run's options."""
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, learning_rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        self.scaler.load_state_dict(state_dict["scaler"])
        state = state_dict["state"]
        self.state = None if state is None else tuple(tensor.to(self._device) for tensor in state)
        self.losses = state_dict["losses"]
        self.validation_losses = state_dict["validation_losses"]

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    # In float32 or better: a half type's sum over a whole window would lose what one update changes.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")


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
        self._position = 0
        self._text = columns(corpus.training, options.batch_size).to(device)
        self._validation_text = columns(corpus.validation, options.batch_size).to(device)

        torch.manual_seed(options.seed)
        make_model = functools.partial(
            CharModel,
            vocabulary_size=len(corpus.vocabulary),
            embedding_size=options.embedding_size,
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            dropout=options.dropout,
            tied=options.tied,
        )
        ours = make_model(functools.partial(fused_lstm.LSTM, backend=options.backend))
        models = {OURS: ours}
        if options.compare:
            # Models are made on the CPU, whose generator is the only one to save.
            with torch.random.fork_rng(devices=[]):
                torchs = make_model(nn.LSTM)
            torchs.load_state_dict(ours.state_dict())
            models = {TORCHS: torchs, OURS: ours}
        self.learners = {name: Learner(model, options, device) for name, model in models.items()}

    @property
    def model(self) -> CharModel:
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
            length = self.options.sequence_length
            if self._position + length >= len(self._text):
                self._position = 0
                for learner in self.learners.values():
                    learner.state = None
            window = self._text[self._position : self._position + length + 1]
            *others, ours = self.learners.values()
            for learner in others:
                with torch.random.fork_rng(devices=self._cuda_devices):
                    learner.step(window[:-1], window[1:])
            ours.step(window[:-1], window[1:])
            self._position += length
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
                self.learners[name].validation_losses.append(loss)
            self.validation_steps.append(self.step)

    def characters_per_second(self) -> dict[str, float]:
        """How many characters each learner trains on in a second: by its median step, as the first ones compile."""
        characters = self.options.batch_size * self.options.sequence_length
        return {name: characters / statistics.median(learner.seconds) for name, learner in self.learners.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, beside the options and the text."""
        return {
            "step": self.step,
            "position": self._position,
            "validation_steps": self.validation_steps,
            "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            "generators": {
                "cpu": torch.get_rng_state(),
                "cuda": [torch.cuda.get_rng_state(device) for device in self._cuda_devices],
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave; the next steps give the numbers they would have given there."""
        for name, learner in self.learners.items():
            learner.load_state_dict(state_dict["learners"][name])
        self.step = state_dict["step"]
        self._position = state_dict["position"]
        self.validation_steps = state_dict["validation_steps"]
        torch.set_rng_state(state_dict["generators"]["cpu"])
        # A run that moves between devices keeps the draws of the device it comes to.
        for device, state in zip(self._cuda_devices, state_dict["generators"]["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)

    def _require_finite(self, losses: dict[str, float]) -> None:
        for name, loss in losses.items():
            if not math.isfinite(loss):
                cause = f"the loss of {name} is {loss} after {self.step} steps"
                raise UserError(cause, "lower --learning-rate or --clip")

    @property
    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []
