"""PPO's critic: a second engine whose head says before each token what reward is to come, trained next to the policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trainers.batch import Batch, each_token
from trainers.config.derived import learning_rate, peak_lr
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data.tokenizer import pad_id
from trainers.engines.base import Engine
from trainers.engines.build import build_engine
from trainers.model.blueprint import Blueprint, make_blueprint
from trainers.model.forward import SCORE
from trainers.model.scores import ScoreHead, with_head
from trainers.objectives.values import Values
from trainers.reference import of_directory, require_same_vocabulary
from trainers.step import take_step
from trainers.world import World

log = logging.getLogger("fulltune")
CRITIC = "critic"
"""The critic's part of a checkpoint."""


@dataclass(frozen=True)
class Critic:
    """The critic's engine and how it is trained. Every method is collective."""

    config: RunConfig
    """That of the critic, as `critic_config` makes it."""
    engine: Engine

    def step(self, batches: Sequence[Batch], world: World, step: int, num_steps: int, labels: int) -> dict[str, float]:
        """Take the critic's part of a step of so many labels over all ranks; returns what is told of it.

        A gradient that is not finite updates nothing.
        """
        optim = self.config.optim
        lr = learning_rate(optim, peak_lr(optim, self.config.peft).value, step, num_steps)
        apart = [each_token(batch) for batch in batches]
        found = take_step(self.engine, Values(self.config.objective), apart, world, lr=lr, targets=labels)
        return {"value_loss": found.loss, "critic_grad_norm": found.grad_norm, "critic_lr": lr, **found.figures}

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


def critic_blueprint(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Blueprint:
    """Return the blueprint of a critic, of its own config: a base with a head of one score.

    Raises ConfigError for another head, another vocabulary, or an architecture without a head of scores.
    """
    named = config.objective.critic
    if named is not None:
        require_same_vocabulary(config, tokenizer, "objective.critic")
    blueprint = make_blueprint(config.model, config.seed, tokenizer)
    scores = blueprint.config.num_labels if any("SequenceClassification" in name for name in blueprint.config.architectures or ()) else 1
    if scores != 1:
        reason = f"has a head of {scores} scores, and a critic says one number"
        raise ConfigError("objective.critic", named, reason, "a model of objective=reward, or a base")
    return replace(blueprint, config=with_head(blueprint.config, ScoreHead(pad_id=pad_id(tokenizer))), scores=True)


def build_critic(config: RunConfig, world: World, tokenizer: PreTrainedTokenizerFast) -> Critic:
    """Build a run's critic, from a reward model or a base with a new head; collective. Raises ConfigError as `critic_blueprint` does."""
    config = critic_config(config)
    log.info("critic: building %s with a head of one score (%s)", config.model.id or config.model.architecture.get("model_type"), SCORE)
    return Critic(config, build_engine(config, world, critic_blueprint(config, tokenizer)))
