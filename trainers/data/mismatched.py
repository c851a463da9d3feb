"""Each prompt with the answer to another one: what the baseline of KTO is measured on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from trainers.batch import WEIGHT
from trainers.data.pack import one_each, pack
from trainers.data.table import TokenTable

Ints = NDArray[np.int64]
SIGNAL = "mismatched/"
"""Begins the name of a signal that belongs to a prompt with the other answer, and not to the document itself."""
AT_ONCE = 8192
"""Documents that are in memory at a time where all of a table are read."""


def partners_of(groups: NDArray[np.uint64]) -> Ints | None:
    """Return the document whose answer follows each one's prompt instead, (documents,); None where one prompt has more than half of them.

    `groups` tells the prompts apart. Each answer is taken once, and none follows its own prompt: with the documents in order of the
    first appearance of their prompt, each takes the answer that is as many places further as the commonest prompt has documents,
    cyclically. Where every prompt is another one, that is the next document's (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1).
    """
    _, first, inverse, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    most = int(counts.max(initial=0))
    if not most or 2 * most > len(groups):
        return None
    order = np.argsort(first[inverse], kind="stable")
    partners = np.empty(len(groups), dtype=np.int64)
    partners[order] = np.roll(order, -most)
    return partners


def longest_row(table: TokenTable) -> int:
    """Return the tokens of the longest row, up to which mismatched documents are cut and packed."""
    return int(table.row_lengths().max(initial=2))


def mismatched(table: TokenTable, documents: Ints, capacity: int) -> TokenTable:
    """Return the prompts of some documents, each with its partner's answer: document k of the result is of `documents[k]`.

    Cut at `capacity` tokens, in rows of as many where the table is packed. A prompt is what comes before the first label, which
    always leaves room for one. The signals are those of the table that SIGNAL begins, without it, and a prompt has its row's weight.
    """
    assert table.partners is not None
    tokens, supervised = [], []
    for document, partner in zip(documents.tolist(), table.partners[documents].tolist(), strict=True):
        (start, first, _), (_, answer, end) = _parts(table, document), _parts(table, partner)
        end = min(end, answer + capacity - (first - start))
        tokens += [table.tokens[start:first], table.tokens[answer:end]]
        supervised += [np.zeros(first - start, np.uint8), table.supervised[answer:end]]
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in zip(tokens[::2], tokens[1::2], strict=True)], np.int64)
    is_packed = len(table.order) > len(table)
    signals = {name.removeprefix(SIGNAL): values[documents] for name, values in table.signals.items() if name.startswith(SIGNAL)}
    order, rows = pack(lengths, capacity) if is_packed else one_each(len(lengths))
    return TokenTable(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        supervised=np.concatenate([np.zeros(0, np.uint8), *supervised]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        order=order,
        rows=rows,
        signals=signals | ({WEIGHT: table.signals[WEIGHT][documents]} if WEIGHT in table.signals else {}),
    )


def _parts(table: TokenTable, document: int) -> tuple[int, int, int]:
    """Return where a document begins, its first label, and its end, as places in the table's tokens."""
    start, end = int(table.offsets[document]), int(table.offsets[document + 1])
    return start, start + int(table.supervised[start:end].argmax()), end


def all_mismatched(table: TokenTable) -> Iterator[TokenTable]:
    """Yield those of all documents, in order, some thousand at a time."""
    capacity = longest_row(table)
    for at in range(0, len(table.offsets) - 1, AT_ONCE):
        yield mismatched(table, np.arange(at, min(at + AT_ONCE, len(table.offsets) - 1)), capacity)
