"""What follows from several settings together: learning rate and its source, a run's length, where rows come from, a step's split."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from trainers.config.choices import DataSource, Export, ObjectiveName, OptimizerName, PeftMethod, Schedule
from trainers.config.errors import ConfigError, plural
from trainers.config.mesh import Mesh
from trainers.config.schema import DataConfig, OptimConfig, PeftConfig, RunConfig, TrainConfig

OF_THE_MODEL = (PeftMethod.none, PeftMethod.freeze)
PRESET_OF = {PeftMethod.bottleneck: "houlsby"}
"""A preset of a method that none is named after."""
"""Methods that train weights of the model itself, at the rate of full fine-tuning."""

OF_STYLES = ("styles", "style_rows", "style_instruction")
OF_MIXTURES = ("mix_by", "mix_exhausted", "mix_temperature", "mix_ratio", "mix_steps", "mix_change")
"""Fields of `data` that are about all sources of a mixture together."""

OF_STREAMS = ("shard_rows", "window_shards")
"""Fields of `data` that are about the shards of a stream."""

LOGITS_BYTES = 256 << 20
"""Of the logits that exist at once where the run decides."""


class Peak(NamedTuple):
    """The learning rate at the end of warm-up, and where it comes from."""

    setting: str
    """The setting that gives it."""
    rate: float
    """What that setting says."""
    factor: float
    """`optim.lr_factor`."""
    of_adamw: float = 1.0
    """`optim.adamw_factor`, where the rate is AdamW's."""

    @property
    def value(self) -> float:
        """Return the learning rate itself."""
        return self.rate * self.of_adamw * self.factor

    def __str__(self) -> str:
        """Return it in words, with its source."""
        factors = {"optim.adamw_factor": self.of_adamw, "optim.lr_factor": self.factor}
        product = "".join(f" x {name} {factor:g}" for name, factor in factors.items() if factor != 1)
        return f"{self.value:g}, from {self.setting}" + (f" {self.rate:g}{product}" if product else "")


class Source(NamedTuple):
    """Where rows come from: a file, a directory or a hub data set, and what of it."""

    path: str
    split: str
    config: str | None = None
    patterns: tuple[str, ...] = ()
    revision: str | None = None


DIGITS, TASKS = "the larger of two digits", "tasks of reasoning-gym: "
"""The paths of rows that are made; settings follow that of tasks."""


def sources_of(data: DataConfig) -> list[Source | None]:
    """Return where the training rows are, None for Python's documentation, and where the held-out rows of `eval_path` are."""
    named = (data.config, tuple(data.data_files), data.revision)
    path = DIGITS if data.source is DataSource.digits else _tasks(data) if data.source is DataSource.reasoning_gym else str(data.path)
    first = None if data.source is DataSource.python_docs else Source(path, data.split, *named)
    if data.eval_path is None:
        return [first]
    of_eval = (data.config, (), data.revision) if data.eval_path == data.path else (None, (), None)
    return [first, Source(data.eval_path, data.eval_split or data.split, *of_eval)]


def _tasks(data: DataConfig) -> str:
    return TASKS + json.dumps({"tasks": data.tasks, "rows": data.task_rows, "seed": data.task_seed})


PREFERENCES = (ObjectiveName.dpo, ObjectiveName.simpo, ObjectiveName.cpo, ObjectiveName.orpo)
"""Objectives that compare the two answers of a pair."""


DESIRABLE = "desirable"
"""The signal that is 1 where a document's answer is wanted, and 0 where it is not."""
OF_REFERENCE = (ObjectiveName.dpo, ObjectiveName.kto)
"""Objectives that compare with a reference model."""
SCORED = (ObjectiveName.reward, ObjectiveName.classify)
"""Objectives of a head that makes scores of documents in the place of log-probabilities."""


SAMPLED = (ObjectiveName.grpo, ObjectiveName.ppo)
"""Objectives of answers that the model itself has given, with their rewards."""
HEADED = (*SCORED, ObjectiveName.ppo)
"""Objectives that train a head of scores, ppo that of its critic."""


def of_answers(objective: ObjectiveName) -> bool:
    """Tell whether an objective is about whole answers, in pairs or each by itself."""
    return compares(objective) or objective is ObjectiveName.kto


def compares(objective: ObjectiveName) -> bool:
    """Tell whether an objective takes pairs of answers."""
    return objective in PREFERENCES or objective is ObjectiveName.reward


def loss_words(objective: ObjectiveName, label_smoothing: float = 0.0) -> str:
    """Return what an objective's held-out loss is called: `loss` where it is nats a label, as tools.evaluate measures it, else by its name.

    Of answers that the model gives itself it is their mean reward, with the sign that makes less better.
    """
    if objective in SAMPLED:
        return "negative reward"
    if objective not in (ObjectiveName.sft, ObjectiveName.cpt):
        return f"{objective} loss"
    return "smoothed loss" if label_smoothing else "loss"


def rows_as(objective: ObjectiveName) -> ObjectiveName:
    """Return the objective whose rows are prepared: those that learn from the same rows share them, so that a sweep prepares once.

    A teacher's log-probabilities are of the rows of supervised fine-tuning, and all preferences are of the same pairs.
    """
    if objective in PREFERENCES:
        return ObjectiveName.dpo
    return ObjectiveName.sft if objective is ObjectiveName.distil else objective


def peak_lr(optim: OptimConfig, peft: PeftConfig) -> Peak:
    """Return the peak learning rate: `optim.lr` where it is given, else the method's own, times `optim.lr_factor`.

    Raises ConfigError where neither is known.
    """
    setting, rate = _given(optim, peft)
    return Peak(setting, rate, optim.lr_factor, 1.0 if setting == "optim.lr" else optim.adamw_factor)


def _given(optim: OptimConfig, peft: PeftConfig) -> tuple[str, float]:
    """Return the setting that decides, and its value."""
    if optim.lr is not None:
        return "optim.lr", optim.lr
    if peft.method in OF_THE_MODEL:
        return "optim.full_lr", optim.full_lr
    if peft.lr is None:
        reason = f"peft.method={peft.method} has no learning rate of its own: its preset gives one"
        preset = PRESET_OF.get(peft.method, peft.method)
        raise ConfigError("peft.lr", None, reason, f"peft={preset}, which is that preset, or optim.lr=2e-4")
    if optim.name is OptimizerName.sgd:
        raise ConfigError("optim.lr", None, f"peft.lr = {peft.lr:g} is a rate for adamw, and optim.name is sgd", "optim.lr=1e-2")
    return "peft.lr", peft.lr


def learning_rate(optim: OptimConfig, peak: float, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up to `peak`, then the schedule, at its floor after the last step.

    Cosine: Loshchilov and Hutter 2017, eq. 5, one cycle. WSD (warm-up, stable, decay): Hu et al. 2024, section 4.
    """
    warmup = warmup_steps(optim, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (num_steps - warmup)
    if optim.schedule is Schedule.cosine:
        shape = (1 + math.cos(math.pi * done)) / 2
    elif optim.schedule is Schedule.linear:
        shape = 1 - done
    elif optim.schedule is Schedule.wsd:
        shape = min(1.0, (num_steps - step) / max(1, round(optim.decay_fraction * num_steps)))
    else:
        return peak
    return peak * (optim.min_lr_fraction + (1 - optim.min_lr_fraction) * shape)


def warmup_steps(optim: OptimConfig, num_steps: int) -> int:
    """Return the steps of warm-up."""
    return min(optim.warmup_steps or round(optim.warmup_fraction * num_steps), num_steps - 1)


def length(train: TrainConfig, table_rows: int, stream_rows: int | None = None) -> tuple[int, int]:
    """Return the rows that a run takes over all ranks, a row of a second epoch again, and its steps, the last of which may be short.

    `stream_rows` is what a mixture takes, which may end earlier.
    """
    if stream_rows is not None:
        return stream_rows, math.ceil(stream_rows / train.global_batch)
    rows = train.steps * train.global_batch if train.steps is not None else max(1, round((train.epochs or 1.0) * table_rows))
    return rows, math.ceil(rows / train.global_batch)


def microbatches(train: TrainConfig, data_size: int) -> int:
    """Return how many microbatches a rank accumulates in a step, where so many groups of ranks have rows of their own."""
    return train.global_batch // (data_size * train.microbatch)


def scarcity(train: TrainConfig, packing: bool, num_rows: int, num_documents: int, data_size: int) -> str | None:
    """Return what to do about data with fewer rows than one step takes; None where there are enough."""
    if num_rows >= train.global_batch:
        return None
    share = data_size * train.microbatch
    remedies = [f"train.global_batch={num_rows // share * share}"] if num_rows >= share else []
    if packing and num_documents >= train.global_batch:
        remedies.append(f"data.packing=false, which makes {num_documents:,} rows of them")
    how = "are packed into" if packing else "are"
    remedy = " or ".join(remedies) or "more data, or a smaller train.global_batch and train.microbatch"
    reason = f"the data {how} {plural(num_rows, 'row')}, and a step takes {train.global_batch:,}"
    return f"{reason}: it is short, or takes the same rows more than once. Try {remedy}"


def rows_words(train: TrainConfig, mesh: Mesh) -> str:
    """Return how the rows of a step are split, in words."""
    where = f"each of {mesh.data_size} {'ranks' if mesh.context * mesh.tensor == 1 else f'groups of {mesh.context * mesh.tensor} ranks'}"
    where = (
        where if mesh.data_size > 1 else "one rank" if mesh.context * mesh.tensor == 1 else f"{mesh.context * mesh.tensor} ranks together"
    )
    share = f"{plural(microbatches(train, mesh.data_size), 'microbatch')} of {train.microbatch} on {where}"
    return f"{train.global_batch} rows a step, {share}"


def logits_chunk(config: RunConfig, vocab_size: int, itemsize: int) -> int:
    """Return how many tokens' logits exist at once, 0 for all; `itemsize` is that of the compute type, in bytes.

    By itself a power of two of at most LOGITS_BYTES, where the logits of a microbatch take more than twice that: fewer tokens make
    matrix products slow, and below it nothing is saved.
    """
    train = config.train
    if train.logits_chunk is not None:
        return train.logits_chunk
    tokens = max(train.microbatch, train.eval_microbatch or 0) * config.data.seq_len // config.engine.context
    return chunk_of(tokens, vocab_size, itemsize)


def chunk_of(tokens: int, vocab_size: int, itemsize: int) -> int:
    """Return of how many of a batch's tokens logits exist at once where nobody says it, 0 for all."""
    size = tokens * vocab_size * itemsize
    return 1 << max(0, (LOGITS_BYTES // (vocab_size * itemsize)).bit_length() - 1) if size > 2 * LOGITS_BYTES else 0


def has_held_out(config: RunConfig) -> bool:
    """Tell whether rows are held out."""
    data = config.data
    held = [(source.eval_path, source.eval_fraction) for source in data.mix.values()] or [(data.eval_path, data.eval_fraction)]
    return any(path is not None or (data.eval_fraction if share is None else share) > 0 for path, share in held)


def exports_best(config: RunConfig) -> bool:
    """Tell whether the checkpoint of the lowest held-out loss is exported, and not the last step."""
    if config.train.export is not None:
        return config.train.export is Export.best
    return has_held_out(config) and (config.train.patience is not None or config.checkpoint.keep_best > 0)


def best_kept(config: RunConfig) -> int:
    """Return how many checkpoints of lowest held-out loss are kept."""
    return max(config.checkpoint.keep_best, int(exports_best(config)))
