"""A report on rows as findings: of which part of the checklist each is, what it says, and whether something is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.page import span
from trainers.config.errors import plural
from trainers.data.report import MOST_COPIES, MOST_LONG, MOST_OPENING, is_leaky, leaked_words

PARTS = ("format", "consistency", "diversity", "length", "accuracy")
MOST_FAULTY = 0.01
"""Share of rows with a fault above which it is off."""
WORDS = {
    "syntax": "have a block of code that does not parse",
    "truncated": "end in the middle",
    "repetition": "repeat their words",
    "refusals": "refuse",
    "boilerplate": "begin as language models do",
    "personal": "hold personal data",
}
OF = {"syntax": "format", "personal": "consistency", "repetition": "diversity"}


@dataclass(frozen=True)
class Finding:
    """A line of the checklist."""

    part: str
    words: str
    is_off: bool = False


def findings(report: dict[str, Any]) -> list[Finding]:
    """Return the checklist, part by part."""
    found = [*_format(report), *_faults(report), *_consistency(report), *_diversity(report), *_length(report)]
    found.append(
        Finding("accuracy", f"{plural(len(report['sample']), 'row')} to read: whether answers are right, only who knows the field can say")
    )
    return sorted(found, key=lambda finding: PARTS.index(finding.part))


def _format(report: dict[str, Any]) -> list[Finding]:
    bad, total = report["looked_at"] - report["trainable"], report["looked_at"]
    found = [Finding("format", f"{_share(bad, total)} of {plural(total, 'row')} cannot be trained on", bad > 0)]
    return [
        *found,
        Finding("format", f"layout {_counts(report, 'layout', 4)}"),
        Finding("format", f"fields {_counts(report, 'field', 12)}"),
    ]


def _faults(report: dict[str, Any]) -> list[Finding]:
    total, counts = report["trainable"], report["tallies"].get("faults", {})
    return [
        Finding(OF.get(kind, "consistency"), f"{_share(count, total)}, {plural(count, 'row')}, {words}", count > MOST_FAULTY * total)
        for kind, words in WORDS.items()
        if (count := counts.get(kind, 0))
    ]


def _consistency(report: dict[str, Any]) -> list[Finding]:
    total, answers = report["trainable"], report["lengths"]["answer"]["count"]
    count = report["contradictions"]
    found = [Finding("consistency", f"{plural(count, 'prompt')} with different answers", count > MOST_COPIES * total)]
    found.append(Finding("consistency", f"scripts {_counts(report, 'script', 5)}"))
    if report["openings"] and answers:
        first = report["openings"][0]
        share = f"{_share(first['answers'], answers)} of the answers begin with '{first['text']}'"
        found.append(Finding("consistency", share, first["answers"] > MOST_OPENING * answers))
    return found


def _diversity(report: dict[str, Any]) -> list[Finding]:
    total, copies, near = report["trainable"], report["copies"], report["near_copies"]
    words = f"{_share(copies, total)} of the rows have the text of another, {_share(near, total)} nearly (similarity of 0.8 or more)"
    found = [Finding("diversity", words, copies + near > MOST_COPIES * total)]
    found.append(Finding("diversity", f"{_share(report['same_prompt'], total)} of the rows have the prompt of another"))
    if report["distinct_pairs"] is not None:
        found.append(Finding("diversity", f"{report['distinct_pairs']:.0%} of the pairs of words of answers are different"))
    if leaked := (report.get("prepared") or {}).get("leakage"):
        found.append(Finding("diversity", leaked_words(leaked), is_leaky(leaked)))
    return found


def _length(report: dict[str, Any]) -> list[Finding]:
    found = []
    for name, lengths in report["lengths"].items():
        if lengths["count"]:
            words = ", ".join(f"{key} {value:,}" for key, value in lengths["quantiles"].items())
            found.append(Finding("length", f"characters of {'an' if name == 'answer' else 'a'} {name}: {words}"))
    if prepared := report.get("prepared"):
        for name, seen in prepared["glance"].items():
            if seen:
                where = f"{name}: " if name else ""
                words = f"{where}{_share(seen['long'], seen['texts'])} of the texts are over data.seq_len = {prepared['seq_len']:,} tokens"
                found.append(Finding("length", words, seen["long"] > MOST_LONG * seen["texts"]))
    return found


def text(report: dict[str, Any]) -> str:
    """Return the report as plain text; what is off begins with `!`."""
    lines = [headline(report)]
    for part in PARTS:
        lines += ["", part, *(f"{'!' if one.is_off else ' '} {one.words}" for one in findings(report) if one.part == part)]
    for row in report["sample"][:3]:
        lines += [
            "",
            f"{row['file']}, line {row['line']}",
            f"  > {_short(row['prompt'])}",
            *(f"  < {_short(answer)}" for answer in row["answers"]),
        ]
    if prepared := report.get("prepared"):
        lines += ["", prepared["summary"]]
    return "\n".join(lines)


def headline(report: dict[str, Any]) -> str:
    """Say how many rows there are, and of how many the report is."""
    rows, looked = report["rows"], report["looked_at"]
    off = sum(one.is_off for one in findings(report))
    drawn = f", of which {looked:,} are looked at" if looked < rows else ""
    return f"{plural(rows, 'row')}{drawn}: {plural(off, 'finding')} to look into"


def in_ranges(bits: dict[str, int]) -> list[tuple[str, list[int]]]:
    """Return counts by the number of binary digits as bars."""
    return [(span(int(size)), [count]) for size, count in bits.items()]


def _counts(report: dict[str, Any], name: str, most: int) -> str:
    counts = report["tallies"].get(name, {})
    rest = f" and {len(counts) - most} more" if len(counts) > most else ""
    return ", ".join(f"{value} {count:,}" for value, count in list(counts.items())[:most]) + rest if counts else "none"


def _short(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= 160 else f"{words[:160]} ..."


def _share(count: int, total: int) -> str:
    return f"{count / max(1, total):.1%}"
