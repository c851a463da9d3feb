"""What rows look like: format, consistency, diversity and length as numbers, and what of them to read."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.curate import duplicates
from tools.curate.config import Boilerplate, Contradictions, Exact, Near, Personal, Refusals, Repetition, Settings, Syntax, Truncated
from tools.curate.filters import FILTERS, WORD
from tools.curate.languages import script
from tools.curate.notes import DETAIL, SHOWN
from tools.curate.personal import hidden, mask
from tools.curate.rows import Item, View, item_of
from tools.curate.tidy import check_schema
from trainers.data.glance import opening_of
from trainers.data.sources import Row

FAULTS: dict[str, Any] = {
    "repetition": Repetition(),
    "truncated": Truncated(),
    "refusals": Refusals(),
    "boilerplate": Boilerplate(),
    "syntax": Syntax(),
}
"""Steps of tools.curate that are asked about each answer."""
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
EXAMPLES, PAIRS, DISTINCT = 3, 8, 2000
"""Rows that are shown of a kind of fault, pairs of near copies, and answers whose pairs of words are counted."""
PERSONAL = Personal()


@dataclass
class Looked:
    """Rows that can be trained on, what they say, and what was noticed of all."""

    items: list[Item] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    tallies: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def tally(self, name: str, value: str) -> None:
        """Count a row under a value."""
        self.tallies.setdefault(name, Counter())[value] += 1

    def show(self, kind: str, reason: str, item: Item, names: list[str]) -> None:
        """Count a fault, and keep the first rows that have it."""
        self.tally("faults", kind)
        self.tally(kind, DETAIL.sub("_", reason)[:100])
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            text = hidden(item.raw.decode(errors="replace"), PERSONAL)[:SHOWN]
            shown.append({"reason": reason, "file": Path(names[item.file]).name, "line": item.line, "text": text})


def drawn(rows: Iterable[Row], most: int) -> tuple[list[Row], int]:
    """Return at most so many rows, each as likely as any other, in their order, and how many there are."""
    rng, kept, count = random.Random(0), list[tuple[int, Row]](), 0
    for count, row in enumerate(rows, 1):
        if len(kept) < most:
            kept.append((count, row))
        elif (place := rng.randrange(count)) < most:
            kept[place] = count, row
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])], count


def report_of(rows: Iterable[Row], most: int, sample: int) -> dict[str, Any]:
    """Return the report on rows, of which at most `most` are looked at and `sample` are to be read."""
    found, total = drawn(rows, most)
    names = list(dict.fromkeys(row.file for row in found))
    looked = Looked()
    layouts: dict[int, Any] = {}
    for item in _items(found, names):
        _look_at(item, looked, names, layouts)
    copies = _copies(looked)
    return {
        "rows": total,
        "looked_at": len(found),
        "trainable": len(looked.items),
        "tallies": {name: dict(counts.most_common(200)) for name, counts in looked.tallies.items()},
        "openings": _openings(looked.views),
        "lengths": {name: _lengths(sizes) for name, sizes in _sizes(looked.views).items()},
        "distinct_pairs": _distinct(looked.views),
        **copies,
        "examples": looked.examples,
        "sample": [_shown(looked, place, names) for place in _evenly(len(looked.items), sample)],
    }


def _items(rows: list[Row], names: list[str]) -> Iterator[Item]:
    numbers = {name: number for number, name in enumerate(names)}
    for row in rows:
        yield item_of(numbers[row.file], row.line, row.data)


def _look_at(item: Item, looked: Looked, names: list[str], layouts: dict[int, Any]) -> None:
    """Check a row; the layout of a file's first row is expected of the others."""
    looked.tally("source", Path(names[item.file]).name)
    found = check_schema(item, layouts.get(item.file))
    if isinstance(found, str):
        looked.show("format", found, item, names)
        return
    layouts.setdefault(item.file, item.layout)
    looked.items.append(item)
    looked.views.append(found)
    looked.tally("layout", str(item.layout))
    looked.tally("script", script(found.text))
    for name in item.row:
        looked.tally("field", str(name))
    for step, settings in FAULTS.items():
        if (reason := FILTERS[step](item, found, settings)) is not None:
            looked.show(step, reason, item, names)
    if (masked := mask(Item(item.file, item.line, item.raw, row=item.row, layout=item.layout), PERSONAL)) is not None:
        looked.show("personal", masked[1], item, names)


def _copies(looked: Looked) -> dict[str, Any]:
    """Return how many rows have the text of an earlier one, exactly or nearly, and how many prompts have different answers."""
    ranks = [0.0] * len(looked.views)
    marks = duplicates.marks(looked.views, [item.layout for item in looked.items], ranks, Near())
    found = duplicates.find([marks], Settings(exact=Exact(), near=Near(), contradictions=Contradictions()))
    near = sorted((twin for twin in found.twins.values() if twin.similarity is not None), key=lambda twin: (twin.similarity, twin.row))
    pairs = [
        {"similarity": twin.similarity, "texts": [hidden(looked.views[row].text, PERSONAL)[:SHOWN] for row in (twin.kept, twin.row)]}
        for twin in near[:PAIRS]
    ]
    counts = {"copies": len(found.twins) - len(near), "near_copies": len(near), "contradictions": len(found.contradictions)}
    prompts = len(marks.prompt) - len(np.unique(marks.prompt, axis=0)) if len(marks.prompt) else 0
    return counts | {"same_prompt": prompts, "pairs": pairs}


def _openings(views: list[View]) -> list[dict[str, Any]]:
    counts = Counter(opening_of(found.answers[0]) for found in views if found.answers)
    return [{"text": hidden(text, PERSONAL), "answers": count} for text, count in counts.most_common(10)]


def _sizes(views: list[View]) -> dict[str, list[int]]:
    """Return the characters of each prompt and each answer."""
    answers = [len(answer) for found in views for answer in found.answers]
    return {"prompt" if answers else "text": [len(found.prompt) for found in views], "answer": answers}


def _lengths(sizes: list[int]) -> dict[str, Any]:
    """Return quantiles, and how many there are by the number of binary digits."""
    bits = Counter(size.bit_length() for size in sizes)
    quantiles = {name: int(np.quantile(sizes, share, method="nearest")) for name, share in QUANTILES.items()} if sizes else {}
    return {
        "count": len(sizes),
        "quantiles": quantiles,
        "bits": {str(bit): bits[bit] for bit in range(min(bits), max(bits) + 1)} if bits else {},
    }


def _distinct(views: list[View]) -> float | None:
    """Return the share of different ones of the pairs of words of some answers (distinct-2, Li et al. 2016, arXiv 1510.03055)."""
    answers = [found.answers[0] for found in views if found.answers]
    pairs: list[tuple[str, str]] = []
    for place in _evenly(len(answers), DISTINCT):
        words = WORD.findall(answers[place].casefold())
        pairs += itertools.pairwise(words)
    return round(len(set(pairs)) / len(pairs), 4) if pairs else None


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted({place * count // wanted for place in range(wanted)}) if count and wanted else []


def _shown(looked: Looked, place: int, names: list[str]) -> dict[str, Any]:
    item, found = looked.items[place], looked.views[place]
    answers = [hidden(answer, PERSONAL)[:SHOWN] for answer in found.answers]
    where = {"file": Path(names[item.file]).name, "line": item.line}
    return where | {"prompt": hidden(found.prompt, PERSONAL)[:SHOWN], "answers": answers}
