"""What an answer is worth by its text alone: pure functions of an answer's row. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainers.config.choices import LengthUnit
from trainers.config.errors import ConfigError
from trainers.data.reasoning import answer_of
from trainers.rewards.matches import exact_match

Row = Mapping[str, Any]
Reward = Callable[[Row], float]
"""Of an answer's row; raises NoReward where there is none."""
UNITS: dict[LengthUnit, Callable[[Row], int]] = {
    LengthUnit.tokens: lambda row: len(row["ids"] or ()),
    LengthUnit.words: lambda row: len(str(row["answer"]).split()),
    LengthUnit.characters: lambda row: len(str(row["answer"])),
}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
KEYWORDS: dict[str, tuple[type, ...]] = {
    "type": (str, list),
    "properties": (dict,),
    "required": (list,),
    "additionalProperties": (dict, bool),
    "items": (dict, bool),
    "enum": (list,),
    "const": (object,),
    "minimum": (int, float),
    "maximum": (int, float),
    "minItems": (int, float),
    "maxItems": (int, float),
}
"""Of a schema, what decides, and what each may be."""
FENCED = re.compile(r"^```(?:python|py|python3)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOTES = ("$schema", "$id", "title", "description", "default", "examples")
"""Of a schema, what decides nothing."""


class NoReward(Exception):
    """An answer whose reward could not be found, which is not a reward of 0: the reason."""


def exact(how: str) -> Reward:
    """Return 1 where the answer has what the reference has, else 0; `how` is that of evaluation.extract."""

    def reward(row: Row) -> float:
        found = exact_match(str(row["answer"]), str(row["reference"]), how)
        if found is None:
            raise NoReward("the row has no reference")
        return found

    return reward


def length(least: float, most: float, soft: float, unit: LengthUnit) -> Reward:
    """Return 1 from `least` to `most` of a unit, and outside a line that is 0 `soft` units away (arXiv 2503.14476, section 3.4)."""

    def reward(row: Row) -> float:
        if unit is LengthUnit.tokens and row.get("ids") is None:
            raise NoReward("the answer has no ids, whose number is its length")
        count = UNITS[unit](row)
        away = max(least - count, count - most, 0)
        return 1.0 if away == 0 else max(1 - away / soft, 0.0) if soft else 0.0

    return reward


def pattern(text: str) -> Reward:
    """Return 1 where a regular expression matches the whole answer, without the space around it, else 0."""
    compiled = re.compile(text, re.DOTALL)
    return lambda row: float(compiled.fullmatch(str(row["answer"]).strip()) is not None)


def code_of(answer: str) -> str:
    """Return the last fenced block after an answer's reasoning that is Python's or nobody's, else all of it."""
    answer = answer_of(answer)
    blocks = FENCED.findall(answer)
    return str(blocks[-1]) if blocks else answer


def schema(given: dict[str, Any] | None) -> Reward:
    """Return 1 where the answer after its reasoning is JSON that the schema takes, else 0.

    It is the schema that is given, else that of the row's field `schema`.
    """

    def reward(row: Row) -> float:
        wanted = given if given is not None else row["row"].get("schema")
        try:
            wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
            if isinstance(wanted, dict):
                require_known(wanted)
        except ValueError:
            raise NoReward("the row's schema is not JSON") from None
        except RecursionError:
            raise NoReward("the row's schema is nested too deeply") from None
        if not isinstance(wanted, dict):
            raise NoReward("the row has no schema")
        try:
            return float(fits(json.loads(answer_of(str(row["answer"]))), wanted))
        except (ValueError, RecursionError):
            return 0.0

    return reward


def read_schema(field: str, file: str) -> dict[str, Any]:
    """Return the schema of a file, which the setting `field` names; raises ConfigError."""
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        require_known(found)
    except (OSError, ValueError) as error:
        raise ConfigError(field, file, f"could not be read: {error}") from None
    except NoReward as error:
        raise ConfigError(field, file, str(error)) from None
    if not isinstance(found, dict):
        raise ConfigError(field, file, "holds no schema, which is an object")
    return dict(found)


def require_known(wanted: Any) -> None:
    """Raise NoReward for a schema with keywords that are not known here, or with values that they may not have, anywhere in it."""
    if isinstance(wanted, bool):
        return
    if not isinstance(wanted, dict):
        raise NoReward("a schema is an object")
    if unknown := [name for name in wanted if name not in (*KEYWORDS, *NOTES)]:
        raise NoReward(f"the schema has `{unknown[0]}`, which is not known here; known are {', '.join(KEYWORDS)}")
    for name, kinds in KEYWORDS.items():
        value = wanted.get(name)
        if name in wanted and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds)):
            raise NoReward(f"the schema has a `{name}` that cannot be: {json.dumps(value)[:80]}")
    if not all(isinstance(name, str) for name in wanted.get("required", ())):
        raise NoReward("the schema requires names that are not strings")
    kinds = wanted.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            raise NoReward(f"the schema has the type `{kind}`; there are {', '.join(TYPES)}")
    for inner in [*wanted.get("properties", {}).values(), wanted.get("items", True), wanted.get("additionalProperties", True)]:
        require_known(inner)


def fits(value: Any, wanted: Mapping[str, Any] | bool) -> bool:
    """Tell whether a value is what a schema describes, whose keywords are known."""
    if isinstance(wanted, bool):
        return wanted
    if ("type" in wanted and not _is_of(value, wanted["type"])) or ("const" in wanted and not _same(value, wanted["const"])):
        return False
    if "enum" in wanted and not any(_same(value, one) for one in wanted["enum"]):
        return False
    if isinstance(value, dict):
        known, rest = wanted.get("properties", {}), wanted.get("additionalProperties", True)
        is_complete = all(name in value for name in wanted.get("required", ()))
        return is_complete and all(fits(held, known.get(name, rest)) for name, held in value.items())
    if isinstance(value, list):
        is_long_enough = wanted.get("minItems", 0) <= len(value) <= wanted.get("maxItems", len(value))
        return is_long_enough and all(fits(held, wanted.get("items", True)) for held in value)
    return not _is_of(value, "number") or bool(wanted.get("minimum", value) <= value <= wanted.get("maximum", value))


def _is_of(value: Any, kind: str | list[str]) -> bool:
    if isinstance(kind, list):
        return any(_is_of(value, one) for one in kind)
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
