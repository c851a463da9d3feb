"""What is minimised: functions of token log-probabilities that know no model and no engine. A file a family."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from trainers.config.choices import ObjectiveName
from trainers.config.derived import PREFERENCES, SAMPLED, SCORED
from trainers.config.errors import ConfigError
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import REFERENCE, TEACHER_IDS, TEACHER_LOGPS, Loss, Objective, Tallied, per_target
from trainers.objectives.next_token import NextToken

__all__ = ["CHOICES", "REFERENCE", "TEACHER_IDS", "TEACHER_LOGPS", "Loss", "Objective", "Tallied", "make_objective", "per_target"]


def _of_pairs(config: ObjectiveConfig) -> Objective:
    from trainers.objectives import preference

    classes: dict[ObjectiveName, Callable[[ObjectiveConfig], Objective]] = {
        ObjectiveName.dpo: preference.DPO,
        ObjectiveName.cpo: preference.CPO,
        ObjectiveName.simpo: preference.SimPO,
        ObjectiveName.orpo: preference.ORPO,
    }
    return classes[config.name](config)


def _of_documents(config: ObjectiveConfig) -> Objective:
    from trainers.objectives import scored

    return scored.Reward(config) if config.name is ObjectiveName.reward else scored.Classify(config)


def _of_teacher(config: ObjectiveConfig) -> Objective:
    from trainers.objectives.distil import Distil

    return Distil(config)


def _kto(config: ObjectiveConfig) -> Objective:
    from trainers.objectives.kto import KTO

    return KTO(config)


def _of_policy(config: ObjectiveConfig) -> Objective:
    from trainers.objectives.policy import Policy

    return Policy(replace(config, kl_weight=0.0) if config.name is ObjectiveName.ppo else config)  # whose divergence is in the rewards


CHOICES: dict[ObjectiveName, Callable[[ObjectiveConfig], Objective]] = {
    **dict.fromkeys((ObjectiveName.sft, ObjectiveName.cpt), lambda config: NextToken(config.label_smoothing)),
    **dict.fromkeys(PREFERENCES, _of_pairs),
    **dict.fromkeys(SCORED, _of_documents),
    ObjectiveName.distil: _of_teacher,
    ObjectiveName.kto: _kto,
    **dict.fromkeys(SAMPLED, _of_policy),
}


def make_objective(config: ObjectiveConfig, carried: Iterable[str] | None, balance_loss: float | None = None) -> Objective:
    """Return the objective that a config names, with a balance loss if there is a coefficient.

    `carried` is None where nobody knows what rows carry, as in a plan. Raises ConfigError where the rows do not carry the signals that
    the objective reads.
    """
    objective = CHOICES[config.name](config)
    missing = sorted(objective.signals - set(carried)) if carried is not None else []
    if missing:
        reason = f"reads {', '.join(missing)}, which the rows of data.path do not carry"
        raise ConfigError("objective.name", str(config.name), reason, "an objective that reads tokens alone: objective=sft")
    if balance_loss is None:
        return objective
    from trainers.objectives.balanced import Balanced

    return Balanced(objective, balance_loss)
