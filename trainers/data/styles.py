"""Rows of one meaning in several styles: each becomes rows of instruction, input and output, to another style. Pure functions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import permutations

from trainers.config.choices import StyleRows
from trainers.data.fields import CONTEXT
from trainers.data.formats import BadRow, Row


def to_rows(row: Row, styles: Sequence[str], which: StyleRows, instruction: str) -> list[Row]:
    """Return a row of layout alpaca for each pair of the row's styles in both directions, or for one that the texts alone decide.

    The fields `styles` have the texts; a row may lack some of them. `instruction` has `{style}` where the style is named that is asked
    for; where it is empty, the text alone is the prompt. A system text, tools and what else a template reads go with each.
    Raises BadRow for fewer than two texts, for one that is blank, and for two that are the same.
    """
    if not isinstance(row, dict):
        raise BadRow("is not an object with named fields")
    texts = {style: row[style] for style in styles if row.get(style) is not None}
    if len(texts) < 2:
        raise BadRow(f"has {len(texts)} of the texts {', '.join(styles)}, which data.styles names, and two are needed")
    for style, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"has `{style}` that is not a text")
    if len(set(texts.values())) < len(texts):
        raise BadRow("has the same text in two styles")
    ways = list(permutations(texts, 2))
    if which is StyleRows.one:
        digest = hashlib.blake2b("\0".join(texts.values()).encode("utf-8", "replace"), digest_size=8).digest()
        ways = [ways[int.from_bytes(digest, "little") % len(ways)]]
    context = {name: row[name] for name in CONTEXT if name in row and name not in styles}
    return [context | _asked(texts[source], target, instruction) | {"output": texts[target]} for source, target in ways]


def _asked(text: str, target: str, instruction: str) -> Row:
    """Return what asks for a text in a style."""
    if not instruction:
        return {"instruction": text}
    return {"instruction": instruction.replace("{style}", target.replace("_", " ")), "input": text}


def meaning(row: Row, styles: Sequence[str]) -> str:
    """Return all texts of a row, by which its rows are on one side of a split."""
    return "\n".join(str(row[style]) for style in styles if row.get(style) is not None)
