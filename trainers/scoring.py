"""A run whose head makes scores of documents: what of its data its model must know, and the export as plain transformers opens it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from trainers.batch import Batch, Needs, each_token
from trainers.config.schema import RunConfig
from trainers.data.prepare import Prepared
from trainers.data.scored import LABEL, class_weights
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.model.blueprint import Blueprint
from trainers.model.scores import ScoreHead, with_head
from trainers.objectives.scored import CLASS_WEIGHT

log = logging.getLogger("fulltune")
AT_ONCE = 8
"""Documents that a plain model scores together."""


def headed(blueprint: Blueprint, report: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """Return the blueprint with the head that prepared rows ask for; `report` is theirs.

    The tokenizer pads from now on with what the export pads with. Raises ConfigError for an architecture without such a head.
    """
    head = ScoreHead(labels=tuple(report.get("labels", ())), pad_id=report["pad_id"])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(head.pad_id)
    return replace(blueprint, config=with_head(blueprint.config, head), scores=True)


def weighted(config: RunConfig, data: Prepared) -> Prepared:
    """Return the data with the weight of each document's class, where classes have weights."""
    weights = None if LABEL not in data.train.signals else class_weights(config, data.train, len(data.report["labels"]))
    if weights is None:
        return data
    log.info(
        "weights of classes: %s", ", ".join(f"{name} {weight:.3g}" for name, weight in zip(data.report["labels"], weights, strict=True))
    )
    return replace(data, train=_carrying(data.train, weights), eval=None if data.eval is None else _carrying(data.eval, weights))


def _carrying(table: TokenTable, weights: NDArray[np.float32]) -> TokenTable:
    return replace(table, signals={**table.signals, CLASS_WEIGHT: weights[table.signals[LABEL].astype(np.int64)]})


def of_each_token(engine: Engine, batch: Batch) -> Tensor:
    """Return the first score of each token, (B, S), as if its document ended there."""
    scores = engine.forward(each_token(batch), Needs(scores=True)).scores
    assert scores is not None
    return scores[:, 0].view_as(batch.documents)


@torch.no_grad()
def score_rows(
    model: PreTrainedModel, table: TokenTable, documents: NDArray[np.int64] | None = None, at_once: int = AT_ONCE
) -> NDArray[np.float32]:
    """Return what a plain sequence-classification model says of documents, (documents, C) float32; all of a table's by default.

    Each document is a row, padded on the right with the model's own pad token, as a user's tokenizer would.
    """
    numbers = np.arange(len(table.offsets) - 1) if documents is None else documents
    pad, device = model.config.get_text_config().pad_token_id, model.device
    found = []
    for begin in range(0, len(numbers), at_once):
        rows = [
            torch.from_numpy(np.array(table.tokens[table.offsets[d] : table.offsets[d + 1]], np.int64))
            for d in numbers[begin : begin + at_once]
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        found.append(model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu().numpy())
    return np.concatenate(found)


def reopen_scores(folder: Path, trust_remote_code: bool, blueprint: Blueprint | None = None) -> PreTrainedModel:
    """Load a model of scores with plain transformers, on the CPU; a base with the config of a blueprint, whose head is not read."""
    more: dict[str, Any] = {} if blueprint is None else {"config": blueprint.config}
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=trust_remote_code, **more)
    model.eval()
    return model


def plain_scores(blueprint: Blueprint) -> PreTrainedModel:
    """Build a base of random weights with its values, which scores rows as transformers does."""
    model = blueprint.build("cpu")
    del model.forward
    model.eval()
    return model
