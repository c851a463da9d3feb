"""Small JSON files that are never seen half-written. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that is never seen half-written."""
    staged(path, value).rename(path)


def staged(path: Path, value: object) -> Path:
    """Write a JSON file under a hidden name next to `path`, for the caller to rename; returns that name."""
    staging = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    staging.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    return staging


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where the file is absent."""
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def try_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty where the file is absent, broken or holds something else."""
    with contextlib.suppress(OSError, ValueError):
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    return {}


def try_row(line: str) -> dict[str, Any] | None:
    """Return a line of a JSON-lines file; None where it is not an object, such as the half line that a killed process leaves."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
