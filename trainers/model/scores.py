"""A head that makes scores of documents in the place of logits: transformers' sequence classification on a causal base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from trainers.config.errors import ConfigError
from trainers.model.forward import SCORE

FRESH = f"{SCORE}.weight"
"""What a base lacks that was not trained so."""


@dataclass(frozen=True, kw_only=True)
class ScoreHead:
    """What a head of scores is called in the export."""

    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the scores; none where a document has one score."""
    pad_id: int
    """What pads rows wherever the export is opened: transformers takes the score of the last token that is another one."""


def with_head(config: PreTrainedConfig, head: ScoreHead) -> PreTrainedConfig:
    """Return the config of a base with a head of scores; raises ConfigError for an architecture that has no such class."""
    mapping: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if mapping.get(type(config), None) is None:
        reason = "transformers has no sequence classification on this architecture, which a head of scores needs"
        raise ConfigError("model.id", config.model_type, reason, "a base of another architecture, such as llama or qwen3")
    config = copy.deepcopy(config)
    names = head.labels or ("score",)
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    config.problem_type = "single_label_classification" if head.labels else "regression"
    for part in (config, config.get_text_config()):
        part.pad_token_id = head.pad_id
    return config


def build_scores(config: PreTrainedConfig, **how: Any) -> PreTrainedModel:
    """Return transformers' model for a config of `with_head`, which scores documents instead of rows; raises ConfigError.

    Its forward takes `ends` (D,), places of last tokens in the rows one after the other, and returns (D, C) float32.
    """
    model: Any = AutoModelForSequenceClassification.from_config(config, **how)
    layer = getattr(model, SCORE, None)
    if not isinstance(layer, nn.Linear) or layer.bias is not None or not hasattr(model, model.base_model_prefix):
        reason = f"{type(model).__name__} has another head than one matrix `{SCORE}` on a causal model's last token"
        raise ConfigError("model.id", config.model_type, reason, "a base of another architecture, such as llama or qwen3")
    layer.forward = partial(_in_float32, layer)  # type: ignore[method-assign]
    model.forward = partial(_score_documents, model)
    model.scores_documents = True
    return model  # type: ignore[no-any-return]


def _in_float32(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """Return scores that nothing has rounded to 16 bits: what counts of them is how they differ."""
    return linear(hidden.float(), layer.weight.float())


def _score_documents(model: Any, ends: Tensor, **inputs: Any) -> Tensor:
    hidden = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
    scores: Tensor = getattr(model, SCORE)(hidden.flatten(0, 1)[ends])
    return scores
