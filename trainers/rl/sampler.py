"""What answers of the model as it is now come from: the weights that generators have, the generators, and the rewards."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trainers.config.choices import RewardKind
from trainers.config.errors import ConfigError
from trainers.config.schema import RlConfig, RunConfig
from trainers.data.reasoning import opened
from trainers.engines.base import Engine
from trainers.generate.local import nothing
from trainers.generate.request import Answer, Request, Sampling
from trainers.model.blueprint import Blueprint, positions_limit
from trainers.rewards.score import Rewards, imported
from trainers.rl import versions
from trainers.rl.conversations import Conversations, environments_of, require_answers, with_environment
from trainers.rl.critic import Critic, Outlined, build_critic
from trainers.rl.environment import Environments
from trainers.rl.generators import Generators, Interrupted
from trainers.rl.groups import Group
from trainers.rl.jobs import Jobs
from trainers.rl.measured import build_reference
from trainers.rl.sync import temper, write_weights
from trainers.rl.turns import Conversation, Turns, words_of
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.checkpoints import name_of
from trainers.world import World

log = logging.getLogger("fulltune")
WEIGHTS = "weights"
"""Next to the rollouts: what generators open; with `rl.staleness` a folder for each of several steps."""
FRONT = 16
"""Tokens at the end of a prompt that are looked at for a `<think>`."""
REPLIES = "judged"
"""Next to the rollouts: a judge's replies."""


@dataclass(kw_only=True)
class Sampler:
    """Prompts, generators and rewards: what answers of the model as it is now come from. Methods are collective."""

    config: RunConfig
    world: World
    attempt: Attempt
    engine: Engine
    blueprint: Blueprint
    tokenizer: PreTrainedTokenizerFast
    generators: Generators
    rewards: Rewards | None
    """On rank 0."""
    reference: Engine | None = None
    """The frozen model that the policy is kept near."""
    conversations: Conversations | None = None
    """With an environment, how its answers come about."""
    untemper: Callable[[], None] = nothing
    """Has the policy's log-probabilities be the model's own again, as its export's are."""
    critic: Critic | None = None
    """What expects rewards, where the objective is PPO."""
    version: int = -1
    """Steps that the weights which generators have were trained for."""
    written: int = -1
    """Steps that the weights which were written last were trained for."""
    passing: int | None = None
    """Those which were written last, where no rollout is of them: with `jobs` they are removed before others are written."""
    jobs: Jobs | None = None
    """What is done while steps are taken: rollouts; None with `rl.staleness=0`."""

    @property
    def rl(self) -> RlConfig:
        """Return the settings of answers."""
        return self.config.rl

    def sync(self, step: int) -> float:
        """Let the generators have the weights after `step` steps, if they have not; returns the seconds that it took."""
        began = time.perf_counter()
        if self.jobs is not None:
            self.jobs.settle()
        if self.version != step:
            if self.written != step:
                self.write(step)
                self.passing = step
            self.open(step)
        return time.perf_counter() - began

    def write(self, step: int) -> None:
        """Put the weights, which are those after `step` steps, where generators find them, if they are not there."""
        if self.written != step:
            if self.passing is not None and self.jobs is not None and self.world.rank == 0:
                self.attempt.require_current()
                versions.remove(self.place(self.passing))
            self.passing = None
            write_weights(self.engine, self.blueprint, self.tokenizer, self.place(step), self.world, self.attempt)
            self.written = step

    def open(self, step: int) -> None:
        """Have the generators take the weights after `step` steps, if they have others."""
        if self.version != step:
            self.generators.renew(self.place(step))
            self.version = step

    def place(self, step: int) -> Path:
        """Return the directory of the weights after `step` steps."""
        return self.folder if self.jobs is None else versions.folder_of(self.folder, step)

    @property
    def folder(self) -> Path:
        """Return the directory of all that generators open."""
        return self.attempt.run_dir / paths.ROLLOUTS / WEIGHTS

    def rollout(self, first: int) -> Path:
        """Return the folder of a rollout by the first of its steps, counted from 0."""
        return self.attempt.run_dir / paths.ROLLOUTS / name_of(first + 1)

    def answers(
        self, asked: list[tuple[int, int, list[int]]], rows: list[dict[str, Any]], split: str, count: int, sampling: Sampling | None = None
    ) -> dict[int, Answer] | None:
        """Return `count` answers to each prompt, (position, number, ids), prompt by prompt; None where a rank was asked to stop.

        An answer's seed is a function of the split, the position and its number. With an environment only rank 0 has them.
        """
        places = [((self.config.seed, split, at, sample), number, ids) for at, number, ids in asked for sample in range(count)]
        if self.conversations is not None:
            return self.conversations.hold(places, rows, seed_of, self.generators, sampling)
        requests = [Request(key=key, seed=seed_of(*place), ids=ids) for key, (place, _, ids) in enumerate(places)]
        return self.generators.ask(requests, sampling)

    def score(
        self, asked: list[tuple[int, int, list[int]]], rows: list[dict[str, Any]], answers: dict[int, Answer], count: int
    ) -> list[Group] | None:
        """Return the groups of prompts, each (position, number, ids), with the rewards of `count` answers each; on rank 0 alone.

        None where this rank was asked to stop.

        Answers have the keys of their places: prompt by prompt.
        """
        assert self.rewards is not None
        every = [answers[key] for key in range(len(asked) * count)]
        require_answers(every)
        texts = [self._text(answer, asked[key // count][2]) for key, answer in enumerate(every)]
        told = []
        for key, (answer, text) in enumerate(zip(every, texts, strict=True)):
            own = {"answer": text, "ids": answer.ids, "finish": answer.finish}
            turn = {"prompt": answer.messages[: answer.last], "ids": answer.last_ids} if isinstance(answer, Conversation) else {}
            told.append(rows[asked[key // count][1]] | own | turn)
        try:
            found = self.rewards.score(told, self.generators.look)
        except Interrupted:
            return None
        if self.conversations is not None:
            found = with_environment(found, every)
        groups = []
        for at, (position, number, ids) in enumerate(asked):
            span = slice(at * count, (at + 1) * count)
            groups.append(
                Group(
                    position=position,
                    number=number,
                    ids=ids,
                    answers=every[span],
                    texts=texts[span],
                    rewards=found.total[span],
                    parts={name: values[span] for name, values in found.parts.items()},
                    reasons={name: values[span] for name, values in found.reasons.items()},
                )
            )
        return groups

    def _text(self, answer: Answer, prompt: list[int]) -> str:
        """Return an answer in words, without the token that ended it; of a conversation the model's last turn.

        Reasoning that the prompt has begun, and that never ends, has the prompt's `<think>` in front of it: it is not taken for an answer.
        """
        text = words_of(answer, self.tokenizer) if answer.text is None else answer.text
        ids = answer.ids or []
        if isinstance(answer, Conversation):
            ids = answer.last_ids
            prompt = answer.document[: len(answer.document) - len(ids)]
        front, whole = (str(self.tokenizer.decode(part)) for part in (prompt[-FRONT:], ids))
        return opened(front, text, whole if ids else text)

    def close(self, continues: bool) -> None:
        """End what was started; a run that `continues` needs the weights of rollouts that are yet to be written."""
        self.generators.is_leaving = True
        if self.jobs is not None:
            self.jobs.close()
        self.generators.close()
        if self.conversations is not None:
            self.conversations.close()
        self.untemper()
        for engine in (self.reference, None if self.critic is None else self.critic.engine):
            if engine is not None:
                engine.close()
        if self.rewards is not None:
            self.rewards.close()
            if self.attempt.is_current(at_once=True) and not (continues and self.rl.staleness):  # else they are a newer one's
                shutil.rmtree(self.folder, ignore_errors=True)


def make_sampler(
    config: RunConfig,
    world: World,
    attempt: Attempt,
    engine: Engine,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerFast,
    critic: Outlined | None = None,
) -> Sampler:
    """Open the rewards, on rank 0, and prepare for generators; raises ConfigError, on every rank, for what cannot be. Collective."""
    limit, _ = positions_limit(blueprint.config)
    if limit is not None and config.data.seq_len > limit:
        reason = f"the model has positions for {limit} tokens of a prompt and its answer"
        raise ConfigError("data.seq_len", config.data.seq_len, reason, f"data.seq_len={limit}")
    folder = attempt.run_dir / paths.ROLLOUTS
    rewards, environments, fault = None, None, None
    turns = None if config.rl.environment is None else Turns(tokenizer, config.rl.environment)
    if world.rank == 0:
        folder.mkdir(exist_ok=True)
        try:
            environments = environments_of(config.rl)
            rewards = Rewards(config.reward, folder / REPLIES, needs_all=False)
        except ConfigError as error:
            fault = error.parts()
    if (refused := world.from_first(fault)) is not None:
        raise ConfigError(**refused)
    is_ahead = config.rl.staleness > 0
    generators = Generators(config, world, folder / WEIGHTS, world.beside() if is_ahead else None)
    more: dict[str, Any] = {"engine": engine, "blueprint": blueprint, "tokenizer": tokenizer}
    if config.objective.kl_weight:
        log.info("reference: building the model that training begins with once more")
        more["reference"] = build_reference(config, world, blueprint, engine)
        temper(more["reference"].model, config.rl.temperature)
    if turns is not None:
        more["conversations"] = Conversations(config, world, turns, environments)
    more["untemper"] = temper(engine.model, config.rl.temperature)
    if critic is not None:
        more["critic"] = build_critic(critic, world, [engine, more["reference"]] if "reference" in more else [engine])
    more["jobs"] = Jobs() if is_ahead else None
    return Sampler(config=config, world=world, attempt=attempt, generators=generators, rewards=rewards, **more)


def require_imports(config: RunConfig) -> None:
    """Import what a person names by its module, before anything is read; raises ConfigError. For rank 0, which uses it later."""
    for name, reward in config.reward.items():
        if reward.kind is RewardKind.function:
            imported(f"reward.{name}.path", str(reward.path))
    if config.rl.environment is not None:
        Environments(config.rl.environment, config.rl.environment_timeout_s, 1).close()


def seed_of(*place: object) -> int:
    """Return the seed of one answer, 63 bits: a function of the run's seed and the answer's place."""
    text = " ".join(map(str, place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
