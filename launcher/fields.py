"""Every setting by its dotted path, read off the dataclasses: for --help, and to say what a wrong name or value should be."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from launcher.config import JobConfig
from trainers.config.schema import RewardConfig, SourceConfig

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SOURCE, REWARD = "data.mix.NAME", "reward.NAME"
PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


@dataclass(frozen=True)
class Field:
    """One setting: its dotted path, its type, its default and the first line of its docstring."""

    path: str
    type: Any
    default: Any
    doc: str


@cache
def all_fields() -> dict[str, Field]:
    """Return every setting that is not itself a group, in the order of the dataclasses."""
    return {item.path: item for item in _walk(JobConfig, "")}


@cache
def named_fields() -> dict[str, Field]:
    """Return what each source of `data.mix` and each of `reward` has, by its dotted path with NAME in the place of its own."""
    return {item.path: item for kind, name in ((SourceConfig, SOURCE), (RewardConfig, REWARD)) for item in _walk(kind, f"{name}.")}


def _walk(schema: type, prefix: str) -> list[Field]:
    hints, docs, found = get_type_hints(schema), _docs(schema), []
    for item in dataclasses.fields(schema):
        path, kind = prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(kind):
            found += _walk(kind, path + ".")  # type: ignore[arg-type]
        else:
            default = item.default_factory() if callable(item.default_factory) else item.default
            found.append(Field(path, kind, default, docs.get(item.name, "")))
    return found


def _docs(schema: type) -> dict[str, str]:
    """Return the first line of the string under each field, base classes first."""
    docs: dict[str, str] = {}
    for cls in reversed([cls for cls in schema.__mro__ if dataclasses.is_dataclass(cls)]):
        body = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                docs[node.target.id] = str(ast.literal_eval(after.value)).splitlines()[0]
    return docs


def names_at(prefix: str) -> list[str]:
    """Return the names one level below a dotted path; the empty path is the top level."""
    start = f"{prefix}." if prefix else ""
    names = [path[len(start) :].split(".")[0] for path in all_fields() if path.startswith(start)]
    return list(dict.fromkeys(names))


def expected(kind: Any) -> str:
    """Say in words which values a type takes."""
    if get_origin(kind) in (Union, UnionType):
        inner = [item for item in get_args(kind) if item is not type(None)]
        return f"{expected(inner[0])}, or null"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return "one of " + ", ".join(kind)
    if get_origin(kind) is list:
        return f"a list of {PLURALS.get(get_args(kind)[0], 'values')}, as [a,b]"
    return KINDS.get(kind, "a mapping of names to values")


def choices(kind: Any) -> list[str]:
    """Return the names that a type takes, where it takes names."""
    return [str(item) for item in kind] if isinstance(kind, type) and issubclass(kind, StrEnum) else []
