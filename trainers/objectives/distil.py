"""What a teacher says of each token: divergences of its likeliest tokens and the rest, one bucket, from those of the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainers.batch import IGNORE, SOURCE, Batch, Needs, Output, Sizes, by_document, label_weights
from trainers.config.choices import Divergence
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import TEACHER_IDS, TEACHER_LOGPS, Loss


class Distil:
    """Distillation from a teacher's k likeliest tokens (Hinton et al. 2015, arXiv 1503.02531), mixed with cross-entropy.

    Both models' probabilities of the k tokens, and of all others together, are two distributions of k + 1 outcomes. Their divergence
    is at most that of whole distributions, and equals it where k is the whole vocabulary.
    """

    needs = Needs(gathered=TEACHER_IDS)
    signals = frozenset({TEACHER_IDS, TEACHER_LOGPS})

    def __init__(self, config: ObjectiveConfig) -> None:
        """Take the settings of the objective."""
        self.config = config

    def targets(self, sizes: Sizes) -> float:
        """Return the number of labels, or the sum of their weights."""
        return sizes.weight or sizes.labels

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed divergence and cross-entropy, each with its share, of each label times its weight."""
        assert output.gathered is not None
        teacher = batch.signals[TEACHER_LOGPS].log_softmax(-1)  # what float16 has rounded sums to 1 again
        share, weights = self.config.ce_weight, label_weights(batch)
        logps = output.logps if weights is None else output.logps * weights
        weights = (batch.labels != IGNORE).float() if weights is None else weights
        apart = divergence(teacher, output.gathered, self.config) * weights
        far, own = apart.sum(), -logps.sum()
        outside = {"student_rest": output.gathered[..., -1].detach(), "teacher_rest": teacher[..., -1]}
        figures = {"divergence": far.detach(), "cross_entropy": own.detach()}
        figures |= {name: (rest.exp() * weights).sum() for name, rest in outside.items()}
        each = None
        if SOURCE in batch.signals:
            each = by_document(((1 - share) * apart - share * logps).detach(), batch), by_document(weights, batch)
        return Loss(total=(1 - share) * far + share * own if share else far, figures=figures, each=each)


def divergence(teacher: Tensor, student: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return how far two distributions are apart in nats, each (..., n) log-probabilities -> (...).

    Forward and reverse KL, and the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649, section 2):
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.
    """
    possible = (teacher > -math.inf) & (student > -math.inf)  # a rest of nothing is -inf on both sides
    p, q = teacher.where(possible, 0.0), student.where(possible, 0.0)
    if config.divergence is Divergence.forward_kl:
        terms = p.exp() * (p - q)
    elif config.divergence is Divergence.reverse_kl:
        terms = q.exp() * (q - p)
    else:
        beta = config.beta
        mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        terms = beta * p.exp() * (p - mixture) + (1 - beta) * q.exp() * (q - mixture)
    return terms.where(possible, 0.0).sum(-1)
