"""Answers that are wanted or not, each by itself: Kahneman-Tversky optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.batch import Batch, Needs, Output, Sizes, by_document, document_weights
from trainers.config.derived import DESIRABLE
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import REFERENCE, Loss


class KTO:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8); the documents of a step divide its loss.

    An answer's value is a sigmoid of beta times how far its log-ratio is above the baseline, or below it where it is not wanted. The
    baseline z0 estimates the KL divergence from the reference: the mean log-ratio of prompts with answers to others over the whole
    step, at least 0 and without a gradient.
    """

    needs = Needs()
    signals = frozenset({REFERENCE, DESIRABLE})

    def __init__(self, config: ObjectiveConfig, baseline: float = 0.0) -> None:
        """Take the settings, and the step's baseline in nats."""
        self.config, self.baseline = config, baseline

    def targets(self, sizes: Sizes) -> float:
        """Return the number of answers, or the sum of their weights."""
        return sizes.weight or sizes.documents

    def measure(self, output: Output, batch: Batch) -> Tensor:
        """Return the summed log-ratios of mismatched answers, in nats, each times the weight of its prompt's row."""
        return (_ratios(output, batch) * document_weights(batch)).sum()

    def given(self, statistic: float) -> KTO:
        """Return the objective with a step's baseline: the mean log-ratio, or 0 where it is below."""
        return KTO(self.config, max(0.0, statistic))

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's answers, each times its weight, with what is known of the wanted and the other ones."""
        ratios = _ratios(output, batch)
        wanted = batch.signals.get(DESIRABLE, torch.ones_like(ratios)) > 0
        above = self.config.beta * (ratios - self.baseline)
        rows = document_weights(batch)
        weights = torch.where(wanted, self.config.desirable_weight, self.config.undesirable_weight) * rows
        losses = weights * torch.sigmoid(torch.where(wanted, -above, above))  # 1 - sigmoid(x) is sigmoid(-x)
        figures, counts = self._figures(ratios.detach(), wanted, output, batch)
        return Loss(total=losses.sum(), figures=figures, counts=counts, each=(losses.detach(), rows))

    def _figures(self, ratios: Tensor, wanted: Tensor, output: Output, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rows = document_weights(batch)
        chosen, rejected = wanted * rows, ~wanted * rows
        nll = -by_document(output.logps.detach(), batch) / by_document(torch.ones_like(output.logps), batch)
        of_chosen = {"reward_chosen": self.config.beta * ratios, "log_ratio_chosen": ratios, "nll_chosen": nll}
        of_rejected = {"reward_rejected": self.config.beta * ratios, "log_ratio_rejected": ratios}
        counts = {name: chosen.sum() for name in of_chosen} | {name: rejected.sum() for name in of_rejected}
        figures = {name: (values * chosen).sum() for name, values in of_chosen.items()}
        figures |= {name: (values * rejected).sum() for name, values in of_rejected.items()}
        right = ((ratios > self.baseline) == wanted) * rows
        return figures | {"accuracy": right.sum(), "kl": (self.baseline * rows).sum()}, counts


def _ratios(output: Output, batch: Batch) -> Tensor:
    """Return each document's summed log-probability less the reference's, (D,) in nats."""
    return by_document(output.logps, batch) - batch.signals.get(REFERENCE, 0.0)
