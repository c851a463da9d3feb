"""Names of persons in texts, found by a token-classification model. Whether it is right depends on the model."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import transformers.utils
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, TokenClassificationPipeline, pipeline

from tools.curate.config import PERSONS
from trainers.config.errors import ConfigError

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # pipelines look for what DeepSpeed runs on, which warns where it is not said
OVERLAP = 32
"""Tokens that two pieces of a long text share."""


def places(text: str, folder: Path) -> list[tuple[int, int]]:
    """Return where the names of persons are in a text, (beginning, end) in characters, ascending."""
    found = opened(folder)(text) if text.strip() else []
    return [(int(place["start"]), int(place["end"])) for place in found if place["entity_group"].upper() in PERSONS]


@lru_cache(1)
def opened(folder: Path) -> TokenClassificationPipeline:
    """Open a model once for all parts that a process does; raises ConfigError for a tokenizer that tells no places in a text."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ConfigError("personal.names", str(folder), "its tokenizer does not tell where in a text a token is", "a fast tokenizer")
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    overlap = min(OVERLAP, tokenizer.model_max_length // 4)
    return pipeline("token-classification", model, tokenizer=tokenizer, aggregation_strategy="simple", stride=overlap, device="cpu")
