"""The policy's weights of several steps at once, for rollouts that are given ahead, and the proof that generators have them.

`rollouts/weights/step-NNNNNN` has the weights after so many steps, until the last rollout that they give is written. Next to it a file
has some answers with what the trainer said of them at that step: generators are asked for the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from trainers.data.table import TokenTable
from trainers.engines.base import Engine
from trainers.health.spikes import TrainingFailed
from trainers.rl.generators import Generators
from trainers.rl.measured import label_logps
from trainers.rl.sync import Mismatch
from trainers.rundir.attempt import Attempt
from trainers.rundir.checkpoints import name_of, number_of, steps
from trainers.world import World


def folder_of(weights: Path, step: int) -> Path:
    """Return the directory of the weights after `step` steps."""
    return weights / name_of(step)


def said_file(folder: Path) -> Path:
    """Return the file of what the trainer said of some answers with a version's weights."""
    return folder.with_name(f"{folder.name}.json")


def remove(folder: Path) -> None:
    """Delete a version that no rollout needs any more."""
    shutil.rmtree(folder, ignore_errors=True)
    said_file(folder).unlink(missing_ok=True)


def remove_before(weights: Path, step: int) -> None:
    """Delete the versions of earlier steps."""
    for folder in steps(weights):
        if number_of(folder) < step:
            remove(folder)


def note_said(folder: Path, engine: Engine, table: TokenTable, world: World, microbatch: int, pad_id: int, attempt: Attempt) -> None:
    """Write what the trainer says now of the first answers of a table, a microbatch a rank; collective.

    Raises Superseded, and TrainingFailed, on every rank, where a value is not finite.
    """
    count = min(len(table), microbatch * engine.mesh.data_size)
    end = int(table.offsets[count])
    first = TokenTable(
        tokens=table.tokens[:end],
        supervised=table.supervised[:end],
        offsets=table.offsets[: count + 1],
        order=table.order[:count],
        rows=table.rows[: count + 1],
    )
    logps = label_logps(engine, first, world, microbatch, pad_id)
    if lost := int((~np.isfinite(logps)).sum()):
        what = f"{lost:,} of {len(logps):,} tokens of answers have a log-probability that is not a finite number"
        raise TrainingFailed(f"after step {number_of(folder)}, {what}: the weights are broken; go back to an earlier checkpoint")
    if world.rank == 0:
        ids = [first.tokens[begin:end].tolist() for begin, end in zip(first.offsets, first.offsets[1:], strict=False)]
        rows = list(zip(ids, np.diff(first.label_starts).tolist(), strict=True))
        if not attempt.write_json(said_file(folder), {"rows": rows, "logps": logps.tolist()}):
            attempt.require_current()


def compare_said(folder: Path, generators: Generators, world: World) -> Mismatch | None:
    """Compare generators with what the trainer said of the same answers with the weights that they have open; collective.

    None where a rank was asked to stop.
    """
    said = world.from_first(json.loads(said_file(folder).read_text()) if world.rank == 0 else {})
    found = generators.score([(ids, count) for ids, count in said["rows"]])
    if found is None:
        return None
    apart = np.abs(np.array(said["logps"]) - np.concatenate([np.zeros(0), *map(np.array, found)]))
    return Mismatch(mean=float(apart.mean()), largest=float(apart.max())) if len(apart) else Mismatch(mean=0.0, largest=0.0)
