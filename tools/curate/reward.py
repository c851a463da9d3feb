"""What a reward model says of rows of any layout."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.curate.rows import Item
from trainers.config.choices import Layout
from trainers.data.formats import to_messages, to_text
from trainers.data.preferences import to_preference
from trainers.rewards.scored import Scorer


def scores_of(folder: Path, items: list[Item]) -> npt.NDArray[np.float64]:
    """Return a number a row, of a pair for its chosen answer. Rows that are longer than the model is wide lose their beginning."""
    scorer = opened(folder)
    return scorer.scores([tokens_of(scorer, item) for item in items])


@lru_cache(1)
def opened(folder: Path) -> Scorer:
    """Open a model once for all parts that a process does."""
    return Scorer(folder)


def tokens_of(scorer: Scorer, item: Item) -> list[int]:
    """Return a row's tokens by the model's own chat template; raises ConfigError where it has none."""
    if item.layout is Layout.text:
        return list(scorer.tokenizer(to_text(item.row))["input_ids"])
    if item.layout is Layout.preference:
        pair = to_preference(item.row)
        return scorer.tokens([*pair.prompt, *pair.chosen])
    return scorer.tokens(to_messages(item.row, item.layout))
