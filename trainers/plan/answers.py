"""What a run's own answers take: a generator's weights, cache and work on tensors without values, and the time of a step by part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from trainers.config.choices import Offload, Precision, RewardKind
from trainers.config.rewards import timeout_of
from trainers.config.schema import RunConfig
from trainers.engines.base import COMPUTE
from trainers.generate.decode import choose
from trainers.generate.request import Sampling
from trainers.model.blueprint import Blueprint
from trainers.plan.estimate import FAST, GIGA, SLOW, Share
from trainers.plan.request import HardwareConfig, Place
from trainers.plan.trace import Kind, Moment, Trace
from trainers.rewards.scored import AT_ONCE
from trainers.rl.measured import measured_signals

Range = tuple[float, float]
"""Fast and slow, in seconds."""
QUICK_S = (1e-5, 1e-3)
"""Of an answer that is compared, counted or matched."""
SCORING_S = {RewardKind.math: (2e-3, 5e-2), RewardKind.code: (5e-2, math.inf)}
"""Of an answer, at best and at worst; at most what its time limit allows."""
UNKNOWN = (RewardKind.model, RewardKind.judge, RewardKind.function)
"""Kinds whose time depends on what they ask."""
ASSUMPTIONS = (
    f"an answer has rl.max_new_tokens tokens; each token reads weights and cache, and its operators start every {FAST.launch * 1e6:g} us "
    f"(fast) or {SLOW.launch * 1e6:g} us (slow); the GPUs of a generator work one after another",
    f"an answer is scored in {QUICK_S[0]:g} to {QUICK_S[1]:g} s, by math in {SCORING_S[RewardKind.math][0]:g} to "
    f"{SCORING_S[RewardKind.math][1]:g} s, by code in {SCORING_S[RewardKind.code][0]:g} s to its time limit, one after another",
)


@dataclass(frozen=True)
class Work:
    """What a part of an answer takes of a device."""

    flops: float
    moved: float
    """Bytes read and written, weights and cache included."""
    operators: int
    """Started one after another."""


@dataclass(kw_only=True)
class Answers:
    """What the answers of a run take; bytes are of one generator, which the GPUs of its node share out, or of its process on a CPU."""

    generators: int
    """One a node; of their own where the place has such."""
    answers: int
    """Of a step, over all generators."""
    batch: int
    """That a generator writes at once."""
    rounds: int
    """One after another, for the answers of a rollout."""
    weights_bytes: int
    cache_bytes: int
    """Of keys and values of a batch whose prompts and answers are as long as they may be."""
    work_bytes: int
    """Of all else where a generator's memory is highest."""
    reference_bytes: int
    """Of all ranks together: the frozen weights of the reference, as they are saved; 0 without one."""
    has_reference_on_host: bool
    """They are on the host, and are not a device's."""
    judges_bytes: int
    """Of the first rank's device: the reward models that it opens, with their work."""
    sync_bytes: int
    """That a rollout writes, and each generator reads, with new weights."""
    prompt: Work
    """Of reading the prompts of a batch."""
    token: Work
    """Of a token of each answer, on average."""
    seconds: dict[str, Range] = field(default_factory=dict)
    """Of a step by part, fast and slow: sync, sampling, scoring, measuring, training; empty where no device is named."""

    @property
    def bytes(self) -> int:
        """Return the bytes of a generator."""
        return self.weights_bytes + self.cache_bytes + self.work_bytes

    def of_rank(self, place: Place) -> float:
        """Return the bytes of the first rank's device: its share of a generator and of the reference, and the reward models."""
        generator = 0.0 if place.generators else self.bytes / place.ranks_per_node
        return generator + self.reference_of_rank(place) + self.judges_bytes

    def reference_of_rank(self, place: Place) -> float:
        """Return the bytes of the reference on a rank's device."""
        return 0.0 if self.has_reference_on_host else self.reference_bytes / place.size


def answers_of(config: RunConfig, place: Place, blueprint: Blueprint, parameters: int, export_bytes: int) -> Answers:
    """Return what a run's answers take, without times; `parameters` are the whole model's, with adapters."""
    rl, dtype = config.rl, COMPUTE[config.train.precision]
    generators, all_answers = place.generators or place.nodes, config.train.global_batch * rl.steps_per_rollout
    each = math.ceil(all_answers / generators)
    if place.generators:  # each takes whole batches
        each = math.ceil(all_answers / min(rl.batch, all_answers) / generators) * min(rl.batch, all_answers)
    batch, weights = min(rl.batch, each), parameters * dtype.itemsize
    parts = traced(blueprint, dtype, batch, config.data.seq_len - rl.max_new_tokens, rl.max_new_tokens)
    first, last = parts["first token"], parts["last token"]
    token = Work(
        flops=(first.work.flops + last.work.flops) / 2,
        moved=weights + (first.work.moved + first.kept + last.work.moved + last.kept) / 2,
        operators=first.work.operators,
    )
    return Answers(
        generators=generators,
        answers=config.train.global_batch,
        batch=batch,
        rounds=math.ceil(each / batch),
        weights_bytes=weights,
        cache_bytes=last.kept,
        reference_bytes=parameters * blueprint.saved_dtype.itemsize * config.engine.replicate if config.objective.kl_weight else 0,
        has_reference_on_host=config.engine.offload_param is not Offload.none,
        judges_bytes=sum(
            scorer_bytes(str(reward.path), config.data.seq_len) for reward in config.reward.values() if reward.kind is RewardKind.model
        ),
        work_bytes=max(part.highest for part in parts.values()) - last.kept,
        sync_bytes=export_bytes,
        prompt=replace(parts["prompt"].work, moved=parts["prompt"].work.moved + weights),
        token=token,
    )


@dataclass(frozen=True)
class Part:
    """Of a batch's answers: the work, and bytes beyond the weights where memory is highest in it and at its end."""

    work: Work
    """Without what products read."""
    highest: int
    kept: int


def traced(blueprint: Blueprint, dtype: torch.dtype, batch: int, prompt: int, new_tokens: int) -> dict[str, Part]:
    """Let a model without values read prompts and write answers as a generator does: `prompt`, `first token` and `last token`."""
    model: Any = blueprint.build()
    model.to(dtype)
    vocab_size = blueprint.config.get_text_config().vocab_size
    fake, counts = FakeTensorMode(allow_non_fake_inputs=True), _Count()
    trace = Trace(vocab_size, fake)

    def read(length: int, cached: int, cache: Any) -> Any:
        ids, mask = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, cached + length, dtype=torch.int64)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        choose(logits, Sampling(max_new_tokens=new_tokens), -torch.empty(batch, vocab_size).log(), 0.0)
        logits.log_softmax(-1)
        return output.past_key_values

    with fake, trace, counts, torch.no_grad():
        model.to_empty(device="cpu")
        model.tie_weights()
        model.eval()
        trace.label(model.parameters(), Kind.parameters)
        trace.restart()
        cache, cached = None, 0
        for name, length in {"prompt": prompt, "first token": 1, "between": new_tokens - 3, "last token": 1}.items():
            if length > 0:
                trace.mark(name)
                counts.begin(name)
                cache = read(length, cached, cache)
                cached += length
    return {moment.name: _part(moment, counts.found[moment.name]) for moment in trace.moments() if moment.name != "between"}


def scorer_bytes(folder: str, seq_len: int) -> int:
    """Return what a reward model's directory takes where it is opened: weights, and the most of scoring rows of `seq_len` tokens."""
    config = AutoConfig.from_pretrained(folder)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    trace = Trace(config.get_text_config().vocab_size, fake)
    with fake, trace, torch.no_grad():
        model.to_empty(device="cpu")
        trace.label(model.parameters(), Kind.parameters)
        trace.restart()
        trace.mark("scores")
        ids = torch.zeros(AT_ONCE, seq_len, dtype=torch.int64)
        getattr(model, model.base_model_prefix)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    weights: int = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    return weights + _part(trace.moments()[-1], 0).highest


def _part(moment: Moment, operators: int) -> Part:
    highest, kept = (round(sum(sizes.values()) - sizes[Kind.parameters]) for sizes in (moment.peak, moment.end))
    return Part(Work(moment.flops, moment.moved, operators), highest, kept)


class _Count(TorchDispatchMode):
    """Counts operators that compute something, by part."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.begin("")

    def begin(self, name: str) -> None:
        self.found: dict[str, int] = {**vars(self).get("found", {}), name: 0}
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[self.name] += not func.is_view
        return func(*args, **(kwargs or {}))


def seconds_of(answers: Answers, config: RunConfig, device: HardwareConfig, forward: Range, training: Range) -> dict[str, Range]:
    """Return the seconds of a step by part, fast and slow; `training` is the trainer's own part, `forward` that of all its forwards."""
    copied = answers.sync_bytes + answers.generators * answers.weights_bytes  # each generator opens the whole model again
    sync = copied / (GIGA * device.storage_gb_s) / config.rl.steps_per_rollout
    return {
        "sync": (sync, sync),
        "sampling": (_sampling(answers, config, device, FAST), _sampling(answers, config, device, SLOW)),
        "scoring": (_scoring(answers, config, 0), _scoring(answers, config, 1)),
        "measuring": (len(measured_signals(config)) * forward[0], len(measured_signals(config)) * forward[1]),
        "training": training,
    }


def step_of(parts: dict[str, Range], config: RunConfig, is_apart: bool = False) -> Range:
    """Return the seconds of a step, fast and slow, from those of its parts.

    With `rl.staleness` answers are given while others are trained on, by the same devices: at best neither slows the other. Generators
    that are on nodes of their own, `is_apart`, never do.
    """
    low, high = (sum(seconds) for seconds in zip(*parts.values(), strict=True))
    if config.rl.staleness:
        low -= min(parts["sampling"][0] + parts["scoring"][0], parts["training"][0])
        high -= min(parts["sampling"][1] + parts["scoring"][1], parts["training"][1]) if is_apart else 0
    return low, high


def _sampling(answers: Answers, config: RunConfig, device: HardwareConfig, share: Share) -> float:
    prompt, token = (_seconds(work, config, device, share) for work in (answers.prompt, answers.token))
    return answers.rounds * (prompt + (config.rl.max_new_tokens - 1) * token) / config.rl.steps_per_rollout


def _seconds(work: Work, config: RunConfig, device: HardwareConfig, share: Share) -> float:
    """Return the seconds of a part: of products and memory, or of operators that are started one after another."""
    peak = device.tflops_fp32 if config.train.precision is Precision.fp32 else device.tflops
    computed = work.flops / (1e12 * peak * share.products) + work.moved / (GIGA * device.memory_gb_s * share.memory)
    return max(computed, work.operators * share.launch)


def _scoring(answers: Answers, config: RunConfig, at: int) -> float:
    """Return the seconds of a step's scoring at best (0) or at worst (1), answer after answer."""
    kinds = [reward for reward in config.reward.values() if reward.kind not in UNKNOWN]
    each = [min(SCORING_S[reward.kind][at], timeout_of(reward)) if reward.kind in SCORING_S else QUICK_S[at] for reward in kinds]
    return sum(each) * answers.answers


def not_timed(config: RunConfig) -> list[str]:
    """Return what no time is known of, and what times take for granted, in words."""
    asked = sorted({str(reward.kind) for reward in config.reward.values() if reward.kind in UNKNOWN})
    words = f"scoring by {', '.join(asked)} takes as long as what is asked, which is not in the times"
    redrawn = (
        f"prompts whose answers all have one reward are drawn again, up to rl.redraws={config.rl.redraws} times, which is not in the times"
    )
    other = "rl.vllm: a generator's memory and time are planned as those of plain transformers; vLLM takes what rl.vllm_words lets it"
    ahead = "rl.staleness: in the fast time sampling and training do not slow each other, in the slow time they take turns"
    turns = (
        f"rl.environment: a conversation is planned as one turn of the model; it has up to rl.max_turns={config.rl.max_turns}, and the "
        "turns between take as long as the environment"
    )
    return (
        ([ahead] if config.rl.staleness else [])
        + ([turns] if config.rl.environment else [])
        + ([other] if config.rl.vllm else [])
        + ([words] if asked else [])
        + ([redrawn] if config.rl.redraws else [])
    )
