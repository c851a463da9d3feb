"""A comparison as one HTML page: everything inside, no script, no network; for a laptop's screen and for paper."""

from __future__ import annotations

import re
import time
from html import escape
from pathlib import Path
from typing import Any

from tools.compare import say
from tools.compare.gather import Run
from tools.compare.methods import Comparison, Method
from tools.compare.plots import look, pictures
from tools.evaluate.say import MARKS
from tools.markdown import without_folders

SHOWN, OPEN = 12, 2
"""Prompts whose answers are put side by side, and those of them that are unfolded, on paper too."""
LONGEST = 1200
"""Characters of a prompt or an answer that are shown."""
POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
"""Nothing runs and nothing is fetched, should a name or an answer have got past `escape`."""
STYLE = Path(__file__).with_name("page.css")


def page(comparison: Comparison, arguments: list[str]) -> str:
    """Return the page; `arguments` are those of the command that makes it."""
    parts = [
        f"<h1>{escape(comparison.title)}</h1>",
        f'<p class="sub">{escape(_about(comparison))}</p>',
        _conclusions(comparison),
        _listed("Not compared", "flag", say.flags(comparison)),
        *(table(grid) for grid in say.grids(comparison)),
        _plots(comparison),
        _answers(comparison),
        _listed("Notes", "note", say.notes(comparison)),
        _reading(comparison),
        _runs(comparison),
        f'<p class="legend">Made by <code>python -m tools.compare {escape(" ".join(arguments))}</code> on {time.strftime("%Y-%m-%d")}.</p>',
    ]
    return document(comparison.title, parts)


def document(name: str, parts: list[str]) -> str:
    """Return a whole page of parts that are HTML; empty ones are left out."""
    title = f"<title>{escape(name)}</title>"
    head = f'<meta charset="utf-8">{POLICY}<meta name="viewport" content="width=device-width, initial-scale=1">{title}'
    style = f"<style>{STYLE.read_text('utf-8')}</style>"
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head>\n<body>\n{body}\n</body></html>\n'


def _about(comparison: Comparison) -> str:
    """Say in a line what was trained on what."""
    if not comparison.methods:
        return "no run can be compared"
    run = comparison.methods[0].best
    data = run.manifest.get("data", {})
    held_out = data.get("splits", {}).get("eval", {})
    parts = [
        without_folders(str(run.config.get("model.id") or "random weights").removesuffix("/export")),
        f"{run.summary.get('steps') or 0:,} steps",
        f"{run.summary.get('tokens') or 0:,} trained tokens each",
        f"{run.summary.get('world_size')} {'GPUs' if run.is_on_gpu else 'CPU ranks'}",
    ]
    parts += [f"{held_out['documents']:,} held-out documents"] if held_out else []
    return " · ".join(parts)


def _conclusions(comparison: Comparison) -> str:
    said = say.conclusions(comparison)
    return f'<ul class="said">{"".join(map(_item, said))}</ul>' if said else ""


def _item(line: str) -> str:
    label, colon, rest = escape(line).partition(": ")
    return f"<li><b>{label}</b>{colon}{rest}</li>"


def table(grid: say.Grid) -> str:
    """Return a table; intervals are small, below their value."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in grid.heads)
    lines = []
    for number, line in enumerate(grid.lines):  # a line a method, in their order
        colour = look(number)[0]
        first = f'<td><span class="key" style="background:{colour}"></span>{escape(line[0])}</td>'
        lines.append(f"<tr>{first}{''.join(map(_cell, line[1:]))}</tr>")
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<h2>{escape(grid.title)}</h2><div class="wide"><table>{body}</table></div>'


def _cell(text: str) -> str:
    figure, bracket, ends = text.partition(" [")
    kind = {MARKS["better"]: "good", MARKS["worse"]: "bad"}.get(figure[:1], "")
    small = f"<small>[{escape(ends)}</small>" if bracket else ""
    return f'<td class="{kind}">{escape(figure)}{small}</td>' if kind else f"<td>{escape(figure)}{small}</td>"


def _plots(comparison: Comparison) -> str:
    found = pictures(comparison) if comparison.methods else []
    figures = [
        f"<figure>{picture.svg}<figcaption><b>{escape(picture.title)}</b>{escape(picture.words)}</figcaption></figure>" for picture in found
    ]
    return f'<h2>Pictures</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def _answers(comparison: Comparison) -> str:
    """Put the base's and each method's answer to the same prompts side by side, those documents first that they do differently at."""
    known = [method for method in comparison.methods if method.best.ours is not None and method.best.ours.answers]
    if not known:
        return ""
    by_method = {method.label: _by_document(method.best.ours) for method in known}
    base = _by_document(comparison.base)
    shared = [document for document in by_method[known[0].label] if all(document in rows for rows in by_method.values())]
    spread = enumerate(_spread(shared, by_method, comparison.metric))
    boxes = [_box(document, by_method, base, comparison.metric, is_open=place < OPEN) for place, document in spread]
    words = f"{len(boxes)} of {len(shared)} prompts, those first whose scores lie furthest apart; all are in RUN/evaluation/run.jsonl."
    return f'<h2>Answers</h2><p class="legend">{words}</p>{"".join(boxes)}'


def _by_document(evaluation: Any) -> dict[int, dict[str, Any]]:
    return {} if evaluation is None else {row["document"]: row for row in evaluation.answers}


def _spread(documents: list[int], by_method: dict[str, dict[int, dict[str, Any]]], metric: str | None) -> list[int]:
    """Return documents by how far the methods' scores lie apart, the first SHOWN."""

    def apart(document: int) -> float:
        scores = [rows[document]["scores"].get(metric) or 0.0 for rows in by_method.values()]
        return min(scores) - max(scores)

    return sorted(documents, key=apart)[:SHOWN]


def _box(
    document: int, by_method: dict[str, dict[int, dict[str, Any]]], base: dict[int, dict[str, Any]], metric: str | None, is_open: bool
) -> str:
    rows = {label: found[document] for label, found in by_method.items()}
    first = next(iter(rows.values()))
    lines: list[tuple[str, str, dict[str, Any] | None]] = [("prompt", first["prompt"], None), ("reference", first["reference"], None)]
    lines += [("base", base[document]["answer"], base[document])] if document in base else []
    lines += [(label, row["answer"], row) for label, row in rows.items()]
    cells = "".join(f"<dt>{escape(name)}{_score_of(row, metric)}</dt><dd>{shown(text)}</dd>" for name, text, row in lines)
    title = " ".join(first["reference"].split())
    summary = f"<summary>{escape(title[:110])}{'...' if len(title) > 110 else ''}</summary>"
    return f'<details{" open" if is_open else ""}>{summary}<dl class="answers">{cells}</dl></details>'


def _score_of(row: dict[str, Any] | None, metric: str | None) -> str:
    score = None if row is None else row["scores"].get(metric)
    unfinished = "" if row is None or row["finished"] else ", cut"
    return "" if score is None else f" <small>({score:.2f}{unfinished})</small>"


def shown(text: str) -> str:
    """Return a prompt or an answer as HTML, its first LONGEST characters."""
    text = re.sub(r"\n\s*\n", "\n", text.strip())
    return escape(text[:LONGEST]) + (" ..." if len(text) > LONGEST else "") if text else "<i>nothing</i>"


def _listed(title: str, kind: str, lines: list[tuple[str, list[str]]]) -> str:
    boxes = [f'<div class="{kind}"><b>{escape(name)}</b>: {escape("; ".join(reasons))}</div>' for name, reasons in lines]
    return f"<h2>{title}</h2>{''.join(boxes)}" if boxes else ""


def _reading(comparison: Comparison) -> str:
    return f'<h2>How to read this</h2><ul class="legend">{"".join(f"<li>{escape(line)}</li>" for line in say.legend(comparison))}</ul>'


def _runs(comparison: Comparison) -> str:
    """List all runs with the command that each was started by."""
    best: dict[str, Method] = {method.best.name: method for method in comparison.methods}
    lines = "".join(
        f"<tr><td>{escape(run.name)}</td><td>{escape(_kind(run, best))}</td><td>{_command(run)}</td></tr>" for run in comparison.runs
    )
    return f'<h2>Runs</h2><table class="runs"><tbody>{lines}</tbody></table>'


def _kind(run: Run, best: dict[str, Method]) -> str:
    return "not compared" if run.faults else best[run.name].label if run.name in best else "another rate"


def _command(run: Run) -> str:
    words = [str(word) for word in run.manifest.get("command", [])]
    words = ["python" if at == 0 else word for at, word in enumerate(words)]  # not where an interpreter lies on somebody's disk
    return f"<code>{escape(' '.join(words))}</code>"
