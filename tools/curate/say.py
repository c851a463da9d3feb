"""The report of a curation in words and tables."""

from __future__ import annotations

from typing import Any

from tools.page import span

REASONS = 5
"""Of a step that are listed."""


def text(report: dict[str, Any]) -> str:
    """Return the report as plain text."""
    rows = report["rows"]
    lines = [f"{rows['after']:,} of {rows['before']:,} rows stay", "", f"{'step':<16}{'removed':>10}{'changed':>10}"]
    for name, counts in report["steps"].items():
        lines.append(f"{name:<16}{counts['removed']:>10,}{counts['changed']:>10,}")
        lines += [f"  {count:>8,}  {reason}" for reason, count in reasons(report, name)]
    lines += ["", f"{'source':<30}{'rows':>10}{'stay':>10}"]
    lines += [f"{name:<30}{counts['before']:>10,}{counts['after']:>10,}" for name, counts in report["sources"].items()]
    return "\n".join([*lines, *notes(report)])


def reasons(report: dict[str, Any], step: str) -> list[tuple[str, int]]:
    """Return the most frequent reasons of a step."""
    found: dict[str, int] = {}
    for kind in ("removed", "changed"):
        for reason, count in report["reasons"][kind].get(step, {}).items():
            found[reason] = found.get(reason, 0) + count
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:REASONS]


def notes(report: dict[str, Any]) -> list[str]:
    """Return what else there is to know."""
    lines = []
    if report["contradictions"]:
        lines.append(f"{report['contradictions']:,} prompts have different answers: contradictions.jsonl")
    lines += proof(report["sets"])
    if report["not_compared"]:
        lines.append(f"{report['not_compared']:,} candidate pairs were not compared: raise near.compared, or near.characters")
    return ["", *lines] if lines else []


def proof(sets: dict[str, Any]) -> list[str]:
    """Return the sizes of the sets, and what was looked for to show that they share nothing."""
    if not sets:
        return []
    lines = ["sets: " + ", ".join(f"{name} {rows:,}" for name, rows in sets["rows"].items() if rows)]
    for kind, found in sets["proof"].items():
        lines.append(f"  {found['pairs']:,} pairs of rows with {kind}: {found['across']:,} across sets")
    if sets["not_compared"]:
        lines.append(f"  {sets['not_compared']:,} candidate pairs were not compared")
    return lines


def lengths(report: dict[str, Any], part: str) -> list[tuple[str, int, int]]:
    """Return the rows by the length of a part in characters, in powers of two: (range, before, after)."""
    before, after = (report["tallies"].get(f"{part} length {when}", {}) for when in ("before", "after"))
    sizes = sorted(int(size) for size in {*before, *after})
    if not sizes:
        return []
    spans = range(sizes[0], sizes[-1] + 1)
    return [(span(size), before.get(str(size), 0), after.get(str(size), 0)) for size in spans]
