"""Rewards by name, opened once and asked many times; what fails is counted, and is never a reward. No torch but in a reward model."""

from __future__ import annotations

import importlib
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.cache import content_key
from trainers.config.choices import RewardKind
from trainers.config.errors import ConfigError
from trainers.config.rewards import timeout_of
from trainers.config.schema import RewardConfig
from trainers.data.reasoning import answer_of
from trainers.generate.endpoint import LOOK_S, check
from trainers.health.activity import watch
from trainers.host import cores
from trainers.rewards.asked import Asked
from trainers.rewards.judged import Judge, known_scores, mean_scores
from trainers.rewards.mathematics import Mathematics
from trainers.rewards.sandbox import Limits, passes, require_isolation
from trainers.rewards.shapes import NoReward, Reward, Row, code_of, exact, length, pattern, read_schema, schema
from trainers.rewards.tasks import Tasks

ASKED: dict[RewardKind, type[Asked]] = {RewardKind.math: Mathematics, RewardKind.task: Tasks}
"""Kinds that a process of its own is asked about."""
Part = tuple[NDArray[np.float64], list[str]]
"""A number for each answer, NaN where there is none; and why there is none, or what has ended it at 0, else an empty text."""
Look = Callable[[], None]
"""Called between answers, and now and then while one is waited for; what it raises ends scoring."""
Of = Callable[[Sequence[Row], Look], Part]


@dataclass(frozen=True)
class Found:
    """Rewards of answers, in their order, by the names of the parts."""

    parts: dict[str, NDArray[np.float64]]
    """Each (N,), NaN where there is none, before weights."""
    reasons: dict[str, list[str]]
    """Why there is none, or what has ended an answer's program at 0; empty texts elsewhere."""
    total: NDArray[np.float64]
    """(N,): the weighted sum, NaN where a part has none."""

    @cached_property
    def failures(self) -> dict[str, Counter[str]]:
        """Return how often each part failed for which reason."""
        return {name: Counter(filter(None, reasons)) for name, reasons in self.reasons.items()}


class Rewards:
    """What the named rewards make of answers. A context manager, which closes what was opened."""

    def __init__(self, rewards: Mapping[str, RewardConfig], kept: Path, needs_all: bool = True) -> None:
        """Open all: models, processes, a try of the sandbox. A judge's replies are kept in the folder `kept`. Raises ConfigError.

        A text that a judge gives no reply about fails the scoring; without `needs_all` it has no reward.
        """
        self.weights = {name: reward.weight for name, reward in rewards.items()}
        with ExitStack() as stack:
            self.parts = {name: _opened(name, reward, kept, needs_all, stack) for name, reward in rewards.items()}
            self.stack = stack.pop_all()

    def score(self, answers: Sequence[Row], look: Look = lambda: None) -> Found:
        """Return the rewards of answers, from the main thread; raises OSError where a judge answers no more. Each is a beat.

        An answer is a mapping as `tools.sample` writes it: `prompt` (messages), `answer`, `ids`, `reference`, and its data `row`.
        """
        found = {name: part(answers, look) for name, part in self.parts.items()}
        total = sum((weight * found[name][0] for name, weight in self.weights.items()), np.zeros(len(answers)))
        return Found({name: part[0] for name, part in found.items()}, {name: part[1] for name, part in found.items()}, total)

    def close(self) -> None:
        """End what was started for them."""
        self.stack.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _opened(name: str, reward: RewardConfig, kept: Path, needs_all: bool, stack: ExitStack) -> Of:
    """Return what one reward makes of answers; `stack` closes what it needs."""
    if reward.kind is RewardKind.judge:
        return _judged(name, reward, kept, needs_all)
    if reward.kind is RewardKind.model:
        from trainers.rewards.scored import Scorer, rewards_of  # torch is for those who ask for it

        scorer = Scorer(Path(str(reward.path)))
        scorer.require_template(f"reward.{name}.path")
        return lambda rows, look: rewards_of(scorer, rows, look)
    if reward.kind is RewardKind.code:
        return _tested(reward)
    one: Reward
    if reward.kind in ASKED:
        one = process = ASKED[reward.kind](timeout_of(reward))
        stack.callback(process.close)
    elif reward.kind is RewardKind.function:
        one = _timed(imported(f"reward.{name}.path", str(reward.path)), timeout_of(reward))
    else:
        one = _by_text(name, reward)
    return lambda rows, look: _each(rows, one, look)


def _by_text(name: str, reward: RewardConfig) -> Reward:
    if reward.kind is RewardKind.exact:
        return exact(reward.extract)
    if reward.kind is RewardKind.json:
        return schema(None if reward.schema is None else read_schema(f"reward.{name}.schema", reward.schema))
    if reward.kind is RewardKind.length:
        return length(reward.min, math.inf if reward.max is None else reward.max, reward.soft, reward.unit)
    return pattern(str(reward.pattern))


def _each(rows: Sequence[Row], reward: Reward, look: Look) -> Part:
    found, reasons = np.full(len(rows), np.nan), [""] * len(rows)
    for number, row in enumerate(watch.each(rows)):
        look()
        try:
            value = float(reward(row))
        except NoReward as error:
            reasons[number] = str(error)
            continue
        if math.isfinite(value):
            found[number] = value
        else:
            reasons[number] = "is not a finite number"
    return found, reasons


def imported(field: str, path: str) -> Callable[[dict[str, Any]], Any]:
    """Return a Python function by module:name or module.name; raises ConfigError."""
    module, _, name = path.replace(":", ".").rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # of a person's module
        reason = f"could not be imported: {type(error).__name__}: {error}"
        raise ConfigError(field, path, reason, "module:function, in this folder or in PYTHONPATH") from None
    if not callable(found):
        raise ConfigError(field, path, "is not callable", "module:function")
    return found  # type: ignore[no-any-return]


AGAIN_S = 0.2
"""After the first alarm to a function that is late, until the next."""


class _Late(BaseException):
    """A function takes too long; not an Exception, which the function may catch."""


def _timed(function: Callable[[dict[str, Any]], Any], timeout_s: float) -> Reward:
    """Return a reward that is missing where the function raises, leaves by sys.exit, or takes longer."""

    def reward(row: Row) -> float:
        is_inside, is_late = True, False

        def late(_number: int, frame: FrameType | None) -> None:
            nonlocal is_late
            is_late = True
            if is_inside and frame is not None and frame.f_code is not reward.__code__:  # there the function has not begun, or has returned
                raise _Late

        def called() -> float:
            return float(function(dict(row)))

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, timeout_s, AGAIN_S)  # again: the function may swallow what is raised in it
        failure = ""
        try:
            value = called()
        except _Late:
            is_inside = False
        except (Exception, SystemExit) as error:  # whatever a person's function does: counted, and shown by its type
            is_inside = False
            failure = f"raises {type(error).__name__}: {str(error)[:80]}"
        finally:
            is_inside = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if is_late:
            raise NoReward(f"takes longer than {timeout_s:g} s")
        if failure:
            raise NoReward(failure)
        return value

    return reward


def _tested(reward: RewardConfig) -> Of:
    """Return 1 where an answer's code passes the row's tests, else 0, also where a limit ended it, which is then the reason."""
    require_isolation()
    mib = 1 << 20
    sizes = {"memory_bytes": int(reward.memory_mib * mib), "disk_bytes": int(reward.disk_mib * mib)}
    limits = Limits(time_s=timeout_of(reward), processes=reward.processes, **sizes)

    def one(row: Row) -> tuple[float, str]:
        tests = row["row"].get(reward.tests)
        tests = "\n".join(map(str, tests)) if isinstance(tests, list) else tests
        if not isinstance(tests, str) or not tests.strip():
            return math.nan, f"the row has no `{reward.tests}`"
        try:
            outcome = passes(code_of(str(row["answer"])), tests, limits)
        except NoReward as error:
            return math.nan, str(error)
        return float(outcome.passed), f"worth 0: stopped by its limit of {outcome.stopped}" if outcome.stopped else ""

    def all_of(rows: Sequence[Row], look: Look) -> Part:
        pool = ThreadPoolExecutor(cores())
        try:
            asked = [pool.submit(one, row) for row in rows]
            for done in watch.each(asked):
                look()
                while wait([done], LOOK_S).not_done:
                    look()
            found = [done.result() for done in asked]
        finally:
            pool.shutdown(cancel_futures=True)
        return np.array([value for value, _ in found], np.float64), [reason for _, reason in found]

    return all_of


def _judged(name: str, reward: RewardConfig, kept: Path, needs_all: bool) -> Of:
    """Return the mean over a judge's criteria, from 0 to 1."""
    url, model = str(reward.url), str(reward.model)
    judge = Judge(url=url, model=model, at_once=reward.at_once, timeout_s=timeout_of(reward))
    if reason := check(judge):
        raise ConfigError(f"reward.{name}.url", url, reason, "an OpenAI-compatible endpoint up to its version")
    kept.mkdir(exist_ok=True)

    def all_of(rows: Sequence[Row], look: Look) -> Part:
        texts = [(_said(row["prompt"]), answer_of(str(row["answer"]))) for row in rows]
        replies = kept / f"{content_key(url, model, texts)}.jsonl"
        if not needs_all:
            scores, reasons = known_scores(texts, judge, replies, look)
            return (scores - 1) / 4, reasons
        found = (mean_scores(texts, judge, replies) - 1) / 4
        return found, ["the judge gave no score" if is_missing else "" for is_missing in np.isnan(found)]

    return all_of


def _said(prompt: Sequence[Mapping[str, Any]]) -> str:
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n".join(f"{turn['role']}: {turn.get('content', '')}" for turn in prompt)
