"""What settings may be, and what they ask of each other; nothing here imports torch, so that a wrong one costs under a second."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from trainers.config.choices import (
    Activations,
    DataSource,
    DocumentOf,
    Export,
    Layout,
    ObjectiveName,
    OnSpike,
    PairsOf,
    Precision,
    Reasoning,
    Supervise,
    TooLong,
)
from trainers.config.derived import OF_MIXTURES, OF_STREAMS, OF_STYLES, SAMPLED, compares, has_held_out, of_answers, peak_lr, rows_as
from trainers.config.errors import ConfigError
from trainers.config.kernels import validate_kernels
from trainers.config.local import FILE_TYPES, file_type, is_remote, looks_local, require_known_scheme, require_model_directory
from trainers.config.measured import validate_evaluation
from trainers.config.methods import validate_peft
from trainers.config.mixtures import validate_mixtures
from trainers.config.objectives import validate_objective, validate_scores
from trainers.config.optimizers import validate_optimizer
from trainers.config.schema import DataConfig, ModelConfig, RlConfig, RunConfig, read
from trainers.config.sharding import near, validate_engine, validate_mesh


def load(path: Path | str) -> RunConfig:
    """Read a frozen config.yaml: the directory that it is in is the run's, wherever that was made.

    Raises ConfigError on an unknown field, a wrong type or what cannot work.
    """
    config = dataclasses.replace(read(path), run_dir=str(Path(path).absolute().parent))
    validate(config)
    return config


POSITIVE = (
    "data.seq_len",
    "objective.beta",
    "objective.f_alpha",
    "objective.constant",
    "objective.clip_low",
    "objective.clip_high",
    "objective.importance_cap",
    "objective.gamma",
    "objective.critic_lr",
    "objective.critic_clip",
    "objective.value_clip",
    "data.processes",
    "data.max_rows",
    "data.shard_rows",
    "data.window_shards",
    "optim.lr",
    "optim.full_lr",
    "optim.lr_factor",
    "optim.adamw_factor",
    "optim.eps",
    "optim.clip",
    "engine.replicate",
    "engine.context",
    "engine.tensor",
    "engine.expert",
    "peft.lr",
    "peft.rank",
    "peft.alpha",
    "peft.lr_ratio",
    "peft.virtual_tokens",
    "peft.encoder_size",
    "peft.last_blocks",
    "peft.target_rank",
    "peft.tfinal",
    "peft.delta_t",
    "peft.bottleneck",
    "peft.scale",
    "engine.shard",
    "engine.sub_group_size",
    "engine.reduce_bucket_size",
    "engine.prefetch_bucket_size",
    "train.steps",
    "train.epochs",
    "train.global_batch",
    "train.microbatch",
    "train.balance_loss",
    "train.loss_scale",
    "train.loss_scale_steps",
    "train.eval_every",
    "train.eval_microbatch",
    "train.patience",
    "train.max_skipped",
    "train.profile",
    "train.step_timeout_s",
    "train.spike_threshold",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "limits.prepare_s",
    "limits.load_s",
    "limits.evaluate_s",
    "limits.save_s",
    "limits.sample_s",
    "limits.export_s",
    "rl.max_new_tokens",
    "rl.steps_per_rollout",
    "rl.batch",
    "rl.timeout_s",
    "rl.mismatch",
    "evaluation.max_new_tokens",
    "evaluation.general_rows",
    "log.peak_tflops",
)
NOT_NEGATIVE = (
    "seed",
    "engine.prefetch",
    "model.train_tokenizer",
    "optim.warmup_steps",
    "optim.weight_decay",
    "train.min_improvement",
    "train.sample_tokens",
    "train.logits_chunk",
    "evaluation.rows",
    "checkpoint.keep_best",
    "peft.tinit",
    "peft.orth_reg_weight",
    "objective.margin",
    "objective.nll_weight",
    "objective.center",
    "objective.desirable_weight",
    "objective.undesirable_weight",
    "objective.kl_weight",
    "objective.critic_weight_decay",
    "rl.redraws",
    "rl.staleness",
    "rl.restarts",
)
RANGES = {
    "objective.gae_lambda": (0.0, 1.0),
    "data.eval_fraction": (0.0, 0.5),
    "data.max_lost_fraction": (0.0, 1.0),
    "data.max_left_out_fraction": (0.0, 1.0),
    "optim.min_lr_fraction": (0.0, 1.0),
    "optim.decay_fraction": (0.0, 1.0),
    "optim.warmup_fraction": (0.0, 1.0),
    "limits.slow_node": (1.05, 100.0),
}
NOT_EMPTY = (
    "name",
    "run_dir",
    "model.id",
    "model.tokenizer",
    "data.path",
    "data.eval_path",
    "data.split",
    "data.eval_split",
    "data.config",
    "data.revision",
    "data.template",
    "engine.nvme_path",
    "peft.adapter",
    "objective.reference",
    "objective.critic",
    "evaluation.path",
    "evaluation.general",
    "evaluation.extract",
)


def value_at(config: object, path: str) -> Any:
    """Return the value of a dotted field path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def validate(config: RunConfig) -> None:
    """Check ranges and what fields ask of each other; raises ConfigError for the first that cannot work."""
    for path in POSITIVE:
        value = value_at(config, path)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(path, value, "must be a number greater than 0")
    for path in NOT_NEGATIVE:
        value = value_at(config, path)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(path, value, "must be a number, 0 or greater")
    for path in NOT_EMPTY:
        if value_at(config, path) == "":
            raise ConfigError(path, "", "is empty: an unset shell variable, perhaps", "give a value, or leave the field out")
    for path, (low, high) in RANGES.items():
        if not low <= value_at(config, path) <= high:
            raise ConfigError(path, value_at(config, path), f"must be from {low:g} to {high:g}")
    _validate_model(config.model)
    _validate_data(config)
    validate_peft(config)
    _validate_spikes(config)
    validate_engine(config.engine)
    if config.train.activations is not Activations.keep:
        from trainers.config.activations import validate_activations

        validate_activations(config)
    validate_kernels(config)
    if config.model.encoder_decoder:
        from trainers.config.seq2seq import validate_encoder_decoder

        validate_encoder_decoder(config)
    if config.engine.context * config.engine.tensor * config.engine.expert > 1:
        validate_mesh(config)
    if config.train.precision is Precision.fp16 or config.train.loss_scale or config.train.loss_scale_steps:
        from trainers.config.precision import validate_precision

        validate_precision(config)
    _validate_training(config)
    validate_objective(config.objective)
    validate_scores(config)
    validate_mixtures(config)
    if config.objective.name in SAMPLED or config.rl != RlConfig():
        from trainers.config.rl import validate_rl

        validate_rl(config)
    validate_optimizer(config)
    validate_evaluation(config.evaluation, config.data.mix)
    if config.reward:
        from trainers.config.rewards import validate_rewards

        validate_rewards(config)
    peak_lr(config.optim, config.peft)


def _validate_model(model: ModelConfig) -> None:
    if model.id is None and not model.architecture:
        raise ConfigError("model.id", None, "no model is named", "model=hf model.id=OWNER/NAME or a local directory")
    if model.id is not None and model.architecture:
        raise ConfigError(
            "model.architecture", model.architecture, f"random weights are asked for, but model.id is {model.id!r}", "give one of the two"
        )
    if model.id is not None and looks_local(model.id):
        require_model_directory("model.id", model.id)
        if not model.encoder_decoder:
            from trainers.config.seq2seq import require_no_encoder

            require_no_encoder(model.id)
    if model.tokenizer is not None and looks_local(model.tokenizer) and not Path(model.tokenizer).is_dir():
        raise ConfigError("model.tokenizer", model.tokenizer, "is not a directory")
    if model.train_tokenizer and (model.id or model.tokenizer):
        raise ConfigError("model.train_tokenizer", model.train_tokenizer, "a tokenizer is trained only for a model from random weights")
    if model.architecture and not model.tokenizer and not model.train_tokenizer:
        raise ConfigError("model.tokenizer", None, "random weights need a tokenizer", "model.tokenizer=DIR or model.train_tokenizer=4096")
    if model.architecture and "model_type" not in model.architecture:
        raise ConfigError("model.architecture", sorted(model.architecture), "has no model_type", "model.architecture.model_type=llama")
    if "" in model.add_tokens or len(set(model.add_tokens)) < len(model.add_tokens):
        raise ConfigError("model.add_tokens", model.add_tokens, "a token is empty or named twice")
    if 0 < model.train_tokenizer < 300:
        raise ConfigError("model.train_tokenizer", model.train_tokenizer, "256 bytes and the special tokens need at least 300")


def _validate_data(config: RunConfig) -> None:
    data = config.data
    if data.source is DataSource.reasoning_gym or (data.tasks, data.task_rows, data.task_seed) != ({}, 1000, 0):
        from trainers.config.tasks import validate_tasks

        validate_tasks(config)
    if data.mix or any(getattr(data, name) != getattr(DataConfig(), name) for name in OF_MIXTURES):
        from trainers.config.mix import named, sources_of_mix, validate_mix

        validate_mix(config)
        for name, one in sources_of_mix(config).items():
            with named(name):
                _validate_one(one)
    if data.streaming or any(getattr(data, name) != getattr(DataConfig(), name) for name in OF_STREAMS):
        from trainers.config.streams import validate_stream

        validate_stream(config)
    if not data.mix:
        _validate_one(config)


def _validate_one(config: RunConfig) -> None:
    data = config.data
    if data.source is DataSource.files and data.path is None:
        raise ConfigError("data.path", None, "no data is named", "data=files data.path=FILE, a directory, or a hub id")
    for name in ("path", "eval_path"):
        value = getattr(data, name)
        if value is not None and is_remote(value):
            require_known_scheme(f"data.{name}", value)
        elif value is not None and looks_local(value) and not Path(value).exists():
            raise ConfigError(f"data.{name}", value, "no such file or directory")
    _validate_source(data)
    if data.eval_path is not None and data.eval_fraction:
        raise ConfigError(
            "data.eval_fraction", data.eval_fraction, f"data.eval_path is also given ({data.eval_path})", "give one of the two"
        )
    if data.template is not None and not data.template.isidentifier() and not Path(data.template).is_file():
        raise ConfigError("data.template", data.template, "no such template file", "a Jinja file, or `chatml`")
    if data.template is not None and Path(data.template).is_file() and not Path(data.template).read_text("utf-8", "replace").strip():
        raise ConfigError("data.template", data.template, "the template file is empty")
    if data.document is DocumentOf.turn and rows_as(config.objective.name) is not ObjectiveName.sft:
        reason = "trains every token" if config.objective.name is ObjectiveName.cpt else "reads whole answers and documents"
        raise ConfigError("data.document", "turn", f"objective={config.objective.name} {reason}", "data.document=row, or objective=sft")
    if data.supervise is not Supervise.assistant and of_answers(config.objective.name):
        reason = f"objective={config.objective.name} is about the answers, and no turn of the prompt"
        raise ConfigError("data.supervise", str(data.supervise), reason, "data.supervise=assistant")
    if data.pairs is not PairsOf.best_worst and not compares(config.objective.name):
        reason = f"says which answers are compared, and objective={config.objective.name} compares none"
        raise ConfigError("data.pairs", str(data.pairs), reason, "data.pairs=best_worst, or objective=dpo")
    if data.document is DocumentOf.turn and data.supervise is not Supervise.assistant:
        reason = f"data.supervise is {data.supervise}, and each document has one turn that is trained"
        raise ConfigError("data.document", "turn", reason, "data.supervise=assistant")
    if data.layout is Layout.styles or any(getattr(data, name) != getattr(DataConfig(), name) for name in ("reasoning", *OF_STYLES)):
        _validate_reasoning(config)
        _validate_styles(config)
    if data.too_long is TooLong.split and config.objective.name is not ObjectiveName.cpt:
        raise ConfigError(
            "data.too_long", "split", "a conversation cannot be split into rows", "data.too_long=truncate or drop, or objective=cpt"
        )
    if data.seq_len < 2:
        raise ConfigError("data.seq_len", data.seq_len, "a row needs two tokens to have one to predict")


def _validate_reasoning(config: RunConfig) -> None:
    """Refuse what has no part of a row that could go without loss, or no rows with answers."""
    data, objective = config.data, f"objective={config.objective.name}"
    if data.reasoning is Reasoning.keep:
        return
    if data.layout is Layout.text:
        reason = "is about turns and answers, and rows of layout text have none"
        raise ConfigError("data.reasoning", str(data.reasoning), reason, "data.reasoning=keep")
    if data.reasoning is not Reasoning.mask:
        return
    if rows_as(config.objective.name) is not ObjectiveName.sft:
        reason = f"{objective} takes whole answers or texts, of which no part goes without loss"
        raise ConfigError("data.reasoning", "mask", reason, "data.reasoning=keep, or data.reasoning=strip")
    if data.supervise is Supervise.all:
        raise ConfigError("data.reasoning", "mask", "data.supervise=all trains every token", "data.supervise=assistant")


def _validate_styles(config: RunConfig) -> None:
    """Refuse styles without their layout, and the layout without styles or without an answer to train on."""
    from trainers.config.mix import require_layout_of_styles

    data = config.data
    require_layout_of_styles(data)
    if data.layout is not Layout.styles:
        return
    if len(set(data.styles)) < max(2, len(data.styles)):
        reason = "names the fields with the texts of one meaning, two or more, each once"
        raise ConfigError("data.styles", data.styles, reason, "two fields or more, such as [business,casual], or data.layout=auto")
    if data.style_instruction and "{style}" not in data.style_instruction:
        reason = "names no style, so that nothing would tell which one is wanted: it has no {style}"
        raise ConfigError("data.style_instruction", data.style_instruction, reason, "leave it out")
    if rows_as(config.objective.name) is not ObjectiveName.sft:
        reason = f"rows of layout styles are prompts and answers, and objective={config.objective.name} takes others"
        raise ConfigError("data.layout", "styles", reason, "objective=sft")


def _validate_source(data: DataConfig) -> None:
    """Refuse what only a directory or a hub data set has."""
    if data.eval_split is not None and data.eval_path is None:
        raise ConfigError("data.eval_split", data.eval_split, "data.eval_path is not set", f"data.eval_path={data.path}")
    here = data.source is not DataSource.files or Path(str(data.path)).exists()
    remote = is_remote(str(data.path))
    if data.revision is not None and (here or remote):
        raise ConfigError("data.revision", data.revision, "only a hub data set has revisions", "leave it out")
    named = file_type(str(data.path)) in FILE_TYPES and not str(data.path).endswith("/")
    is_file = named if remote else here and not Path(str(data.path)).is_dir()
    for name in ("config", "data_files"):
        if getattr(data, name) and is_file:
            raise ConfigError(f"data.{name}", getattr(data, name), "data.path is neither a directory nor a hub data set", "leave it out")


def _validate_training(config: RunConfig) -> None:
    train, optim = config.train, config.optim
    if train.steps is not None and train.epochs is not None:
        raise ConfigError("train.epochs", train.epochs, f"train.steps is also given ({train.steps})", "set the other to null")
    if train.global_batch % train.microbatch:
        reason = f"is not divisible by train.microbatch = {train.microbatch}"
        raise ConfigError(
            "train.global_batch", train.global_batch, reason, f"train.global_batch={near(train.global_batch, train.microbatch)}"
        )
    if optim.warmup_steps and optim.warmup_fraction:
        raise ConfigError(
            "optim.warmup_fraction", optim.warmup_fraction, f"optim.warmup_steps is also given ({optim.warmup_steps})", "set one to 0"
        )
    if train.steps is not None and optim.warmup_steps >= train.steps and optim.warmup_steps:
        reason = f"warm-up never ends within train.steps = {train.steps}"
        raise ConfigError("optim.warmup_steps", optim.warmup_steps, reason, "optim.warmup_steps=0 optim.warmup_fraction=0.03")
    wanted = {"eval_every": train.eval_every, "patience": train.patience} | ({"export": "best"} if train.export is Export.best else {})
    for name, value in wanted.items():
        if value is not None and not has_held_out(config):
            raise ConfigError(f"train.{name}", value, "there are no held-out rows", "data.eval_fraction=0.05, or data.eval_path=FILE")
    for name, value in wanted.items():
        if value is not None and train.eval_every is None:
            raise ConfigError(f"train.{name}", value, "train.eval_every is not set", "train.eval_every=100")


def _validate_spikes(config: RunConfig) -> None:
    """Refuse to go back to checkpoints that nobody makes."""
    checkpoint = config.checkpoint
    if config.train.on_spike is OnSpike.rollback and checkpoint.every is None and checkpoint.every_minutes is None:
        raise ConfigError("train.on_spike", "rollback", "there is no checkpoint to go back to", "checkpoint.every=100")
