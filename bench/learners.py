"""The models of a run, as its options name them."""

import functools

import torch
from torch import nn

import fused_lstm
from fused_lstm.bench.awd_learner import AWDLearner
from fused_lstm.bench.char_model import CharModel
from fused_lstm.bench.learner import Learner
from fused_lstm.bench.options import TrainingOptions

OURS = "fused_lstm"
TORCHS = "torch.nn.LSTM"


def make_learners(options: TrainingOptions, vocabulary_size: int, device: torch.device) -> dict[str, Learner]:
    """The learners by name, of weights that the global generator draws; the last is always `OURS`.

    With `options.compare`, `torch.nn.LSTM` starts from the same weights, and draws none of its own.
    """
    if options.model == "awd":
        model = fused_lstm.AWDLSTM(
            vocabulary_size,
            options.embedding_size,
            options.hidden_size,
            options.num_layers,
            dropout=options.dropout,
            hidden_dropout=options.hidden_dropout,
            input_dropout=options.input_dropout,
            embedding_dropout=options.embedding_dropout,
            weight_dropout=options.weight_dropout,
            backend=options.backend,
        )
        return {OURS: AWDLearner(model, options, device)}
    make_model = functools.partial(
        CharModel,
        vocabulary_size=vocabulary_size,
        embedding_size=options.embedding_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        dropout=options.dropout,
        tied=options.tied,
    )
    models = {OURS: make_model(functools.partial(fused_lstm.LSTM, backend=options.backend))}
    if options.compare:
        # Models are made on the CPU, whose generator is the only one to save.
        with torch.random.fork_rng(devices=[]):
            torchs = make_model(nn.LSTM)
        torchs.load_state_dict(models[OURS].state_dict())
        models = {TORCHS: torchs} | models
    return {name: Learner(model, options, device) for name, model in models.items()}
