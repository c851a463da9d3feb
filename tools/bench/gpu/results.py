"""What was measured: a line a row next to the page, which is made of them again after each row."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.gpu.rows import GAIN, SECTIONS, Row
from tools.markdown import cell_of

Record = dict[str, Any]


@dataclass
class Results:
    """Records of rows by their ids, of one machine: `id`, `section`, `name`, `overrides`, `seconds`, and values or why there are none."""

    page: Path
    device: str
    about: str
    """What the page says of the machine."""
    line: str
    records: dict[str, Record] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Ids of rows that did not fit into the time."""

    @property
    def lines(self) -> Path:
        """Return where the records are kept, next to the page."""
        return self.page.with_suffix(".jsonl")

    def read(self, again: tuple[str, ...] = ()) -> None:
        """Take up what an earlier call has measured on this device; not rows whose id contains one of `again`."""
        if not self.lines.exists():
            return
        for text in self.lines.read_text("utf-8").splitlines():
            record = json.loads(text)
            if record["device"] == self.device and not any(words in record["id"] for words in again):
                self.records[record["id"]] = record

    def add(self, row: Row, overrides: tuple[str, ...], seconds: float, figures: Record) -> Record:
        """Keep a row's values, or `failed` with the reason, in both files."""
        record = {
            "id": row.id,
            "section": row.section,
            "name": row.name,
            "kind": row.kind,
            "device": self.device,
            "seconds": round(seconds, 1),
        }
        self.records[row.id] = record | {"overrides": list(overrides), **figures}
        self.write()
        return self.records[row.id]

    def write(self) -> None:
        """Write both files, each whole or as it was; records of other devices stay."""
        others = [text for text in self._old() if json.loads(text)["device"] != self.device]
        ours = [json.dumps(record) for record in self.records.values()]
        _put(self.lines, "".join(f"{text}\n" for text in [*others, *ours]))
        _put(self.page, self.markdown())

    def _old(self) -> list[str]:
        return self.lines.read_text("utf-8").splitlines() if self.lines.exists() else []

    def took(self, row: Row) -> float:
        """Return about how many seconds a row takes: the most that one of its section and kind has taken, else the estimate."""
        known = [record["seconds"] for record in self.records.values() if (record["section"], record["kind"]) == (row.section, row.kind)]
        return max(known) * 1.1 if known else row.seconds

    def best(self, rows: list[Row], path: str) -> tuple[tuple[str, ...], float]:
        """Return what a path's fastest row tried, on top of those kept before it, and its tokens a second; in the rows' order."""
        kept, fastest = (), 0.0
        for row in rows:
            speed = self.records.get(row.id, {}).get("tokens_per_second") if row.path == path else None
            if speed is not None and speed >= GAIN * fastest:
                kept, fastest = tuple(self.records[row.id].get("kept", ())), speed
        return kept, fastest

    def _ours(self) -> list[Record]:
        """Return the first and the fastest row of each path, for the table of peers."""
        found: list[Record] = []
        for path, words in {"lora": "LoRA", "full": "all parameters"}.items():
            kept = [record for record in self.records.values() if record["section"] == path and record.get("is_kept")]
            named = {f"ours, {words}, the first": kept[:1], f"ours, {words}, the fastest": kept[1:][-1:]}
            found += [_renamed(record, name) for name, records in named.items() for record in records]
        return found

    def markdown(self) -> str:
        """Return the page: what it was measured on, a table a section, what was left out, what the columns mean."""
        parts = ["# On one GPU", f"`{self.line}`", self.about]
        for section, title in SECTIONS.items():
            found = [record for record in self.records.values() if record["section"] == section]
            if found:
                found = [*(self._ours() if section == "peers" else []), *found]
                parts += [f"## {title}", "\n".join(_table(found))]
        if self.left_out:
            parts += ["## Left out", "The time did not suffice for: " + "; ".join(self.left_out) + ". The same command again continues."]
        return "\n\n".join([*parts, LEGEND]) + "\n"


def _renamed(record: Record, name: str) -> Record:
    return record | {"name": name, "is_kept": False}


def _put(file: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    staging = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    staging.write_text(text, "utf-8")
    staging.rename(file)


LEGEND = """## What the columns mean

Each row is a process of its own: our loop on random weights and packed rows of random tokens, as the settings say. The settings of a
row are in the .jsonl file next to this page. Steps that warm up do not count; values are medians of those after them. `plan : peak`
divides the bytes that a plan predicts by torch.cuda.max_memory_allocated. `loss` is the largest relative difference to the table's
first row over its steps: rounding of bf16, where both settings are right. In a table that tries settings, a row adds its own to those
of the fastest row above it; `kept` marks the rows that others are built on."""


def _table(records: list[Record]) -> list[str]:
    """Return a table's lines: the columns of which any row knows something."""
    first = next((record for record in records if record.get("tokens_per_second")), None)
    cells = [_cells(record, first) for record in records]
    titles = [title for title in cells[0] if any(row[title] for row in cells)]
    lines = [titles, ["---"] * len(titles), *([row[title] or "-" for title in titles] for row in cells)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cells(record: Record, first: Record | None) -> dict[str, str]:
    speed, peak, plan, mfu = (record.get(key) for key in ("tokens_per_second", "peak_bytes", "plan_bytes", "mfu"))
    faster = "" if first is None or speed is None or not first["tokens_per_second"] else f"{speed / first['tokens_per_second']:.2f}"
    return {
        "row": cell_of(record["name"]) + (" (kept)" if record.get("is_kept") else ""),
        "tokens/s": "" if speed is None else f"{speed:,.0f}",
        ": the first": faster,
        "MFU": "" if mfu is None else f"{mfu:.1%}",
        "a step in s": "" if (step := record.get("step_seconds")) is None else f"{step:.3f}",
        "peak, GiB": "" if not peak else f"{peak / 2**30:.2f}",
        "plan : peak": "" if not peak or not plan else f"{plan / peak:.3f}",
        "loss": _difference(record, first),
        "seconds in all": f"{record['seconds']:.0f}",
        "result": cell_of(record.get("failed") or record.get("words") or ""),
    }


def _difference(record: Record, first: Record | None) -> str:
    losses, others = record.get("losses"), (first or {}).get("losses")
    if not losses or not others or len(losses) != len(others):
        return ""
    if None in [*losses, *others]:
        return "not finite"
    worst = max(abs(ours - theirs) / max(abs(theirs), 1e-30) for ours, theirs in zip(losses, others, strict=True))
    return "0" if not worst else f"{worst:.1e}" if math.isfinite(worst) else "not finite"
