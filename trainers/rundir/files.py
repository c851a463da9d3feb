"""Small JSON files that are never seen half-written, and what a file's content is known by. No torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a disk says that takes nothing more."""


def storage_says(error: OSError, folder: Path) -> str | None:
    """Say that the disk of `folder` takes nothing more, and what to do; None where an error is of another kind."""
    if error.errno not in STORAGE:
        return None
    what = f"{os.strerror(error.errno)}: {error.filename or folder}"
    return f"{what}. Checkpoints that are complete stay. Make room there, and give the same command again"


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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
