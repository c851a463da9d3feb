"""Rewards as a command line names them, and what each makes of answers; what fails is counted, and is never a reward. No torch."""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tools.command import Refused
from tools.curate import quality
from tools.curate.config import Quality
from tools.curate.rows import Item, View
from tools.select.mathematics import Mathematics
from tools.select.sandbox import Limits, passes, require_isolation
from tools.select.shapes import UNITS, NoReward, Reward, Row, code_of, exact, length, pattern, schema
from trainers.cache import content_key
from trainers.config.choices import Layout
from trainers.host import cores

KINDS: dict[str, dict[str, Any]] = {
    "exact": {"extract": "auto"},
    "math": {"timeout": 15.0},
    "json": {"schema": None},
    "length": {"min": 0.0, "max": math.inf, "soft": 0.0, "unit": "tokens"},
    "format": {"pattern": None},
    "code": {"tests": "tests", "timeout": 10.0, "memory_mib": 512.0, "processes": 16.0, "disk_mib": 16.0},
    "function": {"path": None, "timeout": 10.0},
    "model": {"path": None},
    "judge": {"url": None, "model": None, "timeout": 60.0, "at_once": 8},
}
"""What each kind may be told, and what it is told otherwise."""
MOST = 1e6
BOUNDS = {
    "weight": (-MOST, MOST),
    "min": (-math.inf, math.inf),
    "max": (-math.inf, math.inf),
    "soft": (0.0, math.inf),
    "processes": (1.0, MOST),
    "at_once": (1.0, MOST),
}
"""What numbers may be; others are above 0, and at most MOST."""
NEEDED = {"format": "pattern", "function": "path", "model": "path", "judge": "url"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A reward that is asked for."""

    kind: str
    name: str
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """Answers' rewards: a column for each part, NaN where there is none, and how often each part failed for which reason."""

    parts: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    failures: dict[str, Counter[str]]
    total: np.ndarray[Any, np.dtype[np.float64]]
    """The weighted sum, NaN where a part has none."""


def read(text: str) -> Asked:
    """Return what KIND:NAME=VALUE,... asks for; `pattern` takes all that follows it. Raises Refused."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS:
        raise Refused(f"--reward {text}: there is no reward `{kind}`; there are {', '.join(KINDS)}")
    before, found, last = rest.partition("pattern=")
    words = [part.partition("=") for part in before.split(",") if part.strip()]
    given = {name.strip(): value.strip() for name, _, value in words} | ({"pattern": last} if found else {})
    name, weight = given.pop("name", kind), _number(text, "weight", given.pop("weight", "1"))
    settings = dict(KINDS[kind])
    for key, value in given.items():
        if key not in settings:
            known = ", ".join(("name", "weight", *KINDS[kind]))
            raise Refused(f"--reward {text}: `{key}` is not a setting of `{kind}`, which has {known}")
        settings[key] = _number(text, key, value) if isinstance(KINDS[kind][key], float | int) else value
    if (needed := NEEDED.get(kind)) and settings[needed] is None:
        raise Refused(f"--reward {text}: `{kind}` needs {needed}=...")
    if kind == "length" and settings["unit"] not in UNITS:
        raise Refused(f"--reward {text}: unit is one of {', '.join(UNITS)}")
    return Asked(kind=kind, name=name, weight=weight, settings=settings)


def _number(text: str, name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        raise Refused(f"--reward {text}: `{name}` is a number, and `{value}` is not") from None
    least, most = BOUNDS.get(name, (0.0, MOST))
    if not least <= found <= most or (name not in BOUNDS and found == 0):
        allowed = f"from {least:g} to {most:g}" if name in BOUNDS else f"above 0, and at most {MOST:g}"
        raise Refused(f"--reward {text}: `{name}` is {allowed}, and `{value}` is not")
    return found


def rewards_of(rows: Sequence[Row], asked: Sequence[Asked], kept: Path) -> Found:
    """Return the rewards of all answers. A judge's replies are kept in the folder `kept`. Raises Refused, ConfigError and OSError."""
    parts, failures = {}, {}
    for one in asked:
        parts[one.name], failures[one.name] = _column(rows, one, kept)
    total = sum((one.weight * parts[one.name] for one in asked), np.zeros(len(rows)))
    return Found(parts, failures, total)


def _column(rows: Sequence[Row], asked: Asked, kept: Path) -> tuple[Any, Counter[str]]:
    settings = asked.settings
    if asked.kind == "judge":
        return _judged(rows, settings, kept)
    if asked.kind == "model":
        return _scored(rows, str(settings["path"]))
    if asked.kind == "math":
        mathematics = Mathematics(settings["timeout"])
        try:
            return _each(rows, mathematics)
        finally:
            mathematics.close()
    if asked.kind == "code":
        return _tested(rows, settings)
    if asked.kind == "function":
        return _each(rows, _timed(_function(str(settings["path"])), settings["timeout"]))
    makers: dict[str, Callable[[], Reward]] = {
        "exact": lambda: exact(str(settings["extract"])),
        "json": lambda: schema(settings["schema"]),
        "length": lambda: length(settings["min"], settings["max"], settings["soft"], str(settings["unit"])),
        "format": lambda: pattern(str(settings["pattern"])),
    }
    return _each(rows, makers[asked.kind]())


def _each(rows: Sequence[Row], reward: Reward) -> tuple[Any, Counter[str]]:
    found, failures = np.full(len(rows), np.nan), Counter[str]()
    for number, row in enumerate(rows):
        try:
            value = float(reward(row))
        except NoReward as error:
            failures[str(error)] += 1
            continue
        if math.isfinite(value):
            found[number] = value
        else:
            failures["is not a finite number"] += 1
    return found, failures


def _function(path: str) -> Callable[[dict[str, Any]], Any]:
    """Return a Python function by module:name or module.name; raises Refused."""
    module, _, name = path.replace(":", ".").rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refused(f"--reward function: `{path}` could not be imported: {error}") from None
    if not callable(found):
        raise Refused(f"--reward function: `{path}` is not callable")
    return found  # type: ignore[no-any-return]


class _Late(BaseException):
    """A function takes too long; not an Exception, which the function may catch."""


def _timed(function: Callable[[dict[str, Any]], Any], timeout_s: float) -> Reward:
    """Return a reward that is missing where the function raises, or takes longer."""

    def late(*_: object) -> None:
        raise _Late

    def reward(row: Row) -> float:
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            return float(function(dict(row)))
        except _Late:
            raise NoReward(f"takes longer than {timeout_s:g} s") from None
        except Exception as error:  # whatever a person's function does: counted, and shown by its type
            raise NoReward(f"raises {type(error).__name__}: {str(error)[:80]}") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return reward


def _tested(rows: Sequence[Row], settings: Mapping[str, Any]) -> tuple[Any, Counter[str]]:
    """Return 1 where an answer's code passes the row's tests, else 0, also where a limit ended it; and how often one did."""
    require_isolation()
    mib = 1 << 20
    sizes = {"memory_bytes": int(settings["memory_mib"] * mib), "disk_bytes": int(settings["disk_mib"] * mib)}
    limits = Limits(time_s=settings["timeout"], processes=int(settings["processes"]), **sizes)
    failures = Counter[str]()

    def one(row: Row) -> float:
        tests = row["row"].get(settings["tests"])
        tests = "\n".join(map(str, tests)) if isinstance(tests, list) else tests
        if not isinstance(tests, str) or not tests.strip():
            failures[f"the row has no `{settings['tests']}`"] += 1
            return math.nan
        outcome = passes(code_of(str(row["answer"])), tests, limits)
        if outcome.stopped:
            failures[f"worth 0: stopped by its limit of {outcome.stopped}"] += 1
        return float(outcome.passed)

    with ThreadPoolExecutor(cores()) as pool:
        return np.array(list(pool.map(one, rows)), np.float64), failures


def _scored(rows: Sequence[Row], folder: str) -> tuple[Any, Counter[str]]:
    quality.require_scorer(Quality(by="reward", model=folder))
    from tools.curate.reward import scores_of  # torch is for those who ask for it

    said = [number for number, row in enumerate(rows) if str(row["answer"]).strip()]
    turns = [[*rows[number]["prompt"], {"role": "assistant", "content": rows[number]["answer"]}] for number in said]
    items = [Item(0, number, b"", row={"messages": messages}, layout=Layout.messages) for number, messages in enumerate(turns)]
    found = np.full(len(rows), np.nan)
    found[said] = scores_of(Path(folder), items) if items else []
    return found, +Counter({"the answer is empty": len(rows) - len(said)})


def _judged(rows: Sequence[Row], settings: Mapping[str, Any], kept: Path) -> tuple[Any, Counter[str]]:
    """Return the mean over a judge's criteria, from 0 to 1."""
    if settings["model"] is None:
        raise Refused("--reward judge: nothing says which model judges: model=NAME")
    more = {"timeout_s": settings["timeout"], "at_once": int(settings["at_once"])}
    asked = Quality(by="judge", url=settings["url"], model=settings["model"], **more)
    quality.require_scorer(asked)
    views = [View(_said(row["prompt"]), (str(row["answer"]),)) for row in rows]
    kept.mkdir(exist_ok=True)
    replies = kept / f"{content_key(settings['url'], settings['model'], [(view.prompt, view.answers) for view in views])}.jsonl"
    found = (quality.of_judge(views, quality.judge_of(asked), replies) - 1) / 4
    return found, Counter({"the judge gave no score": int(np.isnan(found).sum())} if np.isnan(found).any() else {})


def _said(prompt: Sequence[Mapping[str, Any]]) -> str:
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in prompt)
