"""What the model that training begins with says of each answer: measured once, before the first step, and read from then on."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.batch import Needs, by_document
from trainers.cache import build_once, cache_root, changed_files, content_key
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig, plain
from trainers.data.loader import deal, make_batch
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.health.activity import watch
from trainers.objectives import REFERENCE
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.beats import Phase
from trainers.rundir.checkpoints import steps
from trainers.rundir.files import try_json, write_json
from trainers.world import Stopped, World

log = logging.getLogger("fulltune")
RECORD = "reference.json"
"""In the folder: the key of what was measured."""
SUM_AT_ONCE = 1 << 16
VERSION = 1
"""Of what is measured: raise it when the numbers come out differently."""


def with_reference(
    config: RunConfig, world: World, attempt: Attempt, engine: Engine, data: Prepared, base: dict[str, Any], pad_id: int
) -> Prepared:
    """Return the data with each document's summed log-probability under the model as it is now, before its first step; collective.

    They are in RUN_DIR/reference, where a continued run reads them again, and next to the prepared data for other runs of the
    same model, rows and settings. Raises ConfigError where a run that has trained has them no more, or those of other rows.
    """
    folder, kept = attempt.run_dir / paths.REFERENCE, cache_root(config.data.prepared_dir) / f"reference-{_key(config, data, base)}"
    refused = _take_or_refuse(folder, kept, attempt) if world.rank == 0 else None
    fault = world.from_first(None if refused is None else refused.parts())
    if fault is not None:
        raise ConfigError(**fault)
    if not world.from_first(folder.is_dir() if world.rank == 0 else False):
        tables = {name: table for name, table in (("train", data.train), ("eval", data.eval)) if table is not None}
        watch.enter(Phase.evaluating)
        measured = {name: _measure(engine, world, table, config, pad_id, name) for name, table in tables.items()}
        if world.rank == 0:
            _keep(measured, kept)
            _take(kept, folder, attempt)
    world.barrier()
    held_out = None if data.eval is None else _carrying(data.eval, folder / "eval.npy")
    return replace(data, train=_carrying(data.train, folder / "train.npy"), eval=held_out)


def _key(config: RunConfig, data: Prepared, base: dict[str, Any]) -> str:
    """Return the hash of what the numbers depend on: weights, rows, and how the model is built and computes."""
    model = {name: base.get(name) for name in ("id", "commit", "weights", "adapter")}
    settings = [plain(config.model), plain(config.peft), str(config.train.precision), config.seed]
    return content_key(VERSION, data.path.name, model, settings)


def _take_or_refuse(folder: Path, kept: Path, attempt: Attempt) -> ConfigError | None:
    """See to it that RUN_DIR/reference is the right one where there is one to be had; return why the run cannot continue."""
    trained = bool(steps(attempt.run_dir / paths.CHECKPOINTS))
    if folder.is_dir():
        fault = _fault(folder, kept.name)
        if fault is None:
            return None
        if trained:
            reason = f"holds no reference of this run: {fault}"
            return ConfigError("run_dir", str(attempt.run_dir), reason, f"put {folder} back, or run_dir={attempt.run_dir}-new")
        shutil.rmtree(folder)
    if kept.is_dir() and _fault(kept, kept.name) is None:
        _take(kept, folder, attempt)
        log.info("reference: read from %s", kept)
        return None
    if trained:
        reason = f"has been trained, and {folder.name}/ is gone: the model that it began with is no longer in memory"
        return ConfigError("run_dir", str(attempt.run_dir), reason, f"put {folder} back, or run_dir={attempt.run_dir}-new")
    return None


def _fault(folder: Path, name: str) -> str | None:
    """Return what is wrong with a folder of references, None where nothing is."""
    record = try_json(folder / RECORD)
    if record.get("key") != name:
        return f"it is of other rows, weights or settings ({record.get('key')}, and not {name})"
    changed = changed_files(folder)
    return f"{', '.join(changed)} has changed on its disk" if changed else None


@torch.no_grad()
def _measure(engine: Engine, world: World, table: TokenTable, config: RunConfig, pad_id: int, name: str) -> NDArray[np.float32]:
    """Return the summed log-probability of each document's labels in nats, (documents,); the same on every rank. Collective."""
    engine.train(False)
    found = np.zeros(len(table.offsets) - 1)
    longest_first = np.argsort(-table.row_lengths(), kind="stable")
    shares = deal(longest_first, config.train.eval_microbatch or config.train.microbatch, world.rank, world.size)
    shown = _bar(world.rank == 0, name, len(shares))
    num = config.train.eval_microbatch or config.train.microbatch
    for rows in watch.each(shown(shares)):
        batch = make_batch(table, rows, num, pad_id).to(world.device)
        logps = engine.forward(batch, Needs()).logps
        documents = np.concatenate([np.zeros(0, np.int64), *(table.documents(int(row)) for row in rows)]).astype(np.int64)
        found[documents] = by_document(logps, batch).double().cpu().numpy()
        if world.any(world.signalled is not None)[0]:
            raise Stopped("a signal while the reference was measured")
    engine.train(True)
    sums = [world.sum(found[at : at + SUM_AT_ONCE].tolist()) for at in range(0, len(found), SUM_AT_ONCE)]
    return np.concatenate([np.array(part, dtype=np.float32) for part in sums])


def _bar(shown: bool, name: str, total: int) -> Any:
    """Return what draws a bar over the microbatches of the pass on a terminal, and says so elsewhere."""
    if not shown:
        return lambda items: items
    from trainers.rundir.metrics import console

    log.info("reference: one pass over the %s rows, %d microbatches on each rank", name, total)
    if not console.is_terminal:
        return lambda items: items
    from rich.progress import track

    return lambda items: track(items, f"reference, {name}", total=total, console=console)


def _keep(measured: dict[str, NDArray[np.float32]], kept: Path) -> None:
    """Write what was measured next to the prepared data, whole or not at all."""
    if kept.is_dir() and _fault(kept, kept.name) is not None:
        shutil.rmtree(kept)

    def build(partial: Path) -> None:
        for name, values in measured.items():
            np.save(partial / f"{name}.npy", values)
        write_json(partial / RECORD, {"key": kept.name})

    build_once(kept.parent, kept.name, build, "the reference")


def _take(kept: Path, folder: Path, attempt: Attempt) -> None:
    """Copy what is kept next to the prepared data into the run directory; raises Superseded where a newer attempt has started."""
    staging = attempt.run_dir / f"{paths.REFERENCE}.attempt-{attempt.number}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(kept, staging)
    attempt.require_current()
    staging.rename(folder)


def _carrying(table: TokenTable, file: Path) -> TokenTable:
    return replace(table, signals={**table.signals, REFERENCE: np.load(file, mmap_mode="r", allow_pickle=False)})
