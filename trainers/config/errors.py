"""The error of a setting that cannot work, and the words that messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(Exception):
    """A setting that cannot work: names the field, its value, the reason and the remedy."""

    def __init__(self, path: str, value: object, reason: str, remedy: str = "") -> None:
        """Keep the parts; the launcher adds where the value was set."""
        self.path, self.value, self.reason, self.remedy = path, value, reason, remedy
        super().__init__(f"`{path}` = {value!r}: {reason}" + (f"\n  remedy: {remedy}" if remedy else ""))

    def parts(self) -> dict[str, str]:
        """Return what another process makes the same error of: ConfigError(**parts)."""
        return {"path": self.path, "value": str(self.value), "reason": self.reason, "remedy": self.remedy}


def alike(name: str, names: Iterable[str], most: int = 3, least: float = 0.6) -> list[str]:
    """Return up to `most` names that are spelt like a wrong one, the nearest first; `least` is difflib's ratio of equal letters."""
    return difflib.get_close_matches(name, list(dict.fromkeys(names)), most, least)


def did_you_mean(name: str, names: Iterable[str], most: int = 1) -> str:
    """Return a remedy that names what is spelt alike, or nothing."""
    close = alike(name, names, most)
    return f"did you mean {', '.join(close)}?" if close else ""


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: 1 rank, 2 ranks, 1 process, 1,000 processes."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count:,} {noun}{ending}"
