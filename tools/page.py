"""A report as one HTML page that opens offline: everything inside, no script, no network; its parts, for a screen and for paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
"""Nothing runs and nothing is fetched, should a row have got past `escape`."""
STYLE = Path(__file__).with_name("page.css")
COLOURS = ("#bbccdd", "#4477aa")
WIDTH, HEIGHT, LEFT, RIGHT = 560, 18, 150, 80


def document(title: str, sub: str, parts: Sequence[str]) -> str:
    """Return a page of parts that are HTML; empty ones are left out."""
    head = (
        f'<meta charset="utf-8">{POLICY}<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
    )
    style = f"<style>{STYLE.read_text('utf-8')}</style>"
    body = "\n".join([f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(sub)}</p>', *filter(None, parts)])
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head>\n<body>\n{body}\n</body></html>\n'


def said(lines: Sequence[str]) -> str:
    """Return what there is to know first."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines if line)
    return f'<ul class="said">{items}</ul>' if items else ""


def table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return a table under a heading; the first column is text, the others numbers, or text too in a table of the kind `words`."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    name = f' class="{kind}"' if kind else ""
    return f'<h2>{escape(title)}</h2><div class="wide"><table{name}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def charts(title: str, found: Sequence[tuple[str, str, Sequence[tuple[str, Sequence[int]]]]]) -> str:
    """Return bar charts under a heading, each of a name, words and lines of bars; those without lines are left out."""
    figures = [
        f"<figure><figcaption><b>{escape(name)}</b>{escape(words)}</figcaption>{bars(lines)}</figure>"
        for name, words, lines in found
        if lines
    ]
    return f'<h2>{escape(title)}</h2><div class="plots">{"".join(figures)}</div>' if figures else ""


def bars(lines: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Return a bar chart as SVG: for each label a bar a number."""
    most = max(max(counts) for _, counts in lines) or 1
    shapes, top = [], 0
    for label, counts in lines:
        middle = top + len(counts) * HEIGHT / 2 + 4
        shapes.append(f'<text x="{LEFT - 8}" y="{middle:g}" text-anchor="end">{escape(label)}</text>')
        for count, colour in zip(counts, COLOURS[-len(counts) :], strict=True):
            width = count / most * (WIDTH - LEFT - RIGHT)
            shapes.append(f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{HEIGHT - 2}" fill="{colour}"/>')
            shapes.append(f'<text x="{LEFT + width + 6:.1f}" y="{top + HEIGHT - 5}">{count:,}</text>')
            top += HEIGHT
        top += 8
    return f'<svg viewBox="0 0 {WIDTH} {top}" font-size="12" role="img">{"".join(shapes)}</svg>'


def span(bits: int) -> str:
    """Return the numbers of so many binary digits as a range."""
    return "0" if bits == 0 else "1" if bits == 1 else f"{1 << bits - 1:,} to {(1 << bits) - 1:,}"


def side_by_side(title: str, words: str, pairs: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Return pairs of texts under a heading, each of a summary and two named texts; the first two are open."""
    boxes = []
    for number, (summary, sides) in enumerate(pairs):
        texts = "".join(f"<div><b>{escape(name)}</b><p>{escape(text)}</p></div>" for name, text in sides)
        is_open = " open" if number < 2 else ""
        boxes.append(f'<details{is_open}><summary>{escape(summary)}</summary><div class="pair">{texts}</div></details>')
    return f'<h2>{escape(title)}</h2><p class="legend">{escape(words)}</p>{"".join(boxes)}' if boxes else ""


def examples(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, str, str]]]], words: str = "") -> str:
    """Return groups of texts under a heading, each text with what is said of it and where it is."""
    boxes = []
    for name, shown in groups:
        lines = "".join(f"<dt>{escape(about)}<small> {escape(where)}</small></dt><dd>{escape(text)}</dd>" for about, where, text in shown)
        boxes.append(f'<details open><summary>{escape(name)}</summary><dl class="answers">{lines}</dl></details>')
    legend = f'<p class="legend">{escape(words)}</p>' if words else ""
    return f"<h2>{escape(title)}</h2>{legend}{''.join(boxes)}" if boxes else ""
