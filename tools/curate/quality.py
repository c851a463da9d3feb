"""How good each row is: a number that it brings, a judge's mean score, or what a reward model says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.curate.config import Quality
from tools.curate.filters import field_of, said
from tools.curate.job import Job
from tools.curate.rows import Item, parsed, read_items, view
from trainers.config.errors import ConfigError
from trainers.config.rewards import gives_scores
from trainers.generate.endpoint import check
from trainers.rewards.judged import Judge, mean_scores

ASKED = "asked"
"""Folder of replies, a file a part, which a continued curation does not ask for again."""
Scores = npt.NDArray[np.float64]
"""A number a row, NaN where there is none."""


def require_scorer(settings: Quality) -> None:
    """Raise ConfigError where what gives the scores cannot be asked."""
    if settings.by == "judge" and (reason := check(judge_of(settings))):
        raise ConfigError("quality.url", settings.url, reason, "an OpenAI-compatible endpoint up to its version")
    if settings.by == "reward" and not gives_scores(Path(str(settings.model))):
        reason = "holds no sequence-classification model"
        raise ConfigError("quality.model", settings.model, reason, "RUN/export of a run with objective=reward")


def judge_of(settings: Quality) -> Judge:
    """Return which model judges and how it is asked."""
    return Judge(url=str(settings.url), model=str(settings.model), at_once=settings.at_once, timeout_s=settings.timeout_s)


def score(folder: Path, out: Path, about: tuple[Job, str]) -> None:
    """Write a score for each row that stays of a part."""
    job, name = about
    settings = job.settings.quality
    assert settings is not None
    items = [parsed(item) for item in read_items(folder / "select" / name / "kept.rows")]
    if settings.by == "field":
        found = of_field(items, str(settings.field))
    elif settings.by == "judge":
        (folder / ASKED).mkdir(exist_ok=True)
        views = [view(item.row, item.layout) for item in items]
        texts = [(one.prompt if one.answers else "", said(one)[0]) for one in views]
        found = mean_scores(texts, judge_of(settings), folder / ASKED / f"{name}.jsonl")
    else:
        from tools.curate.reward import scores_of  # torch is for those who ask for it

        found = scores_of(Path(str(settings.model)), items)
    np.save(out / "scores.npy", found)


def of_field(items: list[Item], path: str) -> Scores:
    """Return the numbers of a field."""
    values = [field_of(item.row, path) for item in items]
    numbers = [float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan for value in values]
    return np.array([value if math.isfinite(value) else math.nan for value in numbers], np.float64)


def left_out(scores: Scores, order: list[bytes], settings: Quality) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return the rows that go with the reason and the score; of rows with equal scores the first in `order` stay."""
    gone: dict[int, tuple[str, dict[str, Any]]] = {}
    rows = np.flatnonzero(~np.isnan(scores)).tolist()
    ranked = sorted(rows, key=lambda row: (-scores[row], order[row]))
    stay = math.ceil(settings.top * len(ranked))
    for place, row in enumerate(ranked):
        value = float(scores[row])
        if settings.least is not None and value < settings.least:
            gone[row] = (f"has a score of {value:.3f}, less than {settings.least:g}", {"score": value})
        elif place >= stay:
            gone[row] = (f"has a score of {value:.3f}, not among the best {settings.top:.0%}", {"score": value})
    if settings.missing == "remove":
        gone |= {row: ("has no score", {}) for row in np.flatnonzero(np.isnan(scores)).tolist()}
    return gone
