"""Rollouts that are given while others are trained on: each by the weights of so many rollouts before it, whatever is slower."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from trainers.data.table import TokenTable
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.rl import versions
from trainers.rl.jobs import Jobs, Spent
from trainers.rl.measured import GIVEN, open_rollout
from trainers.rl.sampler import Sampler
from trainers.rl.sync import require_near
from trainers.rundir.beats import Phase


class Ahead:
    """What has rollouts written before they are needed.

    Which weights give a rollout is a function of its steps alone. So a run that is continued is the same, to the bit: weights are kept
    until the last rollout that they give is there.
    """

    def __init__(
        self,
        sampler: Sampler,
        jobs: Jobs,
        num_steps: int,
        pad_id: int,
        bound: float,
        write: Callable[[int, int, dict[str, float]], Spent | None],
    ) -> None:
        """Begin nothing yet.

        `write` has the generators write a rollout by its first step, given the version of the weights that they have open and what is to
        be told of these; it returns seconds by part, None where a rank was asked to stop.
        """
        self.sampler, self.jobs, self.num_steps, self.pad_id, self.bound, self.write = sampler, jobs, num_steps, pad_id, bound, write
        self.every = sampler.rl.steps_per_rollout
        self.by = sampler.rl.staleness * self.every

    def version(self, first: int) -> int:
        """Return the steps after which the weights give a rollout."""
        return max(0, first - self.by)

    def have(self, step: int, first: int, before: TokenTable | None) -> Spent | None:
        """Begin the rollouts that the weights of now give, and wait for the one of this step, which begins with the step `first`.

        `before` is the rollout before it, where it is open. Returns seconds by part, None where a rank was asked to stop. Collective.
        """
        watch.enter(Phase.sampling, step + 1)
        began, world = time.perf_counter(), self.sampler.world
        firsts = range(first, min(first + self.by, self.num_steps - self.every) + 1, self.every)
        absent = world.from_first([at for at in firsts if not self.sampler.rollout(at).is_dir()] if world.rank == 0 else [])
        if step != first and first in absent:
            raise TrainingFailed(f"{self.sampler.rollout(first)} is gone, and this is step {step + 1}")
        orders = [at for at in absent if not self.jobs.has(at)]
        if step in map(self.version, orders):
            self._put(step, before)
        if world.rank == 0:
            versions.remove_before(self.sampler.folder, min(map(self.version, absent), default=step))
            for folder in (self.sampler.place(self.version(at)) for at in orders):
                if not folder.is_dir():
                    raise TrainingFailed(f"{folder} is gone, with the weights of answers that steps after {step} are to be trained on")
        spent = {"sync_seconds": time.perf_counter() - began} if orders else {}
        for at in orders:
            self.jobs.ask(at, partial(self._give, at))
        written = self.jobs.take(first)
        return None if written is None else spent | written

    def _put(self, step: int, before: TokenTable | None) -> None:
        """Put the weights of now where generators find them, with what they say of the answers of the rollout before; collective."""
        sampler = self.sampler
        sampler.write(step)
        sampler.passing = None
        if step:
            table = open_rollout(sampler.rollout(step - self.every), GIVEN) if before is None else before
            more = sampler.world, sampler.config.train.microbatch, self.pad_id, sampler.attempt
            versions.note_said(sampler.place(step), sampler.engine, table, *more)

    def _give(self, first: int) -> Spent | None:
        """Have the generators write a rollout with the weights of its version; a job."""
        sampler, version, began = self.sampler, self.version(first), time.perf_counter()
        ranks, told = sampler.generators.among, dict[str, float]()
        sampler.open(version)
        if version:
            found = versions.compare_said(sampler.place(version), sampler.generators, ranks)
            if found is None:
                return None
            require_near(found, self.bound, version + 1)
            told = {"mismatch": found.mean, "mismatch_largest": found.largest}
        opening = time.perf_counter() - began
        written = self.write(first, version, told)
        if written is None:
            return None
        if ranks.rank == 0 and self.version(first + self.every) != version and sampler.attempt.is_current(at_once=True):
            versions.remove(sampler.place(version))
        return {"opening_seconds": opening} | written
