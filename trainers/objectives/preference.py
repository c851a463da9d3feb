"""Which of two answers is preferred: each objective is a function of the pairs' summed log-probabilities."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainers.batch import Batch, Needs, Output, Sizes, by_document, by_pair, document_weights
from trainers.config.choices import FDivergence, PreferenceLoss
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import REFERENCE, Loss

LARGEST = 80.0
"""Of exponents: exp(88) is the largest of a float32."""


@dataclass(frozen=True)
class Answers:
    """What is known of the answers of P pairs, preferred ones first: each a pair of (P,) float32."""

    logps: tuple[Tensor, Tensor]
    """Summed log-probabilities in nats, with a graph."""
    tokens: tuple[Tensor, Tensor]
    """Labels."""
    reference: tuple[Tensor, Tensor] | None
    """The same sums under the reference; None where the objective has none."""

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Return the log-ratios to the reference in nats; log-probabilities where there is none."""
        chosen, rejected = self.logps
        return (chosen, rejected) if self.reference is None else (chosen - self.reference[0], rejected - self.reference[1])

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities in nats a token."""
        return self.logps[0] / self.tokens[0], self.logps[1] / self.tokens[1]


class Preference(ABC):
    """A loss of pairs; it divides by the pairs of a step, and every objective of pairs reports the same numbers."""

    needs = Needs()
    signals: frozenset[str] = frozenset()

    def __init__(self, config: ObjectiveConfig) -> None:
        """Take the settings of the objective."""
        self.config = config

    def targets(self, sizes: Sizes) -> float:
        """Return the number of pairs, or the sum of their weights: both documents of a pair have it."""
        return sizes.weight / 2 or sizes.units

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's pairs, each times its weight, with the rewards of their answers."""
        counts = by_document(torch.ones_like(output.logps), batch)
        known = batch.signals.get(REFERENCE) if REFERENCE in self.signals else None
        logps = by_pair(by_document(output.logps, batch))
        answers = Answers(logps, by_pair(counts), None if known is None else by_pair(known))
        weights = by_pair(document_weights(batch))[0]
        losses = self.losses(answers) * weights
        chosen, rejected = (reward.detach() for reward in self.rewards(answers))
        figures = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
            "nll_chosen": -answers.means()[0].detach(),
        }
        if REFERENCE in self.signals:
            ratios = (ratio.detach() for ratio in answers.ratios())
            figures |= dict(zip(("log_ratio_chosen", "log_ratio_rejected"), ratios, strict=True))
        figures = {name: (values * weights).sum() for name, values in figures.items()}
        return Loss(total=losses.sum(), figures=figures, each=(losses.detach(), weights))

    @abstractmethod
    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair, (P,)."""

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return the implicit reward of each preferred answer and of each other one, (P,) each: beta times nats a token."""
        chosen, rejected = answers.means()
        return self.config.beta * chosen, self.config.beta * rejected


class DPO(Preference):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Label smoothing: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3; robust: Chowdhury et al. 2024, arXiv
    2403.00409, eq. 12. Hinge: SLiC (Zhao et al. 2023, arXiv 2305.10425). IPO: Azar et al. 2023, arXiv 2310.12036, eq. 17.
    With the preferred answer's own loss: Pang et al. 2024, arXiv 2404.19733, eq. 1. Other divergences: Wang et al. 2023, arXiv
    2309.16240, eq. 10 and table 1.
    """

    signals = frozenset({REFERENCE})

    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair."""
        chosen, rejected = self.rewards(answers)
        losses = of_margin(chosen - rejected, self.config)
        return losses - self.config.nll_weight * answers.means()[0] if self.config.nll_weight else losses

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return beta times each answer's log-ratio to the reference, in nats or in nats a token; or what a divergence makes of it."""
        chosen, rejected = answers.ratios()
        if self.config.length_normalised:
            chosen, rejected = chosen / answers.tokens[0], rejected / answers.tokens[1]
        return self.config.beta * derivative(chosen, self.config), self.config.beta * derivative(rejected, self.config)


class CPO(DPO):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417, eq. 5): DPO with a uniform reference.

    The preferred answer's own loss is in nats a token.
    """

    signals = frozenset()


class SimPO(Preference):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, eq. 6)."""

    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair."""
        chosen, rejected = self.rewards(answers)
        return -logsigmoid(chosen - rejected - self.config.margin)


class ORPO(Preference):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, eq. 6): the answer's own loss and the ratio of odds."""

    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair."""
        chosen, rejected = (log_odds(mean) for mean in answers.means())
        return -answers.means()[0] - self.config.beta * logsigmoid(chosen - rejected)


def of_margin(margin: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return the loss of each pair from the difference of its rewards, which is `beta` times one in nats."""
    if config.loss is PreferenceLoss.hinge:
        return torch.relu(1 - margin)
    if config.loss is PreferenceLoss.ipo:
        return (margin / config.beta - 1 / (2 * config.beta)) ** 2
    smoothing = config.label_smoothing
    if not smoothing:
        return -logsigmoid(margin)
    right, wrong = -(1 - smoothing) * logsigmoid(margin), -smoothing * logsigmoid(-margin)
    return (right - wrong) / (1 - 2 * smoothing) if config.robust else right + wrong


def derivative(ratio: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return f'(u) of a divergence at u = exp(ratio), but for a constant, which a difference of two answers does not have.

    Wang et al. 2023, arXiv 2309.16240, table 1: log u, -1/u, log(u / (1 + u)), and (1 - u^-alpha) / alpha. Powers end at
    exp(LARGEST), where their gradient is 0: further on they would be infinite.
    """
    if config.f_divergence is FDivergence.jensen_shannon:
        return logsigmoid(ratio)
    if config.f_divergence is FDivergence.reverse_kl:
        return ratio
    alpha = 1.0 if config.f_divergence is FDivergence.forward_kl else config.f_alpha
    return -torch.expm1((-alpha * ratio).clamp(max=LARGEST)) / alpha


def log_odds(mean: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean), for means below 0 and near it."""
    small = mean > -math.log(2.0)
    below = torch.where(
        small, torch.log(-torch.expm1(torch.where(small, mean, -1.0))), torch.log1p(-torch.exp(torch.where(small, -1.0, mean)))
    )
    return mean - below
