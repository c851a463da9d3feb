"""What the settings of rewards may be: each is for some kinds. No torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from trainers.config.choices import RewardKind
from trainers.config.derived import SAMPLED
from trainers.config.errors import ConfigError
from trainers.config.foreign import of_others, refuse_foreign
from trainers.config.measured import EXTRACTS, against_extract
from trainers.config.schema import RewardConfig, RunConfig

FIELDS: dict[RewardKind, tuple[str, ...]] = {
    RewardKind.exact: ("extract",),
    RewardKind.math: ("timeout_s",),
    RewardKind.task: ("timeout_s",),
    RewardKind.json: ("schema",),
    RewardKind.length: ("min", "max", "soft", "unit"),
    RewardKind.format: ("pattern",),
    RewardKind.code: ("tests", "timeout_s", "memory_mib", "processes", "disk_mib"),
    RewardKind.model: ("path",),
    RewardKind.judge: ("url", "model", "timeout_s", "at_once"),
    RewardKind.function: ("path", "timeout_s"),
}
"""The settings that each kind has."""
NEEDED = {
    RewardKind.format: {"pattern": ".+"},
    RewardKind.function: {"path": "module:function"},
    RewardKind.model: {"path": "DIR, the export of a reward model"},
    RewardKind.judge: {"url": "http://host:8000/v1", "model": "NAME"},
}
"""Those without which there is no reward, each with what it may be."""
TIMEOUTS_S = {RewardKind.math: 15.0, RewardKind.task: 15.0, RewardKind.code: 10.0, RewardKind.function: 10.0, RewardKind.judge: 60.0}
MOST = 1e6
"""Of any number that is a limit or a weight."""
NAME = re.compile(r"[A-Za-z0-9_-]+")


def timeout_of(reward: RewardConfig) -> float:
    """Return the seconds that an answer may take."""
    return TIMEOUTS_S[reward.kind] if reward.timeout_s is None else reward.timeout_s


def validate_rewards(config: RunConfig) -> None:
    """Raise ConfigError for rewards that nothing learns from, or that cannot be."""
    for name, reward in config.reward.items():
        validate_reward(name, reward)
    if config.reward and config.objective.name not in SAMPLED:
        first = next(iter(config.reward))
        reason = f"objective={config.objective.name} learns from rows, and asks for no rewards"
        remedy = "objective=grpo, or leave it out: `python -m tools.select` rewards answers"
        raise ConfigError(f"reward.{first}", config.reward[first].kind.value, reason, remedy)


def validate_reward(name: str, reward: RewardConfig) -> None:
    """Raise ConfigError for a setting that the kind does not have, or a value that it may not have."""
    path = f"reward.{name}"
    if not NAME.fullmatch(name):
        raise ConfigError("reward", name, "the name of a reward is letters, digits, - and _, as metrics have it", "another name")
    refuse_foreign(path, reward, f"{path}.kind={reward.kind}", of_others(FIELDS, reward.kind))
    for field, example in NEEDED.get(reward.kind, {}).items():
        if not getattr(reward, field):
            raise ConfigError(f"{path}.{field}", None, f"a reward of kind {reward.kind} needs it", f"{path}.{field}={example}")
    if not abs(reward.weight) <= MOST:
        raise ConfigError(f"{path}.weight", reward.weight, f"must be a number from -{MOST:g} to {MOST:g}")
    for field in ("timeout_s", "memory_mib", "processes", "disk_mib", "at_once"):
        value = getattr(reward, field)
        if value is not None and not 0 < value <= MOST:
            raise ConfigError(f"{path}.{field}", value, f"must be a number greater than 0, at most {MOST:g}")
    _validate_length(path, reward)
    _validate_files(path, reward)


def _validate_length(path: str, reward: RewardConfig) -> None:
    if not 0 <= reward.soft < math.inf:
        raise ConfigError(f"{path}.soft", reward.soft, "must be a number, 0 or greater")
    if reward.max is not None and not reward.min <= reward.max:
        raise ConfigError(f"{path}.max", reward.max, f"is less than {path}.min = {reward.min:g}", f"{path}.max=null")


def _validate_files(path: str, reward: RewardConfig) -> None:
    """Refuse expressions that are not valid, and files that are not what they are taken for."""
    if reason := against_extract(reward.extract):
        raise ConfigError(f"{path}.extract", reward.extract, reason, f"one of {', '.join(EXTRACTS)}, or one group")
    try:
        re.compile(reward.pattern or "")
    except re.error as error:
        raise ConfigError(f"{path}.pattern", reward.pattern, f"is not a valid regular expression: {error}") from None
    if reward.schema is not None and not Path(reward.schema).is_file():
        raise ConfigError(f"{path}.schema", reward.schema, "no such file")
    if reward.kind is RewardKind.model and not gives_scores(Path(str(reward.path))):
        reason = "holds no sequence-classification model" if Path(str(reward.path)).is_dir() else "no such directory"
        raise ConfigError(f"{path}.path", reward.path, reason, "RUN/export of a run that trained a reward model")


def gives_scores(folder: Path) -> bool:
    """Tell whether a directory holds a sequence-classification model."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    return any(str(name).endswith("ForSequenceClassification") for name in names or ())
