"""An objective with the balance loss of a mixture's routers."""

from __future__ import annotations

from dataclasses import replace

from trainers.batch import Batch, Output, Sizes
from trainers.objectives.base import Loss, Objective


class Balanced:
    """An objective of labels with a balance loss: each label adds the coefficient times its document's value."""

    def __init__(self, objective: Objective, coefficient: float) -> None:
        """Need what the objective itself needs: the engine adds the balance of each forward."""
        self.objective, self.coefficient = objective, coefficient
        self.needs, self.signals = objective.needs, objective.signals

    def targets(self, sizes: Sizes) -> float:
        """Return the objective's own."""
        return self.objective.targets(sizes)

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the objective's loss, which is reported as it is, and what is trained in addition."""
        assert output.balance is not None
        loss = self.objective(output, batch)
        return replace(loss, regulariser=self.coefficient * output.balance, figures=loss.figures | {"balance": output.balance})
