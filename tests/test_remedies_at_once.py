"""Every refusal of trainers/config names a way out that works: its overrides, applied to the same settings, are accepted."""

from __future__ import annotations

import ast
import re
import shlex
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import ROOT
from omegaconf import OmegaConf

from launcher.fields import all_fields
from trainers.config.checks import validate
from trainers.config.choices import DataSource
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig, plain
from trainers.config.sharding import check_world

OVERRIDE = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)*=[^\s,;:]+|[a-z_.]+=\[[^\]]*\]")
SCHEMA = OmegaConf.structured(RunConfig)
GROUPS = ("model", "data", "objective", "peft", "engine", "optim")


def good() -> RunConfig:
    return RunConfig(
        model=ModelConfig(architecture={"model_type": "llama"}, train_tokenizer=4096),
        data=DataConfig(source=DataSource.python_docs),
        train=TrainConfig(steps=10, global_batch=4),
    )


def preset(group: str, name: str) -> dict[str, Any]:
    """Return the settings of conf/GROUP/NAME.yaml, with those of the presets that it builds on."""
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml"))
    assert isinstance(values, dict)
    found: dict[str, Any] = {}
    for base in values.pop("defaults", []):
        found |= preset(group, base) if base != "_self_" else {}
    return found | values


def changed(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Return a config with overrides as the command line takes them: a preset replaces its group's settings."""
    values = plain(config)
    for override in overrides:
        name, _, value = override.partition("=")
        if name in GROUPS:
            kept = {
                key: item for key, item in values[name].items() if key in ("id", "path", "nvme_path", "architecture", "train_tokenizer")
            }
            values[name] = (kept if name != "peft" else {}) | preset(name, value)
        if name == "model.architecture":  # a mapping is replaced, not added to
            values["model"]["architecture"] = yaml.safe_load(value)
    plain_values = [override for override in overrides if override.partition("=")[0] not in (*GROUPS, "model.architecture")]
    merged = OmegaConf.merge(SCHEMA, values, OmegaConf.from_dotlist(plain_values))
    made = OmegaConf.to_object(merged)
    assert isinstance(made, RunConfig)
    return made


def remedies(error: ConfigError) -> list[list[str]]:
    """Return the ways that a remedy offers, each with its overrides."""
    ways = re.split(r", or | or (?=[a-z_.]+=)", error.remedy)
    ways = [] if "python -m launcher" in error.remedy else ways  # another command first
    return [found for way in ways if (found := [word for word in OVERRIDE.findall(" ".join(shlex.split(way, posix=False))) if "=" in word])]


def adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}')
    return str(folder)


def t5(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return str(folder)


def template(folder: Path, text: str) -> str:
    (folder / "template.jinja").write_text(text)
    return str(folder / "template.jinja")


LORA = "peft=lora"
STREAM = "data.streaming=true"
MIX = ("data.source=files", "data.mix.a.path=owner/a", "data.mix.a.weight=1", "data.mix.b.path=owner/b", "data.mix.b.weight=2")
RL = ("objective=grpo", "reward.right.kind=exact", "data.packing=false", "rl.group_size=2")
PPO = ("objective=ppo", *RL[1:])
CASES: dict[str, list[str] | Callable[[Path], list[str]]] = {
    "a number that is not positive": ["train.steps=0"],
    "a number below zero": ["optim.weight_decay=-1"],
    "an empty text": ["name=''"],
    "a share above its range": ["data.eval_fraction=0.9"],
    "no tasks": ["data.source=reasoning_gym", "data.path=null"],
    "tasks of a file": ["data.source=reasoning_gym", "data.path=rows.jsonl", "data.tasks={chain_sum:{}}"],
    "fewer rows than tasks": ["data.source=reasoning_gym", "data.path=null", "data.tasks={chain_sum:{},gcd:{}}", "data.task_rows=1"],
    "tasks in a mixture": [*MIX, "data.mix.a.source=reasoning_gym", "data.mix.a.path=null"],
    "no model": ["model.architecture={}", "model.train_tokenizer=0"],
    "two models": ["model.id=owner/name", "model.train_tokenizer=0"],
    "no such model": ["model.id=/nowhere", "model.architecture={}", "model.train_tokenizer=0"],
    "no base yet": ["model.id=runs/quickstart_base_x/export", "model.architecture={}", "model.train_tokenizer=0"],
    "an adapter for a model": lambda folder: [f"model.id={adapter(folder)}", "model.architecture={}", "model.train_tokenizer=0"],
    "a directory without a config": lambda folder: [f"model.id={folder}", "model.architecture={}", "model.train_tokenizer=0"],
    "a URL of a kind that nothing reads": ["data.path=ftp://host/rows.jsonl"],
    "no such tokenizer": ["model.tokenizer=/nowhere", "model.train_tokenizer=0"],
    "two tokenizers": lambda folder: [f"model.tokenizer={folder}"],
    "no tokenizer": ["model.train_tokenizer=0"],
    "no model_type": ["model.architecture={hidden_size: 8}"],
    "a token twice": ["model.add_tokens=[a,a]"],
    "a tokenizer without room": ["model.train_tokenizer=100"],
    "no data": ["data.source=files"],
    "no such data": ["data=files", "data.path=/nowhere"],
    "two sources of held-out rows": ["data.eval_path=owner/name", "data.eval_fraction=0.1"],
    "no such template": ["data.template=/nowhere.jinja"],
    "an empty template": lambda folder: [f"data.template={template(folder, ' ')}"],
    "an encoder-decoder that is not called one": lambda folder: [
        f"model.id={t5(folder)}",
        "model.architecture={}",
        "model.train_tokenizer=0",
    ],
    "an encoder-decoder of pairs": ["model.encoder_decoder=true", "data.packing=false", "objective=dpo"],
    "an encoder-decoder that learns texts": ["model.encoder_decoder=true", "data.packing=false", "objective=cpt"],
    "an encoder-decoder with bottlenecks": ["model.encoder_decoder=true", "data.packing=false", "peft=houlsby"],
    "an encoder-decoder that packs": ["model.encoder_decoder=true"],
    "an encoder-decoder of a stream": [
        *(
            "model.encoder_decoder=true",
            "data.packing=false",
            "data.eval_fraction=0",
            STREAM,
            "data.source=files",
            "data.path=hf://datasets/a/b",
        )
    ],
    "an encoder-decoder with a template": ["model.encoder_decoder=true", "data.packing=false", "data.template=chatml"],
    "an encoder-decoder that writes prompts": ["model.encoder_decoder=true", "data.packing=false", "data.supervise=all"],
    "an encoder-decoder that leaves reasoning out": ["model.encoder_decoder=true", "data.packing=false", "data.reasoning=strip"],
    "an encoder-decoder with a source of turns": [*MIX, "model.encoder_decoder=true", "data.packing=false", "data.mix.b.document=turn"],
    "an encoder-decoder of turns": ["model.encoder_decoder=true", "data.packing=false", "data.document=turn"],
    "an encoder-decoder on shared rows": ["model.encoder_decoder=true", "data.packing=false", "engine.context=2"],
    "an encoder-decoder in split layers": ["model.encoder_decoder=true", "data.packing=false", "engine.tensor=2"],
    "a compiled encoder-decoder": ["model.encoder_decoder=true", "data.packing=false", "train.compile=true"],
    "an encoder-decoder in float8": ["model.encoder_decoder=true", "data.packing=false", "train.float8=tensorwise", "train.precision=bf16"],
    "an encoder-decoder in fp16": ["model.encoder_decoder=true", "data.packing=false", "train.precision=fp16"],
    "an encoder-decoder with inputs on the host": ["model.encoder_decoder=true", "data.packing=false", "train.activations=offload"],
    "an encoder-decoder with a balance loss": ["model.encoder_decoder=true", "data.packing=false", "train.balance_loss=0.1"],
    "an encoder-decoder with virtual tokens": ["model.encoder_decoder=true", "data.packing=false", "peft=prompt"],
    "the last blocks of an encoder-decoder": ["model.encoder_decoder=true", "data.packing=false", "peft=freeze"],
    "an encoder-decoder that is measured on text": ["model.encoder_decoder=true", "data.packing=false", "evaluation.general=sampled"],
    "a quantised encoder-decoder": ["model.encoder_decoder=true", "data.packing=false", "peft=qlora"],
    "turns of texts": ["data.document=turn", "objective=cpt"],
    "turns with all tokens": ["data.document=turn", "data.supervise=all"],
    "reasoning without loss in texts": ["data.reasoning=mask", "objective=cpt"],
    "reasoning without loss where all is trained": ["data.reasoning=mask", "data.supervise=all"],
    "reasoning of texts": ["data.reasoning=strip", "data.layout=text"],
    "styles of other rows": ["data.styles=[business,casual]"],
    "one style": ["data.layout=styles", "data.styles=[business]", "objective=sft"],
    "an instruction that names no style": ["data.layout=styles", "data.styles=[a,b]", "data.style_instruction=again", "objective=sft"],
    "styles of texts": ["data.layout=styles", "data.styles=[a,b]", "objective=cpt"],
    "split conversations": ["data.too_long=split"],
    "one token a row": ["data.seq_len=1"],
    "a split of nothing": ["data.eval_split=test"],
    "a revision of no hub": ["data.revision=main"],
    "a configuration of no hub": ["data.config=main"],
    "steps and epochs": ["train.epochs=1"],
    "a mean over no constant": ["objective=grpo", "objective.average=constant"],
    "a constant that divides nothing": ["objective=grpo", "objective.constant=64"],
    "a probability below 0": ["objective=gspo", "objective.clip_low=1.5"],
    "answers of no run that gives any": ["rl.group_size=4"],
    "answers that nobody rewards": ["objective=grpo"],
    "a discount above one": [*PPO, "objective.gamma=1.5"],
    "an estimate of no divergence": [*PPO, "objective.kl_estimator=k3", "objective.kl_weight=0"],
    "no such critic": [*PPO, "objective.critic=/nowhere"],
    "a critic behind virtual tokens": [*PPO, "peft=prompt"],
    "two models to settle": [*PPO, "train.activations=auto"],
    "two models on NVMe": lambda folder: [*PPO, "engine=zero3_nvme", f"engine.nvme_path={folder}"],
    "a reference on NVMe": lambda folder: [*RL, "objective.kl_weight=0.1", "engine=zero3_nvme", f"engine.nvme_path={folder}"],
    "a prompt without an answer": [*PPO, "rl.group_size=0"],
    "no such Python": [*RL, "rl.vllm=/nowhere"],
    "words for no server": [*RL, "rl.vllm_words=[--x]"],
    "a secret in a server's words": [*RL, "rl.vllm=/bin/true", "rl.vllm_words=[--api-key,tok]"],
    "a server that is started and runs already": [*RL, "rl.vllm=/bin/true", "rl.servers=[http://a:1]"],
    "an address of no server": [*RL, "rl.servers=[a:1]"],
    "a secret in a server's address": [*RL, "rl.servers=['http://me:hunter2hunter2@a:1']"],
    "a server for two": [*RL, "rl.servers=[http://a:1,http://a:1]"],
    "an adapter for servers": [*RL, LORA, "rl.servers=[http://a:1]"],
    "servers that are ahead": [*RL, "rl.servers=[http://a:1]", "rl.staleness=1"],
    "a server that is ahead": [*RL, "rl.vllm=/bin/true", "rl.staleness=1"],
    "a critic that is behind": [*RL, "objective=ppo", "rl.staleness=1"],
    "a function while a step is taken": [*RL, "reward.right.kind=function", "reward.right.path=os:getpid", "rl.staleness=1"],
    "an adapter for a server": [*RL, LORA, "rl.vllm=/bin/true"],
    "answers without chance that are trained on": [*RL, "rl.temperature=0"],
    "prompts that never come back": [*RL, "rl.curriculum=0"],
    "no answer to held-out prompts": [*RL, "rl.eval_samples=0"],
    "held-out answers below chance": [*RL, "rl.eval_temperature=-1"],
    "one held-out answer many times": [*RL, "rl.eval_temperature=0", "rl.eval_samples=4"],
    "turns without an environment": [*RL, "rl.max_turns=2"],
    "an environment that is no class": ["objective=grpo", "data.packing=false", "rl.group_size=2", "rl.environment=one"],
    "turns that a critic values": ["objective=ppo", *RL[1:], "rl.environment=one:One"],
    "turns ahead of training": [*RL, "rl.environment=one:One", "rl.staleness=1"],
    "no turns": [*RL, "rl.environment=one:One", "rl.max_turns=0"],
    "a reward that an environment gives": ["reward.environment.kind=exact", *RL, "rl.environment=one:One"],
    "a group of one": [*RL, "rl.group_size=1"],
    "a part of a group": [*RL, "rl.group_size=3"],
    "answers without a prompt": [*RL, "rl.max_new_tokens=2048"],
    "answers that nothing trains on": [*RL, "rl.steps_per_rollout=4"],
    "answers in one row": [*RL, "data.packing=true"],
    "answers to a mixture": ["objective=grpo", "reward.right.kind=exact", "data.packing=false", "rl.group_size=2", *MIX],
    "prompts of a stream": [*RL, "data.streaming=true"],
    "answers to each turn": [*RL, "data.document=turn"],
    "reasoning of answers that are written": [*RL, "data.reasoning=strip"],
    "prompts of one layout": [*RL, "data.layout=messages"],
    "prompts that are left out": [*RL, "data.skip_bad_rows=true"],
    "prompts in pieces": [*RL, "data.too_long=split"],
    "answers that are left out": [*RL, "train.on_spike=rollback", "checkpoint.every=2"],
    "microbatches that do not divide": ["train.microbatch=3"],
    "three betas": ["optim.betas=[0.1,0.2,0.3]"],
    "two warm-ups": ["optim.warmup_steps=1", "optim.warmup_fraction=0.1"],
    "a warm-up without end": ["optim.warmup_steps=10"],
    "patience without held-out rows": ["train.patience=1"],
    "patience without evaluations": ["train.patience=1", "data.eval_fraction=0.1"],
    "no such evaluation rows": ["evaluation.path=/nowhere"],
    "nothing that measures": ["evaluation.metrics=[]"],
    "an expression that is none": ["evaluation.extract=(("],
    "a count of an expression that is none": ["evaluation.count_in_prompt=(("],
    "a count of nothing": ["evaluation.count_in_prompt=a*"],
    "two groups": ["evaluation.extract=(a)(b)"],
    "one class": ["objective=classify", "objective.labels=[a]"],
    "weights of other classes": ["objective=classify", "objective.class_weights=[1,2]"],
    "a weight below zero": ["objective=classify", "objective.labels=[a,b]", "objective.class_weights=[1,-1]"],
    "two sources of weights": ["objective=classify", "objective.labels=[a,b]", "objective.class_weights=[1,2]", "objective.balanced=true"],
    "a score behind virtual tokens": ["objective=reward", "peft=prompt", "data.packing=false"],
    "logits of a head of scores": ["objective=reward", "train.logits_chunk=64"],
    "turns of a class": ["objective=classify", "data.supervise=all"],
    "a head saved twice": ["objective=reward", LORA, "peft.modules_to_save=[score]"],
    "quantised full training": ["peft.quantise=nf4"],
    "a setting of another method": ["peft.rank=4"],
    "dropping everything": [LORA, "peft.dropout=1"],
    "a target without a name": [LORA, "peft.targets=['']"],
    "all and one": [LORA, "peft.targets=[all-linear,q_proj]"],
    "a start of another method": [LORA, "peft.init=vocabulary"],
    "loftq without bits": [LORA, "peft.init=loftq"],
    "pissa with bits": [LORA, "peft.init=pissa", "peft.quantise=nf4"],
    "nothing to freeze": ["peft.method=freeze"],
    "no such adapter": [LORA, "peft.adapter=/nowhere"],
    "an adapter and a start": lambda folder: [LORA, f"peft.adapter={adapter(folder)}", "peft.init=gaussian"],
    "ranks that do not fall": ["peft=adalora", "peft.target_rank=64"],
    "a decay of one": ["peft=adalora", "peft.beta1=1", "peft.tinit=0", "peft.tfinal=2"],
    "no step to prune in": ["peft=adalora"],
    "ranks in files": [
        "peft=adalora",
        "peft.tinit=0",
        "peft.tfinal=2",
        "engine=zero3",
        "engine.offload_optimizer=nvme",
        "engine.nvme_path=/x",
    ],
    "a bottleneck without features": ["peft=houlsby", "peft.bottleneck=0"],
    "a bottleneck that adds nothing": ["peft=parallel", "peft.scale=0"],
    "a bottleneck in bits": ["peft=pfeiffer", "peft.quantise=nf4"],
    "a bottleneck of split layers": ["peft=houlsby", "engine.tensor=2"],
    "rolling back to nothing": ["train.on_spike=rollback"],
    "packed prompts": ["peft=prompt"],
    "prefixes computed again": ["peft=prefix", "data.packing=false", "train.activations=block"],
    "products added to twice": ["peft=adalora", "peft.tinit=0", "peft.tfinal=2", "train.activations=selective"],
    "prompts in one row": ["peft=prompt", "data.packing=false", "model.attention=flash_attention_2"],
    "a setting of the other engine": ["engine=zero3", "engine.prefetch=2"],
    "files for fsdp": ["engine.offload_param=nvme"],
    "parameters without their state": ["engine.offload_param=cpu"],
    "no place for files": ["engine=zero3", "engine.offload_optimizer=nvme"],
    "a place without files": ["engine.nvme_path=/x"],
    "a key of ours": ["engine=zero3", "engine.overrides={bf16: 1}"],
    "a key without effect": ["engine=zero3", "engine.overrides={zero_optimization: {round_robin_gradients: true}}"],
    "an unknown key": ["engine=zero3", "engine.overrides={zero_optimisation: 1}"],
    "a key that is a mapping": ["engine=zero3", "engine.overrides={aio: 1}"],
    "blocks of the other engine compiled": ["engine=zero3", "train.compile=true"],
    "a method of many graphs": ["peft=dora", "train.compile=true"],
    "float8 for the other engine": ["engine=zero3", "train.float8=rowwise"],
    "float8 in fp32": ["train.float8=tensorwise", "train.precision=fp32"],
    "float8 for an adapter": [LORA, "train.float8=rowwise"],
    "a scale of bf16": ["train.loss_scale=1024"],
    "a growth of fp32": ["train.loss_scale_steps=100", "train.precision=fp32"],
    "a scale that rounds": ["train.precision=fp16", "train.loss_scale=1000"],
    "float8 in fp16": ["train.float8=rowwise", "train.precision=fp16"],
    "importance of scaled gradients": ["peft=adalora", "peft.tinit=0", "peft.tfinal=2", "engine=zero3", "train.precision=fp16"],
    "a method without a rate": ["peft.method=lora"],
    "a rate of another optimizer": [LORA, "optim=sgd"],
    "turns of pairs": ["data.document=turn", "objective=dpo"],
    "reasoning of pairs without loss": ["data.reasoning=mask", "objective=dpo"],
    "pairs with all tokens": ["data.supervise=all", "objective=dpo"],
    "a setting of another objective": ["objective.margin=1"],
    "a share of wrong pairs that turns them": ["objective=dpo", "objective.label_smoothing=0.6"],
    "a label that is all spread": ["objective=sft", "objective.label_smoothing=1"],
    "smoothing of what has no distribution": ["objective=simpo", "objective.label_smoothing=0.1"],
    "smoothing of a hinge": ["objective=dpo", "objective.label_smoothing=0.1", "objective.loss=hinge"],
    "robust against nothing": ["objective=dpo", "objective.robust=true"],
    "nothing of the teacher": ["objective=distil", "objective.ce_weight=1"],
    "a mixture of the teacher alone": ["objective=distil", "objective.divergence=jsd", "objective.beta=1"],
    "no such teacher": ["objective=distil", "objective.teacher=/nowhere"],
    "pairs of no list": ["data.pairs=all"],
    "no weight at all": ["objective=kto", "objective.desirable_weight=0", "objective.undesirable_weight=0"],
    "no such reference": ["objective=dpo", "objective.reference=/nowhere"],
    "an alpha of no divergence": ["objective=dpo", "objective.f_divergence=alpha", "objective.f_alpha=2"],
    "an alpha of another divergence": ["objective=dpo", "objective.f_alpha=0.2"],
    "a divergence of ratios a token": ["objective=dpo", "objective.f_divergence=forward_kl", "objective.length_normalised=true"],
    "moments of another type": ["optim=muon", "optim.state=bf16"],
    "matrices in flat partitions": ["optim=muon", "engine=zero3"],
    "an average with a schedule": ["optim=schedule_free_adamw", "optim.schedule=linear"],
    "an average of nothing": ["optim=schedule_free_adamw", "optim.betas=[0,0.9]"],
    "an average of pruned ranks": ["optim=schedule_free_adamw", "peft=adalora", "peft.tinit=0", "peft.tfinal=2"],
    "a momentum in files": ["optim=lion", "engine=zero3_nvme", "engine.nvme_path=/x"],
    "codes on the host": ["optim=adamw_8bit", "engine=fsdp_offload"],
    "balance with tokens in front": ["peft=prompt", "data.packing=false", "train.balance_loss=0.01"],
    "balance of what is filled up": ["train.balance_loss=0.01", "train.compile=true"],
    "balance of pairs": ["train.balance_loss=0.01", "objective=simpo"],
    "stacks of another method": ["peft=dora", "peft.targets=[experts]"],
    "dropout on stacks": [LORA, "peft.targets=[experts]", "peft.dropout=0.1"],
    "compiled stacks": [LORA, "peft.dropout=0", "peft.targets=[experts]", "train.compile=true"],
    "stacks one by one": [LORA, "peft.dropout=0", "peft.targets=[experts]", "model.experts=eager"],
    "a setting of mixtures without one": ["data.mix_by=rows"],
    "one data set and several": [*MIX, "data.path=owner/name"],
    "a source that is not there": [*MIX, "data.mix.a.path=/nowhere"],
    "classes of several sources": [*MIX, "objective=classify"],
    "a source with a name that metrics cannot have": [*MIX, "data.mix.a/b.path=owner/c", "data.mix.a/b.weight=1"],
    "a share below zero": [*MIX, "data.mix.a.weight=-1"],
    "a source without a weight": [*MIX, "data.mix.a.weight=null"],
    "weights of nothing": [*MIX, "data.mix.a.weight=0", "data.mix.b.weight=0"],
    "no temperature": [*MIX, "data.mix_temperature=0"],
    "a last weight below zero": [*MIX, "data.mix_steps=[5]", "data.mix.a.then=[-1]"],
    "a last weight and no first": [*MIX, "data.mix.a.weight=null", "data.mix.b.weight=null", "data.mix_steps=[5]", "data.mix.a.then=[1]"],
    "a last weight that is never reached": [*MIX, "data.mix.a.then=[1]"],
    "steps in which nothing changes": [*MIX, "data.mix_steps=[5]"],
    "steps that are not in order": [*MIX, "data.mix_steps=[5,5]", "data.mix.a.then=[1,2]"],
    "phases without steps": [*MIX, "data.mix_change=phase"],
    "weights that end at nothing": [*MIX, "data.mix_steps=[5]", "data.mix.a.then=[0]", "data.mix.b.then=[0]"],
    "a ratio of other sources": [*MIX, "data.mix.a.weight=null", "data.mix.b.weight=null", "data.mix_ratio=[1,2,3]"],
    "a ratio below zero": [*MIX, "data.mix.a.weight=null", "data.mix.b.weight=null", "data.mix_ratio=[1,-2]"],
    "a ratio and weights": [*MIX, "data.mix_ratio=[80,20]"],
    "a source without a path": [*MIX, "data.mix.a.path=''"],
    "a source without rows": [*MIX, "data.mix.a.max_rows=0"],
    "a source that is held out": [*MIX, "data.mix.a.eval_fraction=1"],
    "no passes": [*MIX, "data.mix_exhausted=drop", "data.mix.a.repeat=0"],
    "passes of what repeats": [*MIX, "data.mix.a.repeat=2"],
    "rewards that nothing learns from": ["reward.a.kind=exact"],
    "a reward with a name that metrics cannot have": ["reward.a/b.kind=exact"],
    "a setting of another kind of reward": ["reward.a.kind=exact", "reward.a.pattern=x"],
    "a form without a pattern": ["reward.a.kind=format"],
    "a weight without an end": ["reward.a.kind=exact", "reward.a.weight=inf"],
    "no processes for code": ["reward.a.kind=code", "reward.a.processes=0"],
    "a soft end below zero": ["reward.a.kind=length", "reward.a.soft=-1"],
    "a longest answer below the shortest": ["reward.a.kind=length", "reward.a.min=2", "reward.a.max=1"],
    "an extract of two groups": ["reward.a.kind=exact", "reward.a.extract='(a)(b)'"],
    "a pattern that is none": ["reward.a.kind=format", "reward.a.pattern='('"],
    "no such schema": ["reward.a.kind=json", "reward.a.schema=/nowhere"],
    "no such reward model": ["reward.a.kind=model", "reward.a.path=/nowhere"],
    "shards of no stream": ["data.shard_rows=100"],
    "a stream without an end": [STREAM, "train.steps=null", "train.epochs=1"],
    "a stream of several sources": [STREAM, *MIX],
    "a share of a stream": [STREAM, "data.eval_fraction=0.1"],
    "a stream that is to be measured first": [STREAM, "objective=dpo"],
    "a stream of a hub data set": [STREAM, "data.source=files", "data.path=owner/name", "data.revision=main"],
    "rows that do not divide over ranks": ["train.global_batch=7"],
    "copies that do not divide": ["engine.replicate=4"],
    "a shard of another size": ["engine.shard=3"],
    "ranks that are no groups": ["engine.context=3"],
    "groups that are no copies": ["engine.context=2", "engine.replicate=2"],
    "shared rows of the other engine": ["engine=zero3", "engine.context=2"],
    "shared rows in compiled blocks": ["engine.context=2", "train.compile=true"],
    "shared rows in float8": ["engine.context=2", "train.float8=rowwise"],
    "shared rows after virtual tokens": ["engine.context=2", "peft=prompt", "data.packing=false"],
    "shared rows that are scored": ["engine.context=2", "objective=reward"],
    "shared rows by positions": ["engine.context=2", "model.attention=flex"],
    "ranks that cannot split layers": ["engine.tensor=3"],
    "heads that do not divide": ["engine.tensor=2", "model.architecture={model_type: llama, num_attention_heads: 3}"],
    "a vocabulary that does not divide": ["engine.tensor=2", "model.architecture={model_type: llama, vocab_size: 33}"],
    "layers split over nodes": ["engine.tensor=2"],
    "split layers on the host": ["engine=fsdp_offload", "engine.tensor=2"],
    "split layers of the other engine": ["engine=zero3", "engine.tensor=2"],
    "split layers in compiled blocks": ["engine.tensor=2", "train.compile=true"],
    "split layers in float8": ["engine.tensor=2", "train.float8=rowwise"],
    "split layers with other adapters": ["engine.tensor=2", "peft=dora"],
    "split layers in 4 bits": ["engine.tensor=2", "peft=qlora"],
    "split layers next to second copies": ["engine.tensor=2", "peft=lora", "peft.modules_to_save=[lm_head]"],
    "split layers and whole matrices": ["engine.tensor=2", "optim=muon"],
    "split layers and moments of 16 bits": ["engine.tensor=2", "optim.state=bf16"],
    "split layers that are scored": ["engine.tensor=2", "objective=reward"],
    "a part of the vocabulary of a teacher": ["engine.tensor=2", "objective=distil"],
    "a part of the vocabulary of smoothed labels": ["engine.tensor=2", "objective.label_smoothing=0.1"],
    "ranks that cannot have all experts": ["engine.expert=3"],
    "experts that do not divide": ["engine.expert=2", "model.architecture={model_type: mixtral, num_local_experts: 3}"],
    "experts dealt over nodes": ["engine.expert=2"],
    "dealt experts of the other engine": ["engine=zero3", "engine.expert=2"],
    "dealt experts in split layers": ["engine.expert=2", "engine.tensor=2"],
    "dealt experts in compiled blocks": ["engine.expert=2", "train.compile=true"],
    "dealt experts in blocks of which some is kept": ["engine.expert=2", "train.activations=selective"],
    "dealt experts in float8": ["engine.expert=2", "train.float8=rowwise"],
    "dealt experts with other adapters": ["engine.expert=2", "peft=dora"],
    "dealt experts in 4 bits": ["engine.expert=2", "peft=qlora"],
    "dealt experts and whole matrices": ["engine.expert=2", "optim=muon"],
    "dealt experts and moments of 16 bits": ["engine.expert=2", "optim.state=bf16"],
}
RANKS = 2


def refusal(config: RunConfig) -> ConfigError | None:
    try:
        validate(config)
        check_world(config, RANKS, 1)
    except ConfigError as error:
        return error
    return None


def test_the_settings_that_the_cases_change_are_accepted() -> None:
    assert refusal(good()) is None


@pytest.mark.parametrize("case", CASES)
def test_each_way_out_of_a_refusal_is_one(case: str, tmp_path: Path) -> None:
    """One that asks for something more names that in a refusal of its own."""
    made = CASES[case]
    config = changed(good(), made(tmp_path) if callable(made) else made)
    error = refusal(config)
    assert error is not None
    for way in remedies(error):
        then = refusal(changed(config, way))
        assert then is None or (then.path, then.reason) != (error.path, error.reason), f"{way} of {error}"


def test_each_refusal_of_the_settings_has_a_case(tmp_path: Path) -> None:
    reached = set()
    for made in CASES.values():
        error = refusal(changed(good(), made(tmp_path) if callable(made) else made))
        assert error is not None
        reached |= {(Path(frame.filename).name, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)}
        for file in tmp_path.iterdir():
            file.unlink()
    missing = [
        f"{path.name}:{first}"
        for path in sorted((ROOT / "trainers" / "config").glob("*.py"))
        for first, last in raises(path)
        if path.name not in ("schema.py", "errors.py") and not any((path.name, line) in reached for line in range(first, last + 1))
    ]
    assert not missing, "refusals without a line in CASES above"


def raises(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the first and last line of each `raise ConfigError(...)` of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and "ConfigError" in ast.dump(node):
            yield node.lineno, node.end_lineno or node.lineno


ROOMS = "|".join(GROUPS)
SETTING = re.compile(rf"(?<![\w./-])((?:{ROOMS}|train|checkpoint|limits|evaluation|log|reward|launch|plan|hardware)(?:\.[a-z_0-9]+)+)=")
PRESET = re.compile(rf"(?<![\w./-])({ROOMS}|launch|hardware)=([a-z_0-9]+)")


def test_each_setting_and_preset_that_a_message_names_exists() -> None:
    """In every text of the code, so that no remedy of a refusal which only ranks can make is forgotten."""
    fields, wrong = all_fields(), []
    open_ended = ("model.architecture.", "engine.overrides.", "data.mix.", "reward.")
    files = (path for room in ("launcher", "trainers", "tools") for path in (ROOT / room).rglob("*.py"))
    for path in (path for path in files if path.parent.name != "synthesise"):  # its settings are of a file of its own, some of one name
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            names = [name for name in SETTING.findall(node.value) if name not in fields and not name.startswith(open_ended)]
            names += [
                f"{group}={name}"
                for group, name in PRESET.findall(node.value)
                if not (ROOT / "conf" / group / f"{name}.yaml").is_file() and name != "ignore"
            ]
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names]
    assert not wrong, "\n".join(wrong)
