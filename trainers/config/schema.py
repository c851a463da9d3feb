"""Every setting of a run, typed and checked: what the launcher freezes and a rank reads.

Nothing here imports torch, so that a wrong setting costs under a second on a login node.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from trainers.config.choices import (
    KL,
    Activations,
    AdapterActivation,
    AdapterBias,
    AdapterInit,
    Advantage,
    Attention,
    Average,
    DataSource,
    Divergence,
    DocumentOf,
    EngineName,
    Exhausted,
    Experts,
    Export,
    FDivergence,
    Float8,
    Layout,
    LengthUnit,
    MeshChoice,
    Metric,
    MixBy,
    MixChange,
    ObjectiveName,
    Offload,
    OnSpike,
    OptimizerName,
    OptimizerState,
    PairsOf,
    PeftMethod,
    Precision,
    PreferenceLoss,
    Quantisation,
    Ratio,
    Reasoning,
    RewardKind,
    Schedule,
    StyleRows,
    Supervise,
    TooLong,
    WandbMode,
)
from trainers.config.errors import ConfigError as ConfigError
from trainers.config.errors import alike

Entry = TypeVar("Entry")


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
    encoder_decoder: bool = False
    """T5, Flan-T5 and mT5: the encoder reads a row's prompt, the decoder writes its answer. Rows are plain text, without a template."""
    attention: Attention = Attention.auto
    """Attention backend; the start-up table says which one `auto` took and why. `varlen` is torch's own kernel, without a mask."""
    experts: Experts = Experts.auto
    """Mixtures: grouped_mm computes all experts of a block at once, batched_mm copies weights for each token, eager goes one by one."""
    convert: bool = False
    """Convert weights that are only there as pytorch_model.bin to safetensors, once, into the cache (FULLTUNE_CACHE)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for sources you trust."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture; what it leaves empty is as `data` says for all."""

    weight: float | None = None
    """Its share, next to those of the others; 0 only evaluates its held-out rows. Empty for all sources: as much as each has."""
    then: list[float] = field(default_factory=list)
    """Its shares at each of `data.mix_steps`, after `weight`; empty keeps `weight`."""
    repeat: float | None = None
    """mix_exhausted=stop and drop: passes over its rows after which it has run out; empty is 1."""
    source: DataSource = DataSource.files
    """Files or a hub id named by `path`, the documentation of the running Python, or the larger of two digits."""
    path: str | None = None
    """Its rows, as `data.path` names them."""
    split: str = "train"
    """As `data.split`."""
    config: str | None = None
    """As `data.config`."""
    data_files: list[str] = field(default_factory=list)
    """As `data.data_files`."""
    revision: str | None = None
    """As `data.revision`."""
    max_rows: int | None = None
    """As `data.max_rows`."""
    eval_path: str | None = None
    """Its held-out rows, in place of `data.eval_fraction`."""
    eval_split: str | None = None
    """Split of its `eval_path`."""
    eval_fraction: float | None = None
    """Share of its rows held out; empty is `data.eval_fraction`."""
    layout: Layout | None = None
    """Its row layout; empty is `data.layout`."""
    template: str | None = None
    """Its chat template; empty is `data.template`, which is exported."""
    document: DocumentOf | None = None
    """What one of its documents is; empty is `data.document`."""
    supervise: Supervise | None = None
    """Which of its tokens are trained; empty is `data.supervise`."""
    reasoning: Reasoning | None = None
    """What becomes of its reasoning; empty is `data.reasoning`."""
    ignore: list[str] | None = None
    """Fields of its rows and turns that are not read; empty is `data.ignore`."""


@dataclass(kw_only=True)
class DataConfig:
    """Rows, their layout, template, supervision, length and packing."""

    source: DataSource = DataSource.files
    """Files or a hub id named by `path`, the documentation of the running Python, the larger of two digits, or `tasks`."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: tasks by name, each with the settings that it has there, such as {chain_sum: {max_terms: 3}}."""
    task_rows: int = 1000
    """reasoning_gym: rows that are made, of each task as many."""
    task_seed: int = 0
    """reasoning_gym: what the rows are drawn with; `seed` of the run does not change them."""
    path: str | None = None
    """A jsonl, json, csv, tsv, parquet, arrow or text file, also with .gz, .bz2, .xz or .zst; a directory or URL of these; or a hub id."""
    split: str = "train"
    """Split of a hub data set, or of a directory whose files or folders are named by splits."""
    config: str | None = None
    """Configuration of a hub data set or its clone, such as `main`; empty takes its default one."""
    data_files: list[str] = field(default_factory=list)
    """Patterns of the files inside `path` that are read, such as [en/*.jsonl]; empty takes those of `split`."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    eval_path: str | None = None
    """Held-out rows, like `path`; empty takes `eval_fraction` of the rows."""
    eval_split: str | None = None
    """Split of `eval_path`, which may be the data set of `path`; empty is `split`."""
    eval_fraction: float = 0.0
    """Share of the rows held out, grouped by first prompt so that none is on both sides. In [0, 0.5]."""
    mix: dict[str, Any] = field(default_factory=dict)
    """Sources by name instead of `path`, each a path or a SourceConfig: data.mix.code=FILE, or data.mix.code.path=FILE and more."""
    mix_by: MixBy = MixBy.tokens
    """What weights are shares of: of every 1,000 rows, so many are taken that tokens, or rows, are shared as the weights say."""
    mix_exhausted: Exhausted = Exhausted.repeat
    """A source that has run out is repeated, stops the run, or is dropped, and the others share what it had."""
    mix_temperature: float = 1.0
    """Weights are raised to 1 / temperature: above 1 small sources get more, at infinity all the same."""
    mix_ratio: list[float] = field(default_factory=list)
    """Weights of all sources in their order, as [80,20], instead of one in each source."""
    mix_steps: list[int] = field(default_factory=list)
    """Optimizer steps at which the sources have the weights of `then`; before the first it is on the way from `weight`."""
    mix_change: MixChange = MixChange.linear
    """Between these steps weights change in a straight line, or by phases: each weight holds until the next step is reached."""
    max_rows: int | None = None
    """Rows that are read at most, the first ones; empty reads all."""
    streaming: bool = False
    """Begin training once the first shards are prepared, and prepare the others ahead of it, on bounded disk; needs `train.steps`."""
    shard_rows: int = 8192
    """streaming: rows of the data in a shard, which is prepared and packed by itself."""
    window_shards: int = 4
    """streaming: shards whose rows are shuffled together. All of them are prepared before one of their rows is trained."""
    layout: Layout = Layout.auto
    """Row layout; `auto` recognises and prints it."""
    pairs: PairsOf = PairsOf.best_worst
    """Layout `ranked`: which answers of a row are compared. Answers of one score, or of one text, are not; they are counted."""
    styles: list[str] = field(default_factory=list)
    """Layout `styles`: the fields with the texts of one meaning, which are the names of their styles, such as [business,casual]."""
    style_rows: StyleRows = StyleRows.both
    """Layout `styles`: `both` directions between two texts are a row each, or `one` of them, which the texts decide."""
    style_instruction: str = "Rewrite the text in a {style} style."
    """Layout `styles`: what is asked; {style} is the name of the style that is wanted. Empty leaves the text alone as the prompt."""
    template: str | None = None
    """A Jinja file, `chatml`, `plain`, or the name of one of the tokenizer's own; empty takes the tokenizer's own."""
    document: DocumentOf = DocumentOf.row
    """What one document is; `turn` makes each assistant turn one, with the turns before it as the template shows them when it answers."""
    max_left_out_fraction: float = 0.01
    """Largest share of rows with tools, reasoning, system text or the like that may lose them to the template. In [0, 1]."""
    supervise: Supervise = Supervise.assistant
    """Tokens that are trained; ignored by the continued pre-training objective, which trains all."""
    reasoning: Reasoning = Reasoning.keep
    """Reasoning before an answer, in `reasoning_content` or `<think>`: trained as written, in the row without loss, or left out."""
    seq_len: int = 2048
    """Longest row in tokens, and the length of a packed row."""
    packing: bool = True
    """Put whole documents together into rows of `seq_len`; attention never crosses documents."""
    too_long: TooLong = TooLong.truncate
    """What becomes of a row over `seq_len`."""
    max_lost_fraction: float = 0.1
    """Largest share of supervised tokens that truncating and dropping may lose before the run stops. In [0, 1]."""
    ignore: list[str] = field(default_factory=list)
    """Fields of rows and turns that are read as if they were not there, such as [images,weight]."""
    skip_bad_rows: bool = False
    """Count bad rows and continue, instead of stopping at the first ones with file, line and reason."""
    processes: int | None = None
    """Processes that tokenise; empty is one a core."""
    prepared_dir: str | None = None
    """Where prepared data is kept, shared by runs; empty is `~/.cache/fulltune/prepared`."""

    def __post_init__(self) -> None:
        """Type the sources; raises ConfigError for what is not a valid source."""
        self.mix = {name: _source(name, value) for name, value in self.mix.items()}


def _source(name: str, value: Any) -> SourceConfig:
    """Return what a mapping says of a source."""
    path = f"data.mix.{name}"
    return _entry(path, {"path": value} if isinstance(value, str) else value, SourceConfig, "a source", f"{path}.path=FILE")


def reward_of(name: str, value: Any) -> RewardConfig:
    """Return what a mapping, or a kind alone, says of a reward; raises ConfigError for a field that is not one, or without a kind."""
    path, remedy = f"reward.{name}", f"reward.{name}.kind=exact"
    value = {"kind": value} if isinstance(value, str) else value
    if isinstance(value, dict) and "kind" not in value:
        raise ConfigError(f"{path}.kind", None, f"nothing says what is rewarded: one of {', '.join(RewardKind)}", remedy)
    return _entry(path, value, RewardConfig, "a reward", remedy)


def _entry(path: str, value: Any, kind: type[Entry], noun: str, remedy: str) -> Entry:
    """Return a typed entry of a mapping: OmegaConf types none whose keys a command line adds one by one."""
    if isinstance(value, kind):
        return value
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    names = [item.name for item in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise ConfigError(path, value, f"is {noun}, which has fields", remedy)
    for key in (key for key in value if key not in names):
        near = [f"{path}.{close}" for close in alike(key, names)]
        raise ConfigError(f"{path}.{key}", value[key], f"there is no such field; {noun} has {', '.join(names)}", ", ".join(near))
    try:
        entry = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(escaped(value))))
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raise ConfigError(f"{path}.{key}", value.get(key), str(error.msg).splitlines()[0]) from error
    assert isinstance(entry, kind)
    return entry


@dataclass(kw_only=True)
class RewardConfig:
    """One part of what an answer is worth; each kind has settings of its own. An answer of which a part fails has no reward."""

    kind: RewardKind = RewardKind.exact
    """What is rewarded: agreeing with the reference, in words or as mathematics, a task, a form, code that passes, what somebody says."""
    weight: float = 1.0
    """What it is multiplied by in the sum of all."""
    extract: str = "auto"
    """exact: what is compared, as `evaluation.extract`."""
    schema: str | None = None
    """json: file of a JSON schema; empty takes the field `schema` of each row."""
    min: float = 0.0
    """length: from here to `max` the reward is 1."""
    max: float | None = None
    """length: empty sets no limit."""
    soft: float = 0.0
    """length: outside, so far away the reward has fallen to 0 in a straight line (arXiv 2503.14476)."""
    unit: LengthUnit = LengthUnit.tokens
    """length: what it is counted in."""
    pattern: str | None = None
    """format: a regular expression that is to match the whole answer."""
    tests: str = "tests"
    """code: the rows' field of tests, Python that raises where one fails."""
    memory_mib: float = 512.0
    """code: memory of an answer's program, with all that it starts."""
    processes: int = 16
    """code: processes that it may have."""
    disk_mib: float = 16.0
    """code: all files that it may write."""
    path: str | None = None
    """model: directory of a reward model; function: a Python function of an answer's row, as module:function."""
    url: str | None = None
    """judge: an OpenAI-compatible endpoint up to its version, as http://host:8000/v1; its key is read from FULLTUNE_JUDGE_KEY."""
    model: str | None = None
    """judge: name of the model that judges."""
    at_once: int = 8
    """judge: requests in flight."""
    timeout_s: float | None = None
    """math, code, function, judge: seconds for an answer; empty is 15, 10, 10 and 60."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    name: ObjectiveName = ObjectiveName.sft
    """`sft` trains the supervised turns of conversations, `cpt` every token of a text, `distil` what a teacher says of the rows of sft.

    The others train answers or documents as a whole.
    """
    beta: float = 0.1
    """dpo, simpo, cpo, kto: what a difference of log-probabilities in nats is multiplied by; orpo: weight of the odds ratio; distil with
    jsd: share of the teacher in the mixture."""
    loss: PreferenceLoss = PreferenceLoss.sigmoid
    """dpo, cpo: what becomes of a pair's margin."""
    label_smoothing: float = 0.0
    """sft, cpt: share of each label that is spread over the vocabulary, in [0, 1); dpo, cpo: of the pairs in the wrong order, below 0.5."""
    robust: bool = False
    """dpo: with `label_smoothing`, the loss whose mean over such pairs is that of clean ones (arXiv 2403.00409)."""
    length_normalised: bool = False
    """dpo: divide each answer's log-probability by its tokens; simpo and orpo always do."""
    margin: float = 0.0
    """simpo: by how much, in units of the reward, the preferred answer is to lead."""
    center: float = 0.0
    """reward: weight of the square of a pair's summed scores, which keeps scores around 0 (arXiv 2312.09244); 0.01 is usual."""
    labels: list[str] = field(default_factory=list)
    """classify: names of the classes, in the order of the head's outputs; empty takes those of the training rows, sorted."""
    class_weights: list[float] = field(default_factory=list)
    """classify: what a document's loss is multiplied by, for each of `labels`; empty is 1."""
    balanced: bool = False
    """classify: weigh each class so that all count as much: documents / (classes x the class's documents) of the training rows."""
    nll_weight: float = 0.0
    """dpo, cpo: weight of the preferred answer's own loss, in nats a token; orpo always has it with weight 1."""
    teacher: str | None = None
    """distil: a directory that `python -m tools.logprobs` wrote; empty takes the only one of these rows in `data.prepared_dir`."""
    divergence: Divergence = Divergence.forward_kl
    """distil: `forward_kl` covers all that the teacher says, `reverse_kl` keeps to its likeliest tokens, `jsd` is between (`beta`)."""
    ce_weight: float = 0.0
    """distil: share of the loss that is cross-entropy of the rows' own tokens, the rest being the divergence. In [0, 1)."""
    f_divergence: FDivergence = FDivergence.reverse_kl
    """dpo: what keeps the model near the reference (arXiv 2309.16240); `alpha` lies between reverse_kl (0) and forward_kl (1)."""
    f_alpha: float = 0.5
    """dpo with f_divergence=alpha: its alpha. Above 0, at most 1."""
    desirable_weight: float = 1.0
    """kto: what the loss of a wanted answer is multiplied by."""
    undesirable_weight: float = 1.0
    """kto: the same of one that is not wanted; with weights, both kinds are to count about the same in sum (arXiv 2402.01306, eq. 9)."""
    advantage: Advantage = Advantage.grpo
    """grpo: rewards less their group's mean, over its standard deviation (`grpo`) or not (`dr_grpo`); less the mean of the group's others
    (`rloo`); standardised over the step (`reinforce_pp`), or centred by group before (`reinforce_pp_baseline`)."""
    average: Average = Average.answers
    """grpo, ppo: what a step's loss is a mean of; `tokens` weighs long answers more, `constant` divides each by `constant` tokens."""
    constant: int | None = None
    """grpo, ppo with average=constant: tokens that each answer is divided by, as many as an answer may have."""
    ratio: Ratio = Ratio.token
    """grpo: of what probabilities are compared and clipped; `sequence` is GSPO's (arXiv 2507.18071), with far narrower bounds."""
    clip_low: float = 0.2
    """grpo, ppo: how far below 1 the ratio of an answer that is worse than expected is followed. Above 0, at most 1."""
    clip_high: float = 0.2
    """grpo, ppo: how far above 1 that of a better one is followed; DAPO takes 0.28 (arXiv 2503.14476)."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the reference, in nats a token: grpo adds it to the loss, ppo takes it from each token's reward."""
    kl_estimator: KL = KL.k1
    """ppo with kl_weight: `k1` is log(policy / reference) of the drawn token, `k3` is never below 0."""
    importance_cap: float | None = None
    """grpo, ppo: largest weight of a token by which the trainer finds it likelier than the sampler did; empty corrects nothing."""
    reference: str | None = None
    """dpo, kto: a model directory or hub id that is compared with, of the same vocabulary; empty is the model that training begins with."""
    gamma: float = 1.0
    """ppo: what a reward one token later is worth next to one now. Above 0, at most 1."""
    gae_lambda: float = 0.95
    """ppo: how much an advantage trusts later rewards over the critic, from 0 to 1 (arXiv 1506.02438, eq. 16)."""
    whiten: bool = True
    """ppo: standardise advantages over all trained tokens of a rollout."""
    critic: str | None = None
    """ppo: directory or hub id of a reward model, or of a base, that the critic begins as; empty is the policy's base with a new head."""
    critic_lr: float | None = None
    """ppo: peak learning rate of the critic, on the policy's schedule; empty is the policy's."""
    critic_weight_decay: float | None = None
    """ppo: weight decay of the critic; empty is `optim.weight_decay`."""
    critic_clip: float | None = None
    """ppo: largest global gradient norm of the critic; empty is `optim.clip`."""
    value_clip: float | None = 0.2
    """ppo: how far the loss follows a token's value away from that of the rollout; empty follows it anywhere."""


@dataclass(kw_only=True)
class RlConfig:
    """objective=grpo and ppo: the answers that the model gives while it is trained. A step takes train.global_batch of them."""

    group_size: int = 8
    """Answers to each prompt; grpo compares their rewards and needs at least 2. A step has train.global_batch / group_size prompts."""
    max_new_tokens: int = 256
    """Longest answer in tokens; a prompt has at most data.seq_len less this."""
    temperature: float = 1.0
    """Logits are divided by it: answers are drawn, and trained on, from the softmax of that. Above 0; below 1 the likely are likelier."""
    steps_per_rollout: int = 1
    """Optimizer steps whose answers are written together, with the weights before the first of them; each trains on its own part."""
    staleness: int = 0
    """Rollouts by which sampling is ahead of training: both run at once, each rollout by the weights so many before it; 0 takes turns."""
    curriculum: float | None = None
    """Prompts answered rightly half the time are drawn most often, those always or never right this share as often; empty: all alike."""
    redraws: int = 3
    """Further rounds of prompts in place of those whose answers all have one reward, which teach nothing; 0 keeps these."""
    mask_truncated: bool = False
    """Answers that were cut at `max_new_tokens` are not trained on; in their group's mean they count."""
    batch: int = 64
    """Answers that a generator writes at once."""
    vllm: str | None = None
    """Python of an environment with vLLM, which then writes the answers; empty is plain transformers. With it no resume is exact."""
    vllm_words: list[str] = field(default_factory=list)
    """Further words of a vLLM server's command line, as [--gpu-memory-utilization,0.4]."""
    servers: list[str] = field(default_factory=list)
    """vLLM servers that run already, see run_dir and write the answers, as [http://node7:8000]; empty starts generators."""
    timeout_s: float = 600.0
    """Seconds that a generator may take for one batch before another is started in its place."""
    restarts: int = 3
    """Generators of a machine that may be lost over one batch before the run fails."""
    mismatch: float | None = None
    """Largest mean difference of a token's log-probability between generator and trainer, in nats; empty is 1e-3 in float32, else 0.25."""
    environment: str | None = None
    """`module:Class` of what answers the model turn by turn; an answer is then a conversation. Empty is one turn."""
    max_turns: int = 8
    """environment: turns of the model; each has at most `max_new_tokens` tokens, and the whole conversation data.seq_len."""
    environment_timeout_s: float = 30.0
    """environment: seconds of one call of `reset` or `step`, after which its conversation ends without a reward."""
    environment_processes: int = 1
    """environment: processes that share the conversations; more where turns take long."""
    pass_reward: float = 1.0
    """Reward from which an answer counts as right: pass@1 is the share of such answers."""
    eval_samples: int = 1
    """Answers to each held-out prompt at an evaluation; from several follow pass@2, pass@4 and so on up to this."""
    eval_temperature: float | None = None
    """Of answers to held-out prompts; empty is `temperature`, 0 takes the likeliest token."""


@dataclass(kw_only=True)
class PeftConfig:
    """Parameter-efficient method."""

    method: PeftMethod = PeftMethod.none
    """`none` is full fine-tuning, `freeze` trains a part of the model, the others add an adapter to a base that stays as it is."""
    lr: float | None = None
    """Peak learning rate of the method, which its preset sets with the source; `optim.lr` replaces it."""
    rank: int = 8
    """lora, dora, adalora (at first): columns of the two small matrices; at most the smaller side of each matrix that is adapted."""
    alpha: float = 16.0
    """lora, dora, adalora: the product of the two is scaled by alpha / rank."""
    dropout: float = 0.0
    """lora, dora, adalora: share of an adapter's inputs set to zero while training. In [0, 1)."""
    targets: list[str] = field(default_factory=list)
    """[q_proj,v_proj], or [all-linear] without the head; lora: also [experts]; bottleneck: also [mlp]; empty is peft's choice."""
    bias: AdapterBias = AdapterBias.none
    """lora, dora: biases of the base that are trained, and saved with the adapter."""
    modules_to_save: list[str] = field(default_factory=list)
    """lora, dora, adalora, ia3, bottleneck: names of modules that are trained whole and saved with the adapter, as [lm_head]."""
    rank_stabilised: bool = False
    """lora, dora: scale by alpha / sqrt(rank) instead, so that large ranks learn as fast (arXiv 2312.03732)."""
    init: AdapterInit = AdapterInit.default
    """lora: `gaussian`, `pissa` (the base's largest singular values), `loftq` (what nf4 loses); prompt: `vocabulary` (embedding rows)."""
    quantise: Quantisation = Quantisation.none
    """lora: `nf4` stores the frozen linear layers, but for the head, in 0.52 bytes a parameter (QLoRA, arXiv 2305.14314)."""
    adapter: str | None = None
    """lora, dora, ia3, prompt, prefix, bottleneck: a PEFT adapter directory to begin with, as another run's export, instead of `init`."""
    lr_ratio: float = 1.0
    """lora, dora: learning rate of the B matrices over that of the rest (LoRA+, arXiv 2402.12354)."""
    virtual_tokens: int = 20
    """prompt, prefix, ptuning: trained tokens, or keys and values of each layer, in front of every row."""
    encoder_size: int | None = None
    """ptuning, prefix: width of the network that makes them; empty is the hidden size for ptuning, none at all for prefix."""
    freeze: list[str] = field(default_factory=list)
    """freeze: parameters that stay, by shell patterns of their names, as ['*embed_tokens*','model.layers.[0-9].*']."""
    last_blocks: int | None = None
    """freeze: train only so many blocks at the end, and what follows them."""
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
    bottleneck: int = 64
    """bottleneck: features between its two matrices."""
    activation: AdapterActivation = AdapterActivation.relu
    """bottleneck: what is between its two matrices."""
    scale: float = 1.0
    """bottleneck: what it adds is multiplied by this."""
    parallel: bool = False
    """bottleneck: read the input of each target instead of its output."""


@dataclass(kw_only=True)
class EngineConfig:
    """How parameters, gradients and optimizer state are sharded over ranks, and what of it is kept off the device."""

    name: EngineName = EngineName.fsdp
    """`fsdp` is PyTorch's fully_shard (FSDP2), `zero3` DeepSpeed's ZeRO stage 3; the losses are the same."""
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
    mesh: MeshChoice = MeshChoice.given
    """fsdp: `auto` plans the sizes below that are 1 or empty for `hardware`, once a run: the fastest mesh that fits."""
    replicate: int = 1
    """fsdp: copies of the model, each sharded over `shard` ranks (HSDP); nodes, say, where the network between them is slow."""
    shard: int | None = None
    """fsdp: groups of `context` ranks that share one copy; empty is all ranks / `replicate` / `context` / `tensor`."""
    context: int = 1
    """fsdp: ranks that share each row, a slice of its tokens each; they exchange heads (Ulysses), beyond these also keys; for long rows."""
    tensor: int = 1
    """fsdp: ranks of a node that split each layer, by transformers' own plan; for models and batches too large for sharding alone."""
    expert: int = 1
    """fsdp: ranks of a node that have a part of each mixture's experts each; tokens go to their experts."""
    prefetch: int = 1
    """fsdp: blocks gathered ahead of the one that computes; each costs one block's parameters in the compute type."""
    reshard_after_backward: bool = True
    """fsdp: free gathered parameters between the microbatches of a step; false keeps all of them until the last one: fewer all-gathers."""
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
    """zero3: reduce gradients on a stream of their own while backward continues."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """zero3: keys of DeepSpeed's JSON that no field here sets, as +engine.overrides.zero_optimization.stage3_max_live_parameters=1e8."""


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate, a pure function of the step."""

    name: OptimizerName = OptimizerName.adamw
    """The optimizer; optim=NAME is its preset, with the rate that it needs next to AdamW's."""
    state: OptimizerState = OptimizerState.fp32
    """adamw, lion: type of the moments; `bf16` halves them, with stochastic rounding. Master weights stay float32."""
    lr: float | None = None
    """Peak learning rate, whatever the method; empty takes `peft.lr` for adapters and `full_lr` for all else."""
    full_lr: float = 1e-5
    """Peak learning rate where weights of the model itself are trained: peft=none and peft=freeze."""
    adamw_factor: float = 1.0
    """Learning rate over AdamW's: multiplies `full_lr` and `peft.lr`, which are AdamW's, and never `lr`; a preset sets it."""
    lr_factor: float = 1.0
    """Multiplies whichever rate is used: a sweep around rates that differ by method, or the step from large models to a small one."""
    schedule: Schedule = Schedule.cosine
    """Shape after warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up, peak / warmup_steps at the first; 0 takes `warmup_fraction`."""
    warmup_fraction: float = 0.0
    """Warm-up as a share of all steps, for runs counted in epochs. In [0, 1]."""
    min_lr_fraction: float = 0.0
    """Learning rate that the schedule reaches after the last step, as a share of the peak. In [0, 1]."""
    decay_fraction: float = 0.2
    """Share of all steps that `wsd` spends on its final linear decay. In [0, 1]."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW, schedule-free AdamW and Lion, each in [0, 1)."""
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
    extend: bool = False
    """Let a run that has begun or is done have more `steps` or `epochs`, where the steps until now stay the same; else it is refused."""
    global_batch: int = 16
    """Rows an optimizer step over all ranks; divisible by ranks x `microbatch`."""
    microbatch: int = 1
    """Rows a rank takes through one forward and backward."""
    precision: Precision = Precision.bf16
    """Compute type; master weights stay float32. `fp16` is for cards without bf16, and scales the loss."""
    loss_scale: float | None = None
    """fp16: factor of the loss in the first step, a power of two; halved where gradients overflow. Empty is 65536, torch.amp's."""
    loss_scale_steps: int | None = None
    """fp16: steps in a row without an overflow after which the loss scale doubles; empty is 2000, torch.amp's."""
    activations: Activations = Activations.keep
    """What backward finds of a block: `keep` all, `selective` attention and products, `block` its input, `offload` that on the host."""
    compile: bool = False
    """fsdp: compile each block with torch.compile: fewer passes over memory, and a minute or more before the first step, once a machine."""
    float8: Float8 = Float8.none
    """fsdp, bf16, GPUs from SM 8.9 on: matrix products of blocks in float8, scaled by row (`rowwise`) or by matrix (`tensorwise`)."""
    balance_loss: float | None = None
    """Mixtures: coefficient of the routers' balance loss, as `router_aux_loss_coef` of the model's config; empty adds none."""
    logits_chunk: int | None = None
    """Tokens whose logits exist at once, made again in backward; 0 makes them whole. Empty decides by their size: 512 MiB a microbatch."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; empty evaluates before the first and after the last step only."""
    eval_microbatch: int | None = None
    """Rows a rank evaluates at once; empty takes `microbatch`. Changes memory, never the loss."""
    patience: int | None = None
    """Evaluations in a row without a better loss that end the run early; empty never does."""
    export: Export | None = None
    """Step that is exported: `best` by held-out loss, or `last`; empty is best with `patience` or `checkpoint.keep_best`, else last."""
    min_improvement: float = 0.0
    """Smallest drop of the held-out loss that counts as better: in nats a token, or in the units of the objective."""
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
    profile: int | None = None
    """Steps of rank 0 to trace with torch.profiler, after the first two of an attempt, into RUN_DIR/profile; slower while it lasts."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save what a continued run needs, and how many to keep."""

    every: int | None = None
    """Optimizer steps between checkpoints; empty saves when the run is asked to stop or to save, and after the last step."""
    every_minutes: float | None = None
    """Minutes between checkpoints, in addition to `every`; by rank 0's clock, at the next step's end."""
    keep_last: int = 2
    """Newest checkpoints that are kept; at least 1."""
    keep_every: int | None = None
    """Keep each checkpoint whose step this divides, for good."""
    keep_best: int = 0
    """Keep so many checkpoints of lowest evaluation loss; a new best one is saved at once. At least 1 where the best is exported."""
    asynchronous: bool = True
    """Copy the state to host memory, where a node has twice the room, and write it while training continues; false waits."""
    strict: bool = False
    """End the run when a checkpoint cannot be written; otherwise it continues and tries again while there is an older one."""


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
    sample_s: float | None = 3600.0
    """objective=grpo and ppo: writing and scoring answers: begins anew with each batch of answers."""
    export_s: float | None = 3600.0
    """Exporting and checking the export: begins anew with each tensor, and each 64 MiB read or written."""
    slow_node: float = 1.5
    """A rank is named slow above so many times the median of all: its device, link or data. Healthy GPUs of a kind differ by under 1.1."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """What `python -m tools.evaluate` measures of a run that is done; training looks at none of it, and it may be changed later."""

    path: str | None = None
    """Rows to evaluate on, like `data.path`; empty takes the held-out rows, by which rates may have been chosen."""
    rows: int = 200
    """Rows that the model answers, evenly spread over them; 0 lets it answer none."""
    metrics: list[Metric] = field(default_factory=lambda: [Metric.exact_match, Metric.rouge_l])
    """What answers are measured by; the first is the task's score."""
    extract: str = "auto"
    """What exact_match compares: `hashes` (the number after ####), `number` (the last), `whole`, or a regular expression's first group."""
    max_new_tokens: int = 256
    """Longest answer in tokens; one that does not end by then counts as unfinished."""
    count_in_prompt: str | None = None
    """A regular expression: the task's score is also given by how often it matches in the prompt, as documents or examples do."""
    general: str | None = None
    """To measure forgetting: text as a file, directory or hub id, a run or a source of `data.mix` with held-out rows, or `sampled`."""
    general_rows: int = 200
    """Rows of it that count, evenly spread."""


@dataclass(kw_only=True)
class LogConfig:
    """Metrics: metrics.jsonl is always written; W&B mirrors it."""

    wandb: WandbMode = WandbMode.auto
    """Mirror to Weights & Biases."""
    project: str | None = None
    """W&B project; empty is WANDB_PROJECT, else `fulltune`."""
    entity: str | None = None
    """W&B user or team; empty is WANDB_ENTITY, else the key's own."""
    group: str | None = None
    """W&B group, to compare runs side by side; empty is WANDB_RUN_GROUP."""
    tags: list[str] = field(default_factory=list)
    """W&B tags in addition to the method and the engine; empty is WANDB_TAGS."""
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
    rl: RlConfig = field(default_factory=RlConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    reward: dict[str, Any] = field(default_factory=dict)
    """What answers are worth, by name, each a kind or a RewardConfig: reward.right=exact, or reward.right.kind=exact and more."""

    def __post_init__(self) -> None:
        """Type the rewards; raises ConfigError for what is not a valid reward."""
        self.reward = {name: reward_of(name, value) for name, value in self.reward.items()}


ASKS = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
"""What OmegaConf would resolve, such as ${oc.env:HF_TOKEN}: an odd backslash before it makes it a text."""


def read(path: Path | str) -> RunConfig:
    """Read a frozen config.yaml of a run that is over, whose data may be gone; raises ConfigError on what is not a config."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        return _typed(lambda: OmegaConf.load(path), str(path))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config.yaml", str(path), f"cannot be read: {str(error).splitlines()[0]}") from error


def read_at(run_dir: Path) -> RunConfig:
    """Read the config.yaml of a run that is over, with the directory that it is in now; raises ConfigError as `read` does."""
    return dataclasses.replace(read(run_dir / "config.yaml"), run_dir=str(run_dir.resolve()))


def parse(values: dict[str, Any]) -> RunConfig:
    """Return the config that `plain` has made plain; raises ConfigError on what is not a config."""
    from omegaconf import OmegaConf

    return _typed(lambda: OmegaConf.create(escaped(values)), "config")


def _typed(load: Callable[[], Any], name: str) -> RunConfig:
    """Return what is loaded as a RunConfig; raises ConfigError, which names the field or what was loaded, for an unknown field or type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = load()
        if ASKS.search(str(OmegaConf.to_container(loaded, resolve=False)).replace("\\\\", "\\")):  # as a repr has them
            reason = "asks for a variable or another setting (${...}), which no frozen config does: somebody has edited it"
            raise ConfigError(name, None, reason)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), loaded))
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
