"""What a head of scores is trained to say of whole documents: which of two is better, how good one is, or which class it has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainers.batch import Batch, Needs, Output, Sizes, by_pair, document_weights
from trainers.config.objectives import BINS
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import Loss

CLASS_WEIGHT = "class_weight"
"""The signal of a classifier's documents whose classes have weights, (D,)."""


class Reward:
    """A reward model: of pairs by Bradley and Terry, of documents with a `score` by the squared error.

    Of pairs: Ouyang et al. 2022, arXiv 2203.02155, eq. 1; with a margin Touvron et al. 2023, arXiv 2307.09288, eq. 2; centred by
    Eisenstein et al. 2023, arXiv 2312.09244, section 4.
    """

    needs = Needs(scores=True)
    signals: frozenset[str] = frozenset()

    def __init__(self, config: ObjectiveConfig) -> None:
        """Take the settings of the objective."""
        self.config = config

    def targets(self, sizes: Sizes) -> float:
        """Return the number of pairs, or of documents where there are none; or the sum of their weights."""
        return sizes.weight / (2 if sizes.units else 1) or sizes.units or sizes.documents

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's pairs, or of its documents, each times its weight."""
        assert output.scores is not None
        scores, weights = output.scores[:, 0], document_weights(batch)
        if "score" in batch.signals:
            return _of_scores(scores, batch.signals["score"], weights)
        chosen, rejected = by_pair(scores)
        ahead = chosen - rejected
        losses = -logsigmoid(ahead - by_pair(batch.signals["margin"])[0] if "margin" in batch.signals else ahead)
        if self.config.center:
            losses = losses + self.config.center * (chosen + rejected) ** 2
        figures = {"reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": ahead, "accuracy": (ahead > 0).float()}
        weights = by_pair(weights)[0]
        return Loss(total=(losses * weights).sum(), figures={name: (of.detach() * weights).sum() for name, of in figures.items()})


def _of_scores(scores: Tensor, wanted: Tensor, weights: Tensor) -> Loss:
    """Return the squared error of scores (D,), with the absolute one."""
    away = scores - wanted
    figures = {"score": scores.detach(), "absolute_error": away.detach().abs()}
    return Loss(total=(away**2 * weights).sum(), figures={name: (of * weights).sum() for name, of in figures.items()})


class Classify:
    """Cross-entropy of the class of each document, each times the weights of its class and of its row; those of rows are divided by."""

    needs = Needs(scores=True)
    signals = frozenset({"label"})

    def __init__(self, config: ObjectiveConfig) -> None:
        """Take the settings of the objective."""
        self.config = config

    def targets(self, sizes: Sizes) -> float:
        """Return the number of documents, or the sum of their weights."""
        return sizes.weight or sizes.documents

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's documents."""
        assert output.scores is not None
        labels, logps = batch.signals["label"].long(), output.scores.log_softmax(-1)
        weights = document_weights(batch)
        losses = -logps.gather(-1, labels[:, None]).squeeze(-1) * weights
        if CLASS_WEIGHT in batch.signals:
            losses = losses * batch.signals[CLASS_WEIGHT]
        right = (logps.detach().argmax(-1) == labels) * weights
        return Loss(total=losses.sum(), figures={"accuracy": right.sum()})

    def tally(self, output: Output, batch: Batch) -> Tensor:
        """Return what the numbers of an evaluation are made of, (3 C + 2 BINS,) sums over documents, each times its weight.

        Of each class: documents of it, documents that are taken for it, and those of both; of each bin of confidence (the probability of
        the class that is taken): confidence and documents that are right.
        """
        assert output.scores is not None
        size, labels = output.scores.shape[-1], batch.signals["label"].long()
        confidence, taken = output.scores.softmax(-1).max(-1)
        weights = document_weights(batch)
        right = (taken == labels) * weights
        bins = (confidence * BINS).long().clamp(max=BINS - 1)

        def added(at: Tensor, values: Tensor, count: int) -> Tensor:
            return values.new_zeros(count).index_add(0, at, values)

        of_classes = [added(labels, weights, size), added(taken, weights, size), added(labels, right, size)]
        return torch.cat([*of_classes, added(bins, confidence * weights, BINS), added(bins, right, BINS)])

    def summary(self, sums: list[float]) -> dict[str, float]:
        """Return macro F1 and the expected calibration error from the tallies of all held-out rows.

        F1 is 2 TP / (documents of the class + documents taken for it), 0 for a class that nobody meets; macro is its mean over the classes
        that some document has. Calibration: Guo et al. 2017, arXiv 1706.04599, eq. 3, with BINS bins.
        """
        size = (len(sums) - 2 * BINS) // 3
        of_class, taken, both = (sums[size * part : size * (part + 1)] for part in range(3))
        confidence, right = sums[3 * size : 3 * size + BINS], sums[3 * size + BINS :]
        count = sum(of_class) or 1.0
        scores = [2 * hits / (true + said) for true, said, hits in zip(of_class, taken, both, strict=True) if true]
        error = sum(abs(said - hits) for said, hits in zip(confidence, right, strict=True)) / count
        return {"macro_f1": sum(scores) / max(len(scores), 1), "calibration_error": error}
