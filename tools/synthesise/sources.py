"""What a synthesis begins with: rows, documents, seed tasks or topics, each with its place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.synthesise.config import Settings
from tools.synthesise.prompts import Prompts
from trainers.config.choices import ObjectiveName
from trainers.config.derived import Source
from trainers.config.errors import ConfigError
from trainers.data import sources
from trainers.data.formats import BadRow, Message, Row, strict_json, to_text
from trainers.generate import prompts

PLAIN = (".txt", ".md")


@dataclass(frozen=True)
class Begun:
    """A row of the source: what comes before its answer, its answer (empty where it has none), and where it was found."""

    turns: list[Message]
    answer: str
    place: dict[str, Any]
    row: Row

    @property
    def instruction(self) -> str:
        """Return the text of the last turn."""
        return str(self.turns[-1].get("content") or "")


@dataclass(frozen=True)
class Document:
    """A text, and where it was found."""

    text: str
    place: dict[str, Any]


def read_rows(settings: Settings) -> list[Begun]:
    """Return the rows of the source; raises ConfigError for one that cannot be read, with its place."""
    try:
        found = prompts.read(str(settings.source), settings.split)
    except ConfigError as error:
        raise ConfigError("source" if error.path == "PROMPTS" else error.path, error.value, error.reason, error.remedy) from None
    return [Begun(one.messages, one.reference, {"file": one.file, "line": one.line}, one.row) for one in found]


def read_seeds(settings: Settings, own: Prompts) -> list[Begun]:
    """Return the seed tasks: rows of the source, or those that come with fulltune."""
    if settings.source:
        return read_rows(settings)
    lines = own.text("seeds.jsonl").splitlines()
    rows = [strict_json(line) for line in lines if line.strip()]
    return [
        Begun([{"role": "user", "content": row["instruction"]}], str(row["output"]), {"file": "seeds.jsonl", "line": number}, row)
        for number, row in enumerate(rows, 1)
    ]


def read_topics(settings: Settings, own: Prompts) -> list[str]:
    """Return the topics that a tree grows from: lines of a text file, or those that come with fulltune."""
    return own.lines("topics", settings.source, "source")


def read_documents(settings: Settings) -> list[Document]:
    """Return documents: whole .txt and .md files, and rows with `text`; raises ConfigError for a row without."""
    found = [document for document in _documents(str(settings.source), settings.split) if document.text.strip()]
    if not found:
        raise ConfigError("source", settings.source, "there are no documents", "files with text in them")
    return found


def _documents(name: str, split: str) -> Iterator[Document]:
    path = Path(name)
    files = sorted(file for file in path.rglob("*") if file.suffix in PLAIN) if path.is_dir() else [path] if path.suffix in PLAIN else []
    for file in files:
        try:
            yield Document(file.read_text("utf-8"), {"file": str(file)})
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("source", str(file), f"cannot be read: {error}", "a text file in UTF-8") from None
    if files:
        return
    for row in sources.rows(Source(name, split), ObjectiveName.cpt):
        try:
            yield Document(to_text(sources.parse(row)), {"file": row.file, "line": row.line})
        except BadRow as error:
            raise ConfigError("source", name, f"{row.file}:{row.line} {error}", "rows with `text`, or .txt and .md files") from None


def passages(document: Document, longest: int) -> Iterator[str]:
    """Yield a document's passages of at most so many characters, which end where paragraphs, lines or sentences do."""
    text = document.text.strip()
    while len(text) > longest:
        ends = [text.rfind(mark, longest // 2, longest) for mark in ("\n\n", "\n", ". ", " ")]
        end = next((at + 1 for at in ends if at > 0), longest)
        yield text[:end].strip()
        text = text[end:].strip()
    if text:
        yield text


def content_of(settings: Settings) -> str:
    """Return what identifies the content of the source: a digest of its files, or its name where it is a hub's."""
    path = Path(str(settings.source))
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] if path.is_file() else []
    digest = hashlib.sha256(str(settings.source).encode() if not files else b"")
    for file in files:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
