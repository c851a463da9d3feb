"""How good each row is: a number that it brings, a judge's mean score, or what a reward model says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.curate.config import Quality
from tools.curate.filters import field_of, said
from tools.curate.job import Job
from tools.curate.rows import Item, View, parsed, read_items, view
from tools.evaluate.judge import Judge, Rating, rate
from trainers.config.errors import ConfigError
from trainers.generate.endpoint import GARBAGE, check
from trainers.rundir.files import read_json

PROMPT = Template(Path(__file__).with_name("quality.txt").read_text(encoding="utf-8"))
ASKED = "asked"
"""Folder of replies, a file a part, which a continued curation does not ask for again."""
Scores = npt.NDArray[np.float64]
"""A number a row, NaN where there is none."""


def require_scorer(settings: Quality) -> None:
    """Raise ConfigError where what gives the scores cannot be asked."""
    if settings.by == "judge" and (reason := check(judge_of(settings))):
        raise ConfigError("quality.url", settings.url, reason, "an OpenAI-compatible endpoint up to its version")
    if settings.by == "reward":
        config = read_json(Path(str(settings.model)) / "config.json") or {}
        if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
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
        found = of_judge([view(item.row, item.layout) for item in items], judge_of(settings), folder / ASKED / f"{name}.jsonl")
    else:
        from tools.curate.reward import scores_of  # torch is for those who ask for it

        found = scores_of(Path(str(settings.model)), items)
    np.save(out / "scores.npy", found)


def of_field(items: list[Item], path: str) -> Scores:
    """Return the numbers of a field."""
    values = [field_of(item.row, path) for item in items]
    numbers = [float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan for value in values]
    return np.array([value if math.isfinite(value) else math.nan for value in numbers], np.float64)


def of_judge(views: list[View], judge: Judge, replies: Path) -> Scores:
    """Return the mean over the criteria, 1 to 5; replies are kept as they come.

    A reply that cannot be read, or a request that is refused for what it holds, leaves a row without a score. Raises OSError where the
    endpoint answers no more: the rest is asked by the next attempt.
    """
    written = replies.read_bytes() if replies.exists() else b""
    replies.write_bytes(whole := written[: written.rfind(b"\n") + 1])  # a full disk may have cut the last line
    known = [Rating(**json.loads(line)) for line in whole.splitlines()]
    prompts = [PROMPT.substitute(question=found.prompt if found.answers else "", answer=said(found)[0]) for found in views]
    with replies.open("a", encoding="utf-8") as stream:

        def took(rating: Rating) -> None:
            stream.write(json.dumps(vars(rating)) + "\n")
            stream.flush()

        ratings = rate(prompts, judge, [rating for rating in known if not _is_open(rating)], took)
    if left := [rating for rating in ratings if _is_open(rating)]:
        raise OSError(f"{judge.url} gave no score for {len(left)} rows: {left[0].failure}; the same command asks for them again")
    return np.array([np.mean(list(rating.scores.values())) if rating.scores else math.nan for rating in ratings], np.float64)


def _is_open(rating: Rating) -> bool:
    """Tell whether a row is to be asked about again: it is not where it was the row's own doing."""
    return rating.scores is None and rating.failure not in (GARBAGE, "HTTP 400", "HTTP 413", "HTTP 422")


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
