"""What follows from several settings together: the learning rate with its source, and how a step's rows are split."""

from __future__ import annotations

from typing import NamedTuple

from trainers.config.errors import ConfigError
from trainers.config.schema import OptimConfig, OptimizerName, PeftConfig, PeftMethod, TrainConfig

OF_THE_MODEL = (PeftMethod.none, PeftMethod.freeze)
"""Methods that train weights of the model itself, at the rate of full fine-tuning."""


class Peak(NamedTuple):
    """The learning rate at the end of warm-up, and where it comes from."""

    setting: str
    """The setting that gives it."""
    rate: float
    """What that setting says."""
    factor: float
    """`optim.lr_factor`."""

    @property
    def value(self) -> float:
        """Return the learning rate itself."""
        return self.rate * self.factor

    def __str__(self) -> str:
        """Return it in words, with its source."""
        product = f" {self.rate:g} x optim.lr_factor {self.factor:g}" if self.factor != 1 else ""
        return f"{self.value:g}, from {self.setting}{product}"


def peak_lr(optim: OptimConfig, peft: PeftConfig) -> Peak:
    """Return the peak learning rate: `optim.lr` where it is given, else the method's own, times `optim.lr_factor`.

    Raises ConfigError where neither is known.
    """
    return Peak(*_given(optim, peft), optim.lr_factor)


def _given(optim: OptimConfig, peft: PeftConfig) -> tuple[str, float]:
    """Return the setting that decides, and its value."""
    if optim.lr is not None:
        return "optim.lr", optim.lr
    if peft.method in OF_THE_MODEL:
        return "optim.full_lr", optim.full_lr
    if peft.lr is None:
        reason = f"peft.method={peft.method} has no learning rate of its own: its preset gives one"
        raise ConfigError("peft.lr", None, reason, f"peft={peft.method}, which is that preset, or optim.lr=2e-4")
    if optim.name is OptimizerName.sgd:
        raise ConfigError("optim.lr", None, f"peft.lr = {peft.lr:g} is a rate for adamw, and optim.name is sgd", "optim.lr=1e-2")
    return "peft.lr", peft.lr


def microbatches(train: TrainConfig, world_size: int) -> int:
    """Return how many microbatches a rank accumulates in a step."""
    return train.global_batch // (world_size * train.microbatch)


def rows_words(train: TrainConfig, world_size: int) -> str:
    """Return how the rows of a step are split, in words."""
    share = f"{microbatches(train, world_size)} microbatch(es) of {train.microbatch} on each of {world_size} rank(s)"
    return f"{train.global_batch} rows a step, {share}"
