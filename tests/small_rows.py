"""Rows of a few packed or padded documents, and what a small model needs to tell them apart."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trainers.batch import IGNORE, NO_DOCUMENT, Batch
from trainers.config.choices import Attention, EngineName, OptimizerName, Precision
from trainers.config.schema import EngineConfig, OptimConfig, RunConfig, TrainConfig

ROWS = {
    "packed": [[7, 20, 13], [40], [1, 30, -9], [5, 35]],
    "padded": [[40], [17, -23], [33, -7], [-40]],
}
"""Lengths of documents in each row of 40 tokens, below 0 of padding."""


def rows_of(name: str, seed: int = 0, vocabulary: int = 33) -> Batch:
    """Return rows of documents and padding of these lengths, as the loader makes them: each token predicts the next of its document."""
    shape = (len(ROWS[name]), 40)
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    labels, positions, documents = torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_DOCUMENT)
    number = 0
    for row, lengths in enumerate(ROWS[name]):
        at = 0
        for length in lengths:
            end = at + abs(length)
            positions[row, at:end] = torch.arange(abs(length))
            if length > 0:
                labels[row, at : end - 1], documents[row, at:end] = ids[row, at + 1 : end], number
                number += 1
            at = end
    counts = {"num_rows": shape[0], "num_tokens": int((documents >= 0).sum()), "num_documents": number}
    return Batch(input_ids=ids, labels=labels, position_ids=positions, documents=documents, **counts)


def run_config(backend: str = "auto", engine: str = "fsdp") -> RunConfig:
    sizes = TrainConfig(precision=Precision.fp32, microbatch=1, global_batch=4)
    config = RunConfig(optim=OptimConfig(name=OptimizerName.sgd, lr=1e-1), train=sizes)
    config.model.attention, config.engine = Attention(backend), EngineConfig(name=EngineName(engine))
    return config


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Make weights large enough for tokens to see each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model
