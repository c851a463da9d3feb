"""Rewards as a command line names them: KIND:SETTING=VALUE,..."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tools.command import Refused
from trainers.config.choices import RewardKind
from trainers.config.errors import ConfigError
from trainers.config.rewards import FIELDS, validate_reward
from trainers.config.schema import RewardConfig, reward_of


def read(texts: Sequence[str]) -> dict[str, RewardConfig]:
    """Return the rewards by name, their kind's where they have none; raises Refused for two of one name, and ConfigError."""
    rewards: dict[str, RewardConfig] = {}
    for text in texts:
        name, reward = _read(text)
        if name in rewards:
            raise Refused(f"two rewards have one name, `{name}`: name=... tells them apart")
        rewards[name] = reward
    return rewards


def _read(text: str) -> tuple[str, RewardConfig]:
    """Return what one text asks for; `pattern` takes all that follows it."""
    kind, _, rest = text.partition(":")
    if kind not in list(RewardKind):
        raise Refused(f"--reward {text}: there is no reward `{kind}`; there are {', '.join(RewardKind)}")
    before, found, last = rest.partition("pattern=")
    words = [part.partition("=") for part in before.split(",") if part.strip()]
    given = {name.strip(): value.strip() for name, _, value in words} | ({"pattern": last} if found else {})
    name = given.pop("name", kind)
    for key in given:
        if key not in (known := ("weight", *FIELDS[RewardKind(kind)])):
            raise Refused(f"--reward {text}: `{key}` is not a setting of `{kind}`, which has name, {', '.join(known)}")
    try:
        reward = reward_of(name, {"kind": kind, **given})
        validate_reward(name, reward)
    except ConfigError as error:
        parts = error.parts() | {"path": f"--reward {text}"}
        field = error.path.rpartition(".")[2]
        parts["reason"] = f"{field} = {error.value}: {error.reason}" if field in given else f"{field}: {error.reason}"
        parts["remedy"] = re.sub(rf"reward\.{name}\.", f"{kind}:", error.remedy)
        raise ConfigError(**parts | {"value": text}) from error
    return name, reward
