"""What rows and turns weigh: read from their fields, and kept next to the tokens only where something does not weigh 1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.data.formats import BadRow
from trainers.data.masks import Rendered

NAMES = ("weight", "loss_weight", "loss_scale")
"""Of a turn, or of a row."""
ROW_NAMES = (*NAMES, "weights", "sample_weight")
AT_ONCE = 1 << 20
LARGEST = float(np.finfo(np.float32).max)
Floats = NDArray[np.float32]


def is_weight(value: Any) -> bool:
    """Tell whether a value is a number from 0 on that float32 has."""
    return isinstance(value, bool | int | float) and 0 <= value <= LARGEST


def row_weight(row: dict[str, Any]) -> float:
    """Return what a row weighs, 1 where it does not say; raises BadRow where its fields differ."""
    said = {name: float(row[name]) for name in ROW_NAMES if row.get(name) is not None}
    if len(set(said.values())) > 1:
        raise BadRow(f"has weights that differ: {', '.join(f'{name} = {value:g}' for name, value in said.items())}")
    return next(iter(said.values()), 1.0)


def weighed(text: Rendered, weight: float) -> Rendered:
    """Return a document with its row's weight; nothing of it is trained where that is 0."""
    if weight == 1:
        return text
    if not weight:
        return replace(text, spans=[], weights=[])
    return replace(text, weights=[weight * own for own in text.weights or [1.0] * len(text.spans)])


def joined(parts: Iterable[tuple[Floats | None, int]]) -> Floats | None:
    """Return the weights of tokens one after the other, each part with its number of tokens; None where no part has any."""
    held = list(parts)
    if all(weights is None for weights, _ in held):
        return None
    return np.concatenate([np.ones(count, np.float32) if weights is None else weights for weights, count in held])


class Weights:
    """The weights of a store's tokens in a file."""

    def __init__(self, file: Path, before: int) -> None:
        """Begin after so many tokens that weigh 1."""
        self.file = file
        self.add(None, before)

    def add(self, weights: Floats | None, count: int) -> None:
        """Append those of so many tokens; None where each is 1."""
        with self.file.open("ab") as stream:
            if weights is not None:
                weights.tofile(stream)
                return
            for at in range(0, count, AT_ONCE):
                np.ones(min(AT_ONCE, count - at), np.float32).tofile(stream)

    def signal(self, which: slice | NDArray[np.bool_], supervised: NDArray[np.uint8], offsets: NDArray[np.int64], whole: bool) -> Floats:
        """Return what a table carries of its tokens, which are `which` of the store's.

        The weight of each label, (labels, 1), or where documents are judged as a `whole` that of each, (documents,).
        """
        labelled = np.memmap(self.file, dtype=np.float32, mode="r")[which][supervised > 0]
        if not whole:
            return labelled[:, None]
        before = np.concatenate([[0], np.cumsum(supervised, dtype=np.int64)])[offsets[:-1]]
        first: Floats = labelled[before]
        return first

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink()
