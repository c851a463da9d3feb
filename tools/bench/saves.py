"""One rank of `tools.bench checkpoint`: our loop, whose checkpoints are in turn synchronous and asynchronous."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tools.bench.training import training_rank
from trainers.checkpoint import Checkpointer, Progress
from trainers.config.schema import CheckpointConfig
from trainers.rundir.attempt import Attempt
from trainers.rundir.checkpoints import name_of, why_damaged
from trainers.staging import bytes_of
from trainers.world import World

if TYPE_CHECKING:
    from trainers.checkpoint import Saved


def run_rank(options: argparse.Namespace) -> None:
    """Train as one rank, and say what each save cost."""
    with training_rank(Path(options.run_dir)) as (training, order, figures):
        config = CheckpointConfig(every=order["every"], keep_last=1, strict=True)
        timed = TimedCheckpointer(config, training.attempt, training.world, order["steps"])
        training.run(timed)
        figures |= {"saves": timed.saves, "writing": timed.writing}


class TimedCheckpointer(Checkpointer):
    """Saves in turn synchronously and asynchronously; before the next save it waits for the last one, and proves it."""

    def __init__(self, config: CheckpointConfig, attempt: Attempt, world: World, num_steps: int) -> None:
        """Keep after which step nothing is saved any more."""
        super().__init__(config, attempt, world)
        self.num_steps = num_steps
        self.saves: list[dict[str, Any]] = []
        self.writing: list[bool] = []
        """Of each step, whether a save was in flight before its update."""

    def due(self, step: int) -> bool:
        """Leave steps during the last save."""
        return super().due(step) and step < self.num_steps

    def is_writing(self) -> bool:
        """Tell, and keep what was told: the loop asks once a step."""
        self.writing.append(super().is_writing())
        return self.writing[-1]

    def save(self, engine: Saved, progress: Progress, eval_loss: float | None = None, wait: bool = False) -> None:
        """Save and keep the slowest rank's stall; the loop's own save at the end, with `wait`, proves the last one."""
        [late] = self.world.any(super().is_writing())
        self.finish()
        if self.saves:
            self.saves[-1]["late"] = late
            self._prove(self.saves[-1]["step"])
        if wait:
            return
        self.config.asynchronous = len(self.saves) % 2 == 1
        num_bytes = self.world.sum([bytes_of(engine.state())])[0]
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()  # what the step has left does not belong to the save
        self.world.barrier()
        super().save(engine, progress, eval_loss)
        if self.copy.is_short:
            raise RuntimeError("host memory has no room for the copy that an asynchronous save writes: fewer --parameters")
        stall = self.world.max([self.stall_seconds])[0]
        kind = {"asynchronous": self.config.asynchronous, "stall_seconds": stall}
        self.saves.append({"step": progress.step, "num_bytes": int(num_bytes), **kind})

    def _prove(self, step: int) -> None:
        """Raise RuntimeError unless a step's checkpoint is complete, and its files hold the bytes that were hashed."""
        path = self.folder / name_of(step)
        for why in self.world.gather(self._why_not_ours(path) or why_damaged(path, slice(self.world.rank, None, self.world.size))):
            if why:
                raise RuntimeError(f"the checkpoint {path.name} is not valid: {why}")
