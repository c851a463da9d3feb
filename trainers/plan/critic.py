"""PPO's critic in a plan: a second engine, whose step comes after the policy's while each keeps its own between its steps."""

from __future__ import annotations

from dataclasses import replace

from trainers.config.schema import RunConfig
from trainers.model.blueprint import Blueprint
from trainers.model.scores import ScoreHead, with_head
from trainers.plan.inputs import read_model
from trainers.plan.trace import Kind, Moment
from trainers.rl.critic import critic_config

OF_CRITIC = "the critic's "
"""Begins the names of the moments of its step."""


def read_critic(config: RunConfig) -> tuple[RunConfig, Blueprint]:
    """Return the config and the model without values of a run's critic; raises ConfigError naming the field."""
    config = critic_config(config)
    blueprint, _ = read_model(config)
    return config, replace(blueprint, config=with_head(blueprint.config, ScoreHead(pad_id=0)), scores=True)


def together(policy: list[Moment], critic: list[Moment]) -> list[Moment]:
    """Return the moments of a step of both, each with what the other keeps meanwhile."""
    after = [replace(moment, name=f"{OF_CRITIC}{moment.name}") for moment in critic]
    return [*_next_to(policy, critic[-1].end), *_next_to(after, policy[-1].end)]


def _next_to(moments: list[Moment], kept: dict[Kind, float]) -> list[Moment]:
    """Return moments with bytes by kind that are there all the time."""
    return [replace(moment, peak=_added(moment.peak, kept), end=_added(moment.end, kept)) for moment in moments]


def _added(sizes: dict[Kind, float], more: dict[Kind, float]) -> dict[Kind, float]:
    return {kind: sizes.get(kind, 0.0) + more.get(kind, 0.0) for kind in (sizes | more)}
