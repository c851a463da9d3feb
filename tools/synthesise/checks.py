"""What the settings of a synthesis may be, and what a method needs."""

from __future__ import annotations

from typing import Any

from tools.synthesise.config import LANGUAGES, Settings
from trainers.config.errors import ConfigError, did_you_mean
from trainers.generate.models import is_url
from trainers.generate.request import Sampling

OPERATIONS = ("constraints", "deepen", "concretise", "reasoning", "input", "breadth")
CHOICES: dict[str, tuple[str, ...]] = {
    "language": LANGUAGES,
    "model.dtype": ("float32", "bfloat16", "float64"),
    "model.device": ("auto", "cpu"),
    "critique.initial": ("model", "row"),
    "raft.absent": ("answer", "say_so"),
}
BOUNDS: dict[str, tuple[float, float]] = {
    "rows": (1, 100_000_000),
    "model.batch": (1, 100_000),
    "model.at_once": (1, 10_000),
    "model.timeout_s": (0.1, 86_400),
    "model.attempts": (1, 1000),
    "model.silence_s": (0.1, 86_400),
    "cost.prompt": (0, 1e9),
    "cost.answer": (0, 1e9),
    "cost.most": (0, 1e12),
    "filters.similar": (0.05, 1.0),
    "filters.repetition": (0.0, 1.0),
    "judge.least": (1, 5),
    "diversity.rows": (1, 100_000_000),
    "diversity.relevance": (0.0, 1.0),
    "diversity.dimensions": (16, 4096),
    "self_instruct.examples": (1, 100),
    "self_instruct.tasks": (1, 100),
    "self_instruct.round": (1, 100_000),
    "self_instruct.idle": (1, 1000),
    "evol_instruct.rounds": (1, 100),
    "answers.n": (1, 10_000),
    "documents.characters": (100, 1_000_000),
    "documents.questions": (1, 100),
    "paraphrase.copies": (1, 100),
    "paraphrase.most": (0.05, 1.0),
    "back_translation.most": (0.05, 1.0),
    "magpie.turns": (1, 100),
    "magpie.round": (1, 100_000),
    "magpie.idle": (1, 1000),
    "tree.breadth": (1, 100),
    "tree.depth": (0, 10),
    "tree.personas": (0, 100),
    "tree.questions": (1, 100),
    "critique.rounds": (1, 20),
    "safety.requests": (1, 1000),
    "raft.characters": (100, 1_000_000),
    "raft.questions": (1, 100),
    "raft.distractors": (0, 100),
    "raft.without": (0.0, 1.0),
}
"""Smallest and largest value of a number."""
NEEDS_SOURCE = ("evol_instruct", "answers", "documents", "paraphrase", "back_translation", "critique", "raft")
NEEDS_ROWS = ("self_instruct", "magpie")
"""Methods that would never end without a number of rows."""


def check(settings: Settings) -> None:
    """Raise ConfigError for a value out of its range, and for settings that do not go together."""
    for path, names in CHOICES.items():
        value = value_of(settings, path)
        if value is not None and value not in names:
            raise ConfigError(path, value, f"is not one of {', '.join(names)}", did_you_mean(str(value), names))
    for path, (least, most) in BOUNDS.items():
        value = value_of(settings, path)
        if value is not None and not least <= value <= most:
            raise ConfigError(path, value, f"is not between {least:g} and {most:g}", f"{path}: {min(max(value, least), most):g}")
    for name in value_of(settings, "evol_instruct.operations") or ():
        if name not in OPERATIONS:
            raise ConfigError("evol_instruct.operations", name, f"is not one of {', '.join(OPERATIONS)}", did_you_mean(name, OPERATIONS))
    for path in ("evol_instruct.operations", "back_translation.languages"):
        if value_of(settings, path) == []:
            raise ConfigError(path, [], "names nothing, so that no row would be written", f"leave {path} out for the default")
    _check_model(settings)
    _check_method(settings)


def _check_model(settings: Settings) -> None:
    model = settings.model
    if not model.path:
        raise ConfigError("model.path", model.path, "nothing says who writes", "model.path=runs/mine, or a server's http://HOST:PORT/v1")
    if is_url(model.path) and not model.name:
        raise ConfigError("model.name", model.name, f"nothing says which model of {model.path} writes", "model.name=NAME")
    for name in ("name", "tokenizer"):
        value = getattr(model, name)
        if value and not is_url(model.path):
            reason = f"goes with a server, and {model.path} is a model of this machine"
            raise ConfigError(f"model.{name}", value, reason, "leave it out, or model.path=http://HOST:PORT/v1")
    try:
        sampling_of(settings)
    except ConfigError as error:
        raise ConfigError("model." + error.path.strip("-").replace("-", "_"), error.value, error.reason, error.remedy) from None


def sampling_of(settings: Settings, temperature: float | None = None) -> Sampling:
    """Return how tokens are drawn; raises ConfigError."""
    model = settings.model
    drawn = model.temperature if temperature is None else temperature
    return Sampling(temperature=drawn, top_p=model.top_p, top_k=model.top_k, max_new_tokens=model.max_new_tokens)


def _check_method(settings: Settings) -> None:
    method = settings.method
    if method in NEEDS_SOURCE and not settings.source:
        what = "documents, as .txt or .md files or rows with `text`" if method in ("documents", "raft") else "rows of any layout"
        raise ConfigError("source", settings.source, f"{method} begins with {what}", "source=FILE, a directory or a hub data set")
    if method == "magpie" and settings.source:
        raise ConfigError("source", settings.source, "magpie begins with the template alone", "leave source out")
    if method == "safety" and settings.source:
        raise ConfigError("source", settings.source, "safety begins with categories", "safety.categories=FILE")
    if method in NEEDS_ROWS and settings.rows is None:
        raise ConfigError("rows", None, f"{method} would never end", "rows=1000")
    if method == "raft" and settings.of_method.levels and settings.rows is not None and settings.rows <= settings.of_method.distractors:
        most = settings.of_method.distractors
        reason = f"with raft.levels a question is {most + 1} rows, one for each number of distractors, and none is cut"
        raise ConfigError("rows", settings.rows, reason, f"rows={most + 1} or more, or raft.distractors={settings.rows - 1}")
    if method == "magpie" and is_url(str(settings.model.path)) and not settings.model.tokenizer:
        reason = "magpie sends the ids of the user's header, and a server that renders messages takes none"
        raise ConfigError("model.tokenizer", None, reason, "model.tokenizer=DIR of the server's model, with a server such as vLLM")
    if settings.judge and not (settings.judge.url and settings.judge.model):
        raise ConfigError("judge.url", settings.judge.url, "a judge needs judge.url and judge.model", "judge.url=http://HOST:PORT/v1")


def value_of(settings: Settings, path: str) -> Any:
    """Return a setting by its path; None where its section is not there."""
    section, _, name = path.partition(".")
    if not name:
        return getattr(settings, section)
    found = settings.of_method if section == settings.method else getattr(settings, section, None)
    return None if found is None else getattr(found, name)
