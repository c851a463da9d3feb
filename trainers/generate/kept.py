"""Answers as they arrive, in FILE.part: a stopped command continues from there, and FILE is written once it is whole. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from trainers.config.errors import ConfigError
from trainers.config.secrets import mask
from trainers.rundir.files import try_row, write_json


class Kept:
    """The answers of one command, known by `key`."""

    def __init__(self, file: Path, key: str) -> None:
        """Read what is there; raises ConfigError where it is another command's."""
        self.file, self.key = file, key
        self.part, self.about = Path(f"{file}.part"), Path(f"{file}.json")
        self.rows: dict[int, dict[str, Any]] = {}
        """By the request's key."""
        self.stream: BinaryIO | None = None
        if not file.parent.is_dir():
            raise ConfigError("--out", str(file), "its folder does not exist", f"mkdir -p {file.parent}")
        if self.part.exists():
            self._read()

    @property
    def is_whole(self) -> bool:
        """Tell whether this command has written the file already; raises ConfigError where another has."""
        if not self.file.exists():
            return False
        known = try_row(self.about.read_text("utf-8")) if self.about.exists() else None
        if known is None or known.get("key") != self.key:
            raise ConfigError("--out", str(self.file), "is there already, and holds other answers", "another --out, or remove it")
        return True

    def _read(self) -> None:
        """Read the whole lines, and drop the half one that a kill has left."""
        data = self.part.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = [row for line in whole.splitlines() if (row := try_row(line.decode("utf-8", "replace"))) is not None]
        if lines and lines[0].get("key") != self.key:
            reason = "holds answers to other prompts, of another model, or with other settings"
            raise ConfigError("--out", str(self.part), reason, "another --out, or remove it")
        if len(whole) < len(data):
            os.truncate(self.part, len(whole))
        self.rows = {row["number"]: row for row in lines[1:]}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row under its `number`."""
        if self.stream is None:
            self.stream = self.part.open("ab")
            if not self.stream.tell():
                self._write({"key": self.key})
        self._write(row)
        self.rows[row["number"]] = row

    def _write(self, row: dict[str, Any]) -> None:
        assert self.stream is not None
        self.stream.write(json.dumps(row).encode() + b"\n")
        self.stream.flush()

    def close(self) -> None:
        """Leave what is there for the next attempt."""
        if self.stream is not None:
            self.stream.close()

    def drop(self) -> None:
        """Forget what is there."""
        self.close()
        self.part.unlink(missing_ok=True)

    def finish(self, about: dict[str, Any], shown: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Write the file in the order of the requests, and what is known of it next to it; `shown` gives a row of it, None for none."""
        found = (shown(self.rows[number]) for number in sorted(self.rows))
        self.write(about, (row for row in found if row is not None))

    def write(self, about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
        """Write rows as the file, and what is known of it next to it, without secrets; forget the answers."""
        self.close()
        staging = Path(f"{self.file}.tmp")
        with staging.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            stream.flush()
            os.fsync(stream.fileno())
        write_json(self.about, {"key": self.key} | mask(about))
        staging.rename(self.file)
        self.part.unlink(missing_ok=True)
