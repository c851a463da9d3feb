"""What the trainer and a reference say of each token of a rollout, next to what the sampler says: measured once, kept in its folder."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.batch import IGNORE, Batch, Needs
from trainers.config.choices import Activations, ObjectiveName, PeftMethod
from trainers.config.derived import OF_THE_MODEL
from trainers.config.schema import OptimConfig, PeftConfig, RunConfig
from trainers.data.loader import deal, make_batch
from trainers.data.table import SIGNALS, TokenTable, open_table
from trainers.engines.base import Engine
from trainers.engines.build import build_engine
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.model.blueprint import Blueprint
from trainers.objectives.base import ADVANTAGE, OLD_LOGPS, REFERENCE_LOGPS, SAMPLED_LOGPS, VALUES
from trainers.reference import SUM_AT_ONCE
from trainers.rundir.attempt import Attempt
from trainers.scoring import of_each_token
from trainers.world import World

GIVEN = frozenset({ADVANTAGE, SAMPLED_LOGPS})
"""Signals that a rollout is trained on, whatever else is measured."""
OF_THE_FIRST = (OLD_LOGPS, VALUES)
"""Signals that only the weights before the rollout's first step give."""
APPEARS_S = 60.0
"""For a network file system to show what another machine has written: NFS may remember for so long what was absent."""


def measured_signals(config: RunConfig) -> frozenset[str]:
    """Return what models say of a run's rollouts: the reference, the critic, and where several steps take one the trainer before them."""
    is_corrected = config.objective.importance_cap is not None and config.rl.steps_per_rollout > 1
    asked = {OLD_LOGPS: is_corrected, REFERENCE_LOGPS: config.objective.kl_weight > 0, VALUES: config.objective.name is ObjectiveName.ppo}
    return frozenset(name for name, is_asked in asked.items() if is_asked)


def build_reference(config: RunConfig, world: World, blueprint: Blueprint, policy: Engine | None = None) -> Engine:
    """Build the model that training begins with once more, nearly all of it frozen, for the policy to be kept near; collective.

    Raises ConfigError where a node's memory does not hold what is offloaded of it next to the `policy`.
    """
    frozen = PeftConfig(method=PeftMethod.freeze, last_blocks=1) if config.peft.method in OF_THE_MODEL else config.peft
    forward_alone = replace(config.train, activations=Activations.keep)
    own = replace(config, peft=frozen, optim=OptimConfig(), train=forward_alone)
    return build_engine(own, world, blueprint, next_to=[] if policy is None else [policy])


def measure(
    folder: Path, engines: Mapping[str, Engine], attempt: Attempt, world: World, microbatch: int, pad_id: int, is_first: bool
) -> list[str]:
    """Put the signals of `engines`, (labels, 1), into a rollout's folder, each complete or absent; returns those that were not there.

    Collective. Raises TrainingFailed where the trainer's own is gone and it has taken a step on the rollout, which `is_first` denies, and
    Superseded where a newer attempt has started.
    """
    table, here = open_rollout(folder, frozenset({SAMPLED_LOGPS})), world.rank == 0
    missing = world.from_first([name for name in engines if here and not (folder / f"{SIGNALS}{name}.npy").is_file()])
    for name in missing:
        file = folder / f"{SIGNALS}{name}.npy"
        if name in OF_THE_FIRST and not is_first:
            raise TrainingFailed(f"{file} is gone, which the weights before the rollout's first step gave")
        values = of_labels(engines[name], table, world, microbatch, pad_id, _values if name == VALUES else _logps)
        if here:
            keep_signal(folder, name, values, attempt)
    world.barrier()
    return list(missing)


def keep_signal(folder: Path, name: str, values: NDArray[Any], attempt: Attempt) -> None:
    """Put a number a label, (labels,), into a rollout's folder, complete or absent; raises Superseded where a newer attempt has started.

    It is staged next to the rollout, where a newer attempt takes away what is staged.
    """
    file = folder / f"{SIGNALS}{name}.npy"
    file.parent.mkdir(exist_ok=True)
    staging = folder.with_name(f"{folder.name}.{name}.attempt-{attempt.number}.tmp")
    with staging.open("wb") as opened:
        np.save(opened, values[:, None].astype(np.float32))
    attempt.require_current()
    staging.rename(file)


def open_rollout(folder: Path, signals: frozenset[str]) -> TokenTable:
    """Memory-map a rollout with at least these signals; waits for a file system that does not show at once what rank 0 has written.

    Raises TrainingFailed where files are still absent after APPEARS_S.
    """
    until = time.monotonic() + APPEARS_S
    wanted = {f"{SIGNALS}{name}.npy" for name in signals}
    while missing := sorted(wanted.difference(str(path.relative_to(folder)) for path in folder.rglob("*.npy"))):
        if time.monotonic() > until:
            raise TrainingFailed(f"{folder / missing[0]} is not there on {socket.gethostname()}, and this step trains on it")
        time.sleep(0.1)
    return open_table(folder)


def _logps(engine: Engine, batch: Batch) -> Tensor:
    """Return the log-probability of each label in nats, (B, S)."""
    return engine.forward(batch, Needs()).logps


def _values(engine: Engine, batch: Batch) -> Tensor:
    """Return the critic's value before each label, (B, S)."""
    return of_each_token(engine, batch)


def label_logps(engine: Engine, table: TokenTable, world: World, microbatch: int, pad_id: int) -> NDArray[np.float32]:
    """Return an engine's log-probability of each label of a table in nats, (labels,); the same on every rank. Collective."""
    return of_labels(engine, table, world, microbatch, pad_id, _logps)


@torch.no_grad()
def of_labels(
    engine: Engine, table: TokenTable, world: World, microbatch: int, pad_id: int, read: Callable[[Engine, Batch], Tensor]
) -> NDArray[np.float32]:
    """Return what `read` says of each label of a table, (labels,); the same on every rank. Collective."""
    engine.train(False)
    found = np.zeros(int(table.label_starts[-1]))
    longest_first = np.argsort(-table.row_lengths(), kind="stable")
    for rows in watch.each(deal(longest_first, microbatch, **engine.mesh.share_of(world.rank))):
        batch = make_batch(table, rows, microbatch, pad_id).to(world.device)
        values = read(engine, batch)[batch.labels != IGNORE]  # row by row, as labels are in the documents of these rows
        places = [np.arange(*table.label_starts[document : document + 2]) for document in table.documents_of(rows)]
        found[np.concatenate([np.zeros(0, np.int64), *places])] = values.double().cpu().numpy()
    engine.train(True)
    found /= engine.mesh.same_rows  # as many ranks have the same rows
    sums = [world.sum(found[at : at + SUM_AT_ONCE].tolist()) for at in range(0, len(found), SUM_AT_ONCE)]
    return np.concatenate([np.zeros(0, np.float32), *(np.array(part, dtype=np.float32) for part in sums)])
