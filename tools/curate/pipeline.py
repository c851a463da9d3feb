"""The stages of a curation, from the input files to the files of --out.

read      each file into parts of a few megabytes
tidy      each part: schema, normalisation, and what is needed to find duplicates
twins     all parts together: duplicates and contradictions
index     of the evaluation files
select    each part: rows that stay
score     each part: how good each row is
choose    all parts together: which rows are too many, and the set of each row
place     each part: rows in their sets
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tools.curate import contamination, duplicates, quality, sets
from tools.curate.config import Decontaminate, Settings
from tools.curate.filters import FILTERS
from tools.curate.job import Job
from tools.curate.notes import SHOWN, Notes, merged
from tools.curate.personal import hidden, mask
from tools.curate.rows import Item, View, item_of, parsed, read_items, view, write_items
from tools.curate.stages import Tell, Work
from tools.curate.tidy import check_schema, normalise
from trainers.config.choices import Layout
from trainers.data import containers
from trainers.data.formats import BadRow, recognise, strict_json
from trainers.rundir.files import try_json, write_json

PART_BYTES = 8 << 20
STAGES = ("tidy", "select", "place")
"""Those that take or change rows."""
PAIRS = 20
"""Duplicates that the report shows side by side."""


class Parts(Protocol):
    """What does the parts of a stage: processes here, or tasks of a SLURM array."""

    def run(self, folder: Path, stage: str, work: Work, parts: Sequence[tuple[str, Any]], tell: Tell) -> None:
        """Do the parts that are not there yet, each into folder/stage/NAME."""

    def single(self) -> AbstractContextManager[Parts]:
        """Return what does them with one process a machine."""
        ...


def run(job: Job, folder: Path, pool: Parts, tell: Tell) -> dict[str, Any]:
    """Do all stages in `folder`, or what is missing of them, and return what the report shows."""
    pool.run(folder, "read", _read, [(f"{number:05}", (job, number)) for number in range(len(job.files))], tell)
    parts = _parts(folder)
    pool.run(folder, "tidy", _tidy, [(name, (job, *about)) for name, about in parts], tell)
    names = [name for name, _ in parts]
    pool.run(folder, "twins", _twins, [("all", (job, names))], tell)
    if job.settings.decontaminate:
        pool.run(folder, "index", _index, [("all", job.settings.decontaminate)], tell)
    pool.run(folder, "select", _select, [(name, (job, number)) for number, name in enumerate(names)], tell)
    if job.settings.quality:
        scored = [(name, (job, name)) for name in names]
        with pool.single() if job.settings.quality.by == "reward" else nullcontext(pool) as scorer:
            scorer.run(folder, "score", quality.score, scored, tell)
    if sets.chooses(job.settings):
        pool.run(folder, "choose", sets.choose_all, [("all", (job, names))], tell)
        pool.run(folder, "place", sets.place, [(name, (job, name)) for name in names], tell)
    return _about(job, folder, names)


def _parts(folder: Path) -> list[tuple[str, tuple[Path, str]]]:
    """Return the name of each part of the input, with its file and the layout of the first row of the input file."""
    found = []
    for of_file in sorted((folder / "read").iterdir()):
        layout = json.loads((of_file / "about.json").read_text())["layout"]
        found += [(f"{of_file.name}-{file.stem}", (file, layout)) for file in sorted(of_file.glob("*.rows"))]
    return found


def _read(folder: Path, out: Path, about: tuple[Job, int]) -> None:
    """Cut an input file into parts."""
    job, number = about
    items: list[Item] = []
    size = parts = 0
    layout = ""
    for data, line in containers.read(Path(job.files[number])):
        item = item_of(number, line, data)
        layout = layout or _layout_of(item)
        items.append(item)
        size += len(item.raw)
        if size >= PART_BYTES:
            write_items(out / f"{parts:05}.rows", items)
            items, size, parts = [], 0, parts + 1
    if items or not parts:
        write_items(out / f"{parts:05}.rows", items)
    write_json(out / "about.json", {"layout": layout})


def _layout_of(item: Item) -> str:
    """Return the layout of a row; '' where it cannot be told."""
    try:
        return "" if item.bad else str(recognise(strict_json(item.raw.decode())))
    except (BadRow, ValueError):
        return ""


def _tidy(folder: Path, out: Path, about: tuple[Job, Path, str]) -> None:
    """Check and normalise the rows of a part, and mark them for the search of duplicates."""
    job, file, layout = about
    notes, kept, views, ranks = Notes(list(job.files), job.settings.personal), [], [], []
    schema = job.settings.schema
    expected = Layout(schema.layout or layout or Layout.auto) if schema else None
    for item in read_items(file):
        notes.tally("source before", job.names[item.file])
        if isinstance(found := check_schema(item, expected), str):
            notes.remove(item, "schema", found)
            continue
        notes.tally("layout", item.layout)
        before = item.raw
        if job.settings.normalise and (reason := normalise(item, job.settings.normalise)):
            notes.change(item, "normalise", reason, before)
            if isinstance(found := check_schema(Item(item.file, item.line, item.raw), None), str):
                notes.remove(item, "schema", f"{found} once it is normalised")
                continue
        notes.lengths(found, "before")
        kept.append(item)
        views.append(found)
        ranks.append(_rank(item, found, job.settings))
    write_items(out / "kept.rows", kept)
    np.save(out / "places.npy", np.array([(item.file, item.line) for item in kept], np.int64).reshape(-1, 2))
    duplicates.write_marks(out, duplicates.marks(views, [item.layout for item in kept], ranks, job.settings.near))
    notes.write(out)


def _rank(item: Item, found: View, settings: Settings) -> float:
    """Return by which the best row of a cluster of near duplicates is kept: the largest."""
    if settings.near is None or settings.near.keep == "first":
        return 0.0
    if settings.near.keep == "longest":
        return float(len(found.text))
    value = item.row.get(settings.near.field or "")
    return float(value) if isinstance(value, int | float) and value == value else float("-inf")


def _twins(folder: Path, out: Path, about: tuple[Job, list[str]]) -> None:
    """Find the duplicates among the rows of all parts; a file a part says which of its rows go."""
    job, names = about
    tidy = [folder / "tidy" / name for name in names]
    parts = [duplicates.read_marks(part) for part in tidy]
    found = duplicates.find(parts, job.settings)
    places = np.concatenate([np.load(part / "places.npy") for part in tidy])
    firsts = np.cumsum([0, *(len(part.text) for part in parts)])
    for number in range(len(names)):
        of_part = {}
        for row in range(firsts[number], firsts[number + 1]):
            if twin := found.twins.get(row):
                file, line = places[twin.kept].tolist()
                of_part[row - firsts[number]] = {"like": job.files[file], "like_line": line, "similarity": twin.similarity}
        write_json(out / f"{number:05}.json", {str(row): twin for row, twin in of_part.items()})
    shown = sorted((twin for twin in found.twins.values() if twin.similarity is not None), key=lambda twin: (twin.similarity, twin.row))
    shown = shown[:PAIRS]
    paired = {row for twin in shown for row in (twin.row, twin.kept)}
    wanted = paired | {row for group in found.contradictions for row in group}
    views = dict(_views(tidy, firsts.tolist(), wanted))
    texts = {row: hidden(found.text, job.settings.personal) for row, found in views.items() if row in paired}
    pairs = [{"similarity": twin.similarity, "kept": texts[twin.kept][:SHOWN], "removed": texts[twin.row][:SHOWN]} for twin in shown]
    write_json(out / "about.json", {"pairs": pairs, "not_compared": found.not_compared, "contradictions": len(found.contradictions)})
    with (out / "contradictions.jsonl").open("w", encoding="utf-8") as stream:
        for group in found.contradictions:
            stream.write(json.dumps(_contradiction(group, views, places, job), ensure_ascii=False) + "\n")


def _contradiction(group: list[int], views: dict[int, View], places: duplicates.Numbers, job: Job) -> dict[str, Any]:
    """Return a prompt with the rows that answer it in different ways."""
    rows = []
    for row in group:
        file, line = places[row].tolist()
        rows.append({"file": job.files[file], "line": line, "answer": hidden("\n".join(views[row].answers), job.settings.personal)})
    return {"prompt": hidden(views[group[0]].prompt, job.settings.personal), "rows": rows}


def _views(parts: list[Path], firsts: list[int], wanted: set[int]) -> Iterator[tuple[int, View]]:
    """Yield what some rows say, by their number."""
    for part, first, end in zip(parts, firsts, firsts[1:], strict=False):
        here = {row for row in wanted if first <= row < end}
        if here:
            for row, item in enumerate(read_items(part / "kept.rows"), first):
                if row in here:
                    yield row, view(parsed(item).row, item.layout)


def _select(folder: Path, out: Path, about: tuple[Job, int]) -> None:
    """Leave out the duplicates of a part, and then what the steps on single rows take."""
    job, number = about
    notes, kept, views = Notes(list(job.files), job.settings.personal), [], []
    twins = json.loads((folder / "twins" / "all" / f"{number:05}.json").read_text())
    part = sorted((folder / "tidy").iterdir())[number]
    for row, item in enumerate(read_items(part / "kept.rows")):
        parsed(item)
        if twin := twins.get(str(row)):
            step = "exact" if twin["similarity"] is None else "near"
            words = "has the same text as" if step == "exact" else f"has a similarity of {twin['similarity']:.3f} with"
            notes.remove(item, step, f"{words} line {twin['like_line']} of {Path(twin['like']).name}", **twin)
            continue
        if (found := _judged(item, job.settings, notes, folder)) is not None:
            kept.append(item)
            views.append(found)
    if sets.chooses(job.settings):
        sets.write_keys(out, kept, views, job)
    else:
        for item, found in zip(kept, views, strict=True):
            notes.stays(job.names[item.file], found)
    write_items(out / "kept.rows", kept)
    notes.write(out)


def _judged(item: Item, settings: Settings, notes: Notes, folder: Path) -> View | None:
    """Mask a row and hold it against the filters; return what it says, None where it is removed."""
    if settings.personal:
        before = item.raw
        if (masked := mask(item, settings.personal)) is not None:
            is_removed, kinds = masked
            if is_removed:
                notes.remove(item, "personal", kinds)
                return None
            notes.change(item, "personal", kinds, before)
    found = view(item.row, item.layout)
    for step, judge in FILTERS.items():
        asked = getattr(settings, step)
        if asked is not None and (reason := judge(item, found, asked)) is not None:
            notes.remove(item, step, reason)
            return None
    if (asked := settings.decontaminate) is not None:
        index = contamination.index_of(folder / "index" / "all", asked.words, asked.least_words)
        if (overlap := index.overlap(found)) is not None:
            notes.remove(item, "decontaminate", overlap[0], **overlap[1])
            return None
    return found


def _index(folder: Path, out: Path, about: Decontaminate) -> None:
    contamination.write_index(about, out)


def _about(job: Job, folder: Path, names: list[str]) -> dict[str, Any]:
    """Return what the report shows."""
    total = merged([folder / stage / name for stage in STAGES for name in names if (folder / stage).is_dir()])
    twins = json.loads((folder / "twins" / "all" / "about.json").read_text())
    sources = {
        name: {
            "before": total["tallies"].get("source before", {}).get(name, 0),
            "after": total["tallies"].get("source after", {}).get(name, 0),
        }
        for name in job.names
    }
    steps = {
        name: {
            "removed": sum(total["counts"]["removed"].get(name, {}).values()),
            "changed": sum(total["counts"]["changed"].get(name, {}).values()),
        }
        for name, settings in vars(job.settings).items()
        if settings is not None
    }
    return {
        "rows": {when: sum(counts[when] for counts in sources.values()) for when in ("before", "after")},
        "steps": steps,
        "reasons": total["counts"],
        "sources": sources,
        "tallies": total["tallies"],
        "examples": total["examples"],
        **twins,
        "sets": try_json(folder / "choose" / "all" / "about.json"),
    }


def kept(folder: Path) -> Iterator[tuple[str, Item]]:
    """Yield the set and the row of all that stay, in the order of the input; the set is `rows` where there is no split."""
    placed = folder / "place"
    for part in sorted((placed if placed.is_dir() else folder / "select").iterdir()):
        names = json.loads((part / "sets.json").read_text())["sets"] if placed.is_dir() else None
        for row, item in enumerate(read_items(part / "kept.rows")):
            yield (names[row] if names else "rows"), item


def aside(folder: Path, name: str) -> Iterator[bytes]:
    """Yield the lines of what was `removed` or `changed`, a stage after the other."""
    for stage in STAGES:
        for part in sorted((folder / stage).iterdir()) if (folder / stage).is_dir() else ():
            yield (part / f"{name}.jsonl").read_bytes()


def scores(job: Job, folder: Path) -> Iterator[bytes]:
    """Yield a line for each row that has a score: where it was found, and the score."""
    for part in sorted((folder / "score").iterdir()):
        for item, score in zip(read_items(folder / "select" / part.name / "kept.rows"), np.load(part / "scores.npy").tolist(), strict=True):
            if score == score:
                yield json.dumps({"file": job.files[item.file], "line": item.line, "score": score}, ensure_ascii=False).encode() + b"\n"
