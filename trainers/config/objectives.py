"""What the settings of an objective may be: each is for some objectives. No torch."""

from __future__ import annotations

import math
from pathlib import Path

from trainers.config.choices import Average, Divergence, FDivergence, ObjectiveName, PreferenceLoss, Supervise
from trainers.config.derived import SAMPLED, SCORED
from trainers.config.errors import ConfigError, plural
from trainers.config.foreign import of_others, refuse_foreign
from trainers.config.local import looks_local, require_model_directory
from trainers.config.methods import VIRTUAL
from trainers.config.schema import ObjectiveConfig, RunConfig

SCORE = "score"
"""The head's name in a model of scores."""
FIELDS: dict[ObjectiveName, tuple[str, ...]] = {
    ObjectiveName.sft: ("label_smoothing",),
    ObjectiveName.cpt: ("label_smoothing",),
    ObjectiveName.dpo: (
        *("beta", "loss", "label_smoothing", "robust", "length_normalised", "nll_weight"),
        *("f_divergence", "f_alpha", "reference"),
    ),
    ObjectiveName.cpo: ("beta", "loss", "label_smoothing", "length_normalised", "nll_weight"),
    ObjectiveName.simpo: ("beta", "margin"),
    ObjectiveName.orpo: ("beta",),
    ObjectiveName.reward: ("center",),
    ObjectiveName.classify: ("labels", "class_weights", "balanced"),
    ObjectiveName.distil: ("beta", "teacher", "divergence", "ce_weight"),
    ObjectiveName.kto: ("beta", "desirable_weight", "undesirable_weight", "reference"),
    ObjectiveName.grpo: ("advantage", "average", "constant", "ratio", "clip_low", "clip_high", "kl_weight", "importance_cap"),
    ObjectiveName.ppo: (
        *("average", "constant", "clip_low", "clip_high", "kl_weight", "kl_estimator", "importance_cap", "gamma", "gae_lambda", "whiten"),
        *("critic", "critic_lr", "critic_weight_decay", "critic_clip", "value_clip"),
    ),
}
"""The settings that each objective has."""
BINS = 10
"""Of a classifier's confidence, all as wide, for the calibration error."""
TEACHER = "teacher.json"
"""In a directory of a teacher's log-probabilities: whose they are, and of which rows."""


def validate_objective(objective: ObjectiveConfig) -> None:
    """Raise ConfigError for a setting that the named objective does not have, or a value that its formula does not allow."""
    refuse_foreign("objective", objective, f"objective.name={objective.name}", of_others(FIELDS, objective.name))
    spreads = objective.name in (ObjectiveName.sft, ObjectiveName.cpt)
    if spreads and not 0 <= objective.label_smoothing < 1:
        reason = "must be from 0 to below 1: it is a share of each label's probability"
        raise ConfigError("objective.label_smoothing", objective.label_smoothing, reason, "objective.label_smoothing=0.1")
    if not spreads and not 0 <= objective.label_smoothing < 0.5:
        reason = "must be from 0 to below 0.5: above it the other answer would be the preferred one"
        raise ConfigError("objective.label_smoothing", objective.label_smoothing, reason, "objective.label_smoothing=0.1")
    if objective.name is ObjectiveName.distil:
        _validate_teacher(objective)
    if objective.name in SCORED:
        _validate_classes(objective)
    if objective.name in (ObjectiveName.dpo, ObjectiveName.cpo):
        _validate_preference(objective)
    if objective.name in SAMPLED:
        _validate_policy(objective)
    if objective.desirable_weight == objective.undesirable_weight == 0:
        raise ConfigError("objective.desirable_weight", 0, "with both weights 0 nothing is trained", "objective.desirable_weight=1")
    if objective.reference is not None and looks_local(objective.reference):
        require_model_directory("objective.reference", objective.reference)


def _validate_preference(objective: ObjectiveConfig) -> None:
    """Refuse wrong labels of another loss, an alpha of another divergence, and a divergence of anything but a ratio of two models."""
    if objective.loss is not PreferenceLoss.sigmoid and objective.label_smoothing:
        reason = f"is for the log-sigmoid, and objective.loss is {objective.loss}"
        raise ConfigError("objective.label_smoothing", objective.label_smoothing, reason, "objective.loss=sigmoid")
    if objective.robust and not objective.label_smoothing:
        reason = "is about a share of wrong pairs, and objective.label_smoothing is 0"
        raise ConfigError("objective.robust", True, reason, "objective.label_smoothing=0.1")
    alpha, divergence = objective.f_alpha, objective.f_divergence
    if alpha > 1:
        raise ConfigError("objective.f_alpha", alpha, "must be above 0 and at most 1", "objective.f_alpha=0.5")
    if alpha != ObjectiveConfig().f_alpha and divergence is not FDivergence.alpha:
        reason = f"is of the alpha divergence, and objective.f_divergence is {divergence}"
        raise ConfigError("objective.f_alpha", alpha, reason, "objective.f_divergence=alpha")
    if divergence is not FDivergence.reverse_kl and (objective.length_normalised or objective.loss is PreferenceLoss.ipo):
        what = (
            "objective.loss=ipo is derived for reverse_kl"
            if objective.loss is PreferenceLoss.ipo
            else "an answer's ratio is not one a token"
        )
        remedy = "objective.f_divergence=reverse_kl, or objective.loss=sigmoid objective.length_normalised=false"
        raise ConfigError("objective.f_divergence", str(divergence), what, remedy)


def _validate_policy(objective: ObjectiveConfig) -> None:
    """Refuse a mean over a constant that is not given, or given for nothing, and a ratio below 0."""
    if objective.clip_low > 1:
        reason = "must be above 0 and at most 1: no probability is below 0"
        raise ConfigError("objective.clip_low", objective.clip_low, reason, "objective.clip_low=0.2")
    divides = objective.average is Average.constant
    if divides and objective.constant is None:
        reason = "is what objective.average=constant divides each answer by: the most tokens that an answer may have"
        raise ConfigError("objective.constant", None, reason, "objective.constant=1024, or objective.average=tokens")
    if objective.constant is not None and not divides:
        reason = f"divides nothing where objective.average is {objective.average}"
        raise ConfigError("objective.constant", objective.constant, reason, "objective.average=constant")


def _validate_teacher(objective: ObjectiveConfig) -> None:
    """Refuse shares that leave nothing of the teacher or of the model, and a teacher that does not exist."""
    if not 0 <= objective.ce_weight < 1:
        reason = "must be from 0 to below 1: with 1 nothing is learnt from the teacher"
        raise ConfigError("objective.ce_weight", objective.ce_weight, reason, "objective.ce_weight=0.5")
    if objective.divergence is Divergence.jsd and not 0 < objective.beta < 1:
        reason = "is the share of the teacher in a mixture, above 0 and below 1; at its ends are forward_kl and reverse_kl"
        raise ConfigError("objective.beta", objective.beta, reason, "objective.beta=0.5, or objective.divergence=forward_kl")
    if objective.teacher is not None and not (Path(objective.teacher) / TEACHER).is_file():
        reason = f"no such directory, or it has no {TEACHER}"
        raise ConfigError("objective.teacher", objective.teacher, reason, "what `python -m tools.logprobs` has written for these rows")


def _validate_classes(objective: ObjectiveConfig) -> None:
    """Refuse classes that are none, and weights of other classes."""
    labels, weights = objective.labels, objective.class_weights
    if labels and (len(set(labels)) < max(2, len(labels)) or "" in labels):
        raise ConfigError("objective.labels", labels, "needs two names or more, each once", "objective.labels=[]: those of the rows")
    if weights and len(weights) != len(labels):
        reason = f"has {plural(len(weights), 'weight')}, and objective.labels names {plural(len(labels), 'class')}"
        raise ConfigError("objective.class_weights", weights, reason, "objective.balanced=true objective.class_weights=[]")
    if any(not 0 <= weight < math.inf for weight in weights) or (weights and not any(weights)):
        raise ConfigError("objective.class_weights", weights, "must be numbers, 0 or greater, and not all 0", "objective.class_weights=[]")
    if weights and objective.balanced:
        reason = "weighs classes by their documents, and objective.class_weights is given"
        raise ConfigError("objective.balanced", True, reason, "objective.balanced=false")


def validate_scores(config: RunConfig) -> None:
    """Refuse what has no meaning for a model whose head makes scores of documents, and no logits."""
    if config.objective.name not in SCORED:
        return
    said = f"objective={config.objective.name} trains a head of scores"
    if config.peft.method in VIRTUAL:
        reason = f"{said}, and transformers takes the score of a row's last token by the row's own, without virtual ones in front"
        raise ConfigError("peft.method", str(config.peft.method), reason, "peft=lora")
    if config.train.logits_chunk:
        raise ConfigError("train.logits_chunk", config.train.logits_chunk, f"{said}: there are no logits", "train.logits_chunk=null")
    if config.data.supervise is not Supervise.assistant:
        reason = f"{said} at a document's last token, whoever wrote the rest"
        raise ConfigError("data.supervise", str(config.data.supervise), reason, "data.supervise=assistant")
    if SCORE in config.peft.modules_to_save:
        reason = f"{said}, which every adapter is saved with"
        raise ConfigError("peft.modules_to_save", config.peft.modules_to_save, reason, "peft.modules_to_save=[]")
