"""Answers that the model has sampled, each with how much better than expected it is: the clipped policy gradients of GRPO and after it."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.batch import IGNORE, Batch, Needs, Output, Sizes, by_document
from trainers.config.choices import Average, Ratio
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import ADVANTAGE, OLD_LOGPS, REFERENCE_LOGPS, SAMPLED_LOGPS, Loss


class Policy:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7) on advantages that are given, and what came after it.

    GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4): each answer is a mean of its tokens, with the KL divergence from the reference.
    DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 8): a higher upper bound, a mean over tokens. Dr. GRPO (Liu et al. 2025, arXiv 2503.20783,
    section 3): over a constant length. GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 5 and 7): ratios of whole answers.
    """

    needs = Needs(entropy=True)

    def __init__(self, config: ObjectiveConfig) -> None:
        """Take the settings of the objective."""
        self.config = config
        self.signals = frozenset({ADVANTAGE, SAMPLED_LOGPS, *((REFERENCE_LOGPS,) if config.kl_weight else ())})

    def targets(self, sizes: Sizes) -> float:
        """Return the number of answers, with those that no token is trained of, or of trained tokens, or the answers times a constant."""
        return sizes.labels if self.config.average is Average.tokens else sizes.documents * (self.config.constant or 1)

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's answers, and means over their tokens."""
        assert output.entropy is not None
        logps, kept = output.logps, (batch.labels != IGNORE).float()
        counts, advantages = by_document(kept, batch), at_labels(batch.signals[ADVANTAGE], batch)
        old, weights, figures = compared(logps.detach(), batch, self.config.importance_cap)
        log_ratios = (logps - old) * kept
        if self.config.ratio is Ratio.sequence:
            log_ratios = at_labels(by_document(log_ratios, batch) / counts.clamp(min=1), batch)
        ratios, low, high = log_ratios.exp(), 1 - self.config.clip_low, 1 + self.config.clip_high
        losses = -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages) * weights
        clipped = torch.where(advantages > 0, ratios > high, (ratios < low) & (advantages < 0))
        figures |= {"ratio": ratios, "clip_share": clipped, "entropy": output.entropy}
        if self.config.kl_weight:
            figures["kl"] = k3(batch.signals[REFERENCE_LOGPS].squeeze(-1) - logps)
            losses = losses + self.config.kl_weight * figures["kl"]
        sums = by_document(losses, batch) / (counts.clamp(min=1) if self.config.average is Average.answers else 1)
        targets = counts if self.config.average is Average.tokens else torch.full_like(counts, self.config.constant or 1)
        summed = {name: (values.detach() * kept).sum() for name, values in figures.items()}
        return Loss(total=sums.sum(), figures=summed, counts=dict.fromkeys(summed, kept.sum()), each=(sums.detach(), targets))


def compared(logps: Tensor, batch: Batch, cap: float | None) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
    """Return the log-probabilities that ratios are to, (B, S), what weighs each token's loss, and `mismatch_kl` of each token in nats.

    These are the sampler's. With a cap they are the trainer's, and the weights min(trainer / sampler, cap) (Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"). The trainer's are those before the first step on these answers,
    where the signals have them, else those of now. mismatch_kl estimates KL(sampler || trainer).
    """
    sampled = batch.signals[SAMPLED_LOGPS].squeeze(-1)
    old = batch.signals[OLD_LOGPS].squeeze(-1) if OLD_LOGPS in batch.signals else logps
    figures = {"mismatch_kl": k3(old - sampled)}
    return (sampled, 1.0, figures) if cap is None else (old, (old - sampled).exp().clamp(max=cap), figures)


def k3(log_ratios: Tensor) -> Tensor:
    """Return q / p - 1 - log(q / p), whose mean over samples of p is KL(p || q) (Schulman 2020, "Approximating KL divergence")."""
    return torch.expm1(log_ratios) - log_ratios


def at_labels(values: Tensor, batch: Batch) -> Tensor:
    """Return a number a document, (D,), or one a label, (B, S, 1), at each token, (B, S); 0.0 where it is padding."""
    if values.ndim == 3:
        return values.squeeze(-1)
    return torch.cat([values.new_zeros(1), values])[batch.documents + 1]
