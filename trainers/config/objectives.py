"""What the settings of an objective may be: each is for some objectives. No torch."""

from __future__ import annotations

from trainers.config.choices import ObjectiveName, PreferenceLoss
from trainers.config.errors import ConfigError
from trainers.config.foreign import of_others, refuse_foreign
from trainers.config.schema import ObjectiveConfig

FIELDS: dict[ObjectiveName, tuple[str, ...]] = {
    ObjectiveName.sft: (),
    ObjectiveName.cpt: (),
    ObjectiveName.dpo: ("beta", "loss", "label_smoothing", "robust", "length_normalised", "nll_weight"),
    ObjectiveName.cpo: ("beta", "loss", "label_smoothing", "length_normalised", "nll_weight"),
    ObjectiveName.simpo: ("beta", "margin"),
    ObjectiveName.orpo: ("beta",),
}
"""The settings that each objective has."""


def validate_objective(objective: ObjectiveConfig) -> None:
    """Raise ConfigError for a setting that the named objective does not have, or a value that its formula does not allow."""
    refuse_foreign("objective", objective, f"objective.name={objective.name}", of_others(FIELDS, objective.name))
    if not 0 <= objective.label_smoothing < 0.5:
        reason = "must be from 0 to below 0.5: above it the other answer would be the preferred one"
        raise ConfigError("objective.label_smoothing", objective.label_smoothing, reason, "objective.label_smoothing=0.1")
    if objective.loss is not PreferenceLoss.sigmoid and objective.label_smoothing:
        reason = f"is for the log-sigmoid, and objective.loss is {objective.loss}"
        raise ConfigError("objective.label_smoothing", objective.label_smoothing, reason, "objective.loss=sigmoid")
    if objective.robust and not objective.label_smoothing:
        reason = "is about a share of wrong pairs, and objective.label_smoothing is 0"
        raise ConfigError("objective.robust", True, reason, "objective.label_smoothing=0.1")
