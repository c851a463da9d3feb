"""The report of a curation as one HTML page."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from tools.curate import say
from tools.page import charts, document, examples, said, side_by_side, table


def page(report: dict[str, Any]) -> str:
    """Return the page."""
    rows = report["rows"]
    parts = [
        said(say.notes(report)),
        _steps(report),
        _sources(report),
        charts("Lengths", [(f"{part} length", "rows by characters, before and after", _lengths(report, part)) for part in PARTS]),
        _tally(report, "script after", "Scripts of the rows that stay", "script"),
        side_by_side("Near duplicates", "The pairs that are least alike of those of which one was removed.", _pairs(report)),
        examples("Examples", [(step, list(map(_example, shown))) for step, shown in report["examples"].items()]),
        f"<h2>Settings</h2><pre>{escape(report['config'])}</pre>",
    ]
    return document("Curation", f"{rows['after']:,} of {rows['before']:,} rows stay · {', '.join(report['names'])}", parts)


PARTS = ("prompt", "answer")


def _steps(report: dict[str, Any]) -> str:
    lines = []
    for name, counts in report["steps"].items():
        lines.append([name, f"{counts['removed']:,}", f"{counts['changed']:,}", ""])
        lines += [["", "", f"{count:,}", reason] for reason, count in say.reasons(report, name)]
    return table("What each step took", ["step", "removed", "changed", "most frequent reasons"], lines)


def _sources(report: dict[str, Any]) -> str:
    lines = [
        [name, f"{counts['before']:,}", f"{counts['after']:,}", f"{counts['after'] / counts['before']:.1%}" if counts["before"] else "-"]
        for name, counts in report["sources"].items()
    ]
    return table("Sources", ["source", "rows", "stay", "share"], lines)


def _tally(report: dict[str, Any], name: str, title: str, head: str) -> str:
    counts = report["tallies"].get(name, {})
    lines = [[value, f"{count:,}"] for value, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    return table(title, [head, "rows"], lines) if lines else ""


def _lengths(report: dict[str, Any], part: str) -> list[tuple[str, list[int]]]:
    return [(label, [before, after]) for label, before, after in say.lengths(report, part)]


def _pairs(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(f"similarity {pair['similarity']:.3f}", [("stays", pair["kept"]), ("removed", pair["removed"])]) for pair in report["pairs"]]


def _example(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["reason"], f"{Path(row['file']).name}, line {row['line']}", row["text"]
