"""PPO's critic: a second engine whose head says before each token what reward is to come, trained next to the policy."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trainers.batch import Batch, each_token
from trainers.config.derived import learning_rate, peak_lr
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data.tokenizer import pad_id
from trainers.engines.base import Engine, require_moved
from trainers.engines.build import attending, attention_of, build_engine
from trainers.health.spikes import TrainingFailed
from trainers.model.blueprint import Blueprint, make_blueprint
from trainers.model.forward import SCORE
from trainers.model.scores import ScoreHead, with_head
from trainers.objectives.values import Values
from trainers.reference import of_directory, require_same_vocabulary
from trainers.rundir.base import base_of, pinned
from trainers.step import take_step
from trainers.world import World

log = logging.getLogger("fulltune")
CRITIC = "critic"
"""The critic's part of a checkpoint."""


@dataclass
class Critic:
    """The critic's engine and how it is trained. Every method is collective."""

    config: RunConfig
    """That of the critic, as `critic_config` makes it."""
    engine: Engine
    skipped_in_a_row: int = 0
    """Steps whose gradient was not finite."""
    has_moved: bool = False
    """An update of this attempt has moved what begins at zero."""

    def step(self, batches: Sequence[Batch], world: World, step: int, num_steps: int, labels: int) -> dict[str, float]:
        """Take the critic's part of a step of so many labels over all ranks; returns what is told of it.

        A gradient that is not finite updates nothing. Raises TrainingFailed, on every rank, where `train.max_skipped` in a row were not,
        and where no gradient reaches a part of an adapter.
        """
        optim, scale = self.config.optim, None if self.engine.scale is None else self.engine.scale.factor
        lr = learning_rate(optim, peak_lr(optim, self.config.peft).value, step, num_steps)
        apart = [each_token(batch) for batch in batches]
        found = take_step(self.engine, Values(self.config.objective), apart, world, lr=lr, targets=labels)
        if not math.isfinite(found.grad_norm):
            overflowed = (scale or 0.0) > 1 and math.isfinite(found.loss)  # half the loss scale may do
            self._count_skipped(step + 1, found.grad_norm, overflowed)
        elif found.grad_norm:
            self.skipped_in_a_row = 0
            if not self.has_moved:
                require_moved(self.engine, world)
                self.has_moved = True
        return {"value_loss": found.loss, "critic_grad_norm": found.grad_norm, "critic_lr": lr, **found.figures}

    def _count_skipped(self, step: int, grad_norm: float, overflowed: bool) -> None:
        if overflowed:
            return
        self.skipped_in_a_row += 1
        log.warning("step %d leaves the critic as it is: its gradient norm is %s (%d in a row)", step, grad_norm, self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            reason = f"the critic's gradient norm was not finite in {self.skipped_in_a_row} steps in a row, the last {grad_norm}"
            raise TrainingFailed(f"{reason}; lower objective.critic_lr, raise optim.warmup_steps, or look at the rewards in metrics.jsonl")

    def next_to(self, policy: Engine) -> Both:
        """Return what a checkpoint of a run with a critic holds."""
        return Both(policy, self.engine)


@dataclass(frozen=True)
class Both:
    """Policy and critic, as one checkpoint holds them."""

    policy: Engine
    critic: Engine

    def state(self) -> dict[str, Any]:
        """Return the policy's state, with the critic's under its name."""
        return self.policy.state() | {CRITIC: self.critic.state()}

    def load(self, folder: Path) -> None:
        """Restore both."""
        self.policy.load(folder)
        self.critic.load(folder, CRITIC)


def critic_config(config: RunConfig) -> RunConfig:
    """Return the config that builds a run's critic: the run's, with its own model and optimizer settings, and no adapter to begin with."""
    objective, optim = config.objective, config.optim
    given: dict[str, Any] = {"weight_decay": objective.critic_weight_decay, "clip": objective.critic_clip, "lr": objective.critic_lr}
    given = {name: value for name, value in given.items() if value is not None}
    optim = replace(optim, **given | ({"lr_factor": 1.0} if "lr" in given else {}))
    model = config.model if objective.critic is None else of_directory(config.model, objective.critic)
    train = replace(config.train, balance_loss=None, logits_chunk=None)
    return replace(config, model=model, optim=optim, train=train, peft=replace(config.peft, adapter=None, modules_to_save=[]))


@contextmanager
def about_critic(named: str | None) -> Iterator[None]:
    """Let what is wrong with the model that a critic begins as be said of `objective.critic`, `named`, and not of `model.id`."""
    try:
        yield
    except ConfigError as error:
        if not error.path.startswith(("model.id", "model.architecture", "model.tokenizer")):
            raise
        remedy = "objective.critic=DIR, a reward model or a base such as llama or qwen3 with the run's tokenizer"
        raise ConfigError("objective.critic", named or error.value, error.reason, remedy) from error


@dataclass(frozen=True)
class Outlined:
    """What a critic is built from."""

    config: RunConfig
    """That of the critic, as `critic_config` makes it, at the hub's commit that the run began with."""
    blueprint: Blueprint

    def base(self) -> dict[str, Any]:
        """Return what of the run's manifest tells the weights of a critic with a base of its own from others; not collective."""
        if self.config.objective.critic is None:
            return {}
        unpinned = replace(self.config, model=replace(self.config.model, revision=None))
        return {CRITIC: base_of(unpinned, self.blueprint.folder, self.blueprint.revision)}


def outline_critic(config: RunConfig, tokenizer: PreTrainedTokenizerFast, device: str) -> Outlined:
    """Return what a run's critic is built from on `cuda` or `cpu`: a reward model, or a base with a new head of one score.

    Raises ConfigError for another head, another vocabulary, or an architecture without a head of scores: before weights are read.
    """
    config = pinned(critic_config(config), Path(config.run_dir), CRITIC)
    named = config.objective.critic
    if named is not None:
        require_same_vocabulary(config, tokenizer, "objective.critic")
    with about_critic(named):
        blueprint = make_blueprint(config.model, config.seed, tokenizer)
        scores = (
            blueprint.config.num_labels if any("SequenceClassification" in name for name in blueprint.config.architectures or ()) else 1
        )
        if scores != 1:
            reason = f"has a head of {scores} scores, and a critic says one number"
            raise ConfigError("objective.critic", named, reason, "a model of objective=reward, or a base")
        blueprint = replace(blueprint, config=with_head(blueprint.config, ScoreHead(pad_id=pad_id(tokenizer))), scores=True)
        blueprint = attending(blueprint, attention_of(config, blueprint, device))
        blueprint.build()
    return Outlined(config, blueprint)


def build_critic(outlined: Outlined, world: World, next_to: Sequence[Engine]) -> Critic:
    """Build a run's critic next to its policy, and the reference where there is one; collective."""
    config = outlined.config
    log.info("critic: building %s with a head of one score (%s)", config.model.id or config.model.architecture.get("model_type"), SCORE)
    return Critic(config, build_engine(config, world, outlined.blueprint, next_to=next_to))
