"""The base that a run began with: a fingerprint of its weights, and the hub's commit, which each attempt takes again. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig, read_at
from trainers.rundir.files import try_json
from trainers.rundir.paths import MANIFEST

SAMPLE_BYTES = 1024
PLACES = (0.0, 0.5, 1.0)
"""Where in each tensor: training changes nearly all of its values."""
MOST_TENSORS = 4096
"""In a file with more, only the beginning of each is read: 100,000 experts would be too many reads of a network's file system."""
LONGEST_HEADER = 100_000_000


def base_of(config: RunConfig, folder: Path | None, commit: str | None) -> dict[str, Any]:
    """Return what tells the base of a run from another, and the adapter that it begins with: for manifest.json."""
    known = {"id": config.model.id, "asked": config.model.revision, "commit": commit}
    marks = {"weights": folder, "adapter": None if config.peft.adapter is None else Path(config.peft.adapter)}
    return known | {name: fingerprint(place) for name, place in marks.items() if place is not None}


def fingerprint(folder: Path) -> str:
    """Return a hash of a folder's safetensors files: config, index, each header and size, and bytes out of each tensor.

    A file that is damaged has one too: whoever loads it says what is wrong. Where a copy lies, and its times, change nothing.
    """
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("*config.json")]):
        if file.name == "generation_config.json" or file.name.startswith("tokenizer"):
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
        else:
            for part in _samples(file):
                digest.update(part)
    return digest.hexdigest()[:32]


def _samples(path: Path) -> Iterator[bytes]:
    """Yield a safetensors file's header, and bytes of each of its tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < LONGEST_HEADER else b""
        yield header
        try:
            spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            places = PLACES if len(spans) <= MOST_TENSORS else PLACES[:1]
            starts = sorted({8 + length + _start(begin, end, place) for begin, end in spans for place in places})
        except (ValueError, TypeError, KeyError, AttributeError):  # no safetensors file
            starts = [0]
        yield from _read(file, starts)


def _start(begin: int, end: int, place: float) -> int:
    return int(begin + place * max(0, end - begin - SAMPLE_BYTES))


def _read(file: BinaryIO, starts: list[int]) -> Iterator[bytes]:
    for start in starts:
        file.seek(start)
        yield file.read(SAMPLE_BYTES)


def pinned(config: RunConfig, run_dir: Path, second: str | None = None) -> RunConfig:
    """Return a run's config with the hub's commit that its first attempt found: a branch moves on.

    `second` names what the config is of where that is not the run's own model: "critic".
    """
    base = try_json(run_dir / MANIFEST).get("base") or {}
    base = base if second is None else base.get(second) or {}
    if base.get("commit") is None or (base["id"], base["asked"]) != (config.model.id, config.model.revision):
        return config
    return replace(config, model=replace(config.model, revision=base["commit"]))


def config_of(run_dir: Path) -> RunConfig:
    """Return the config of a run that is over, in the directory that it is in now and with the base that it was trained on."""
    return pinned(read_at(run_dir), run_dir)


def require_same_base(run_dir: Path, now: dict[str, Any]) -> None:
    """Raise ConfigError where a run began with other weights than are there now under the same name."""
    begun = try_json(run_dir / MANIFEST).get("base") or {}
    of_critic = begun.get("critic") or {}, now.get("critic") or {}
    marks = (begun, now, "weights", "model.id"), (begun, now, "adapter", "peft.adapter"), (*of_critic, "weights", "objective.critic")
    for old, new, mark, field in marks:
        if mark in old and mark in new and old[mark] != new[mark]:
            reason = f"its weights have changed since this run began ({mark} {old[mark][:12]}, now {new[mark][:12]})"
            value = "the adapter to begin with" if mark == "adapter" else new["id"]
            raise ConfigError(field, value, reason, f"put them back, or run_dir={run_dir}-new, which begins again")
