"""The rows of a run that learns from its own answers: a step's are made before it, and kept as a file that a continued run reads again."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainers.batch import Batch, Sizes
from trainers.config.schema import RunConfig
from trainers.data.loader import Ints, Made, deal, make_batch, row_order
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.data.tokenizer import pad_id
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.objectives.base import OLD_LOGPS, REFERENCE_LOGPS, RETURNS, VALUES
from trainers.rl.ahead import Ahead
from trainers.rl.curriculum import Curriculum, rates_of
from trainers.rl.estimates import estimate
from trainers.rl.groups import Group, figures_of, save_groups, teaches, why_unrewarded
from trainers.rl.jobs import Spent
from trainers.rl.measured import GIVEN, measure, measured_signals, open_rollout
from trainers.rl.prompts import read_rows
from trainers.rl.sampler import Sampler
from trainers.rl.sync import bound_of, compare, require_near
from trainers.rundir import paths
from trainers.rundir.beats import Phase
from trainers.rundir.checkpoints import steps


class Rollouts:
    """Rows of answers that the model gave itself: what the loop asks for, as for any other rows.

    Each step has a table of its own, RUN_DIR/rollouts/step-NNNNNN, NNNNNN being the first of the `rl.steps_per_rollout` steps that
    train on it. It is written before these steps, and read again where it is there. Everything in it is a function of the weights
    and of (seed, position of the prompt in the stream of prompts, number of the answer).
    """

    def __init__(self, sampler: Sampler, data: Prepared) -> None:
        """Make nothing yet."""
        config = sampler.config
        self.measured = measured_signals(config)
        self.signals = self.measured | GIVEN | ({RETURNS} if sampler.critic is not None else frozenset())
        self.sampler, self.config, self.rl, self.world, self.attempt = sampler, config, config.rl, sampler.world, sampler.attempt
        self.prompts, self.pad_id = data.train, pad_id(sampler.tokenizer)
        self.rows = read_rows(data.path, "train") if self.world.rank == 0 else []
        self.each = config.train.global_batch // self.rl.group_size
        self.num_steps = num_steps(config, len(self.prompts))
        self.bound = bound_of(config, sampler.blueprint)
        self.folder = self.attempt.run_dir / paths.ROLLOUTS
        self.made, self.made_until = Made(), 0
        self.ahead = None if sampler.jobs is None else Ahead(sampler, sampler.jobs, self.num_steps, self.pad_id, self.bound, self._write)
        self.curriculum = None if self.rl.curriculum is None else Curriculum(config, len(self.prompts), self._known)
        self.opened: tuple[int, TokenTable, int] | None = None
        """The first step, counted from 0, of the rollout that is open, its table, and the position at which the next one begins."""

    def make(self, step: int, ahead: int = 0) -> bool:
        """Have a step's rollout: open it, or sync, sample, score and write it; False where a rank was asked to stop. Collective."""
        began = time.perf_counter()
        first = step - step % self.rl.steps_per_rollout
        self.made, self.made_until = Made(), step + 1
        if self.opened is not None and self.opened[0] == first:
            return True
        if step == 0 and self.world.rank == 0:  # of an attempt that came to no checkpoint, and may have had other settings
            self.attempt.require_current()
            for older in steps(self.folder):
                shutil.rmtree(older)
        folder = self._folder(first)
        before = None if self.opened is None else self.opened[1]
        written = self._now(step, first, folder) if self.ahead is None else self.ahead.have(step, first, before)
        if written is None:
            return False
        spent = written | self._measure(step, folder)
        about = self.world.from_first(self._about(folder) if self.world.rank == 0 else {})
        self.opened = first, open_rollout(folder, self.signals), about["position"]
        if step != first:  # continued after the row that told of it
            self.made = Made(more=spent, seconds=time.perf_counter() - began)
            return True
        figures = about["figures"] | ({"staleness": step - about["version"]} if self.rl.staleness else {})
        if about["version"] != step:
            figures |= about["compared"]
        else:
            found = compare(self.sampler.engine, self.table(step), self.world, self.config.train.microbatch, self.pad_id)
            require_near(found, self.bound, step + 1)
            figures |= {"mismatch": found.mean, "mismatch_largest": found.largest}
        shown = {name: _number(figures.pop(name)) for name in ("reward", "truncated")}
        more = {name: _number(value) for name, value in figures.items()} | spent
        self.made = Made(shown, more, time.perf_counter() - began)
        return True

    def _now(self, step: int, first: int, folder: Path) -> Spent | None:
        """Have a rollout by the weights of now, if it is not there; returns seconds by part, None where a rank was asked to stop."""
        if self.world.from_first(self.world.rank == 0 and folder.is_dir()):  # a file system may remember what was absent
            return {}
        if step != first:
            raise TrainingFailed(f"{folder} is gone, which the weights after step {first} gave, and this is step {step + 1}")
        watch.enter(Phase.sampling, first + 1)
        synced = {"sync_seconds": self.sampler.sync(first)}
        written = self._write(first, first, {})
        return None if written is None else synced | written

    def _write(self, first: int, version: int, compared: dict[str, float]) -> Spent | None:
        """Sample and score until there are groups for all steps, and write them; returns seconds by part, None where asked to stop."""
        ranks, spent = self.sampler.generators.among, {"sampling_seconds": 0.0, "scoring_seconds": 0.0}
        begin = position = ranks.from_first(self._position(first) if ranks.rank == 0 else 0)
        wanted = self.each * self.rl.steps_per_rollout
        drawn: list[Group] = []
        kept = 0
        for _ in range(self.rl.redraws + 1):
            asked = self._asked(first, begin, range(position, position + wanted - kept))
            position += len(asked)
            at = time.perf_counter()
            answers = self.sampler.answers(asked, self.rows, "train", self.rl.group_size)
            if answers is None:
                return None
            spent["sampling_seconds"] += time.perf_counter() - at
            at = time.perf_counter()
            scored = self.sampler.score(asked, self.rows, answers, self.rl.group_size) if self.world.rank == 0 else []
            if ranks.from_first(scored is None):
                return None
            drawn += scored or []
            kept = ranks.from_first(sum(self._teaches(group) for group in drawn))
            spent["scoring_seconds"] += time.perf_counter() - at
            if kept == wanted:
                break
        if ranks.rank == 0:
            self._save(drawn, wanted, {"begin": begin, "position": position, "version": version, "compared": compared}, self._folder(first))
        ranks.barrier()
        return spent

    def _measure(self, step: int, folder: Path) -> dict[str, float]:
        """Have what trainer and reference say of a rollout's tokens next to it; returns the seconds that it took. Collective."""
        if not self.measured:
            return {}
        critic = None if self.sampler.critic is None else self.sampler.critic.engine
        began, engines = time.perf_counter(), {OLD_LOGPS: self.sampler.engine, REFERENCE_LOGPS: self.sampler.reference, VALUES: critic}
        known = {name: engine for name, engine in engines.items() if engine is not None and name in self.measured}
        is_first = step % self.rl.steps_per_rollout == 0
        measured = measure(folder, known, self.attempt, self.world, self.config.train.microbatch, self.pad_id, is_first)
        return {"measuring_seconds": time.perf_counter() - began} if measured else {}

    def _about(self, folder: Path) -> dict[str, Any]:
        """Return what is known of a rollout, with what its critic says; advantages are made where they are not there. On rank 0."""
        about: dict[str, Any] = json.loads((folder / paths.ABOUT).read_text())
        if self.sampler.critic is not None:
            about["figures"] |= estimate(folder, self.config.objective, self.attempt)
        return about

    def _save(self, drawn: list[Group], wanted: int, about: dict[str, Any], folder: Path) -> None:
        """Write the groups that teach, and where there are too few of them others, whose advantages are 0; complete or absent.

        Raises TrainingFailed where no answer has a reward.
        """
        if why := why_unrewarded(drawn):
            raise TrainingFailed(f"none of the answers of {folder.name} has a reward: {why}")
        taught = [group for group in drawn if self._teaches(group)]
        others = [group for group in drawn if not self._teaches(group)]
        groups = sorted((*taught, *others)[:wanted], key=lambda group: group.position)
        staging = folder.with_name(f"{folder.name}.attempt-{self.attempt.number}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        save_groups(groups, self.config, staging)
        counts = {"prompts_drawn": len(drawn), "prompts_without_contrast": len(others), "prompts_kept_without": wanted - len(taught)}
        figures = {name: _finite(value) for name, value in (figures_of(drawn, self.rl.pass_reward) | counts).items()}
        if self.curriculum is not None:
            about = about | {"rates": rates_of(drawn, self.rl.pass_reward)}
        (staging / paths.ABOUT).write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
        self.attempt.require_current()
        staging.rename(folder)

    def _teaches(self, group: Group) -> bool:
        return teaches(group, self.config.objective)

    def _position(self, first: int) -> int:
        """Return where the prompts of a rollout begin: where those of the one before ended. Raises TrainingFailed where that is gone."""
        if first == 0:
            return 0
        return int(self._known(first - self.rl.steps_per_rollout, f"where the prompts of step {first + 1} begin")["position"])

    def _known(self, first: int, what: str) -> dict[str, Any]:
        """Return what is known of a rollout that is there; raises TrainingFailed where it is gone, which says `what`."""
        file = self._folder(first) / paths.ABOUT
        if not file.is_file():
            raise TrainingFailed(f"{file} is gone, which says {what}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def _asked(self, first: int, begin: int, positions: range) -> list[tuple[int, int, list[int]]]:
        """Return position, number and ids of prompts of a rollout, whose first is at `begin` of the stream. Collective.

        The stream is epochs of all, each in an order of its own, or what is drawn by the share of right answers before this rollout.
        """
        count, seed = len(self.prompts), self.config.seed
        if self.curriculum is None:
            numbers = [int(row_order(seed, position // count, count)[position % count]) for position in positions]
        else:
            ranks = self.sampler.generators.among
            numbers = ranks.from_first(self.curriculum.numbers(first, begin, positions) if ranks.rank == 0 else [])
        return [(position, number, ids_of(self.prompts, number)) for position, number in zip(positions, numbers, strict=True)]

    def _folder(self, first: int) -> Path:
        return self.sampler.rollout(first)

    def table(self, step: int) -> TokenTable:
        """Return the rollout that a step trains on, or trained on."""
        first = step - step % self.rl.steps_per_rollout
        return self.opened[1] if self.opened is not None and self.opened[0] == first else open_rollout(self._folder(first), self.signals)

    def row_ids(self, step: int, ahead: int = 0) -> Ints:
        """Return a step's part of its rollout."""
        count = self.config.train.global_batch
        return np.arange(count, dtype=np.int64) + step % self.rl.steps_per_rollout * count

    def sizes(self, step: int, row_ids: Ints) -> Sizes:
        """Return how much is in a step's rows."""
        return self.table(step).sizes(row_ids)

    def batches(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return this rank's microbatches of a step's rows."""
        microbatch = self.config.train.microbatch
        mine = deal(row_ids, microbatch, **self.sampler.engine.mesh.share_of(self.world.rank))
        return [make_batch(self.table(step), rows, microbatch, self.pad_id) for rows in mine]

    def first(self, step: int, row_ids: Ints) -> list[Batch]:
        """Return nothing: no statistic is measured before a step."""
        return []

    def epoch(self, step: int) -> float:
        """Return the passes over the prompts that are done, those that were drawn in place of others included."""
        return 0.0 if self.opened is None else self.opened[2] / len(self.prompts)

    def passes(self, step: int) -> dict[str, float]:
        """Return nothing: prompts have one source."""
        return {}


def num_steps(config: RunConfig, prompts: int) -> int:
    """Return a run's steps: `train.steps`, or as many whole rollouts as the passes over the prompts make without redraws."""
    if config.train.steps is not None:
        return config.train.steps
    steps, of_rollout = config.train.epochs or 1.0, config.rl.steps_per_rollout
    each = config.train.global_batch // config.rl.group_size * of_rollout
    return max(1, math.ceil(steps * prompts / each)) * of_rollout


def ids_of(prompts: TokenTable, number: int) -> list[int]:
    """Return the ids of a prompt."""
    ids: list[int] = prompts.tokens[prompts.offsets[number] : prompts.offsets[number + 1]].tolist()
    return ids


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
