"""The last stages: rows that are not good enough, or too many, go. The others are put into sets that share nothing, which is proved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tools.curate import choose, diversity, duplicates, quality
from tools.curate.config import Diversity, Near, Settings, Split
from tools.curate.filters import ABSENT, field_of
from tools.curate.job import Job
from tools.curate.languages import script
from tools.curate.notes import Notes
from tools.curate.rows import Item, View, first_prompt, parsed, read_items, view, write_items
from trainers.config.errors import ConfigError
from trainers.data.formats import BadRow
from trainers.rundir.files import write_json

OF_THE_ROW: dict[str, Callable[[Item, View, Job], str]] = {
    "source": lambda item, found, job: job.names[item.file],
    "script": lambda item, found, job: script(found.text),
    "length": lambda item, found, job: str(1 << len(found.text).bit_length()),
}
"""Names of caps other than fields; length is the power of two that a text is shorter than."""
COMPARED = 500
"""Rows of a bucket that a row is compared with, so that a split is proved."""


def chooses(settings: Settings) -> bool:
    """Tell whether rows are chosen among all."""
    return any(step is not None for step in (settings.quality, settings.balance, settings.diversity, settings.split))


def near_of(split: Split) -> Near:
    """Return how similar texts are looked for."""
    return Near(threshold=split.similar, bands=32, band_rows=4, compared=COMPARED)


def write_keys(out: Path, items: list[Item], views: list[View], job: Job) -> None:
    """Write what rows are chosen by: texts, first prompts, values of caps, and the group that is not divided."""
    split, balance = job.settings.split, job.settings.balance
    found = duplicates.marks(views, [item.layout for item in items], [0.0] * len(items), near_of(split) if split else None)
    duplicates.write_marks(out, found)
    np.save(out / "first.npy", duplicates.digests(first_prompt(item.row, item.layout) for item in items))
    caps = balance.caps if balance else {}
    values = [[_value(name, item, view, job) for name in caps] for item, view in zip(items, views, strict=True)]
    grouped = [_text_of(field_of(item.row, split.group)) for item in items] if split and split.group else []
    write_json(out / "keys.json", {"values": values, "groups": grouped})
    if job.settings.diversity:
        np.save(out / "vectors.npy", vectors_of(items, views, job.settings.diversity))


def vectors_of(items: list[Item], views: list[View], settings: Diversity) -> diversity.Vectors:
    """Return by what rows are compared for diversity, (rows, dimensions); raises ConfigError for embeddings that do not go together."""
    if settings.embedding is None:
        found = [diversity.hashed(held.text, settings.dimensions) for held in views]
        return np.array(found, np.int8).reshape(-1, settings.dimensions)
    try:
        found = [diversity.embedded(field_of(item.row, settings.embedding)) for item in items]
    except BadRow as error:
        raise ConfigError(
            "diversity.embedding", settings.embedding, f"a row {error}", "the path of a list of numbers in every row"
        ) from None
    if len({len(vector) for vector in found}) > 1:
        raise ConfigError("diversity.embedding", settings.embedding, "embeddings have different lengths", "those of one model")
    return np.array(found, np.int8).reshape(len(found), len(found[0]) if found else 0)


def _value(name: str, item: Item, found: View, job: Job) -> str:
    return OF_THE_ROW[name](item, found, job) if name in OF_THE_ROW else _text_of(field_of(item.row, name)) or "none"


def _text_of(value: Any) -> str:
    return "" if value is ABSENT else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def choose_all(folder: Path, out: Path, about: tuple[Job, list[str]]) -> None:
    """Decide of all rows which go and which set each of the others goes to; a file a part says so."""
    job, names = about
    parts = [folder / "select" / name for name in names]
    keys = [json.loads((part / "keys.json").read_text()) for part in parts]
    marks = [duplicates.read_marks(part) for part in parts]
    text = np.concatenate([part.text for part in marks])
    gone = left_out(job.settings, parts, [row for part in keys for row in part["values"]], text, names)
    sets: list[str] = ["rows"] * len(text)
    proof: dict[str, Any] = {}
    if job.settings.split:
        first = np.concatenate([np.load(part / "first.npy") for part in parts])
        sets, proof = split_all(job.settings.split, text, first, [name for part in keys for name in part["groups"]], marks, gone)
    write_json(out / "about.json", proof)
    start = 0
    for name, part in zip(names, marks, strict=True):
        rows = range(start, start + len(part.text))
        write_json(
            out / f"{name}.json", {"sets": [sets[row] for row in rows], "gone": {row - start: gone[row] for row in rows if row in gone}}
        )
        start = rows.stop


Gone = dict[int, tuple[str, str, dict[str, Any]]]
"""Rows that go: the step, the reason and what else is noted."""


def left_out(settings: Settings, parts: list[Path], values: list[list[str]], text: duplicates.Keys, names: list[str]) -> Gone:
    """Return the rows that are not good enough, and of the others those beyond a cap, and of these those that are most alike."""
    gone: Gone = {}
    scores = np.full(len(text), np.nan)
    if settings.quality:
        scores = np.concatenate([np.load(part.parents[1] / "score" / name / "scores.npy") for part, name in zip(parts, names, strict=True)])
        order = [choose.order_of(0, key) for key in text]
        gone |= {row: ("quality", *found) for row, found in quality.left_out(scores, order, settings.quality).items()}
    if settings.balance:
        rows = [row for row in range(len(text)) if row not in gone]
        beyond = choose.beyond_caps([values[row] for row in rows], text[rows], settings.balance)
        gone |= {rows[at]: ("balance", reason, {}) for at, reason in beyond.items()}
    if settings.diversity:
        gone |= alike(settings.diversity, parts, scores, text, gone)
    return gone


def alike(settings: Diversity, parts: list[Path], scores: quality.Scores, text: duplicates.Keys, gone: Gone) -> Gone:
    """Return the rows that are not among the most diverse ones."""
    rows = sorted((row for row in range(len(text)) if row not in gone), key=lambda row: choose.order_of(settings.seed, text[row]))
    loaded = [found for part in parts if len(found := np.load(part / "vectors.npy"))]
    if len({found.shape[1] for found in loaded}) > 1:
        raise ConfigError("diversity.embedding", settings.embedding, "embeddings have different lengths", "those of one model")
    if len(rows) <= settings.rows:
        return {}
    vectors = np.concatenate(loaded)[rows]
    taken = set(diversity.choose(vectors, diversity.relevance_of(scores[rows]), settings.rows, settings.relevance))
    reason = f"is not among the {settings.rows} most diverse rows"
    return {row: ("diversity", reason, {}) for at, row in enumerate(rows) if at not in taken}


def split_all(
    split: Split, text: duplicates.Keys, first: duplicates.Keys, groups: list[str], marks: list[duplicates.Marks], gone: Gone
) -> tuple[list[str], dict[str, Any]]:
    """Return the set of each row, and the proof: how many pairs of each kind there are, and how many of them are in two sets.

    Rows that go are in no set, but what they connect is not divided either.
    """
    similar, not_compared = choose.similar_pairs(marks, near_of(split))
    named = [(name, row) for row, name in enumerate(groups) if name]
    firsts: dict[str, int] = {}
    pairs = {
        "the same text": choose.same(text),
        "the same first prompt": choose.same(first),
        f"a similarity of {split.similar:g} or more": similar,
        "the same group": [(one, row) for name, row in named if (one := firsts.setdefault(name, row)) != row],
    }
    together = choose.connected(len(text), [pair for found in pairs.values() for pair in found])
    sets = choose.sets_of([rest for group in together if (rest := [row for row in group if row not in gone])], text, split)
    left = {kind: [pair for pair in found if pair[0] not in gone and pair[1] not in gone] for kind, found in pairs.items()}
    proof = {kind: {"pairs": len(found), "across": choose.crossings(sets, found)} for kind, found in left.items()}
    sizes = {name: sets.count(name) for name in choose.SETS}
    return sets, {"rows": sizes, "proof": proof, "not_compared": not_compared}


def place(folder: Path, out: Path, about: tuple[Job, str]) -> None:
    """Leave out the rows of a part that are too many, and say which set each of the others is in."""
    job, name = about
    decided = json.loads((folder / "choose" / "all" / f"{name}.json").read_text())
    notes, kept, sets = Notes(list(job.files), job.settings.personal), [], []
    for row, item in enumerate(read_items(folder / "select" / name / "kept.rows")):
        if (found := decided["gone"].get(str(row))) is not None:
            step, reason, more = found
            notes.remove(parsed(item), step, reason, **more)
            continue
        notes.stays(job.names[item.file], view(parsed(item).row, item.layout))
        kept.append(item)
        sets.append(decided["sets"][row])
    write_items(out / "kept.rows", kept)
    write_json(out / "sets.json", {"sets": sets})
    notes.write(out)
