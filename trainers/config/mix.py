"""Mixtures of data sources: what each source is, as data of its own, and what their settings may be. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise

from trainers.config.choices import DataSource, Exhausted, Layout, MixChange
from trainers.config.derived import OF_MIXTURES, OF_STYLES, SCORED
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import DataConfig, RunConfig, SourceConfig

OWN = ("source", "path", "split", "config", "data_files", "revision", "max_rows", "eval_path", "eval_split")
"""Fields of `data` that each source has for itself."""
SHARED = ("eval_fraction", "layout", "template", "document", "supervise", "reasoning", "ignore")
"""Fields that a source has where it does not leave them to `data`."""
NAME = re.compile(r"[A-Za-z0-9_-]+")


def data_of(data: DataConfig, name: str) -> DataConfig:
    """Return a source of a mixture as data of its own, under which it is prepared."""
    source, plain = data.mix[name], DataConfig()
    own = {field: getattr(source, field) for field in OWN}
    own |= {field: value for field in SHARED if (value := getattr(source, field)) is not None}
    if source.eval_path is not None and source.eval_fraction is None:
        own["eval_fraction"] = 0.0
    unused = OF_MIXTURES if own.get("layout", data.layout) is Layout.styles else (*OF_MIXTURES, *OF_STYLES)
    return replace(data, mix={}, **{field: getattr(plain, field) for field in unused}, **own)


def first_of(data: DataConfig) -> DataConfig:
    """Return a single data set: the run's own, or that of the first source, without limits to its rows."""
    return replace(data_of(data, next(iter(data.mix))), max_rows=None) if data.mix else replace(data, max_rows=None)


def sources_of_mix(config: RunConfig) -> dict[str, RunConfig]:
    """Return the run of each source alone, by name; empty where the run has a single data set."""
    return {name: replace(config, data=data_of(config.data, name)) for name in config.data.mix}


@contextmanager
def named(name: str) -> Iterator[None]:
    """Let errors about `data.FIELD` name the source's own field, where it has one."""
    try:
        yield
    except ConfigError as error:
        parts = error.parts()
        for part in ("path", "reason", "remedy"):
            parts[part] = re.sub(rf"\bdata\.({'|'.join(_own_fields())})\b", rf"data.mix.{name}.\1", parts[part])
        raise ConfigError(**parts | {"value": error.value}) from error  # type: ignore[arg-type]


def _own_fields() -> list[str]:
    return [field.name for field in fields(SourceConfig)]


def schedule(data: DataConfig) -> list[tuple[int, list[float]]] | None:
    """Return the weights of the sources at step 0 and at each of `data.mix_steps`; None where they have none."""
    begin = begin_weights(data)
    if all(weight is None for weight in begin.values()):
        return None
    then = {name: source.then or [begin[name]] * len(data.mix_steps) for name, source in data.mix.items()}
    rows = zip(*([begin[name], *then[name]] for name in data.mix), strict=True)
    return [(step, [float(weight or 0.0) for weight in row]) for step, row in zip([0, *data.mix_steps], rows, strict=True)]


def begin_weights(data: DataConfig) -> dict[str, float | None]:
    """Return each source's weight at the beginning: its own, or that of `data.mix_ratio`; raises ConfigError for another number of them."""
    if not data.mix_ratio:
        return {name: source.weight for name, source in data.mix.items()}
    if len(data.mix_ratio) != len(data.mix):
        reason = f"has {plural(len(data.mix_ratio), 'number')}, and the sources are {', '.join(data.mix)}"
        raise ConfigError("data.mix_ratio", data.mix_ratio, reason, "data.mix_ratio=[], or a number for each source")
    return dict(zip(data.mix, data.mix_ratio, strict=True))


def validate_mix(config: RunConfig) -> None:
    """Raise ConfigError for weights that cannot be shares, and settings of one data set or of mixtures where there is the other."""
    data, plain = config.data, DataConfig()
    if not data.mix:
        for name in OF_MIXTURES:
            if (value := getattr(data, name)) != getattr(plain, name):
                said = value if isinstance(value, int | float | list) else str(value)
                raise ConfigError(f"data.{name}", said, "is of mixtures, and data.mix names no sources", "leave it out")
        return
    if config.objective.name in SCORED:
        reason = f"names sources, and the classes and ends of documents that objective={config.objective.name} needs are those of one"
        raise ConfigError("data.mix", list(data.mix), reason, "objective=sft, or one data set with the rows of all")
    for name in (name for name, source in data.mix.items() if source.source is DataSource.reasoning_gym):
        reason = "a mixture takes no tasks: data.tasks names several, and as many rows are made of each"
        raise ConfigError(f"data.mix.{name}.source", "reasoning_gym", reason, "data=reasoning_gym without data.mix")
    for name in (name for name in OWN if getattr(data, name) != getattr(plain, name)):
        value, unset, first = getattr(data, name), getattr(plain, name), next(iter(data.mix))
        reason = f"is of one data set, and data.mix names {', '.join(data.mix)}"
        off = "null" if unset is None else unset
        raise ConfigError(f"data.{name}", value, reason, f"data.{name}={off} data.mix.{first}.{name}={value}, or leave data.mix out")
    for name in data.mix:
        if not NAME.fullmatch(name):
            raise ConfigError("data.mix", name, "the name of a source is letters, digits, - and _, as metrics have it", "another name")
    require_layout_of_styles(data)
    _validate_weights(data)
    _validate_annealing(data)
    for name, source in data.mix.items():
        _validate_values(name, source)
        _validate_repeat(data, name, source)


def require_layout_of_styles(data: DataConfig) -> None:
    """Raise ConfigError for settings of styles where no rows are of their layout, those of a mixture's sources included."""
    if Layout.styles not in (data.layout, *(source.layout for source in data.mix.values())):
        for name in (name for name in OF_STYLES if getattr(data, name) != getattr(DataConfig(), name)):
            value = getattr(data, name) if name == "styles" else str(getattr(data, name))
            raise ConfigError(f"data.{name}", value, "is of rows with texts in several styles", "data.layout=styles, or leave it out")


def _validate_weights(data: DataConfig) -> None:
    own = {name: source.weight for name, source in data.mix.items() if source.weight is not None}
    if own and data.mix_ratio:
        reason = f"data.mix.{next(iter(own))}.weight is given too"
        raise ConfigError("data.mix_ratio", data.mix_ratio, reason, "data.mix_ratio=[], or no weight in a source")
    given = {name: weight for name, weight in begin_weights(data).items() if weight is not None}
    for name, weight in given.items():
        if not 0 <= weight < math.inf:
            path = "data.mix_ratio" if data.mix_ratio else f"data.mix.{name}.weight"
            raise ConfigError(path, data.mix_ratio or weight, "must be a number, 0 or greater")
    if missing := [name for name in data.mix if name not in given] if given else []:
        reason = f"{', '.join(given)} has a weight: all sources need one, or none, which takes as much as each has"
        raise ConfigError(f"data.mix.{missing[0]}.weight", None, reason, f"data.mix.{missing[0]}.weight=1")
    if given and not any(given.values()):
        raise ConfigError("data.mix", list(given), "every weight is 0: nothing is trained", f"data.mix.{next(iter(given))}.weight=1")
    if not data.mix_temperature > 0:
        raise ConfigError("data.mix_temperature", data.mix_temperature, "must be a number greater than 0")


def _validate_annealing(data: DataConfig) -> None:
    steps, changing = data.mix_steps, {name: source.then for name, source in data.mix.items() if source.then}
    if any(after <= before for before, after in pairwise([0, *steps])):
        raise ConfigError(
            "data.mix_steps", steps, "must be steps after the first, each greater than the one before", "data.mix_steps=[1000]"
        )
    for name, then in changing.items():
        if any(not 0 <= weight < math.inf for weight in then):
            raise ConfigError(f"data.mix.{name}.then", then, "must be numbers, 0 or greater")
        if begin_weights(data)[name] is None:
            raise ConfigError(f"data.mix.{name}.then", then, "the sources have no weights to begin with", f"data.mix.{name}.weight=1")
        if len(then) != len(steps):
            reason = f"has {plural(len(then), 'weight')}, and data.mix_steps names {plural(len(steps), 'step')}"
            raise ConfigError(f"data.mix.{name}.then", then, reason, "data.mix_steps=[1000] and one weight, or as many of both")
    if steps and not changing:
        raise ConfigError("data.mix_steps", steps, "no source has other weights then", f"data.mix.{next(iter(data.mix))}.then=[1]")
    if data.mix_change is not MixChange.linear and not steps:
        reason = "is about how weights change, and data.mix_steps is empty"
        raise ConfigError("data.mix_change", str(data.mix_change), reason, "data.mix_change=linear")
    for step, weights in schedule(data) or []:
        if not any(weights):
            raise ConfigError("data.mix", list(data.mix), f"every weight is 0 at step {step}: nothing would be trained", "a weight above 0")


def _validate_values(name: str, source: SourceConfig) -> None:
    for field in ("path", "eval_path", "split", "config", "revision", "template"):
        if getattr(source, field) == "":
            raise ConfigError(f"data.mix.{name}.{field}", "", "is empty: an unset shell variable, perhaps", "give a value, or leave it out")
    if source.max_rows is not None and source.max_rows <= 0:
        raise ConfigError(f"data.mix.{name}.max_rows", source.max_rows, "must be a number greater than 0")
    if source.eval_fraction is not None and not 0 <= source.eval_fraction <= 0.5:
        raise ConfigError(f"data.mix.{name}.eval_fraction", source.eval_fraction, "must be from 0 to 0.5")


def _validate_repeat(data: DataConfig, name: str, source: SourceConfig) -> None:
    if source.repeat is None:
        return
    if not 0 < source.repeat < math.inf:
        raise ConfigError(f"data.mix.{name}.repeat", source.repeat, "must be a number greater than 0")
    if data.mix_exhausted is Exhausted.repeat:
        reason = "data.mix_exhausted=repeat: a source is repeated as often as its weight asks for"
        raise ConfigError(f"data.mix.{name}.repeat", source.repeat, reason, "data.mix_exhausted=drop, or stop")
