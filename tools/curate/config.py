"""What a curation does: its steps and their settings, read from YAML. A step runs where the file names it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainers.config.choices import Layout
from trainers.config.errors import ConfigError, did_you_mean

LAYOUTS = [str(layout) for layout in Layout if layout is not Layout.auto]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Rows that have the layout's fields with text in them; others are removed."""

    layout: str | None = None
    """What every row must have; None takes each file's first row's."""


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """One spelling of the same characters; rows are changed, none is removed."""

    unicode: bool = True
    """To NFC, the composed form."""
    spaces: bool = True
    """Line ends to a line feed, blanks of all kinds to a space, none at the ends of lines."""
    encodings: bool = True
    """UTF-8 that was read as Windows-1252 or Latin-1 is read again."""
    controls: bool = True
    """Control characters and characters without a width are removed."""


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Rows with the same text, whatever their spaces and capitals; the first stays."""


@dataclass(frozen=True, kw_only=True)
class Near:
    """Rows whose texts overlap: candidates by MinHash, removed where their real Jaccard similarity reaches the threshold."""

    threshold: float = 0.8
    characters: int = 5
    """Length of the runs of characters that are compared."""
    bands: int = 20
    band_rows: int = 5
    """A pair of similarity s is a candidate with probability 1 - (1 - s^band_rows)^bands."""
    keep: str = "longest"
    """Of a cluster: longest, first, or highest by `field`."""
    field: str | None = None
    """A number of the row, for keep: highest."""
    compared: int = 50
    """Rows of one bucket that a row is compared with, at most."""


@dataclass(frozen=True, kw_only=True)
class Contradictions:
    """Prompts that have different answers are listed; no row is removed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every step in the order it runs in; None for one that does not."""

    schema: Schema | None = None
    normalise: Normalise | None = None
    exact: Exact | None = None
    near: Near | None = None
    contradictions: Contradictions | None = None


STEPS: dict[str, type[Any]] = {
    "schema": Schema,
    "normalise": Normalise,
    "exact": Exact,
    "near": Near,
    "contradictions": Contradictions,
}
CHOICES: dict[str, tuple[str, ...]] = {"near.keep": ("longest", "first", "highest"), "schema.layout": tuple(LAYOUTS)}
BOUNDS: dict[str, tuple[float, float]] = {
    "near.threshold": (0.3, 1.0),
    "near.characters": (2, 50),
    "near.bands": (1, 256),
    "near.band_rows": (1, 32),
    "near.compared": (1, 100_000),
}
"""Smallest and largest value of a number."""


def read_settings(file: Path) -> Settings:
    """Return the settings of a YAML file; raises ConfigError that names the file, the key and the remedy."""
    try:
        found = yaml.safe_load(file.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "CONFIG", str(file), f"cannot be read: {' '.join(str(error).split())}", "conf/curate/default.yaml is one"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError("CONFIG", str(file), "holds no names of steps", f"steps are {', '.join(STEPS)}")
    for name in found:
        if name not in STEPS:
            remedy = did_you_mean(str(name), STEPS) or f"steps are {', '.join(STEPS)}"
            raise ConfigError(str(name), found[name], f"{file} names a step that does not exist", remedy)
    settings = Settings(**{name: _step(name, value) for name, value in found.items() if value not in (None, False)})
    if settings == Settings():
        raise ConfigError("CONFIG", str(file), "turns on no step, so that every row would stay as it is", f"one of {', '.join(STEPS)}")
    check(settings)
    return settings


def _step(name: str, value: Any) -> Any:
    """Return a step's settings: its defaults for true, else the keys of an object over them; raises ConfigError."""
    kind = STEPS[name]
    if value is True:
        return kind()
    if not isinstance(value, dict):
        raise ConfigError(name, value, "is neither true, false nor settings", f"{name}: true")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key, held in value.items():
        if key not in fields:
            known = did_you_mean(str(key), fields) or (f"settings are {', '.join(fields)}" if fields else f"{name}: true")
            raise ConfigError(f"{name}.{key}", held, "is not a setting of this step", known)
        _require_type(f"{name}.{key}", held, fields[key])
    return kind(**value)


def _require_type(path: str, value: Any, found: dataclasses.Field[Any]) -> None:
    """Raise ConfigError unless a value has the type that its field is declared with."""
    asked = str(found.type)
    kinds: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": list, "dict": dict, "None": type(None)}
    allowed = [kinds[part.partition("[")[0]] for part in asked.split(" | ")]
    wrong_bool = isinstance(value, bool) and "bool" not in asked
    if wrong_bool or not any(isinstance(value, kind) for kind in allowed):
        raise ConfigError(path, value, f"is not of type {asked}", f"the default is {_default(found)!r}")
    inner = asked[asked.find("[") + 1 : asked.rfind("]")] if asked.startswith("list[") else ""
    if inner and not all(isinstance(item, kinds[inner]) for item in value):
        raise ConfigError(path, value, f"is not a {asked}", f"the default is {_default(found)!r}")


def _default(found: dataclasses.Field[Any]) -> Any:
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


def check(settings: Settings) -> None:
    """Raise ConfigError for a value out of its range, and for settings that do not go together."""
    for path, names in CHOICES.items():
        value = value_of(settings, path)
        if value is not None and value not in names:
            raise ConfigError(path, value, f"is not one of {', '.join(names)}", did_you_mean(str(value), names))
    for path, (least, most) in BOUNDS.items():
        value = value_of(settings, path)
        if value is not None and not least <= value <= most:
            raise ConfigError(path, value, f"is not between {least:g} and {most:g}", f"{path}: {min(max(value, least), most):g}")
    near = settings.near
    if near and (near.keep == "highest") != (near.field is not None):
        raise ConfigError("near.field", near.field, "goes with near.keep: highest, and that with it", "near: {keep: highest, field: score}")


def value_of(settings: Settings, path: str) -> Any:
    """Return a setting by its path; None where its step does not run."""
    step, _, name = path.partition(".")
    found = getattr(settings, step)
    return None if found is None else getattr(found, name)
