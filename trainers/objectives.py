"""What is minimised: functions of token log-probabilities that know no model and no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from trainers.batch import Batch, Needs, Output, Sizes
from trainers.config.errors import ConfigError
from trainers.config.schema import ObjectiveConfig, ObjectiveName


@dataclass(kw_only=True)
class Loss:
    """A microbatch's loss as a SUM; `take_step` divides by the targets of the whole step."""

    total: Tensor
    """Scalar float32 with a graph; exactly 0 where nothing is labelled."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that are reported under their names, the same names in every microbatch; SUMS, divided like `total`."""


class Objective(Protocol):
    """One objective: what it reads, what divides its loss, and its summed loss."""

    needs: Needs
    signals: frozenset[str]
    """Signals that the table must carry."""

    def targets(self, sizes: Sizes) -> int:
        """Return the denominator for rows of these sizes: labels, documents or units."""
        ...

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return the summed loss of a microbatch."""
        ...


class NextToken:
    """Cross-entropy of the labelled tokens: supervised fine-tuning and continued pre-training differ in labels alone."""

    needs = Needs()
    signals: frozenset[str] = frozenset()

    def targets(self, sizes: Sizes) -> int:
        """Return the number of labels."""
        return sizes.labels

    def __call__(self, output: Output, batch: Batch) -> Loss:
        """Return minus the summed log-probability."""
        return Loss(total=-output.logps.sum())


CHOICES: dict[ObjectiveName, Callable[[ObjectiveConfig], Objective]] = {
    ObjectiveName.sft: lambda config: NextToken(),
    ObjectiveName.cpt: lambda config: NextToken(),
}


def make_objective(config: ObjectiveConfig, carried: Iterable[str]) -> Objective:
    """Return the objective that a config names; raises ConfigError where the rows do not carry the signals that it reads."""
    objective = CHOICES[config.name](config)
    if missing := sorted(objective.signals - set(carried)):
        reason = f"reads {', '.join(missing)}, which the rows of data.path do not carry"
        raise ConfigError("objective.name", str(config.name), reason, "an objective that reads tokens alone: objective=sft")
    return objective
