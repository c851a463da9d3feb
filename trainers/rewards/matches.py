"""Whether an answer says what its reference says: pure functions of strings. No torch."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from trainers.data.reasoning import answer_of

NUMBER = re.compile(r"(?:(?<![\w.])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A minus belongs to a number unless it follows another one."""


def extract(text: str, how: str) -> str | None:
    """Return what of a text is compared, in one spelling; None where it is not there.

    `hashes` is the number after the last ####, as GSM8K ends its answers; `number` the last number; `whole` everything; else the first
    group of a regular expression's last match. `auto` must have been decided before: by `resolve`.
    """
    if how == "whole":
        return " ".join(text.split()).casefold() or None
    if how == "hashes":
        _, found, behind = text.rpartition("####")
        numbers = NUMBER.findall(behind.split("\n")[0]) if found else []
        return _canonical(numbers[0]) if numbers else None
    if how == "number":
        numbers = NUMBER.findall(text)
        return _canonical(numbers[-1]) if numbers else None
    groups = [match.group(1) for match in re.finditer(how, text)]
    return _canonical(" ".join((groups[-1] or "").split())) if groups else None


def resolve(how: str, reference: str) -> str:
    """Return the way that `auto` takes for a reference: `hashes` where it has a number after ####, else `whole`."""
    if how != "auto":
        return how
    return "hashes" if extract(reference, "hashes") is not None else "whole"


def _canonical(text: str) -> str:
    """Return one spelling of a number, so that $1,200.50 is 1200.5; other texts without regard to case."""
    try:
        number = Decimal(text.replace(",", "").replace("$", ""))
        return f"{number.normalize() + 0:f}"  # + 0: there is a -0
    except InvalidOperation:
        return text.casefold()


def exact_match(answer: str, reference: str, how: str = "auto") -> float | None:
    """Return 1.0 where answer and reference have the same extract after their reasoning, else 0.0; None where the reference has none."""
    reference = answer_of(reference)
    how = resolve(how, reference)
    wanted = extract(reference, how)
    return None if wanted is None else float(extract(answer_of(answer), how) == wanted)
