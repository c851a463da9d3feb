"""The report of a curation as one HTML page: everything inside, no script, no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from tools.curate import say

POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
"""Nothing runs and nothing is fetched, should a row have got past `escape`."""
STYLE = Path(__file__).with_name("page.css")
BEFORE, AFTER = "#bbccdd", "#4477aa"
WIDTH, HEIGHT, LEFT = 560, 18, 130


def page(report: dict[str, Any]) -> str:
    """Return the page."""
    rows = report["rows"]
    parts = [
        "<h1>Curation</h1>",
        f'<p class="sub">{rows["after"]:,} of {rows["before"]:,} rows stay · {escape(", ".join(report["names"]))}</p>',
        _said(report),
        _steps(report),
        _sources(report),
        _lengths(report),
        _tally(report, "script after", "Scripts of the rows that stay", "script"),
        _pairs(report),
        _examples(report),
        f"<h2>Settings</h2><pre>{escape(report['config'])}</pre>",
    ]
    head = f'<meta charset="utf-8">{POLICY}<meta name="viewport" content="width=device-width, initial-scale=1"><title>Curation</title>'
    style = f"<style>{STYLE.read_text('utf-8')}</style>"
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head>\n<body>\n{body}\n</body></html>\n'


def _said(report: dict[str, Any]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in say.notes(report) if line)
    return f'<ul class="said">{lines}</ul>' if lines else ""


def table(title: str, heads: list[str], lines: list[list[str]]) -> str:
    """Return a table under a heading; the first column is text, the others numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<h2>{escape(title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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


def _lengths(report: dict[str, Any]) -> str:
    found = [(part, bars) for part in ("prompt", "answer") if (bars := say.lengths(report, part))]
    charts = "".join(map(_chart, found))
    return f'<h2>Lengths</h2><div class="plots">{charts}</div>' if charts else ""


def _chart(found: tuple[str, list[tuple[str, int, int]]]) -> str:
    words = f"<b>{found[0]} length</b>rows by characters, before and after"
    return f"<figure>{_bars(found[1])}<figcaption>{words}</figcaption></figure>"


def _bars(bars: list[tuple[str, int, int]]) -> str:
    """Return a bar chart as SVG: two bars a range of lengths."""
    most = max(max(before, after) for _, before, after in bars) or 1
    shapes = []
    for number, (span, before, after) in enumerate(bars):
        top = number * (2 * HEIGHT + 8)
        shapes.append(f'<text x="{LEFT - 8}" y="{top + HEIGHT + 5}" text-anchor="end">{span}</text>')
        for at, count, colour in ((top, before, BEFORE), (top + HEIGHT, after, AFTER)):
            width = count / most * (WIDTH - LEFT - 70)
            shapes.append(f'<rect x="{LEFT}" y="{at}" width="{width:.1f}" height="{HEIGHT - 2}" fill="{colour}"/>')
            shapes.append(f'<text x="{LEFT + width + 6:.1f}" y="{at + HEIGHT - 5}">{count:,}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {len(bars) * (2 * HEIGHT + 8)}" font-size="12" role="img">{"".join(shapes)}</svg>'


def _pairs(report: dict[str, Any]) -> str:
    boxes = [_pair(pair, is_open=number < 2) for number, pair in enumerate(report["pairs"])]
    words = "The pairs that are least alike of those of which one was removed."
    return f'<h2>Near duplicates</h2><p class="legend">{words}</p>{"".join(boxes)}' if boxes else ""


def _pair(pair: dict[str, Any], is_open: bool) -> str:
    sides = "".join(f"<div><b>{name}</b><p>{escape(pair[key])}</p></div>" for name, key in (("stays", "kept"), ("removed", "removed")))
    summary = f"<summary>similarity {pair['similarity']:.3f}</summary>"
    return f'<details{" open" if is_open else ""}>{summary}<div class="pair">{sides}</div></details>'


def _examples(report: dict[str, Any]) -> str:
    boxes = []
    for step, shown in report["examples"].items():
        lines = "".join(map(_example, shown))
        boxes.append(f'<details open><summary>{escape(step)}</summary><dl class="answers">{lines}</dl></details>')
    return f"<h2>Examples</h2>{''.join(boxes)}" if boxes else ""


def _example(row: dict[str, Any]) -> str:
    where = f"{Path(row['file']).name}, line {row['line']}"
    return f"<dt>{escape(row['reason'])}<small> {escape(where)}</small></dt><dd>{escape(row['text'])}</dd>"
