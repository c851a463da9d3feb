"""A teacher's log-probabilities of a run's labels, which `python -m tools.logprobs` wrote: found, checked, put next to the tokens."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.batch import Batch
from trainers.cache import cache_root, changed_files
from trainers.config.errors import ConfigError
from trainers.config.objectives import TEACHER
from trainers.config.schema import ObjectiveConfig, RunConfig
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.objectives import TEACHER_IDS, TEACHER_LOGPS
from trainers.rundir import paths
from trainers.rundir.checkpoints import steps
from trainers.rundir.files import try_json

FILES = {TEACHER_IDS: "ids.npy", TEACHER_LOGPS: "logps.npy"}
"""Of each split, by signal: (labels, k) int32, and (labels, k + 1) float32 or float16."""
PREFIX = "teacher-"
COMMAND = "python -m tools.logprobs --model TEACHER with this command's settings"
LIKELIEST = 64
"""Tokens at each label where nothing says otherwise."""


def with_teacher(config: RunConfig, data: Prepared, verify: bool) -> Prepared:
    """Return the data with the teacher's log-probabilities as signals, and who it is in the report; `verify` reads every byte.

    Raises ConfigError where there are none, or of other rows, where they are damaged, or the run has begun with others.
    """
    begun = (try_json(Path(config.run_dir) / paths.MANIFEST).get("data") or {}).get("teacher") or {}
    folder = _find(config, data, begun.get("key"))
    record = try_json(folder / TEACHER)
    if record.get("data") != data.path.name:
        reason = f"is of other rows (prepared as {record.get('data')}, and this run's are {data.path.name})"
        raise ConfigError("objective.teacher", str(folder), reason, COMMAND)
    if begun and begun["key"] != record["key"] and steps(Path(config.run_dir) / paths.CHECKPOINTS):
        reason = f"has begun with another teacher ({begun['name']}, {begun['key']}), and {folder} is {record['name']}, {record['key']}"
        raise ConfigError("run_dir", config.run_dir, reason, f"objective.teacher with the first, or run_dir={config.run_dir}-new")
    if verify and (changed := changed_files(folder)):
        raise _damaged(folder, f"{', '.join(changed[:3])} is not what was written")
    report = data.report | {"teacher": {"folder": str(folder), **{name: record[name] for name in ("key", "name", "k")}}}
    tables = {
        name: _taught(table, folder, name, record["k"]) for name, table in (("train", data.train), ("eval", data.eval)) if table is not None
    }
    return replace(data, train=tables["train"], eval=tables.get("eval"), report=report)


def _find(config: RunConfig, data: Prepared, begun: str | None) -> Path:
    """Return the directory that is named, else the one that the run began with, else the only one of these rows."""
    if config.objective.teacher is not None:
        return Path(config.objective.teacher)
    root = cache_root(config.data.prepared_dir)
    found = sorted(file.parent for file in root.glob(f"{PREFIX}*/{TEACHER}") if try_json(file).get("data") == data.path.name)
    found = [folder for folder in found if folder.name == begun] or found
    if not found:
        raise ConfigError("objective.teacher", None, f"{root} has no teacher's log-probabilities of these rows ({data.path.name})", COMMAND)
    if len(found) > 1:
        several = ", ".join(f"{folder.name} ({try_json(folder / TEACHER).get('name')})" for folder in found)
        reason = f"{root} has those of several teachers: {several}"
        raise ConfigError("objective.teacher", None, reason, f"objective.teacher={found[0]}, or another of them")
    return found[0]


def _taught(table: TokenTable, folder: Path, split: str, k: int) -> TokenTable:
    labels, signals = int(table.label_starts[-1]), {}
    for (name, file), width in zip(FILES.items(), (k, k + 1), strict=True):
        try:
            signals[name] = opened(folder / split / file)
        except (OSError, ValueError) as error:
            raise _damaged(folder, f"{split}/{file} cannot be read: {error}") from error
        if signals[name].shape != (labels, width):
            raise _damaged(folder, f"{split}/{file} has {signals[name].shape} numbers, and not {(labels, width)}")
    return replace(table, signals=table.signals | signals)


def opened(file: Path) -> NDArray[Any]:
    """Memory-map one of FILES; a table without labels has nothing to map."""
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError:
        if (array := np.load(file, allow_pickle=False)).size:
            raise
    return array


def _damaged(folder: Path, reason: str) -> ConfigError:
    return ConfigError("objective.teacher", str(folder), reason, f"rm -r {shlex.quote(str(folder))}, and {COMMAND}")


def as_taught(batch: Batch, objective: ObjectiveConfig, vocab_size: int) -> Batch:
    """Return a plan's batch with as many of a teacher's log-probabilities as the run's own, without their values."""
    named = {} if objective.teacher is None else try_json(Path(objective.teacher) / TEACHER)
    k, shape = min(named.get("k", LIKELIEST), vocab_size), batch.labels.shape
    signals = {TEACHER_IDS: torch.zeros(*shape, k, dtype=torch.int32), TEACHER_LOGPS: torch.zeros(*shape, k + 1)}
    return replace(batch, signals=batch.signals | signals)
