"""What settings may be, and what they ask of each other; nothing here imports torch, so that a wrong one costs under a second."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from trainers.config.deepspeed_keys import check_overrides
from trainers.config.derived import compares, has_held_out, peak_lr
from trainers.config.errors import ConfigError, plural
from trainers.config.kernels import validate_kernels
from trainers.config.mixtures import names_stacks, validate_mixtures
from trainers.config.objectives import validate_objective
from trainers.config.optimizers import validate_optimizer
from trainers.config.schema import (
    Activations,
    AdapterInit,
    Attention,
    DataConfig,
    DataSource,
    DocumentOf,
    EngineConfig,
    EngineName,
    EvaluationConfig,
    Export,
    ModelConfig,
    ObjectiveName,
    Offload,
    OnSpike,
    PeftConfig,
    PeftMethod,
    Quantisation,
    RunConfig,
    Supervise,
    TooLong,
    plain,
    read,
)


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
    "data.processes",
    "optim.lr",
    "optim.full_lr",
    "optim.lr_factor",
    "optim.adamw_factor",
    "optim.eps",
    "optim.clip",
    "engine.replicate",
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
    "engine.shard",
    "engine.sub_group_size",
    "engine.reduce_bucket_size",
    "engine.prefetch_bucket_size",
    "train.steps",
    "train.epochs",
    "train.global_batch",
    "train.microbatch",
    "train.balance_loss",
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
    "limits.export_s",
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
)
RANGES = {
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
    "evaluation.path",
    "evaluation.general",
    "evaluation.extract",
)
FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""What the name of a file of FILE_TYPES may have after it; parquet and arrow compress their own content."""


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
    _validate_peft(config)
    _validate_spikes(config)
    _validate_engine(config.engine)
    if config.train.activations is not Activations.keep:
        from trainers.config.activations import validate_activations

        validate_activations(config)
    validate_kernels(config)
    _validate_training(config)
    validate_objective(config.objective)
    validate_mixtures(config)
    validate_optimizer(config)
    validate_evaluation(config.evaluation)
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


def looks_local(name: str) -> bool:
    """Tell a path from a hub id: it exists, or has not the form OWNER/NAME."""
    if Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        return True
    return file_type(name) in FILE_TYPES or name.startswith("runs/")


def file_type(name: str) -> str:
    """Return the suffix that says what a file holds, in small letters and without that of its compression; '' where none does."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def require_model_directory(path: str, value: str) -> None:
    """Raise ConfigError unless `value` is a directory with a config.json."""
    folder = Path(value)
    if not folder.is_dir():
        remedy = "make the base first: python -m launcher +exp=quickstart_base" if value.startswith("runs/quickstart_base") else ""
        raise ConfigError(path, value, "no such directory, and not a hub id of the form OWNER/NAME", remedy)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(path, value, "is an adapter, not a model", _of_adapter(folder))
    if not (folder / "config.json").is_file():
        raise ConfigError(path, value, "the directory has no config.json", "name a model directory in Hugging Face form")


def _of_adapter(folder: Path) -> str:
    """Return the settings that train an adapter further, as far as its own config says what it is for."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        base, method = config["base_model_name_or_path"], str(config["peft_type"]).lower()
    except (ValueError, KeyError, TypeError, OSError):
        base, method = "", ""
    named = f"model.id={base}" if base else "model.id with its base"
    return f"{named} peft={method if method in (*PeftMethod,) else 'METHOD'} peft.adapter={folder} to train it further"


def _validate_data(config: RunConfig) -> None:
    data = config.data
    if data.source is DataSource.files and data.path is None:
        raise ConfigError("data.path", None, "no data is named", "data=files data.path=FILE, a directory, or a hub id")
    for name in ("path", "eval_path"):
        value = getattr(data, name)
        if value is not None and looks_local(value) and not Path(value).exists():
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
    if data.document is DocumentOf.turn and config.objective.name is not ObjectiveName.sft:
        reason = "compares two answers" if compares(config.objective.name) else "trains every token"
        raise ConfigError("data.document", "turn", f"objective={config.objective.name} {reason}", "data.document=row, or objective=sft")
    if data.supervise is not Supervise.assistant and compares(config.objective.name):
        reason = f"objective={config.objective.name} compares the answers, and no turn of the prompt"
        raise ConfigError("data.supervise", str(data.supervise), reason, "data.supervise=assistant")
    if data.document is DocumentOf.turn and data.supervise is not Supervise.assistant:
        reason = f"data.supervise is {data.supervise}, and each document has one turn that is trained"
        raise ConfigError("data.document", "turn", reason, "data.supervise=assistant")
    if data.too_long is TooLong.split and config.objective.name is not ObjectiveName.cpt:
        raise ConfigError(
            "data.too_long", "split", "a conversation cannot be split into rows", "data.too_long=truncate or drop, or objective=cpt"
        )
    if data.seq_len < 2:
        raise ConfigError("data.seq_len", data.seq_len, "a row needs two tokens to have one to predict")


def _validate_source(data: DataConfig) -> None:
    """Refuse what only a directory or a hub data set has."""
    if data.eval_split is not None and data.eval_path is None:
        raise ConfigError("data.eval_split", data.eval_split, "data.eval_path is not set", f"data.eval_path={data.path}")
    here = data.source is not DataSource.files or Path(str(data.path)).exists()
    if data.revision is not None and here:
        raise ConfigError("data.revision", data.revision, "only a hub data set has revisions", "leave it out")
    for name in ("config", "data_files"):
        if getattr(data, name) and here and not Path(str(data.path)).is_dir():
            raise ConfigError(f"data.{name}", getattr(data, name), "data.path is neither a directory nor a hub data set", "leave it out")


def _validate_training(config: RunConfig) -> None:
    train, optim = config.train, config.optim
    if train.steps is not None and train.epochs is not None:
        raise ConfigError("train.epochs", train.epochs, f"train.steps is also given ({train.steps})", "set the other to null")
    if train.global_batch % train.microbatch:
        reason = f"is not divisible by train.microbatch = {train.microbatch}"
        raise ConfigError(
            "train.global_batch", train.global_batch, reason, f"train.global_batch={_near(train.global_batch, train.microbatch)}"
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


EXTRACTS = ("auto", "hashes", "number", "whole")
"""Named ways to what exact_match compares; anything else is a regular expression."""
SAMPLED = "sampled"
"""The value of `evaluation.general` that lets the base write its own text."""


def validate_evaluation(evaluation: EvaluationConfig) -> None:
    """Refuse files that are not there, an expression that is not valid, and answers that nothing measures."""
    for name in ("path", "general"):
        value = getattr(evaluation, name)
        if value not in (None, SAMPLED) and looks_local(value) and not Path(value).exists():
            raise ConfigError(f"evaluation.{name}", value, "no such file or directory")
    if evaluation.rows and not evaluation.metrics:
        raise ConfigError(
            "evaluation.metrics", [], "nothing would measure the answers", "evaluation.rows=0, which lets the model answer none"
        )
    if evaluation.extract in EXTRACTS:
        return
    try:
        groups = re.compile(evaluation.extract).groups
    except re.error as error:
        known = ", ".join(EXTRACTS)
        raise ConfigError(
            "evaluation.extract", evaluation.extract, f"is not a valid regular expression: {error}", f"one of {known}"
        ) from error
    if groups != 1:
        raise ConfigError(
            "evaluation.extract",
            evaluation.extract,
            f"has {groups} groups, and one says what is compared",
            "evaluation.extract=whole, or one group",
        )


LORA = ("lr", "rank", "alpha", "dropout", "targets", "bias", "modules_to_save", "rank_stabilised", "adapter", "lr_ratio")
ADALORA = ("target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
PEFT_FIELDS: dict[PeftMethod, tuple[str, ...]] = {
    PeftMethod.none: (),
    PeftMethod.freeze: ("freeze", "last_blocks"),
    PeftMethod.lora: (*LORA, "init", "quantise"),
    PeftMethod.dora: LORA,
    PeftMethod.ia3: ("lr", "targets", "modules_to_save", "adapter"),
    PeftMethod.prompt: ("lr", "virtual_tokens", "init", "adapter"),
    PeftMethod.prefix: ("lr", "virtual_tokens", "encoder_size", "adapter"),
    PeftMethod.ptuning: ("lr", "virtual_tokens", "encoder_size"),
    PeftMethod.adalora: ("lr", "rank", "alpha", "dropout", "targets", "modules_to_save", *ADALORA),
}
VIRTUAL = (PeftMethod.prompt, PeftMethod.prefix, PeftMethod.ptuning)
INITS = {
    PeftMethod.lora: (AdapterInit.default, AdapterInit.gaussian, AdapterInit.pissa, AdapterInit.loftq),
    PeftMethod.prompt: (AdapterInit.default, AdapterInit.vocabulary),
}


def _validate_peft(config: RunConfig) -> None:
    """Refuse what the named method does not have or cannot do."""
    peft = config.peft
    if peft.quantise is not Quantisation.none and peft.method in (PeftMethod.none, PeftMethod.freeze):
        reason = f"peft.method={peft.method} trains weights of the model itself, and 4 bits cannot hold a small step"
        raise ConfigError("peft.quantise", str(peft.quantise), reason, "peft=qlora, which trains adapters in addition to them")
    foreign = [item.name for item in dataclasses.fields(PeftConfig) if item.name not in ("method", *PEFT_FIELDS[peft.method])]
    owners = {name: ", ".join(method for method, names in PEFT_FIELDS.items() if name in names) for name in foreign}
    remedies = {name: f"leave it out; it is for {methods}" for name, methods in owners.items()}
    _refuse_foreign("peft", peft, f"peft.method={peft.method}", remedies)
    if not 0 <= peft.dropout < 1:
        raise ConfigError("peft.dropout", peft.dropout, "must be from 0 to below 1")
    for name in ("targets", "modules_to_save", "freeze"):
        if "" in getattr(peft, name):
            raise ConfigError(f"peft.{name}", getattr(peft, name), "a name is empty")
    named = [name for name in peft.targets if name not in names_stacks(peft.targets)]
    if "all-linear" in named and len(named) > 1:
        raise ConfigError("peft.targets", peft.targets, "all-linear must be the only target", "peft.targets=[all-linear]")
    if peft.init not in INITS.get(peft.method, (AdapterInit.default,)):
        raise ConfigError("peft.init", str(peft.init), f"is not a valid start for peft.method={peft.method}", "peft.init=default")
    if peft.init is AdapterInit.loftq and peft.quantise is Quantisation.none:
        raise ConfigError("peft.init", "loftq", "begins at what quantising loses, and the base is not quantised", "peft=loftq")
    if peft.init is AdapterInit.pissa and peft.quantise is not Quantisation.none:
        reason = "PiSSA changes the base before it is quantised: its export would belong to no base that exists"
        raise ConfigError("peft.init", "pissa", reason, "peft.init=loftq, which begins near the same values")
    if peft.method is PeftMethod.freeze and bool(peft.freeze) == (peft.last_blocks is not None):
        raise ConfigError("peft.freeze", peft.freeze, "name patterns, or a number of blocks in peft.last_blocks", "peft.last_blocks=4")
    if peft.adapter is not None and not (Path(peft.adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            "peft.adapter", peft.adapter, "no such directory, or it has no adapter_config.json", "RUN_DIR/export of a PEFT run"
        )
    if peft.adapter is not None and peft.init is not AdapterInit.default:
        raise ConfigError("peft.init", str(peft.init), f"peft.adapter is also given ({peft.adapter})", "peft.init=default")
    _validate_virtual(config)
    _validate_adalora(config)


def _validate_adalora(config: RunConfig) -> None:
    """Refuse a schedule that prunes nothing, and what keeps the values that it looks at out of reach."""
    peft, steps = config.peft, config.train.steps
    if peft.method is not PeftMethod.adalora:
        return
    if peft.target_rank >= peft.rank:
        reason = f"peft.rank = {peft.rank}, which adalora begins with, must be larger"
        raise ConfigError("peft.target_rank", peft.target_rank, reason, f"peft.rank={-(-3 * peft.target_rank // 2)}, or peft=lora")
    for name in ("beta1", "beta2"):
        if not 0 < getattr(peft, name) < 1:
            raise ConfigError(f"peft.{name}", getattr(peft, name), "must be above 0 and below 1", f"peft.{name}=0.85")
    if steps is not None:
        require_pruning(peft, steps)
    if config.engine.offload_optimizer is Offload.nvme:
        reason = "adalora looks at each adapter's float32 weights before and after every step, and these would be in files"
        raise ConfigError("engine.offload_optimizer", "nvme", reason, "engine.offload_optimizer=cpu: an adapter's state is small")


def require_pruning(peft: PeftConfig, num_steps: int) -> None:
    """Raise ConfigError unless a run of so many steps has some between adalora's first and last phase."""
    if peft.tinit + peft.tfinal < num_steps:
        return
    reason = f"with peft.tfinal = {peft.tfinal} it leaves none of the run's {num_steps} steps to prune in"
    share = f"peft.tinit={num_steps // 6} peft.tfinal={max(1, num_steps // 2)}"  # of MRPC's 3450 steps, the preset's
    raise ConfigError("peft.tinit", peft.tinit, reason, share if num_steps > 1 else "more steps")


def _refuse_foreign(group: str, settings: object, chosen: str, remedies: dict[str, str]) -> None:
    """Raise ConfigError where a setting of `remedies`, which what is chosen does not have, is not left at its default."""
    defaults = type(settings)()
    for name, remedy in remedies.items():
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"{group}.{name}", plain(value), f"{chosen} has no such setting", remedy)


def _validate_spikes(config: RunConfig) -> None:
    """Refuse to go back to checkpoints that nobody makes."""
    checkpoint = config.checkpoint
    if config.train.on_spike is OnSpike.rollback and checkpoint.every is None and checkpoint.every_minutes is None:
        raise ConfigError("train.on_spike", "rollback", "there is no checkpoint to go back to", "checkpoint.every=100")


def _validate_virtual(config: RunConfig) -> None:
    """Refuse what goes wrong with tokens in front of a row."""
    method = config.peft.method
    if method not in VIRTUAL:
        return
    if config.data.packing:
        reason = f"peft.method={method} puts its tokens in front of a row, where only the first of its documents would see them"
        raise ConfigError("data.packing", True, reason, "data.packing=false")
    if config.model.attention not in (Attention.auto, Attention.sdpa, Attention.eager):
        reason = f"it gets all rows as one, and peft.method={method} needs its tokens in front of each"
        raise ConfigError("model.attention", str(config.model.attention), reason, "model.attention=sdpa")


FSDP_ONLY = ("reshard_after_forward", "reshard_after_backward", "replicate", "shard", "prefetch", "sync_each_microbatch")
ZERO3_ONLY = (
    "sub_group_size",
    "reduce_bucket_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "overlap_comm",
    "overrides",
)


def _validate_engine(engine: EngineConfig) -> None:
    """Refuse what the named engine does not have or cannot do."""
    fsdp = engine.name is EngineName.fsdp
    foreign, other = (ZERO3_ONLY, "zero3") if fsdp else (FSDP_ONLY, "fsdp")
    _refuse_foreign("engine", engine, f"engine.name={engine.name}", dict.fromkeys(foreign, f"engine={other}, or leave it out"))
    offloads = {name: getattr(engine, name) for name in ("offload_param", "offload_optimizer")}
    for name, where in offloads.items():
        if fsdp and where is Offload.nvme:
            raise ConfigError(f"engine.{name}", "nvme", "fsdp offloads to host memory only", "engine=zero3_nvme")
    if fsdp and engine.offload_param is Offload.cpu and engine.offload_optimizer is Offload.none:
        reason = "fsdp keeps the optimizer's state where the parameters are"
        raise ConfigError("engine.offload_optimizer", "none", reason, "engine.offload_optimizer=cpu")
    if Offload.nvme in offloads.values() and engine.nvme_path is None:
        raise ConfigError(
            "engine.nvme_path", None, "nothing says where offloaded state goes", "engine.nvme_path=/a/directory/on/local/nvme"
        )
    if Offload.nvme not in offloads.values() and engine.nvme_path is not None:
        raise ConfigError("engine.nvme_path", engine.nvme_path, "nothing is offloaded to nvme", "engine=zero3_nvme, or leave it out")
    check_overrides(engine.overrides)


def check_world(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError unless the global batch splits evenly over `world_size` ranks."""
    train = config.train
    share = world_size * train.microbatch
    if train.global_batch % share:
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"is not divisible by {plural(world_size, 'rank')} x train.microbatch {train.microbatch} = {share}",
            f"train.global_batch={_near(train.global_batch, share)}",
        )
    _check_mesh(config.engine, world_size)


def _near(size: int, share: int) -> str:
    """Return the multiples of `share` below and above a size, in words."""
    return " or ".join(str(near) for near in (size // share * share, -(-size // share) * share) if near)


def _check_mesh(engine: EngineConfig, world_size: int) -> None:
    """Raise ConfigError unless `replicate` x `shard` is the number of ranks."""
    if world_size % engine.replicate:
        near = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
        reason = f"{plural(world_size, 'rank')} cannot be divided into as many copies"
        raise ConfigError("engine.replicate", engine.replicate, reason, f"engine.replicate={' or '.join(near)}")
    shard = world_size // engine.replicate
    if engine.shard not in (None, shard):
        reason = f"{plural(world_size, 'rank')} / engine.replicate {engine.replicate} are {plural(shard, 'rank')} a copy"
        raise ConfigError("engine.shard", engine.shard, reason, f"engine.shard={shard}")
