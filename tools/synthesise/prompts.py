"""Prompts are files: prompts/LANGUAGE/NAME.txt, with $names for what is put in."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from trainers.cache import content_key
from trainers.config.errors import ConfigError

FOLDER = Path(__file__).parent / "prompts"
LIST = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(.*)$")
"""A line of a list: with a number, or a dash."""


class Prompts:
    """The prompts of one language; those of one's own folder come first."""

    def __init__(self, language: str, own: str | None) -> None:
        """Find the folder; raises ConfigError where there is none."""
        self.folders = [*([Path(own)] if own else []), FOLDER / language]
        if own and not Path(own).is_dir():
            raise ConfigError("prompts", own, "no such folder", f"a folder with files named as in {FOLDER / language}")

    def text(self, name: str) -> str:
        """Return a file's text without blanks at its ends."""
        return next(file for folder in self.folders if (file := folder / name).is_file()).read_text("utf-8").strip()

    def fill(self, name: str, **values: object) -> str:
        """Return a prompt with the values in it; raises ConfigError for a $name that there is no value for."""
        try:
            return Template(self.text(f"{name}.txt")).substitute({key: str(value) for key, value in values.items()})
        except (KeyError, ValueError) as error:
            known = ", ".join(f"${key}" for key in values)
            raise ConfigError("prompts", f"{name}.txt", f"has a name without a value: {error}", f"names are {known}; $$ is a $") from None

    def lines(self, name: str, own: str | None, path: str) -> list[str]:
        """Return the lines of a list, one's own or ours, without comments; raises ConfigError for one that cannot be read."""
        try:
            text = self.text(f"{name}.txt") if own is None else Path(own).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(path, own, f"cannot be read: {error}", "a text file with an entry a line") from None
        found = [line.strip() for line in text.splitlines()]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise ConfigError(path, own, "lists nothing", "an entry a line")
        return found

    @property
    def key(self) -> str:
        """Return what identifies all files."""
        names = sorted({file.name for folder in self.folders for file in folder.iterdir() if file.is_file()})
        return content_key(*((name, self.text(name)) for name in names))


def listed(text: str, most: int) -> list[str]:
    """Return the entries of a numbered or dashed list, at most so many; lines without a mark continue an entry."""
    found: list[list[str]] = []
    for line in text.splitlines():
        mark = LIST.match(line)
        if mark:
            found.append([mark[1]])
        elif found and line.strip():
            found[-1].append(line.strip())
    entries = [" ".join(" ".join(parts).split()).strip() for parts in found]
    return [entry for entry in entries if entry][:most]


def marked(text: str, *marks: str) -> list[str] | None:
    """Return what follows each of some marks that begin a line, such as `Question:`, in their order; None where one is missing.

    A mark may be several words, divided by |: whichever is there counts.
    """
    found, at = [], 0
    ends: list[tuple[int, int]] = []
    for mark in marks:
        names = "|".join(map(re.escape, mark.split("|")))
        place = re.compile(rf"^[ \t*#]*(?:{names})[ \t*]*[:：][ \t*]*", re.MULTILINE | re.IGNORECASE).search(text, at)
        if place is None:
            return None
        ends.append(place.span())
        at = place.end()
    for number, (_, start) in enumerate(ends):
        end = ends[number + 1][0] if number + 1 < len(ends) else len(text)
        found.append(text[start:end].strip())
    return found
