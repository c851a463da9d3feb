"""What a critic is trained to say before each token of an answer: the reward that is still to come."""

from __future__ import annotations

import torch

from trainers.batch import IGNORE, Batch, Needs, Output, Sizes
from trainers.config.schema import ObjectiveConfig
from trainers.objectives.base import RETURNS, VALUES, Loss


class Values:
    """The squared error of PPO's critic, the larger of two: as it is, and of values that stay within a bound of the rollout's.

    Half of it, a mean over tokens, as the authors' own code has it (openai/baselines, ppo2/model.py); the paper, arXiv 1707.06347, eq. 9,
    has no bound. Batches are those of `each_token`: there is a score for each token.
    """

    needs = Needs(scores=True)
    signals = frozenset({VALUES, RETURNS})

    def __init__(self, config: ObjectiveConfig) -> None:
        """Take the settings of the objective."""
        self.clip = config.value_clip

    def targets(self, sizes: Sizes) -> float:
        """Return the number of trained tokens."""
        return sizes.labels

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch's tokens, with the share of those that the bound holds."""
        assert output.scores is not None
        values = output.scores[:, 0].view_as(batch.labels).where(batch.labels != IGNORE, 0.0)
        old, wanted = (batch.signals[name].squeeze(-1) for name in (VALUES, RETURNS))  # 0.0 where there is no label
        errors = (values - wanted) ** 2
        if self.clip is None:
            return Loss(total=0.5 * errors.sum())
        bounded = (values.clamp(old - self.clip, old + self.clip) - wanted) ** 2
        return Loss(total=0.5 * torch.maximum(errors, bounded).sum(), figures={"value_clip_share": (bounded > errors).float().sum()})
