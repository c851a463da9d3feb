"""What the settings of an evaluation may be. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.config.local import is_remote, looks_local
from trainers.config.schema import EvaluationConfig

EXTRACTS = ("auto", "hashes", "number", "whole")
"""Named ways to what exact_match compares; anything else is a regular expression."""
SAMPLED = "sampled"
"""The value of `evaluation.general` that lets the base write its own text."""


def validate_evaluation(evaluation: EvaluationConfig, sources: Iterable[str] = ()) -> None:
    """Refuse files that are not there, an expression that is not valid, and answers that nothing measures.

    `sources` are the names of the run's mixture, of which `general` may be one.
    """
    for name in ("path", "general"):
        value = getattr(evaluation, name)
        if value not in (None, SAMPLED, *sources) and not is_remote(value) and looks_local(value) and not Path(value).exists():
            raise ConfigError(f"evaluation.{name}", value, "no such file or directory")
    if evaluation.rows and not evaluation.metrics:
        raise ConfigError(
            "evaluation.metrics", [], "nothing would measure the answers", "evaluation.rows=0, which lets the model answer none"
        )
    if evaluation.count_in_prompt is not None and (reason := against_pattern(evaluation.count_in_prompt)):
        raise ConfigError("evaluation.count_in_prompt", evaluation.count_in_prompt, reason, "(?m)^Document [0-9]+:")
    if reason := against_extract(evaluation.extract):
        raise ConfigError("evaluation.extract", evaluation.extract, reason, f"one of {', '.join(EXTRACTS)}, or one group")


def against_pattern(pattern: str) -> str:
    """Say why nothing can be counted by this; empty where something can."""
    try:
        return "matches the empty text, everywhere" if re.compile(pattern).match("") else ""
    except re.error as error:
        return f"is not a valid regular expression: {error}"


def against_extract(extract: str) -> str:
    """Say why nothing can be extracted by this; empty where something can."""
    if extract in EXTRACTS:
        return ""
    try:
        groups = re.compile(extract).groups
    except re.error as error:
        return f"is not a valid regular expression: {error}"
    return "" if groups == 1 else f"has {groups} groups, and one says what is compared"
