"""What the steps take and change, kept aside a row at a time, and counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.curate.config import Personal
from tools.curate.languages import script
from tools.curate.personal import hidden
from tools.curate.rows import Item, View
from trainers.rundir.files import write_json

EXAMPLES = 4
"""Of a step that are shown."""
SHOWN = 600
"""Characters of a row that are shown."""
DETAIL = re.compile(r"[0-9]+|'[^']*'|\"[^\"]*\"|`[^`]*`")


@dataclass
class Notes:
    """Of one part of a stage: rows that were removed and changed, as lines of JSON, and their counts."""

    names: list[str]
    """Of the input files."""
    personal: Personal | None = None
    """What examples are masked by."""
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, Counter[str]]] = field(default_factory=lambda: {"removed": {}, "changed": {}})
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tallies: dict[str, Counter[str]] = field(default_factory=dict)
    """Rows by something else: length, source, language."""

    def remove(self, item: Item, step: str, reason: str, **more: object) -> None:
        """Keep a row that a step takes."""
        about = {"file": self.names[item.file], "line": item.line, "step": step, "reason": reason} | more
        self.removed.append(json.dumps(about | {"row": item.row or item.raw.decode(errors="replace")}, ensure_ascii=False))
        self._count("removed", step, reason)
        self._show(step, about, item)

    def change(self, item: Item, step: str, reason: str, before: bytes) -> None:
        """Keep what a row was before a step changed it; the row has what it is now."""
        about = {"file": self.names[item.file], "line": item.line, "step": step, "reason": reason}
        self.changed.append(json.dumps(about | {"before": json.loads(before), "after": item.row}, ensure_ascii=False))
        self._count("changed", step, reason)
        self._show(step, about, item)

    def tally(self, name: str, value: str) -> None:
        """Count a row."""
        self.tallies.setdefault(name, Counter())[value] += 1

    def lengths(self, found: View, when: str) -> None:
        """Count a row by the lengths of its parts, `before` or `after`."""
        for name, size in (("prompt", len(found.prompt)), ("answer", sum(map(len, found.answers)))):
            self.tally(f"{name} length {when}", str(size.bit_length()))

    def stays(self, source: str, found: View) -> None:
        """Count a row that stays."""
        self.tally("source after", source)
        self.tally("script after", script(found.text))
        self.lengths(found, "after")

    def _count(self, kind: str, step: str, reason: str) -> None:
        self.counts[kind].setdefault(step, Counter())[DETAIL.sub("_", reason)[:100]] += 1

    def _show(self, step: str, about: dict[str, Any], item: Item) -> None:
        shown = self.examples.setdefault(step, [])
        if len(shown) < EXAMPLES:
            shown.append(about | {"text": hidden(item.raw.decode(errors="replace"), self.personal)[:SHOWN]})

    def write(self, folder: Path) -> None:
        """Write them next to what the part has made; half of a surrogate pair, which no file takes, is written as `?`."""
        for name, lines in (("removed", self.removed), ("changed", self.changed)):
            (folder / f"{name}.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode(errors="replace"))
        write_json(folder / "notes.json", {"counts": self.counts, "examples": self.examples, "tallies": self.tallies})


def merged(folders: list[Path]) -> dict[str, Any]:
    """Return the counts and the first examples of several parts, in their order."""
    total: dict[str, Any] = {"counts": {"removed": {}, "changed": {}}, "examples": {}, "tallies": {}}
    for folder in folders:
        found = json.loads((folder / "notes.json").read_text())
        for kind, steps in found["counts"].items():
            _add(total["counts"][kind], steps)
        _add(total["tallies"], found["tallies"])
        for step, shown in found["examples"].items():
            total["examples"][step] = (total["examples"].get(step, []) + shown)[:EXAMPLES]
    return total


def _add(total: dict[str, dict[str, int]], found: dict[str, dict[str, int]]) -> None:
    for name, counts in found.items():
        total[name] = dict(Counter(total.get(name, {})) + Counter(counts))
