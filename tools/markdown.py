"""Markdown that tools write: cells of tables, names without folders, and a section put in its place in a file."""

from __future__ import annotations

import os
from pathlib import Path


def cell_of(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def without_folders(name: str) -> str:
    """Return a model's or a file's name without the folders that its machine keeps it in; one that is not an absolute path as it is."""
    path = Path(name)
    return path.name if path.is_absolute() else name


def put_section(file: Path, section: str) -> None:
    """Put a section in the place of the one with the same heading, else at the end; the file is never seen half-written."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    heading = section.splitlines()[0]
    start = lines.index(heading) if heading in lines else len(lines)
    end = next((at for at in range(start + 1, len(lines)) if lines[at].startswith(("# ", "## "))), len(lines))
    parts = ["\n".join(lines[:start]), section, "\n".join(lines[end:])]
    staging = file.resolve().with_name(f".{file.name}.{os.getpid()}.tmp")
    staging.write_text("\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n", "utf-8")
    staging.rename(file.resolve())
