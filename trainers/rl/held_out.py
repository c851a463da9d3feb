"""Held-out prompts while a run learns from its own answers: one answer each, and how many are right."""

from __future__ import annotations

import math

from trainers.data.prepare import Prepared
from trainers.engines.base import Engine
from trainers.evaluation import Evaluation, HeldOut
from trainers.generate.request import Request
from trainers.health.activity import watch
from trainers.objectives import Objective
from trainers.rl.groups import Group, figures_of
from trainers.rl.prompts import read_rows
from trainers.rl.rollouts import Sampler, ids_of, seed_of
from trainers.rundir.beats import Phase

Z = 1.959963984540054
"""Of 95 %."""


class HeldOutPrompts(HeldOut):
    """The held-out prompts of a run, and the losses so far: the mean reward, with the sign that makes less better."""

    def __init__(self, sampler: Sampler, data: Prepared, num_steps: int, pad_id: int) -> None:
        """Take no prompts at all where none are held out."""
        super().__init__(data.eval, sampler.config.train, num_steps, sampler.world, pad_id)
        self.sampler = sampler
        self.rows = read_rows(data.path, "eval") if data.eval is not None and sampler.world.rank == 0 else []

    def measure(self, engine: Engine, objective: Objective, step: int) -> Evaluation | None:
        """Answer each prompt once with the weights after `step`, the same draws each time; None where a rank was asked to stop."""
        assert self.table is not None
        watch.enter(Phase.sampling, step)
        groups = self._answered(step)
        watch.enter(Phase.evaluating, step)
        if groups is None:
            return None
        figures = self.world.from_first(figures_of(groups, self.sampler.rl.pass_reward) if self.world.rank == 0 else {})
        low, high = wilson(figures["pass@1"], len(self.table))
        found = Evaluation(loss=-figures["reward"], figures={f"eval_{name}": value for name, value in figures.items()})
        found.figures.update({"eval_pass@1_low": low, "eval_pass@1_high": high})
        self.losses.append(found.loss)
        self.at = step
        return found

    def _answered(self, step: int) -> list[Group] | None:
        """Return each prompt with its answer and reward, on rank 0, and nothing on others; None where a rank was asked to stop."""
        assert self.table is not None
        self.sampler.sync(step)
        asked = [(number, number, ids_of(self.table, number)) for number in range(len(self.table))]
        seed = self.sampler.config.seed
        requests = [Request(key=number, seed=seed_of(seed, "eval", number), ids=ids) for number, _, ids in asked]
        answers = self.sampler.generators.ask(requests)
        if answers is None:
            return None
        groups = self.sampler.score(asked, self.rows, answers, 1) if self.world.rank == 0 else []
        return None if self.world.from_first(groups is None) else groups


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a share, at 95 % (Wilson 1927, JASA 22:209)."""
    middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, (middle - spread) / (1 + Z**2 / count)), min(1.0, (middle + spread) / (1 + Z**2 / count))
