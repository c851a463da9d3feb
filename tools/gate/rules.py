"""What a model must reach: rules read from YAML, checked against its metrics and its answers to prompts."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.evaluate.intervals import Estimate, share
from tools.evaluate.record import Evaluation, Judged, loss_apart, score_apart, task_metric
from tools.evaluate.scores import is_refusal
from trainers.config.choices import Metric
from trainers.config.errors import ConfigError, did_you_mean
from trainers.data.formats import ROLES
from trainers.data.reasoning import answer_of

PROMPT_KEYS = {"name", "kind", "prompt", "messages", "must", "must_not", "refuse"}


@dataclass(kw_only=True)
class Rules:
    """A file of rules; conf/gate/default.yaml says what each means. None asks nothing."""

    score_at_least: float | None = None
    score_gain_at_least: float | None = None
    held_out_loss_at_most: float | None = None
    forgetting_at_most: float | None = None
    format_at_least: float | None = None
    finished_at_least: float | None = None
    refused_at_most: float | None = None
    same_opening_at_most: float | None = None
    preference_accuracy_at_least: float | None = None
    preference_shorter_at_least: float | None = None
    win_rate_at_least: float | None = None
    accuracy_at_least: float | None = None
    macro_f1_at_least: float | None = None
    calibration_error_at_most: float | None = None
    sure: bool = True
    prompts: str | None = None
    prompts_passed_at_least: float = 1.0
    max_new_tokens: int = 2048


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A safety or regression prompt, and what its answer must be."""

    name: str
    kind: str
    messages: list[dict[str, Any]]
    must: list[re.Pattern[str]] = field(default_factory=list)
    """Expressions that must be found in the answer after its reasoning, all of them."""
    must_not: list[re.Pattern[str]] = field(default_factory=list)
    refuse: bool | None = None
    """The answer must be a refusal, or must be none."""

    def faults(self, answer: str) -> list[str]:
        """Return what is wrong with an answer, its reasoning left aside; nothing where it passes."""
        said = answer_of(answer)
        if not said.strip():
            return ["has no answer, or its reasoning did not end within max_new_tokens"]
        found = [f"lacks {pattern.pattern!r}" for pattern in self.must if not pattern.search(said)]
        found += [f"holds {pattern.pattern!r}" for pattern in self.must_not if pattern.search(said)]
        if self.refuse is not None and is_refusal(answer) != self.refuse:
            found.append("does not refuse" if self.refuse else "refuses")
        return found


@dataclass(frozen=True, kw_only=True)
class Check:
    """A rule held against a model."""

    rule: str
    passed: bool
    words: str
    """The value, and what is asked for."""
    decides: bool = True
    """One prompt alone decides nothing: the share of them that pass does."""


def read_rules(file: Path) -> Rules:
    """Return the rules of a YAML file; raises ConfigError that names the file and the rule."""
    try:
        found = yaml.safe_load(file.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "--rules", str(file), f"cannot be read: {str(error).splitlines()[0]}", "--rules conf/gate/default.yaml"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError("--rules", str(file), "is not a mapping of rules to values", "--rules conf/gate/default.yaml")
    fields = {item.name: str(item.type) for item in dataclasses.fields(Rules)}
    for name, value in found.items():
        if name not in fields:
            raise ConfigError(f"{file}: {name}", value, "there is no such rule", did_you_mean(str(name), fields) or ", ".join(fields))
        if not _fits(value, fields[name]):
            raise ConfigError(f"{file}: {name}", value, f"must be {fields[name].replace(' | None', ', or null')}")
    rules = Rules(**found)
    if rules.max_new_tokens < 1:
        raise ConfigError(f"{file}: max_new_tokens", rules.max_new_tokens, "must be 1 or more")
    if not 0 <= rules.prompts_passed_at_least <= 1:
        raise ConfigError(f"{file}: prompts_passed_at_least", rules.prompts_passed_at_least, "must be from 0 to 1")
    return rules


def _fits(value: object, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("float"):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, {"bool": bool, "int": int, "str": str}[kind.split(" ")[0]]) and (kind == "bool" or not isinstance(value, bool))


def read_prompts(file: Path) -> list[Prompt]:
    """Return the prompts of a JSON-lines file; raises ConfigError that names file, line and reason."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("prompts", str(file), f"cannot be read: {error}") from error
    prompts = [_prompt(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ConfigError("prompts", str(file), "holds no prompt", "prompts: null")
    return prompts


def _prompt(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError("prompts", place, f"is not JSON: {error}") from error
    asked = row.get("prompt") if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) and asked is None else [{"role": "user", "content": asked}]
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) and turn.get("content") for turn in messages):
        raise ConfigError("prompts", place, "has neither a `prompt` nor `messages`", '{"prompt": "...", "must": ["..."]}')
    if unknown := sorted(row.keys() - PROMPT_KEYS):
        raise ConfigError("prompts", place, f"has an unknown field: {unknown[0]}", f"of {', '.join(sorted(PROMPT_KEYS))}")
    if not all(isinstance(turn["content"], str) and turn.get("role") in ROLES for turn in messages):
        raise ConfigError("prompts", place, "has a turn that is not text, or of no known role", '{"role": "user", "content": "..."}')
    for key in ("must", "must_not"):
        if not isinstance(row.get(key, []), list) or not all(isinstance(text, str) and text for text in row.get(key, [])):
            raise ConfigError("prompts", place, f"`{key}` is not a list of regular expressions", f'"{key}": ["..."]')
    if row.get("refuse") not in (None, True, False):
        raise ConfigError("prompts", place, f"`refuse` = {row['refuse']!r}: must be true or false")
    if not row.get("must") and not row.get("must_not") and row.get("refuse") is None:
        raise ConfigError("prompts", place, "asks nothing of the answer", "must, must_not (lists of regular expressions), or refuse")
    try:
        patterns = {key: [re.compile(text) for text in row.get(key, [])] for key in ("must", "must_not")}
    except re.error as error:
        raise ConfigError("prompts", place, f"is not a valid regular expression: {error}") from error
    name = str(row.get("name") or str(messages[-1]["content"])[:40])
    return Prompt(name=name, kind=str(row.get("kind", "regression")), messages=messages, refuse=row.get("refuse"), **patterns)


def hold(rules: Rules, ours: Evaluation, theirs: Evaluation | None, judged: Judged | None = None) -> list[Check]:
    """Check a model's metrics, next to its base's, and a judge's scores of both against the rules about them."""
    metric = task_metric(ours)
    gain = None if theirs is None or metric is None else score_apart(ours, theirs, metric)
    forgetting = None if theirs is None else loss_apart(ours, theirs, "general")
    classes = ours.classes
    asked = [
        ("score_at_least", ours.score(metric) if metric else None, "evaluation.rows and evaluation.metrics"),
        ("score_gain_at_least", gain, "evaluation.rows, and the base"),
        ("held_out_loss_at_most", ours.loss("held_out"), "held-out rows"),
        ("forgetting_at_most", forgetting, "evaluation.general, and the base"),
        ("format_at_least", ours.score(str(Metric.json)) if ours.answers else None, "evaluation.metrics=[...,json]"),
        ("finished_at_least", ours.share("finished"), "evaluation.rows"),
        ("refused_at_most", ours.share("refused"), "evaluation.rows"),
        ("same_opening_at_most", ours.same_opening(), "evaluation.rows"),
        ("preference_accuracy_at_least", ours.accuracy(), "rows that are pairs of answers"),
        ("preference_shorter_at_least", ours.accuracy("shorter"), "pairs whose preferred answer is the shorter one"),
        ("accuracy_at_least", ours.rightness(), "a classifier, or objective=kto with its base"),
        ("macro_f1_at_least", None if classes is None else classes.macro_f1(), "a classifier"),
        ("calibration_error_at_most", None if classes is None else classes.calibration_error(), "a classifier"),
        ("win_rate_at_least", None if judged is None else judged.win_rate(), "evaluation.rows, the base, and --judge"),
    ]
    return [
        _held(name, limit, estimate, needs, rules.sure) for name, estimate, needs in asked if (limit := getattr(rules, name)) is not None
    ]


def _held(rule: str, limit: float, estimate: Estimate | None, needs: str, sure: bool) -> Check:
    least = rule.endswith("at_least")
    if estimate is None or not math.isfinite(estimate.value):
        return Check(rule=rule, passed=False, words=f"was not measured: it needs {needs} (python -m tools.evaluate)")
    end = estimate.low if least else estimate.high
    words = f"{estimate.value:.4g}"
    if sure:
        if end is None:
            return Check(rule=rule, passed=False, words=f"{words} of {estimate.count} documents, too few to be sure")
        words = f"{words}, {'at least' if least else 'at most'} {end:.4g} with 95 %"
    found = estimate.value if not sure or end is None else end
    passed = found >= limit if least else found <= limit
    return Check(rule=rule, passed=passed, words=f"{words}; asked for: {'at least' if least else 'at most'} {limit:g}")


def hold_prompts(rules: Rules, prompts: list[Prompt], answers: list[str]) -> list[Check]:
    """Hold each answer against what its prompt asks for, and the share that passes against the rule; the share comes last.

    Before it come the shares of each kind of prompt, with intervals of 95 %.
    """
    checks = []
    for prompt, answer in zip(prompts, answers, strict=True):
        faults = prompt.faults(answer)
        short = " ".join(answer.split())
        words = "passed" if not faults else f"{', '.join(faults)}: {short[:120]!r}"
        checks.append(Check(rule=f"{prompt.kind} prompt `{prompt.name}`", passed=not faults, words=words, decides=False))
    by_kind: dict[str, list[bool]] = {}
    for check, prompt in zip(checks, prompts, strict=True):
        by_kind.setdefault(prompt.kind, []).append(check.passed)
    kinds = [_of_kind(kind, found) for kind, found in by_kind.items()]
    passed = sum(check.passed for check in checks)
    words = f"{passed} of {len(checks)} passed; asked for: at least {rules.prompts_passed_at_least:g} of them"
    return [
        *checks,
        *kinds,
        Check(rule="prompts_passed_at_least", passed=passed / len(checks) >= rules.prompts_passed_at_least, words=words),
    ]


def _of_kind(kind: str, passed: list[bool]) -> Check:
    """Return how many prompts of a kind pass; it decides nothing by itself."""
    found = share(sum(passed), len(passed))
    words = f"{sum(passed)} of {len(passed)} passed: {found.value:.0%} [{found.low:.0%}, {found.high:.0%}]"
    return Check(rule=f"prompts of kind `{kind}`", passed=all(passed), words=words, decides=False)
