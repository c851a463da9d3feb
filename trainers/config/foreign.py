"""What a setting is not for: one refusal for every group whose choice has settings of its own. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.config.errors import ConfigError
from trainers.config.schema import plain


def refuse_foreign(group: str, settings: object, chosen: str, remedies: dict[str, str]) -> None:
    """Raise ConfigError where a setting of `remedies`, which what is chosen does not have, is not left at its default."""
    defaults = type(settings)()
    for name, remedy in remedies.items():
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"{group}.{name}", plain(value), f"{chosen} has no such setting", remedy)


def of_others(fields: Mapping[Any, tuple[str, ...]], chosen: str) -> dict[str, str]:
    """Return the settings that only other choices of `fields` have, each with the remedy that names them; by setting."""
    foreign = {name: None for names in fields.values() for name in names if name not in fields[chosen]}
    owners = {name: ", ".join(owner for owner, names in fields.items() if name in names) for name in foreign}
    return {name: f"leave it out; it is for {named}" for name, named in owners.items()}
