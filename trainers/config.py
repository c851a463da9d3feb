"""Every setting of a run, typed and checked: what the launcher freezes and a rank reads.

Nothing here imports torch, so that a wrong setting costs under a second on a login node.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from trainers.deepspeed_keys import check_overrides
from trainers.errors import ConfigError as ConfigError


class Attention(StrEnum):
    """Attention backends that keep packed documents apart; `auto` is flash on a GPU that has it, else sdpa."""

    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Layout(StrEnum):
    """Row layouts; `auto` looks at the keys of the first row."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    question_answer = "question_answer"
    prompt_completion = "prompt_completion"
    text = "text"


class Supervise(StrEnum):
    """Which tokens are trained: every assistant turn, only the last one, or all tokens."""

    assistant = "assistant"
    last = "last"
    all = "all"


class TooLong(StrEnum):
    """What becomes of a row longer than `seq_len`; `split` cuts plain text into several rows."""

    truncate = "truncate"
    drop = "drop"
    split = "split"  # type: ignore[assignment]  # shadows str.split, which nobody calls on a member


class DataSource(StrEnum):
    """Where rows come from: files or a hub data set, or the documentation of the running Python."""

    files = "files"
    python_docs = "python_docs"


class ObjectiveName(StrEnum):
    """Supervised fine-tuning on conversations, or continued pre-training on every token."""

    sft = "sft"
    cpt = "cpt"


class PeftMethod(StrEnum):
    """Parameter-efficient methods; `none` trains every parameter. Those in UNAVAILABLE are refused by name."""

    none = "none"
    freeze = "freeze"
    lora = "lora"
    dora = "dora"
    ia3 = "ia3"
    prompt = "prompt"
    prefix = "prefix"
    ptuning = "ptuning"
    adalora = "adalora"
    houlsby = "houlsby"


class AdapterBias(StrEnum):
    """Which biases of the base are trained beside LoRA's matrices: none, those of the adapted layers, or all."""

    none = "none"
    adapted = "adapted"
    all = "all"


class AdapterInit(StrEnum):
    """Where adapters begin: peft's own default, a Gaussian, the base (PiSSA), what 4 bits have lost of it (LoftQ), a prompt from words."""

    default = "default"
    gaussian = "gaussian"
    pissa = "pissa"
    loftq = "loftq"
    vocabulary = "vocabulary"


class Quantisation(StrEnum):
    """How a frozen base is stored: in the compute type, or its linear layers in NormalFloat of 4 bits with double quantisation."""

    none = "none"
    nf4 = "nf4"


class EngineName(StrEnum):
    """Sharding engines: PyTorch's fully_shard (FSDP2), and DeepSpeed's ZeRO stage 3."""

    fsdp = "fsdp"
    zero3 = "zero3"


class Offload(StrEnum):
    """Where a part of the training state lives between uses: on the device, in host memory, or in files on NVMe."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OptimizerName(StrEnum):
    """AdamW, or plain stochastic gradient descent without momentum, which keeps no state."""

    adamw = "adamw"
    sgd = "sgd"


class Schedule(StrEnum):
    """Learning-rate schedules, each after a linear warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class Precision(StrEnum):
    """Compute and storage of activations; master weights and optimizer state are float32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class OnSpike(StrEnum):
    """What follows a step whose loss or gradient norm is far above the last ones'; in each case it updates nothing, but for `none`."""

    none = "none"
    skip = "skip"
    rollback = "rollback"
    stop = "stop"


class WandbMode(StrEnum):
    """`auto` is online when a key is at hand, otherwise offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class ModelConfig:
    """The model: a hub id or a local directory, or a small one from random weights."""

    id: str | None = None
    """Hub id or local directory in Hugging Face form. Empty builds `architecture` from random weights."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); pin a commit for a run that must be repeatable."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """A transformers config (`model_type`, `hidden_size`, ...) for random weights; `vocab_size` comes from the tokenizer."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer; empty takes the model's own."""
    train_tokenizer: int = 0
    """Vocabulary size of a byte-level BPE tokenizer trained on the data; 0 trains none."""
    add_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to the tokenizer; one it knows stays where it is. The model grows a row for each new one."""
    grow_vocabulary: bool = False
    """Give the model a row for each token that the tokenizer has beyond it: the mean of its rows. It never shrinks."""
    attention: Attention = Attention.auto
    """Attention backend."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for sources you trust."""


@dataclass(kw_only=True)
class DataConfig:
    """Rows, their layout, template, supervision, length and packing."""

    source: DataSource = DataSource.files
    """Files or a hub id named by `path`, or the documentation of the running Python."""
    path: str | None = None
    """A jsonl, json, csv, parquet, arrow or text file, a directory of these, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    eval_path: str | None = None
    """Held-out rows, like `path`; empty takes `eval_fraction` of the rows."""
    eval_fraction: float = 0.0
    """Share of the rows held out, grouped by first prompt so that none stands on both sides. In [0, 0.5]."""
    layout: Layout = Layout.auto
    """Row layout; `auto` recognises and prints it."""
    template: str | None = None
    """A Jinja chat template file, or `chatml`; empty takes the tokenizer's own."""
    supervise: Supervise = Supervise.assistant
    """Tokens that are trained; ignored by the continued pre-training objective, which trains all."""
    seq_len: int = 2048
    """Longest row in tokens, and the length of a packed row."""
    packing: bool = True
    """Put whole documents together into rows of `seq_len`; attention never crosses documents."""
    too_long: TooLong = TooLong.truncate
    """What becomes of a row over `seq_len`."""
    max_lost_fraction: float = 0.1
    """Largest share of supervised tokens that truncating and dropping may lose before the run stops. In [0, 1]."""
    skip_bad_rows: bool = False
    """Count bad rows and go on, instead of stopping at the first ones with file, line and reason."""
    processes: int | None = None
    """Processes that tokenise; empty is one a core."""
    prepared_dir: str | None = None
    """Where prepared data is kept, shared by runs; empty is `~/.cache/fulltune/prepared`."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    name: ObjectiveName = ObjectiveName.sft
    """`sft` trains the supervised turns of conversations, `cpt` every token of a text."""


@dataclass(kw_only=True)
class PeftConfig:
    """Parameter-efficient method."""

    method: PeftMethod = PeftMethod.none
    """`none` is full fine-tuning, `freeze` trains a part of the model, the others add an adapter to a base that stays as it is."""
    rank: int = 8
    """lora, dora, adalora (at first): columns of the two small matrices; at most the smaller side of each matrix that is adapted."""
    alpha: float = 16.0
    """lora, dora, adalora: the product of the two is scaled by alpha / rank."""
    dropout: float = 0.0
    """lora, dora, adalora: share of an adapter's inputs set to zero while training. In [0, 1)."""
    targets: list[str] = field(default_factory=list)
    """lora, dora, adalora, ia3: names of modules as [q_proj,v_proj], or [all-linear] without the head; empty is peft's choice."""
    bias: AdapterBias = AdapterBias.none
    """lora, dora: biases of the base that are trained, and saved with the adapter."""
    modules_to_save: list[str] = field(default_factory=list)
    """lora, dora, adalora, ia3: names of modules that are trained whole and saved with the adapter, as [lm_head]."""
    rank_stabilised: bool = False
    """lora, dora: scale by alpha / sqrt(rank) instead, so that large ranks learn as fast (arXiv 2312.03732)."""
    init: AdapterInit = AdapterInit.default
    """lora: `gaussian`, `pissa` (the base's largest singular values), `loftq` (what nf4 loses); prompt: `vocabulary` (embedding rows)."""
    quantise: Quantisation = Quantisation.none
    """lora: `nf4` stores the frozen linear layers, but for the head, in 0.52 bytes a parameter (QLoRA, arXiv 2305.14314)."""
    adapter: str | None = None
    """lora, dora, ia3, prompt, prefix: a PEFT adapter directory to begin with, such as another run's export, instead of `init`."""
    lr_ratio: float = 1.0
    """lora, dora: learning rate of the B matrices over that of the rest (LoRA+, arXiv 2402.12354)."""
    virtual_tokens: int = 20
    """prompt, prefix, ptuning: trained tokens, or keys and values of each layer, in front of every row."""
    encoder_size: int | None = None
    """ptuning, prefix: width of the network that makes them; empty is the hidden size for ptuning, none at all for prefix."""
    freeze: list[str] = field(default_factory=list)
    """freeze: parameters that stay, by shell patterns of their names, as ['*embed_tokens*','model.layers.[0-9].*']."""
    last_blocks: int | None = None
    """freeze: train only so many blocks at the end, and what comes behind them."""
    target_rank: int = 4
    """adalora: mean rank of the layers in the end; below `rank`."""
    tinit: int = 0
    """adalora: the first pruning comes in step tinit + 1 or later, counted from 0."""
    tfinal: int = 1
    """adalora: steps at the end, at least one, in whose first the ranks become final."""
    delta_t: int = 1
    """adalora: until then prune only in steps whose number it divides."""
    beta1: float = 0.85
    """adalora: decay rate of the running mean of an element's importance. Above 0, below 1."""
    beta2: float = 0.85
    """adalora: decay rate of the running mean of how far that strays. Above 0, below 1."""
    orth_reg_weight: float = 0.5
    """adalora: weight of the regulariser that keeps A's rows and B's columns orthonormal; it is trained on, and not part of `loss`."""


@dataclass(kw_only=True)
class EngineConfig:
    """How parameters, gradients and optimizer state are sharded over ranks, and what of it is kept off the device."""

    name: EngineName = EngineName.fsdp
    """`fsdp` is PyTorch's fully_shard (FSDP2), `zero3` DeepSpeed's ZeRO stage 3; the figures are the same."""
    offload_param: Offload = Offload.none
    """Where parameters live between uses. fsdp: `cpu` takes gradients and optimizer along; `nvme` needs zero3."""
    offload_optimizer: Offload = Offload.none
    """Where the optimizer's state lives. fsdp: it visits the device to be used; zero3: the host's cores take the step."""
    nvme_path: str | None = None
    """A directory on each node's local NVMe for what is offloaded to `nvme`; only this run's files in it are touched."""
    pin_memory: bool = True
    """Page-lock offloaded host memory of a GPU run: faster copies, and memory that the host cannot swap out."""
    reshard_after_forward: bool = True
    """fsdp: free a block's gathered parameters between forward and backward; false trades memory for one all-gather less."""
    replicate: int = 1
    """fsdp: copies of the model, each sharded over `shard` ranks (HSDP); nodes, say, where the network between them is slow."""
    shard: int | None = None
    """fsdp: ranks that share one copy; empty is all ranks / `replicate`."""
    prefetch: int = 1
    """fsdp: blocks gathered ahead of the one that computes; each costs one block's parameters in the compute type."""
    sync_each_microbatch: bool = True
    """fsdp: reduce gradients after each microbatch; false only after the last: less traffic, 4 bytes a parameter unsharded."""
    sub_group_size: int = 100_000_000
    """zero3: parameters a rank updates at once; smaller needs smaller buffers with nvme, larger fewer steps."""
    reduce_bucket_size: int | None = None
    """zero3: gradient elements reduced at once; empty is hidden size squared, at least 1,048,576."""
    prefetch_bucket_size: int | None = None
    """zero3: parameter elements gathered ahead; empty is 0.9 x hidden size squared."""
    param_persistence_threshold: int | None = None
    """zero3: parameters up to this size stay whole on every rank; empty is 10 x hidden size: norms and biases."""
    overlap_comm: bool = True
    """zero3: reduce gradients on a stream of their own while backward goes on."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """zero3: keys of DeepSpeed's JSON that no field here sets, as +engine.overrides.zero_optimization.stage3_max_live_parameters=1e8."""


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate, a pure function of the step."""

    name: OptimizerName = OptimizerName.adamw
    """`adamw`, or `sgd` without momentum."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Schedule = Schedule.cosine
    """Shape after warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up, lr / warmup_steps at the first; 0 takes `warmup_fraction`."""
    warmup_fraction: float = 0.0
    """Warm-up as a share of all steps, for runs counted in epochs. In [0, 1]."""
    min_lr_fraction: float = 0.0
    """Learning rate that the schedule reaches behind the last step, as a share of `lr`. In [0, 1]."""
    decay_fraction: float = 0.2
    """Share of all steps that `wsd` spends on its final linear decay. In [0, 1]."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates, each in [0, 1)."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    weight_decay: float = 0.0
    """Decoupled weight decay, applied to matrices and embeddings only, not to norms and biases."""
    clip: float | None = 1.0
    """Largest global gradient norm; empty clips nothing."""


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch, precision and evaluation."""

    steps: int | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the training rows; give this or `steps`. One pass when neither is given."""
    global_batch: int = 16
    """Rows an optimizer step over all ranks; divisible by ranks x `microbatch`."""
    microbatch: int = 1
    """Rows a rank takes through one forward and backward."""
    precision: Precision = Precision.bf16
    """Compute type; master weights stay float32."""
    activation_checkpointing: bool = False
    """Keep only block inputs for backward and compute the rest again: about a third more time, far less memory."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; empty evaluates before the first and after the last step only."""
    eval_microbatch: int | None = None
    """Rows a rank evaluates at once; empty takes `microbatch`. Changes memory, never the figure."""
    patience: int | None = None
    """Evaluations in a row without a better loss that end the run early; empty never does."""
    min_improvement: float = 0.0
    """Smallest drop of the evaluation loss, in nats a token, that counts as better."""
    max_skipped: int = 3
    """Steps in a row skipped for non-finite gradients or spikes, or rollbacks without a new checkpoint, that end the run with an error."""
    on_spike: OnSpike = OnSpike.none
    """A spike: `skip` the step, `rollback` to the last checkpoint and past the rows since it, or save and `stop` with an error."""
    spike_threshold: float = 10.0
    """A spike is a loss or gradient norm so many robust standard deviations above the median of the last 100 steps."""
    sample_tokens: int = 64
    """Longest sample answer made from the export at the end, in tokens; 0 makes none."""
    step_timeout_s: float | None = 1800.0
    """Seconds for an optimizer step before the run is ended as hung, naming the rank; empty never. The first step gets five times that."""
    deterministic: bool = False
    """Bitwise repeatable kernels on a GPU; slower."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save what a continued run needs, and how many to keep."""

    every: int | None = None
    """Optimizer steps between checkpoints; empty saves when the run is asked to stop or to save, and after the last step."""
    every_minutes: float | None = None
    """Minutes between checkpoints, beside `every`; by rank 0's clock, at the next step's end."""
    keep_last: int = 2
    """Newest checkpoints that are kept; at least 1."""
    keep_every: int | None = None
    """Keep each checkpoint whose step this divides, for good."""
    keep_best: int = 0
    """Keep so many checkpoints of lowest evaluation loss; a new best one is saved at once."""
    asynchronous: bool = True
    """Copy the state to host memory, where a node has twice the room, and write it while training goes on; false waits."""
    strict: bool = False
    """End the run when a checkpoint cannot be written; otherwise it goes on and tries again while there is an older one."""


@dataclass(kw_only=True)
class LimitsConfig:
    """When a run is ended as hung, in seconds without progress outside of steps (empty is for ever), and what is slow.

    A continued run may change them.
    """

    prepare_s: float | None = 3600.0
    """Preparing data and meeting the other ranks: begins anew with each 512 rows, and each 64 MiB downloaded, read or written."""
    load_s: float | None = 3600.0
    """Loading weights or a checkpoint: begins anew with each tensor, and each 64 MiB read."""
    evaluate_s: float | None = 1800.0
    """Evaluating: begins anew with each microbatch."""
    save_s: float | None = 3600.0
    """Saving a checkpoint: begins anew with each 64 MiB that a rank writes."""
    export_s: float | None = 3600.0
    """Exporting and checking the export: begins anew with each tensor, and each 64 MiB read or written."""
    slow_node: float = 1.5
    """A rank is named slow above so many times the median of all: its device, link or data. Healthy GPUs of a kind differ by under 1.1."""


@dataclass(kw_only=True)
class LogConfig:
    """Figures: metrics.jsonl is always written; W&B mirrors it."""

    wandb: WandbMode = WandbMode.auto
    """Mirror to Weights & Biases."""
    project: str = "fulltune"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; empty is the key's own."""
    group: str | None = None
    """W&B group, to compare runs side by side."""
    tags: list[str] = field(default_factory=list)
    """W&B tags besides the method and the engine."""
    peak_tflops: float | None = None
    """The device's dense matrix peak in TFLOP/s, for MFU; empty looks the device up."""


@dataclass(kw_only=True)
class RunConfig:
    """One run: the only input of a rank."""

    name: str = "run"
    """Name of the run, in W&B and in `run_dir`."""
    run_dir: str = "runs/run"
    """Everything that the run writes; starting the same command again continues it."""
    seed: int = 0
    """Seed of row order, dropout and random weights."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load(path: Path | str) -> RunConfig:
    """Read a frozen config.yaml; raises ConfigError on an unknown field, a wrong type or what cannot work."""
    config = read(path)
    validate(config)
    return config


def read(path: Path | str) -> RunConfig:
    """Read a frozen config.yaml of a run that is over, whose data may be gone; raises ConfigError on what is no config."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return _typed(lambda: OmegaConf.load(path), str(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config.yaml", str(path), f"cannot be read: {str(error).splitlines()[0]}") from error


def parse(values: dict[str, Any]) -> RunConfig:
    """Return the config that `plain` has made plain; raises ConfigError on what is none."""
    from omegaconf import OmegaConf

    return _typed(lambda: OmegaConf.create(escaped(values)), "config")


def _typed(load: Callable[[], Any], name: str) -> RunConfig:
    """Return what is loaded as a RunConfig; raises ConfigError, which names the field or what was loaded, for an unknown field or type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), load()))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error.full_key or name), None, str(error.msg or error).splitlines()[0]) from error
    assert isinstance(config, RunConfig)
    return config


def escaped(value: Any) -> Any:
    """Return settings with each `${` in a text escaped: all are resolved, and reading them must not resolve again."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def plain(config: object) -> Any:
    """Return a dataclass as plain dicts, lists and strings, as config.yaml and W&B hold it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: plain(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, StrEnum):
        return config.value
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list) else config


POSITIVE = (
    "data.seq_len",
    "data.processes",
    "optim.lr",
    "optim.eps",
    "optim.clip",
    "engine.replicate",
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
    "train.eval_every",
    "train.eval_microbatch",
    "train.patience",
    "train.max_skipped",
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
    "checkpoint.keep_best",
    "peft.tinit",
    "peft.orth_reg_weight",
)
RANGES = {
    "data.eval_fraction": (0.0, 0.5),
    "data.max_lost_fraction": (0.0, 1.0),
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
    "data.template",
    "engine.nvme_path",
    "peft.adapter",
)
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt", ".md")


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
        if not 0 <= value_at(config, path) < math.inf:
            raise ConfigError(path, value_at(config, path), "must be a number, 0 or greater")
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
    _validate_training(config)


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
    return Path(name).suffix in FILE_TYPES or name.startswith("runs/")


def require_model_directory(path: str, value: str) -> None:
    """Raise ConfigError unless `value` is a directory with a config.json."""
    folder = Path(value)
    if not folder.is_dir():
        remedy = "make the base first: python -m launcher +exp=quickstart_base" if value.startswith("runs/quickstart_base") else ""
        raise ConfigError(path, value, "no such directory, and not a hub id of the form OWNER/NAME", remedy)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(path, value, "is an adapter, not a model", f"name its base, and peft.adapter={value} to train it further")
    if not (folder / "config.json").is_file():
        raise ConfigError(path, value, "the directory has no config.json", "name a model directory in Hugging Face form")


def _validate_data(config: RunConfig) -> None:
    data = config.data
    if data.source is DataSource.files and data.path is None:
        raise ConfigError("data.path", None, "no data is named", "data=files data.path=FILE, a directory, or a hub id")
    for name in ("path", "eval_path"):
        value = getattr(data, name)
        if value is not None and looks_local(value) and not Path(value).exists():
            raise ConfigError(f"data.{name}", value, "no such file or directory")
    if data.eval_path is not None and data.eval_fraction:
        raise ConfigError(
            "data.eval_fraction", data.eval_fraction, f"data.eval_path is also given ({data.eval_path})", "give one of the two"
        )
    if data.template is not None and data.template != "chatml" and not Path(data.template).is_file():
        raise ConfigError("data.template", data.template, "no such template file", "a Jinja file, or `chatml`")
    if data.template not in (None, "chatml") and not Path(str(data.template)).read_text("utf-8", "replace").strip():
        raise ConfigError("data.template", data.template, "the template file is empty")
    if data.too_long is TooLong.split and config.objective.name is not ObjectiveName.cpt:
        raise ConfigError(
            "data.too_long", "split", "a conversation cannot be split into rows", "data.too_long=truncate or drop, or objective=cpt"
        )
    if data.seq_len < 2:
        raise ConfigError("data.seq_len", data.seq_len, "a row needs two tokens to have one to predict")


def _validate_training(config: RunConfig) -> None:
    train, optim = config.train, config.optim
    if train.steps is not None and train.epochs is not None:
        raise ConfigError("train.epochs", train.epochs, f"train.steps is also given ({train.steps})", "set the other to null")
    if train.global_batch % train.microbatch:
        raise ConfigError("train.global_batch", train.global_batch, f"is not divisible by train.microbatch = {train.microbatch}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", optim.betas, "must be two numbers from 0 to below 1")
    if optim.warmup_steps and optim.warmup_fraction:
        raise ConfigError(
            "optim.warmup_fraction", optim.warmup_fraction, f"optim.warmup_steps is also given ({optim.warmup_steps})", "set one to 0"
        )
    if train.steps is not None and optim.warmup_steps >= train.steps and optim.warmup_steps:
        raise ConfigError("optim.warmup_steps", optim.warmup_steps, f"warm-up never ends within train.steps = {train.steps}")
    has_eval = config.data.eval_path is not None or config.data.eval_fraction > 0
    for name in ("eval_every", "patience"):
        if getattr(train, name) is not None and not has_eval:
            raise ConfigError(
                f"train.{name}", getattr(train, name), "there are no held-out rows", "data.eval_path=FILE or data.eval_fraction=0.05"
            )
    if train.patience is not None and train.eval_every is None:
        raise ConfigError("train.patience", train.patience, "train.eval_every is not set", "train.eval_every=100")


LORA = ("rank", "alpha", "dropout", "targets", "bias", "modules_to_save", "rank_stabilised", "adapter", "lr_ratio")
ADALORA = ("target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
PEFT_FIELDS: dict[PeftMethod, tuple[str, ...]] = {
    PeftMethod.none: (),
    PeftMethod.freeze: ("freeze", "last_blocks"),
    PeftMethod.lora: (*LORA, "init", "quantise"),
    PeftMethod.dora: LORA,
    PeftMethod.ia3: ("targets", "modules_to_save", "adapter"),
    PeftMethod.prompt: ("virtual_tokens", "init", "adapter"),
    PeftMethod.prefix: ("virtual_tokens", "encoder_size", "adapter"),
    PeftMethod.ptuning: ("virtual_tokens", "encoder_size"),
    PeftMethod.adalora: ("rank", "alpha", "dropout", "targets", "modules_to_save", *ADALORA),
}
VIRTUAL = (PeftMethod.prompt, PeftMethod.prefix, PeftMethod.ptuning)
INITS = {
    PeftMethod.lora: (AdapterInit.default, AdapterInit.gaussian, AdapterInit.pissa, AdapterInit.loftq),
    PeftMethod.prompt: (AdapterInit.default, AdapterInit.vocabulary),
}
UNAVAILABLE = {
    PeftMethod.houlsby: "the peft library has no bottleneck adapters, so that nothing could load the export",
}


def _validate_peft(config: RunConfig) -> None:
    """Refuse what the named method does not have or cannot do."""
    peft = config.peft
    if peft.method in UNAVAILABLE:
        raise ConfigError("peft.method", str(peft.method), UNAVAILABLE[peft.method], "peft=lora, which trains as few parameters")
    if peft.quantise is not Quantisation.none and peft.method in (PeftMethod.none, PeftMethod.freeze):
        reason = f"peft.method={peft.method} trains weights of the model itself, and 4 bits cannot hold a small step"
        raise ConfigError("peft.quantise", str(peft.quantise), reason, "peft=qlora, which trains adapters beside them")
    foreign = [item.name for item in dataclasses.fields(PeftConfig) if item.name not in ("method", *PEFT_FIELDS[peft.method])]
    owners = {name: ", ".join(method for method, names in PEFT_FIELDS.items() if name in names) for name in foreign}
    remedies = {name: f"leave it out; it is for {methods}" for name, methods in owners.items()}
    _refuse_foreign("peft", peft, f"peft.method={peft.method}", remedies)
    if not 0 <= peft.dropout < 1:
        raise ConfigError("peft.dropout", peft.dropout, "must be from 0 to below 1")
    for name in ("targets", "modules_to_save", "freeze"):
        if "" in getattr(peft, name):
            raise ConfigError(f"peft.{name}", getattr(peft, name), "a name is empty")
    if "all-linear" in peft.targets and len(peft.targets) > 1:
        raise ConfigError("peft.targets", peft.targets, "all-linear stands for itself", "peft.targets=[all-linear]")
    if peft.init not in INITS.get(peft.method, (AdapterInit.default,)):
        raise ConfigError("peft.init", str(peft.init), f"is no beginning for peft.method={peft.method}", "peft.init=default")
    if peft.init is AdapterInit.loftq and peft.quantise is Quantisation.none:
        raise ConfigError("peft.init", "loftq", "begins at what quantising loses, and the base is not quantised", "peft=loftq")
    if peft.init is AdapterInit.pissa and peft.quantise is not Quantisation.none:
        reason = "PiSSA changes the base before it is quantised: its export would belong to no base that exists"
        raise ConfigError("peft.init", "pissa", reason, "peft=loftq, which begins near the same values")
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
    if method is PeftMethod.prefix and config.train.activation_checkpointing:
        reason = "prefix tuning goes through the cache of keys and values, which computing a block again would fill twice"
        raise ConfigError("train.activation_checkpointing", True, reason, "train.activation_checkpointing=false, or peft=prompt")
    if config.model.attention is Attention.flash_attention_2:
        reason = f"flash attention gets all rows as one, and peft.method={method} needs its tokens in front of each"
        raise ConfigError("model.attention", "flash_attention_2", reason, "model.attention=sdpa")


FSDP_ONLY = ("reshard_after_forward", "replicate", "shard", "prefetch", "sync_each_microbatch")
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
        below, above = train.global_batch // share * share, -(-train.global_batch // share) * share
        near = " or ".join(str(size) for size in (below, above) if size)
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"is not divisible by {world_size} ranks x train.microbatch {train.microbatch} = {share}",
            f"train.global_batch={near}",
        )
    _check_mesh(config.engine, world_size)


def _check_mesh(engine: EngineConfig, world_size: int) -> None:
    """Raise ConfigError unless `replicate` x `shard` is the number of ranks."""
    if world_size % engine.replicate:
        near = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
        reason = f"{world_size} ranks do not divide into as many copies"
        raise ConfigError("engine.replicate", engine.replicate, reason, f"one of {', '.join(near)}")
    shard = world_size // engine.replicate
    if engine.shard not in (None, shard):
        reason = f"{world_size} ranks / engine.replicate {engine.replicate} are {shard} ranks a copy"
        raise ConfigError("engine.shard", engine.shard, reason, f"engine.shard={shard}")
