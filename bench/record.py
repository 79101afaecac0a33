"""What a run has found, as plain data: the JSON log, and what the table and the plot are made of."""

import dataclasses
import json
import math
import platform
from typing import Any

import torch

from fused_lstm import BackendChoice
from fused_lstm.bench.corpus import Corpus
from fused_lstm.bench.training import Training


def collect(training: Training, corpus: Corpus, choice: BackendChoice, sample: str) -> dict[str, Any]:
    """The record of a run that has validated at least once in its life and made a step in this process.

    Losses are in nats per character, one a step; `validation_bits` in bits per character, one for each of
    `validation_steps`; `characters_per_second` is of this process. Of a text in words, all of these are of words, in
    name and number. `averaging_from` is the step from which NTASGD has averaged, or None.
    """
    speeds = training.characters_per_second()
    unit = corpus.unit
    return {
        "options": dataclasses.asdict(training.options),
        "device": str(training.device),
        "backend": {"name": choice.name, "reason": choice.reason},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "text": {
            "name": corpus.name,
            "sha256": corpus.digest,
            "unit": unit,
            f"{unit}s": len(corpus.training) + len(corpus.validation),
            f"validation_{unit}s": len(corpus.validation),
            "vocabulary": corpus.vocabulary,
        },
        "unigram_bits": corpus.unigram_bits(),
        "steps": training.step,
        "validation_steps": training.validation_steps,
        "learners": {
            name: {
                "losses": learner.losses,
                "validation_bits": [bits(loss) for loss in learner.validation_losses],
                "averaging_from": learner.averaging_from,
                f"{unit}s_per_second": speeds[name],
            }
            for name, learner in training.learners.items()
        },
        "sample": sample,
    }


def as_json(results: dict[str, Any]) -> bytes:
    """The JSON text of `collect`, in UTF-8."""
    return (json.dumps(results, ensure_ascii=False, allow_nan=False) + "\n").encode()


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)
