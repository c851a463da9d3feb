"""What the reference says of each answer: the model that training begins with, or another. Measured once, before the first step."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from trainers.batch import Needs, by_document
from trainers.cache import build_once, cache_root, changed_files, content_key
from trainers.config.choices import PeftMethod
from trainers.config.derived import OF_THE_MODEL
from trainers.config.errors import ConfigError
from trainers.config.numerics import NUMERICS
from trainers.config.schema import ModelConfig, OptimConfig, PeftConfig, RunConfig, plain
from trainers.data.loader import deal, make_batch
from trainers.data.mismatched import SIGNAL as MISMATCHED
from trainers.data.mismatched import all_mismatched
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.data.tokenizer import load_tokenizer, pad_id
from trainers.engines.base import Engine
from trainers.engines.build import build_engine
from trainers.health.activity import watch
from trainers.model.blueprint import make_blueprint
from trainers.objectives import REFERENCE
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.base import base_of
from trainers.rundir.beats import Phase
from trainers.rundir.checkpoints import steps
from trainers.rundir.files import try_json, write_json
from trainers.world import Stopped, World

log = logging.getLogger("fulltune")
RECORD = "reference.json"
"""In the folder: the key of what was measured."""
SUM_AT_ONCE = 1 << 16
VERSION = 2
"""Of what is measured: raise it when the numbers come out differently."""


def with_reference(
    config: RunConfig, world: World, attempt: Attempt, engine: Engine, data: Prepared, base: dict[str, Any], pad_id: int
) -> Prepared:
    """Return the data with each document's summed log-probability under the model as it is now, before its first step; collective.

    They are in RUN_DIR/reference, where a continued run reads them again, and next to the prepared data for other runs of the
    same model, rows and settings. Raises ConfigError where a run that has trained has them no more, or those of other rows.
    """

    def measure() -> Measured:
        return _measure_all(engine, world, data, config, pad_id)

    return _with(config, world, attempt, data, _key(config, data, base, world.device.type), measure)


def with_other_reference(config: RunConfig, world: World, attempt: Attempt, data: Prepared, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    """Return the data as `with_reference` does, under the model that `objective.reference` names; collective.

    It is built by the run's engine before the model that is trained, and freed. Raises ConfigError where its vocabulary is another.
    """
    other = other_model(config)
    require_same_vocabulary(other, tokenizer)
    blueprint = make_blueprint(other.model, other.seed, tokenizer)
    base = world.from_first(base_of(other, blueprint.folder, blueprint.revision) if world.rank == 0 else {})

    def measure() -> Measured:
        watch.enter(Phase.loading)
        log.info("reference: building %s", other.model.id)
        with contextlib.closing(build_engine(other, world, blueprint)) as engine:
            return _measure_all(engine, world, data, other, pad_id(tokenizer))

    found = _with(config, world, attempt, data, _key(other, data, base, world.device.type), measure)
    gc.collect()  # what the engine held; its parts know each other
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def other_model(config: RunConfig) -> RunConfig:
    """Return the config that builds the reference which `objective.reference` names: nearly all of it frozen, for the least memory."""
    model, train = of_directory(config.model, str(config.objective.reference)), replace(config.train, balance_loss=None)
    return replace(config, model=model, peft=PeftConfig(method=PeftMethod.freeze, last_blocks=1), optim=OptimConfig(), train=train)


def of_directory(model: ModelConfig, place: str) -> ModelConfig:
    """Return the settings of another model, of a directory or hub id, that is computed as the run's own."""
    model = replace(model, id=place, revision=None, architecture={}, train_tokenizer=0, add_tokens=[])
    return replace(model, grow_vocabulary=False, tokenizer=None)


def require_same_vocabulary(other: RunConfig, tokenizer: PreTrainedTokenizerFast, field: str = "objective.reference") -> None:
    """Raise ConfigError, naming the first token that differs, unless what the field names gives each token of the run the same id."""
    named = other.model.id
    try:
        theirs = load_tokenizer(other).get_vocab()
    except ConfigError as error:
        raise ConfigError(field, named, error.reason, "a model directory with its tokenizer") from error
    wrong = [token for token, number in tokenizer.get_vocab().items() if theirs.get(token) != number]
    if wrong:
        token = min(wrong, key=tokenizer.get_vocab().__getitem__)
        place = f"id {theirs[token]}" if token in theirs else "none"
        reason = f"has another vocabulary: {token!r} is id {tokenizer.get_vocab()[token]} of the run's and {place} of its own"
        raise ConfigError(field, named, f"{reason}; {len(wrong):,} differ", "a model of the same tokenizer, or leave it out")


Measured = dict[str, NDArray[np.float32]]
"""Summed log-probabilities of documents in nats, by the names of their files."""
OTHER = "-mismatched"
"""Ends the name of a file of prompts with answers to others."""


def _with(config: RunConfig, world: World, attempt: Attempt, data: Prepared, key: str, measure: Callable[[], Measured]) -> Prepared:
    """Return the data with the reference of a key: from the run directory, from next to the prepared data, or measured now; collective."""
    folder, kept = attempt.run_dir / paths.REFERENCE, cache_root(config.data.prepared_dir) / f"reference-{key}"
    refused = _take_or_refuse(folder, kept, attempt) if world.rank == 0 else None
    fault = world.from_first(None if refused is None else refused.parts())
    if fault is not None:
        raise ConfigError(**fault)
    if not world.from_first(folder.is_dir() if world.rank == 0 else False):
        measured = measure()
        if world.rank == 0:
            _keep(measured, kept)
            _take(kept, folder, attempt)
    world.barrier()
    held_out = None if data.eval is None else _carrying(data.eval, folder, "eval")
    return replace(data, train=_carrying(data.train, folder, "train"), eval=held_out)


def _key(config: RunConfig, data: Prepared, base: dict[str, Any], device: str) -> str:
    """Return the hash of what the numbers depend on: weights, rows, and how the model is built and computes.

    Rates, dropout and what is trained of the weights change none; the last bits depend on the kernels, of which `auto` takes others
    on a GPU.
    """
    model: dict[str, Any] = {name: base.get(name) for name in ("id", "commit", "weights", "adapter")}
    model = {name: value for name, value in model.items() if name != "id"} if base.get("weights") else model
    left_out = ("id", "revision", "convert") if base.get("weights") else ("convert",)
    model |= {name: value for name, value in plain(config.model).items() if name not in left_out}
    peft = {name: value for name, value in plain(config.peft).items() if name not in ("lr", "lr_ratio", "dropout", "adapter")}
    seed = None if config.peft.method in OF_THE_MODEL and config.model.id is not None else config.seed
    settings = [{} if config.peft.method in OF_THE_MODEL else peft, str(config.train.precision), str(config.train.float8), seed, device]
    return content_key(VERSION, NUMERICS, data.path.name, model, settings)


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
        reason = f"has been trained, and {folder.name}/ is gone: what it began with is not measured anew"
        return ConfigError("run_dir", str(attempt.run_dir), reason, f"put {folder} back, or run_dir={attempt.run_dir}-new")
    return None


def _fault(folder: Path, name: str) -> str | None:
    """Return what is wrong with a folder of references, None where nothing is."""
    record = try_json(folder / RECORD)
    if record.get("key") != name:
        return f"it is of other rows, weights or settings ({record.get('key')}, and not {name})"
    changed = changed_files(folder)
    return f"{', '.join(changed)} has changed on its disk" if changed else None


def _measure_all(engine: Engine, world: World, data: Prepared, config: RunConfig, pad_id: int) -> Measured:
    """Return the reference of all documents, and of each prompt with the answer to another where the data say which; collective."""
    watch.enter(Phase.evaluating)
    found = {}
    for name, table in (("train", data.train), ("eval", data.eval)):
        if table is None:
            continue
        found[name] = _measure(engine, world, table, config, pad_id, name)
        if table.partners is not None:
            parts = [_measure(engine, world, part, config, pad_id, f"mismatched {name}") for part in all_mismatched(table)]
            found[f"{name}{OTHER}"] = np.concatenate(parts)
    return found


@torch.no_grad()
def _measure(engine: Engine, world: World, table: TokenTable, config: RunConfig, pad_id: int, name: str) -> NDArray[np.float32]:
    """Return the summed log-probability of each document's labels in nats, (documents,); the same on every rank. Collective."""
    engine.train(False)
    found, mesh = np.zeros(len(table.offsets) - 1), engine.mesh
    longest_first = np.argsort(-table.row_lengths(), kind="stable")
    shares = deal(longest_first, config.train.eval_microbatch or config.train.microbatch, mesh.data_rank(world.rank), mesh.data_size)
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
    sums = [world.sum((found[at : at + SUM_AT_ONCE] / mesh.same_rows).tolist()) for at in range(0, len(found), SUM_AT_ONCE)]
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


def _carrying(table: TokenTable, folder: Path, name: str) -> TokenTable:
    """Return a table with its reference, memory-mapped, and that of prompts with answers to others where it has such."""
    found = {REFERENCE: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)}
    if table.partners is not None:
        found[f"{MISMATCHED}{REFERENCE}"] = np.load(folder / f"{name}{OTHER}.npy", mmap_mode="r", allow_pickle=False)
    return replace(table, signals={**table.signals, **found})
