"""What rows of scored documents say besides their text: a margin, a score or a class; and what must be known of all rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainers.config.choices import Layout, ObjectiveName
from trainers.config.derived import Source
from trainers.config.errors import ConfigError, did_you_mean
from trainers.config.schema import RunConfig
from trainers.data import sources
from trainers.data.formats import BadRow
from trainers.data.table import TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN, SCORE, LABEL = "margin", "score", "label"
"""Fields of rows, and signals of their documents."""
MOST_LABELS = 10_000


def signal_of(row: Any, objective: ObjectiveName, layout: Layout, labels: Sequence[str]) -> dict[str, float]:
    """Return what each document of a row carries; raises BadRow for a field that is missing or no number, or an unknown class."""
    if objective is ObjectiveName.classify:
        name = label_of(row)
        if name not in labels:
            raise BadRow(f"has the label `{name}`, which is not one of the classes{did_you_mean_among(name, labels)}")
        return {LABEL: float(labels.index(name))}
    if layout is Layout.preference:
        return {MARGIN: 0.0 if row.get(MARGIN) is None else _number(row, MARGIN)}
    return {SCORE: _number(row, SCORE)}


def did_you_mean_among(name: str, labels: Sequence[str]) -> str:
    """Return what is near an unknown class, in words, or what there is."""
    return f"; {did_you_mean(name, labels) or 'they are ' + ', '.join(labels[:8])}"


def _number(row: Any, name: str) -> float:
    value = row.get(name)
    if value is None:
        raise BadRow(f"has no `{name}`")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"has a `{name}` that is not a number: {value!r}")
    return float(value)


def label_of(row: Any) -> str:
    """Return the name of a row's class: a text as it is, a number or a boolean as JSON writes it; raises BadRow."""
    value = row.get(LABEL) if isinstance(row, dict) else None
    if value is None or value == "":
        raise BadRow(f"has no `{LABEL}`")
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int):
        return json.dumps(value)
    raise BadRow(f"has a `{LABEL}` that is not a name: {value!r}")


def find_labels(config: RunConfig, source: Source | None) -> tuple[str, ...]:
    """Return the classes of a run: as they are named, or those of all training rows, sorted, numbers by size.

    Raises ConfigError where there is one class, or more than MOST_LABELS.
    """
    if config.objective.labels:
        return tuple(config.objective.labels)
    found = set(_labels_in(config, source))
    if len(found) < 2 or len(found) > MOST_LABELS:
        reason = f"`{LABEL}` of the rows has {len(found):,} different values" + (f": {', '.join(found)}" if len(found) == 1 else "")
        raise ConfigError("data.path", config.data.path, reason, "rows of two classes or more, or objective.labels=[NAME,NAME]")
    is_number = all(name.removeprefix("-").isdigit() for name in found)
    return tuple(sorted(found, key=int if is_number else str))


def _labels_in(config: RunConfig, source: Source | None) -> Iterator[str]:
    for row in islice(sources.rows(source, config.objective.name), config.data.max_rows):
        try:
            yield label_of(sources.parse(row, config.data.ignore))
        except BadRow:  # which the encoder names by file and line
            continue


def label_counts(table_of: dict[str, TokenTable], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return how many documents of each split are of each class."""
    counts = {split: np.bincount(table.signals[LABEL].astype(np.int64), minlength=len(labels)) for split, table in table_of.items()}
    return {name: {split: int(count[number]) for split, count in counts.items()} for number, name in enumerate(labels)}


def choose_pad(tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int:
    """Return the id that pads rows wherever the model is opened: the tokenizer's own, or the first special token that ends no document.

    transformers takes the score of the last token that is not padding, so that documents may not end with it. `ends` are the ids that
    documents end with. Raises ConfigError where every special token does.
    """
    vocabulary = tokenizer.get_vocab()
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    named = sorted(special, key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token, vocabulary.get(token, 0)))
    for token in [*([tokenizer.pad_token] if tokenizer.pad_token is not None else []), *named]:
        if (number := vocabulary.get(token)) is not None and number not in ends:
            return int(number)
    reason = "each of its special tokens ends some document, and the export needs one that pads and ends none"
    raise ConfigError("model.tokenizer", tokenizer.name_or_path, reason, "\"model.add_tokens=['<|pad|>']\", with peft=none")


def ends_of(tables: Sequence[TokenTable]) -> set[int]:
    """Return the ids that documents end with."""
    return {int(token) for table in tables for token in np.unique(table.tokens[table.offsets[1:] - 1])}


def class_weights(config: RunConfig, table: TokenTable, num_labels: int) -> NDArray[np.float32] | None:
    """Return the weight of each class, (classes,); None where all weigh 1. A class without a training row has weight 0 if balanced."""
    if config.objective.class_weights:
        return np.array(config.objective.class_weights, np.float32)
    if not config.objective.balanced:
        return None
    counts = np.bincount(table.signals[LABEL].astype(np.int64), minlength=num_labels)
    shares = counts.sum() / (num_labels * np.maximum(counts, 1))
    return np.where(counts, shares, 0.0).astype(np.float32)
