"""Rows that hold what a model is to be evaluated on: runs of words that an evaluation row has too, and the longest of them.

Runs of 13 words: Brown et al. 2020, arXiv 2005.14165, appendix C.
"""

from __future__ import annotations

import json
from difflib import SequenceMatcher
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.curate.config import Decontaminate
from tools.curate.rows import View, view
from tools.evaluate.scores import WORD
from trainers.config.errors import ConfigError
from trainers.data import containers
from trainers.data.formats import BadRow, recognise, strict_json

Grams = npt.NDArray[np.uint64]
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case and marks."""
    return WORD.findall(text.casefold())


@cache
def _code(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def codes_of(words: list[str]) -> Grams:
    """Return the hash of each word, (n,) uint64."""
    return np.array([_code(word) for word in words], np.uint64)


def grams(codes: Grams, size: int) -> Grams:
    """Return the hash of each run of `size` words, (n,) uint64; none for a shorter text."""
    if len(codes) < size:
        return np.zeros(0, np.uint64)
    rolled = np.zeros(len(codes) - size + 1, np.uint64)
    for at in range(size):
        rolled = (rolled ^ (rolled >> np.uint64(31))) * FACTOR + codes[at : len(codes) - size + 1 + at]
    return rolled


def write_index(settings: Decontaminate, out: Path) -> None:
    """Write the runs of words of all evaluation rows, and the rows themselves; raises ConfigError for a file that has none."""
    found: list[Grams] = []
    owners: list[npt.NDArray[np.int64]] = []
    rows: list[dict[str, Any]] = []
    for file in settings.files:
        before = len(rows)
        for data, line in containers.read(Path(file)):
            text = _text(data)
            if words := words_of(text):
                hashes = grams(codes_of(words), min(settings.words, max(len(words), settings.least_words)))
                found.append(hashes)
                owners.append(np.full(len(hashes), len(rows), np.int64))
                rows.append({"file": Path(file).name, "line": line, "words": words})
        if len(rows) == before:
            raise ConfigError("decontaminate.files", file, "holds no row with words")
    every, owner = np.concatenate(found), np.concatenate(owners)
    order = np.argsort(every, kind="stable")
    np.save(out / "grams.npy", every[order])
    np.save(out / "owners.npy", owner[order])
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _text(data: Any) -> str:
    """Return what an evaluation row says: by its layout, else all its strings."""
    try:
        row = strict_json(data.decode()) if isinstance(data, bytes) else data
        return view(row, recognise(row)).text
    except (BadRow, ValueError):
        pass
    if isinstance(data, BadRow):
        return ""
    return "\n".join(_strings(row))


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in held for text in _strings(part)]


@cache
def index_of(folder: Path, words: int, least_words: int) -> Index:
    """Return the index in a folder, read once a process."""
    return Index(folder, words, least_words)


class Index:
    """The runs of words of the evaluation rows, read from their folder."""

    def __init__(self, folder: Path, most: int, least: int) -> None:
        self.most = most
        self.grams: Grams = np.load(folder / "grams.npy")
        self.owners = np.load(folder / "owners.npy")
        self.rows = [json.loads(line) for line in (folder / "rows.jsonl").open(encoding="utf-8")]
        shorter = {len(row["words"]) for row in self.rows if len(row["words"]) < most}
        self.sizes = sorted({most, *(size for size in shorter if size >= least)})

    def overlap(self, found: View) -> tuple[str, dict[str, Any]] | None:
        """Return why a row is removed, with the evaluation row and the longest run of words that both have; None where it stays."""
        words = words_of(found.text)
        codes = codes_of(words)
        for size in self.sizes:
            hashes = grams(codes, size)
            places = np.searchsorted(self.grams, hashes)
            hits = self.grams[np.minimum(places, max(0, len(self.grams) - 1))] == hashes if len(self.grams) else np.zeros(0, bool)
            for place in np.flatnonzero(hits):
                row = self.rows[self.owners[places[place]]]
                match = SequenceMatcher(None, words, row["words"], autojunk=False).find_longest_match()
                if match.size >= min(self.most, len(row["words"])):
                    shared = " ".join(words[match.a : match.a + match.size])
                    where = f"line {row['line']} of {row['file']}"
                    return f"shares {match.size} words with {where}", {"like": row["file"], "like_line": row["line"], "overlap": shared}
        return None
