"""PPO's advantages and returns of a rollout: made once of what its folder holds, and kept there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainers.config.schema import ObjectiveConfig
from trainers.data.table import TokenTable, open_table
from trainers.objectives.advantage import divergence, gae, token_rewards, whitened
from trainers.objectives.base import ADVANTAGE, OLD_LOGPS, REFERENCE_LOGPS, RETURNS, REWARD, SAMPLED_LOGPS, VALUES
from trainers.rl.measured import keep_signal
from trainers.rundir.attempt import Attempt

Floats = NDArray[np.float64]


def estimate(folder: Path, objective: ObjectiveConfig, attempt: Attempt) -> dict[str, float]:
    """Put each label's advantage and return into a rollout's folder, where they are not there; returns what is told of them.

    Not collective: rank 0 does it, so that nothing depends on how ranks share the rows. Raises Superseded where a newer attempt has
    started.
    """
    table = open_table(folder)
    penalties = _penalties(table, objective)
    values, starts = _of(table, VALUES), table.label_starts
    advantages = gae(
        token_rewards(table.signals[REWARD].astype(np.float64), objective.kl_weight * penalties, starts),
        values,
        starts,
        objective.gamma,
        objective.gae_lambda,
    )
    returns = advantages + values
    found = {RETURNS: returns, ADVANTAGE: whitened(advantages) if objective.whiten else advantages}
    for name in found.keys() - table.signals.keys():
        keep_signal(folder, name, found[name], attempt)
    told = {"value": _mean(values), "return": _mean(returns), "explained_variance": _explained(values, returns)}
    return told | ({"reference_kl": _mean(penalties)} if objective.kl_weight else {})


def _penalties(table: TokenTable, objective: ObjectiveConfig) -> Floats:
    """Return the divergence from the reference at each label in nats, 0 without one."""
    if not objective.kl_weight:
        return np.zeros(int(table.label_starts[-1]))
    policy = _of(table, OLD_LOGPS if OLD_LOGPS in table.signals else SAMPLED_LOGPS)
    return divergence(policy - _of(table, REFERENCE_LOGPS), objective.kl_estimator)


def _of(table: TokenTable, name: str) -> Floats:
    found: Floats = table.signals[name][:, 0].astype(np.float64)
    return found


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def _explained(values: Floats, returns: Floats) -> float:
    """Return the share of the returns' variance that the critic's values explain: 1 for a perfect critic, 0 for a constant."""
    spread = returns.var() if len(returns) else 0.0
    return float(1 - (returns - values).var() / spread) if spread else 0.0
