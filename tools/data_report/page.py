"""The report on rows as one HTML page."""

from __future__ import annotations

from html import escape
from typing import Any

from tools.data_report import say
from tools.page import charts, document, examples, said, side_by_side, table

PARTS = {
    "format": "rows that cannot be trained on",
    "syntax": "blocks that do not parse",
    "truncated": "answers that end in the middle",
    "repetition": "answers that repeat their words",
    "refusals": "refusals",
    "boilerplate": "answers that begin as language models do",
    "personal": "personal data, masked here",
}


def page(report: dict[str, Any]) -> str:
    """Return the page."""
    found = say.findings(report)
    prepared = report.get("prepared") or {}
    lines = [[one.part, "look" if one.is_off else "", one.words] for one in found]
    parts = [
        said([one.words for one in found if one.is_off]),
        table("Checklist", ["part", "", "finding"], lines, "words"),
        charts("Plots", _plots(report, prepared)),
        side_by_side(
            "Near copies",
            "The pairs that are least alike of those that are nearly the same.",
            _pairs(report["pairs"], "earlier row", "row"),
        ),
        side_by_side(
            "Held out and trained",
            "Held-out documents that are nearly trained ones.",
            _pairs(prepared.get("leaked", []), "trained", "held out"),
        ),
        examples("Faults", [(PARTS[kind], [_example(row) for row in rows]) for kind, rows in report["examples"].items()]),
        examples("Rows to read", [(f"{row['file']}, line {row['line']}", _row(row)) for row in report["sample"]], ACCURACY),
    ]
    parts.append(f"<h2>Made of</h2><pre>{escape(chr(10).join(report['given']))}</pre>")
    return document(f"Data report: {report['name']}", say.headline(report), parts)


ACCURACY = "Whether answers are right no program can say: let somebody read these who knows the field."


def _plots(report: dict[str, Any], prepared: dict[str, Any]) -> list[tuple[str, str, list[tuple[str, list[int]]]]]:
    lengths = [(f"{name} length", "rows by characters", say.in_ranges(found["bits"])) for name, found in report["lengths"].items()]
    scripts = [(name, [count]) for name, count in list(report["tallies"].get("script", {}).items())[:8]]
    sources = [(name[-22:], [count]) for name, count in list(report["tallies"].get("source", {}).items())[:12]]
    openings = [(one["text"][:22], [one["answers"]]) for one in report["openings"]]
    return [
        *lengths,
        (
            "document length",
            f"trained documents by tokens; a row has {prepared.get('seq_len', 0):,}",
            say.in_ranges(prepared.get("token_bits", {})),
        ),
        ("openings", "the most frequent first words of answers", openings),
        ("scripts", "rows by the script of most letters", scripts),
        ("sources", "rows by file", sources if len(sources) > 1 else []),
    ]


def _pairs(pairs: list[dict[str, Any]], one: str, other: str) -> list[tuple[str, list[tuple[str, str]]]]:
    return [(f"similarity {pair['similarity']:.3f}", list(zip((one, other), pair["texts"], strict=True))) for pair in pairs]


def _example(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["reason"], f"{row['file']}, line {row['line']}", row["text"]


def _row(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    names = ["answer"] if len(row["answers"]) == 1 else ["chosen", "rejected"]
    return [
        ("prompt" if row["answers"] else "text", "", row["prompt"]),
        *((name, "", answer) for name, answer in zip(names, row["answers"], strict=False)),
    ]
