"""After the method: a judge's scores, and the rows that are least alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.curate import diversity
from tools.curate.rows import View
from tools.synthesise.work import Work
from trainers.config.errors import ConfigError
from trainers.generate.endpoint import check
from trainers.rewards.judged import Judge, mean_scores

Rows = list[dict[str, Any]]


def chosen(work: Work, rows: Rows) -> Rows:
    """Return the rows that the judge lets pass, and of these so many that are unlike each other; raises ConfigError and OSError."""
    scores = np.full(len(rows), np.nan)
    if work.settings.judge is not None and rows:
        scores = _scores(work, rows)
        stay = scores >= work.settings.judge.least
        for score in scores[~stay]:
            work.remove("judge: no score" if np.isnan(score) else f"judge: a score below {work.settings.judge.least:g}")
        rows = [row | {"score": float(score)} for row, score, stays in zip(rows, scores, stay, strict=True) if stays]
        scores = scores[stay]
    settings = work.settings.diversity
    if settings is None or len(rows) <= settings.rows:
        return rows
    if settings.embedding is not None:
        raise ConfigError("diversity.embedding", settings.embedding, "rows that a model writes bring no embedding", "leave it out")
    vectors = np.stack([diversity.hashed(view_of(row).text, settings.dimensions) for row in rows])
    taken = diversity.choose(vectors, diversity.relevance_of(scores), settings.rows, settings.relevance)
    work.removed["diversity: not among the rows that are least alike"] += len(rows) - len(taken)
    return [rows[number] for number in sorted(taken)]


def _scores(work: Work, rows: Rows) -> npt.NDArray[np.float64]:
    asked = work.settings.judge
    assert asked is not None
    judge = Judge(url=asked.url, model=asked.model, at_once=asked.at_once, timeout_s=asked.timeout_s)
    if reason := check(judge):
        raise ConfigError("judge.url", asked.url, reason, "an OpenAI-compatible endpoint up to its version")
    views = [view_of(row) for row in rows]
    return mean_scores([(view.prompt, view.answers[0]) for view in views], judge, replies_of(work))


def replies_of(work: Work) -> Path:
    """Return where a judge's replies are kept until the rows are written."""
    return Path(f"{work.kept.file}.{work.kept.key[:8]}.asked")


def view_of(row: dict[str, Any]) -> View:
    """Return what a row says: all turns before the answer, and the answer; of a pair both."""
    turns = row["messages"][:-1] if "messages" in row else row["prompt"]
    last = [row["messages"][-1]] if "messages" in row else [*row["chosen"], *row["rejected"]]
    prompt = "\n".join(str(turn["content"]) for turn in turns)
    return View(prompt, tuple(str(turn["content"]) for turn in last))
