"""RUN/evaluation: what was measured of a run and of its base, document by document, and the metrics computed from it. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tools.evaluate import intervals
from tools.evaluate.classes import Classes
from tools.evaluate.intervals import LEVEL, Estimate, Floats
from tools.evaluate.pairs import BUCKETS, Pairs, accuracy, are_right, longer_wins, margin, members, thirds
from tools.evaluate.scores import is_refusal, score
from tools.evaluate.unpaired import KINDS, Unpaired
from trainers.cache import content_key
from trainers.config.choices import Metric
from trainers.config.schema import EvaluationConfig
from trainers.data.glance import opening_of
from trainers.data.reasoning import answer_of
from trainers.rundir import paths
from trainers.rundir.files import try_json, try_row, write_json
from trainers.rundir.rows import finite

VERSION = 1
FOLDER, JUDGED = paths.EVALUATION, "judge"
LOSSES = ("held_out", "general")
PLAIN = ("tokens", "reasoning", "repetition")
"""Metrics of answers other than scores."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's metrics by document: arrays of one length, in the order of `documents`, for each part."""

    about: dict[str, Any]
    """What was measured with which settings; RUN/evaluation/NAME.json without its metrics."""
    documents: dict[str, list[int]]
    """Of each part: `held_out`, `general`, `pairs`, `unpaired`, `mismatched`, `classes`, `answers`."""
    sums: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Of each loss: nats and tokens, (documents,)."""
    logps: dict[str, Floats] = field(default_factory=dict)
    """Summed log-probabilities of `unpaired` and `mismatched` answers, (documents,), in nats."""
    pairs: Pairs | None = None
    """Of pairs of answers, whose documents are neighbours; None where rows have one answer each."""
    unpaired: Unpaired | None = None
    """Of answers that are wanted or not."""
    classes: Classes | None = None
    """Of a classifier."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Prompt, reference, answer and scores of each document that was answered."""

    def scores(self, metric: str) -> Floats:
        """Return a metric of each answer, (answers,); those that it says nothing about are not a number."""
        return np.array([np.nan if (value := row["scores"].get(metric)) is None else value for row in self.answers], np.float64)

    def loss(self, part: str, level: float = LEVEL) -> Estimate | None:
        """Return a loss in nats a token; None where it was not measured."""
        return intervals.ratio(*self.sums[part], level) if part in self.sums and len(self.sums[part][0]) else None

    def accuracy(self, bucket: str = "all", level: float = LEVEL) -> Estimate | None:
        """Return the share of a bucket's pairs whose preferred answer scores higher; None where there are none."""
        if self.pairs is None or self.pairs.scores is None:
            return None
        return accuracy(self.pairs.scores, self.pairs.tokens, bucket, level)

    @property
    def right(self) -> Floats | None:
        """Return 1 for each document whose class is found, or each answer that is told as wanted or not; None where there are none."""
        found = self.classes or self.unpaired
        return None if found is None else found.right

    def rightness(self, level: float = LEVEL) -> Estimate | None:
        """Return the share of these; None where there are none."""
        return None if self.right is None or not len(self.right) else intervals.mean(self.right, level)

    def by_length(self, level: float = LEVEL) -> list[tuple[tuple[float, float], Estimate | None]]:
        """Return the accuracy of short, middle and long pairs, each third with its fewest and most tokens an answer."""
        if self.pairs is None or self.pairs.scores is None:
            return []
        scores, tokens = self.pairs.scores, self.pairs.tokens
        return [((low, high), accuracy(scores[which], tokens[which], "all", level)) for low, high, which in thirds(tokens)]

    def longer_wins(self, level: float = LEVEL) -> Estimate | None:
        """Return the share of pairs whose longer answer scores higher; None where there are none."""
        return None if self.pairs is None or self.pairs.scores is None else longer_wins(self.pairs.scores, self.pairs.tokens, level)

    def longer_preferred(self, level: float = LEVEL) -> Estimate | None:
        """Return the share of pairs whose preferred answer is the longer one; None where there are none."""
        return None if self.pairs is None else intervals.mean(members(self.pairs.tokens, "longer").astype(np.float64), level)

    def margin(self, level: float = LEVEL) -> Estimate | None:
        """Return by how much preferred answers score higher; None where there are no pairs."""
        return None if self.pairs is None or self.pairs.scores is None else margin(self.pairs.scores, level)

    def score(self, metric: str, level: float = LEVEL) -> Estimate | None:
        """Return the mean of a metric over the answers that it says something about; None where there are none."""
        values = self.scores(metric)
        values = values[~np.isnan(values)]
        return intervals.mean(values, level) if len(values) else None

    def score_by_count(self, metric: str, level: float = LEVEL) -> dict[int, Estimate]:
        """Return the mean of a metric by how often `evaluation.count_in_prompt` matches, fewest first; empty where nothing was counted."""
        values, counts = self.scores(metric), np.array([row.get("count", -1) for row in self.answers])
        kept = ~np.isnan(values) & (counts >= 0)
        return {int(count): intervals.mean(values[kept & (counts == count)], level) for count in np.unique(counts[kept])}

    def share(self, name: str, level: float = LEVEL) -> Estimate | None:
        """Return the share of answers that are `finished` or `refused`; None where there are none."""
        return intervals.share(sum(bool(row[name]) for row in self.answers), len(self.answers), level) if self.answers else None

    def same_opening(self, of: str = "answer", level: float = LEVEL) -> Estimate | None:
        """Return the share of answers that begin as most do, by three words after their reasoning; `of` is `answer` or `reference`.

        None where there are no answers. The opening is chosen among these answers, so that of few it is found too often.
        """
        openings = Counter(filter(None, (opening_of(answer_of(row[of])) for row in self.answers)))
        return intervals.share(max(openings.values(), default=0), len(self.answers), level) if self.answers else None

    def mean(self, name: str) -> float | None:
        """Return the mean of one of PLAIN; None where there are no answers, or it was not measured."""
        return float(np.mean([row[name] for row in self.answers])) if self.answers and name in self.answers[0] else None


def loss_apart(ours: Evaluation, theirs: Evaluation, part: str, level: float = LEVEL) -> Estimate | None:
    """Return our loss less theirs over the same documents, in nats a token; None where these differ or were not measured."""
    if part not in ours.sums or part not in theirs.sums or not are_of_the_same(ours, theirs, part):
        return None
    if not np.array_equal(ours.sums[part][1], theirs.sums[part][1]):
        return None
    return intervals.difference(ours.sums[part][0], theirs.sums[part][0], ours.sums[part][1], level)


def score_apart(ours: Evaluation, theirs: Evaluation, metric: str, level: float = LEVEL) -> Estimate | None:
    """Return our mean score less theirs over the same documents; None where these differ or nothing was scored."""
    settings = [[evaluation.about.get("settings", {}).get(name) for name in ("max_new_tokens", "extract")] for evaluation in (ours, theirs)]
    if not ours.answers or not are_of_the_same(ours, theirs, "answers") or settings[0] != settings[1]:
        return None
    both = np.stack([ours.scores(metric), theirs.scores(metric)])
    both = both[:, ~np.isnan(both).any(0)]
    return intervals.difference(both[0], both[1], level=level) if both.shape[1] else None


def accuracy_apart(ours: Evaluation, theirs: Evaluation, bucket: str = "all", level: float = LEVEL) -> Estimate | None:
    """Return our accuracy less theirs over the same pairs.

    None where these differ, where they were not measured, or where one model's answers are ordered by rewards and the other's are not.
    """
    if ours.pairs is None or theirs.pairs is None or not are_of_the_same(ours, theirs, "pairs"):
        return None
    if ours.pairs.scores is None or theirs.pairs.scores is None or (ours.pairs.rewards is None) != (theirs.pairs.rewards is None):
        return None
    kept = members(ours.pairs.tokens, bucket)
    mine, other = (are_right(scores)[kept] for scores in (ours.pairs.scores, theirs.pairs.scores))
    return intervals.difference(mine, other, level=level) if kept.any() else None


def rightness_apart(ours: Evaluation, theirs: Evaluation, level: float = LEVEL) -> Estimate | None:
    """Return our share of documents that are told rightly less theirs, over the same ones; None where these differ or there are none."""
    part = "unpaired" if ours.classes is None else "classes"
    if ours.right is None or theirs.right is None or not len(ours.right) or not are_of_the_same(ours, theirs, part):
        return None
    return intervals.difference(ours.right, theirs.right, level=level)


def likely(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation whose pairs are ordered by log-probabilities a token, which any model has, and not by rewards."""
    return evaluation if evaluation.pairs is None else replace(evaluation, pairs=replace(evaluation.pairs, rewards=None))


def are_of_the_same(ours: Evaluation, theirs: Evaluation, part: str) -> bool:
    """Tell whether two models were measured on the same documents of the same rows, in the same type."""
    marks = [(one.about.get("sets", {}).get(part), one.about.get("dtype"), one.documents.get(part)) for one in (ours, theirs)]
    return marks[0] == marks[1]


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file's lines; the last may be the half that a killed process leaves."""
    for line in file.read_text("utf-8", "replace").split("\n"):
        if (row := try_row(line)) is not None:
            yield row


def collect(folder: Path, documents: Sequence[int]) -> list[dict[str, Any]]:
    """Return the metrics of documents from the files of all processes, in this order; raises KeyError for one that none has."""
    known = {row["document"]: row for file in sorted(folder.glob("*.jsonl")) for row in read_lines(file)}
    return [known[document] for document in documents]


def scored(answer: dict[str, Any], settings: EvaluationConfig) -> dict[str, Any]:
    """Return an answer's row with its scores, and whether it refuses."""
    texts = answer["answer"], answer["reference"]
    scores = {str(metric): score(metric, *texts, settings.extract) for metric in settings.metrics}
    pattern = settings.count_in_prompt
    counted = {} if pattern is None else {"count": sum(1 for _ in re.finditer(pattern, answer["prompt"]))}
    return answer | {"scores": scores, "refused": is_refusal(answer["answer"])} | counted


def write(folder: Path, name: str, about: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> Evaluation:
    """Write RUN/evaluation/NAME.jsonl and NAME.json, the second last: where it is there, all is; return what they hold."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)
    staging, lines = folder / f".{name}.jsonl.tmp", [{"part": part} | row for part, found in rows.items() for row in found]
    staging.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    staging.rename(folder / f"{name}.jsonl")
    evaluation = _of_rows(about, lines)
    write_json(folder / f"{name}.json", {"version": VERSION, **about, "figures": figures(evaluation)})
    return evaluation


def load(folder: Path, name: str) -> Evaluation | None:
    """Return what RUN/evaluation holds of a model; None where it holds nothing whole, or of another version."""
    about = try_json(folder / f"{name}.json")
    if about.get("version") != VERSION or not (folder / f"{name}.jsonl").is_file():
        return None
    try:
        return _of_rows({key: value for key, value in about.items() if key != "figures"}, read_lines(folder / f"{name}.jsonl"))
    except (KeyError, TypeError):  # somebody has been at it
        return None


def _of_rows(about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> Evaluation:
    by_part: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_part.setdefault(row["part"], []).append(row)
    sums = {
        part: (np.array([row["nats"] for row in by_part[part]]), np.array([row["tokens"] for row in by_part[part]], np.float64))
        for part in LOSSES
        if part in by_part
    }
    documents = {part: [row["document"] for row in found] for part, found in by_part.items()}
    pairs = Pairs.of_rows(by_part["pairs"]) if by_part.get("pairs") else None
    unpaired = Unpaired.of_rows(by_part["unpaired"], by_part.get("mismatched", [])) if by_part.get("unpaired") else None
    classes = Classes.of_rows(by_part["classes"]) if by_part.get("classes") else None
    logps = {part: np.array([-row["nats"] for row in by_part[part]], np.float64) for part in ("unpaired", "mismatched") if part in by_part}
    more: dict[str, Any] = {"logps": logps, "unpaired": unpaired, "classes": classes, "answers": by_part.get("answers", [])}
    return Evaluation(about=about, documents=documents, sums=sums, pairs=pairs, **more)


def figures(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of NAME.json: each with its interval of 95 % where it has one."""
    found: dict[str, Any] = {f"{part}_loss": as_json(evaluation.loss(part)) for part in evaluation.sums}
    for part, (_, tokens) in evaluation.sums.items():
        found[f"{part}_loss"] |= {"tokens": int(tokens.sum())}
    found |= _of_pairs(evaluation) | _of_unpaired(evaluation) | _of_classes(evaluation)
    if evaluation.answers:
        metrics = dict.fromkeys(metric for row in evaluation.answers for metric in row["scores"])
        found |= {metric: as_json(evaluation.score(metric)) for metric in metrics}
        found |= {name: as_json(evaluation.share(name)) for name in ("finished", "refused")}
        if by_count := evaluation.score_by_count(metric := str(task_metric(evaluation))):
            found[f"{metric}_by_count"] = [{"count": count} | (as_json(value) or {}) for count, value in by_count.items()]
        found |= {"same_opening": as_json(evaluation.same_opening())}
        found |= {"same_opening_of_references": as_json(evaluation.same_opening("reference"))}
        found |= {f"answer_{name}": evaluation.mean(name) for name in PLAIN}
    return found


def _of_pairs(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of pairs: by what the run's objective orders answers by, and by log-probabilities a token."""
    if evaluation.pairs is None:
        return {}
    found: dict[str, Any] = {"preference_scores": "likelihood" if evaluation.pairs.rewards is None else "reward"}
    found |= {f"preference_accuracy{'' if bucket == 'all' else f'_{bucket}'}": as_json(evaluation.accuracy(bucket)) for bucket in BUCKETS}
    found |= {"preference_margin": as_json(evaluation.margin()), "likelihood_accuracy": as_json(likely(evaluation).accuracy())}
    found |= {"preferred_is_longer": as_json(evaluation.longer_preferred())}
    found |= {"longer_scores_higher": as_json(evaluation.longer_wins())}
    return found | {
        "preference_accuracy_by_length": [{"tokens": list(ends)} | (as_json(share) or {}) for ends, share in evaluation.by_length()]
    }


def _of_unpaired(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of answers that are wanted or not; none where there are no rewards."""
    told = evaluation.unpaired
    if told is None or told.rewards is None:
        return {}
    found: dict[str, Any] = {"accuracy": as_json(evaluation.rightness()), "reward_baseline": told.baseline}
    for kind in KINDS:
        found |= {f"accuracy_{kind}": as_json(told.accuracy(kind)), f"reward_{kind}": as_json(told.reward(kind))}
    return found


def _of_classes(evaluation: Evaluation) -> dict[str, Any]:
    """Return the metrics of a classifier, with F1 of each class."""
    told = evaluation.classes
    if told is None:
        return {}
    found = {"accuracy": evaluation.rightness(), "macro_f1": told.macro_f1(), "calibration_error": told.calibration_error()}
    found |= {"overconfidence": told.overconfidence()}
    return {name: as_json(value) for name, value in found.items()} | {"f1": {name: as_json(told.f1(name)) for name in told.names}}


def as_json(estimate: Estimate | None) -> dict[str, Any] | None:
    """Return an estimate as plain JSON."""
    if estimate is None:
        return None
    return finite({"value": estimate.value, "low": estimate.low, "high": estimate.high}) | {"documents": estimate.count}


def of_json(figure: dict[str, Any] | None) -> Estimate | None:
    """Return what `as_json` has made plain."""
    if figure is None:
        return None
    return Estimate(value=figure["value"], low=figure["low"], high=figure["high"], count=figure["documents"])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge made of a run's answers, next to the base's: scores from 1 to 5, by criterion and `overall`."""

    about: dict[str, Any]
    """The judge, how many rows it scored, what failed, and how much it prefers the first answer."""
    run: dict[str, Floats]
    base: dict[str, Floats]

    def apart(self, criterion: str, level: float = LEVEL) -> Estimate | None:
        """Return the run's mean score less the base's; None where nothing was scored."""
        ours, theirs = self.run.get(criterion), self.base.get(criterion)
        return None if ours is None or theirs is None or not len(ours) else intervals.difference(ours, theirs, level=level)

    def win_rate(self, level: float = LEVEL) -> Estimate | None:
        """Return the share of answers that score higher than the base's in the mean of both orders, ties as half; None without any."""
        apart = self.run.get("overall", np.zeros(0)) - self.base.get("overall", np.zeros(0))
        return intervals.mean((np.sign(apart) + 1) / 2, level) if len(apart) else None

    def score(self, criterion: str, level: float = LEVEL) -> Estimate | None:
        """Return the run's mean score; None where nothing was scored."""
        values = self.run.get(criterion)
        return None if values is None or not len(values) else intervals.ratio(values, np.ones_like(values), level)


def judged_words(about: dict[str, Any]) -> str:
    """Return how a judging went in one line: what was scored, what failed of which cause, and what the judge is worth."""
    parts = [f"{about['model']} judged {about['scored']} of {about['rows']} answers in both orders"]
    parts += [f"{about['one_order']} in one order only, which does not count"] if about["one_order"] else []
    parts += [f"{about['none']} in none"] if about["none"] else []
    if about["failures"]:
        parts.append("failed: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(about["failures"].items())))
    parts += [f"it cannot be asked: {about['reason']}"] if about["reason"] else []
    parts += [f"{about['retries']} tries again"] if about["retries"] else []
    parts += [f"what stood first got {about['position_bias']:+.2f}"] if about["position_bias"] is not None else []
    return "; ".join(parts)


def answers_key(ours: Evaluation, theirs: Evaluation) -> str:
    """Return what identifies the answers that were judged."""
    return content_key(*([(row["document"], row["answer"]) for row in evaluation.answers] for evaluation in (ours, theirs)))


def load_judged(folder: Path, ours: Evaluation, theirs: Evaluation) -> Judged | None:
    """Return what RUN/evaluation/judge.json holds of these answers; None where it is of others, or is not there."""
    found = try_json(folder / f"{JUDGED}.json")
    if not found or found.get("answers") != answers_key(ours, theirs):
        return None
    run, base = ({name: np.array(values, np.float64) for name, values in found[who].items()} for who in ("run", "base"))
    return Judged(about={key: value for key, value in found.items() if key not in ("run", "base", "documents")}, run=run, base=base)


def task_metric(evaluation: Evaluation) -> str | None:
    """Return the metric that is the task's score: the first that was asked for."""
    metrics = evaluation.about.get("settings", {}).get("metrics", [])
    return str(Metric(metrics[0])) if metrics and evaluation.answers else None
