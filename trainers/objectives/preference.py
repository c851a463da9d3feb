"""Which of two answers is preferred: each objective is a function of the pairs' summed log-probabilities."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trainers.batch import Batch, Needs, Output, Sizes, by_document, by_pair
from trainers.config.choices import PreferenceLoss
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import REFERENCE, Loss


@dataclass(frozen=True)
class Answers:
    """What is known of the answers of P pairs, preferred ones first: each a pair of (P,) float32."""

    logps: tuple[Tensor, Tensor]
    """Summed log-probabilities in nats, with a graph."""
    tokens: tuple[Tensor, Tensor]
    """Labels."""
    reference: tuple[Tensor, Tensor] | None
    """The same sums under the reference; None where the objective has none."""

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

    def targets(self, sizes: Sizes) -> int:
        """Return the number of pairs."""
        return sizes.units

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's pairs, with the rewards of their answers."""
        counts = by_document(torch.ones_like(output.logps), batch)
        known = batch.signals.get(REFERENCE) if REFERENCE in self.signals else None
        logps = by_pair(by_document(output.logps, batch))
        answers = Answers(logps, by_pair(counts), None if known is None else by_pair(known))
        losses = self.losses(answers)
        chosen, rejected = (reward.detach() for reward in self.rewards(answers))
        figures = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
            "nll_chosen": -answers.means()[0].detach(),
        }
        return Loss(total=losses.sum(), figures={name: values.sum() for name, values in figures.items()})

    @abstractmethod
    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair, (P,)."""

    @abstractmethod
    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return the implicit reward of each preferred answer and of each other one, (P,) each."""


class DPO(Preference):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Label smoothing: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3; robust: Chowdhury et al. 2024, arXiv
    2403.00409, eq. 12. Hinge: SLiC (Zhao et al. 2023, arXiv 2305.10425). IPO: Azar et al. 2023, arXiv 2310.12036, eq. 17.
    With the preferred answer's own loss: Pang et al. 2024, arXiv 2404.19733, eq. 1.
    """

    signals = frozenset({REFERENCE})

    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair."""
        chosen, rejected = self.rewards(answers)
        losses = of_margin(chosen - rejected, self.config)
        return losses - self.config.nll_weight * answers.means()[0] if self.config.nll_weight else losses

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return beta times each answer's log-ratio to the reference, in nats or in nats a token."""
        chosen, rejected = (self._reward(answers, number) for number in (0, 1))
        return chosen, rejected

    def _reward(self, answers: Answers, number: int) -> Tensor:
        ratio = answers.logps[number] - (0.0 if answers.reference is None else answers.reference[number])
        return self.config.beta * (ratio / answers.tokens[number] if self.config.length_normalised else ratio)


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

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return beta times each answer's log-probability in nats a token."""
        chosen, rejected = answers.means()
        return self.config.beta * chosen, self.config.beta * rejected


class ORPO(Preference):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, eq. 6): the answer's own loss and the ratio of odds."""

    def losses(self, answers: Answers) -> Tensor:
        """Return the loss of each pair."""
        chosen, rejected = (log_odds(mean) for mean in answers.means())
        return -answers.means()[0] - self.config.beta * logsigmoid(chosen - rejected)

    def rewards(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Return beta times each answer's log-probability in nats a token."""
        chosen, rejected = answers.means()
        return self.config.beta * chosen, self.config.beta * rejected


def of_margin(margin: Tensor, config: ObjectiveConfig) -> Tensor:
    """Return the loss of each pair from the difference of its rewards, which is `beta` times one in nats."""
    if config.loss is PreferenceLoss.hinge:
        return torch.relu(1 - margin)
    if config.loss is PreferenceLoss.ipo:
        return (margin / config.beta - 1 / (2 * config.beta)) ** 2
    smoothing, right, wrong = config.label_smoothing, -logsigmoid(margin), -logsigmoid(-margin)
    if config.robust:
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong if smoothing else right


def log_odds(mean: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean), for means below 0 and near it."""
    small = mean > -math.log(2.0)
    below = torch.where(
        small, torch.log(-torch.expm1(torch.where(small, mean, -1.0))), torch.log1p(-torch.exp(torch.where(small, -1.0, mean)))
    )
    return mean - below
