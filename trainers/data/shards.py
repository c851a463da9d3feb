"""What a stream keeps of its shards: where they are, how many rows each has, and what became of the rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainers.config.schema import RunConfig
from trainers.data.parts import LeftOut
from trainers.rundir.files import try_row

FOLDER, INDEX, WANTED, ERROR, PROGRESS = "stream", "index.jsonl", "wanted.json", "error.json", "progress.json"
"""In a run directory, and in that: a line a shard, what the ranks read, why the process ahead has ended, and what it has read."""
POLL_S = 0.05


def folder_of(config: RunConfig, name: str) -> Path:
    """Return where a run keeps the shards of the data that are prepared as `name`."""
    return Path(config.run_dir) / FOLDER / name


def shard_folder(folder: Path, number: int) -> Path:
    """Return where a shard is while it is needed."""
    return folder / f"data-{number:06d}"


@dataclass(frozen=True)
class Totals:
    """What became of rows."""

    counts: Counter[str] = field(default_factory=Counter)
    left_out: LeftOut = field(default_factory=LeftOut)

    def __add__(self, other: Totals) -> Totals:
        """Return what became of these rows and of those that come after them."""
        left_out = LeftOut()
        left_out.update(self.left_out)
        left_out.update(other.left_out)
        return Totals(self.counts + other.counts, left_out)


@dataclass(frozen=True)
class Shard:
    """What the index keeps of a shard."""

    rows: int
    """Packed rows; 0 where nothing of it is trained."""
    read: int
    """Rows of the data."""
    files: dict[str, int]
    """Of these, in each file."""
    is_last: bool
    """The data end with it."""


class Index:
    """The shards that have been prepared so far, in their order; a line that is not whole is not read."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self.file, self.at, self.shards, self.totals = folder / INDEX, 0, list[Shard](), Totals()

    def refresh(self) -> list[Shard]:
        """Read what is new, and return all."""
        if self.file.exists():
            with self.file.open("rb") as stream:
                stream.seek(self.at)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    self.at += len(line)
                    row = try_row(line.decode("utf-8", "replace"))
                    if row is not None and row.pop("number", None) == len(self.shards):
                        counts, left_out = Counter(row.pop("counts")), row.pop("left_out")
                        kept = LeftOut(Counter(left_out["rows"]), Counter(left_out["missing"]), left_out["first"])
                        self.totals += Totals(counts, kept)
                        self.shards.append(Shard(**row))
        return self.shards

    def append(self, shard: Shard, totals: Totals) -> None:
        """Add a shard and what became of its rows; half a line that a killed process has left is ended first."""
        torn = self.file.exists() and self.file.stat().st_size > self.at
        kept = {name: dict(getattr(totals.left_out, name)) for name in ("rows", "missing", "first")}
        line = json.dumps({"number": len(self.shards), **asdict(shard), "counts": dict(totals.counts), "left_out": kept})
        with self.file.open("a") as stream:
            stream.write(("\n" if torn else "") + line + "\n")
        self.refresh()

    def num_shards(self) -> int | None:
        """Return the shards of one pass; None until the data have ended once."""
        return len(self.shards) if self.shards and self.shards[-1].is_last else None
