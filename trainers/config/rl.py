"""What a run asks of the answers that it gives itself, and what it does not go with. No torch."""

from __future__ import annotations

import math
import os
import re

from trainers.config.choices import (
    KL,
    Activations,
    DocumentOf,
    Layout,
    ObjectiveName,
    Offload,
    OnSpike,
    PeftMethod,
    Reasoning,
    RewardKind,
    TooLong,
)
from trainers.config.derived import OF_THE_MODEL, SAMPLED
from trainers.config.errors import ConfigError
from trainers.config.foreign import refuse_foreign
from trainers.config.local import looks_local, require_model_directory
from trainers.config.methods import VIRTUAL
from trainers.config.rewards import MOST
from trainers.config.schema import RlConfig, RunConfig
from trainers.config.secrets import is_option, masked

PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def validate_rl(config: RunConfig) -> None:
    """Refuse settings of `rl` for other objectives, numbers that cannot be, and what does not go with answers of the model's own."""
    rl, name = config.rl, config.objective.name
    if name not in SAMPLED:
        remedy = f"leave it out, or objective={SAMPLED[0]}, whose answers the model gives itself"
        refuse_foreign("rl", rl, f"objective={name}", dict.fromkeys(vars(RlConfig()), remedy))
        return
    if not config.reward and rl.environment is None:
        raise ConfigError("reward", None, f"objective={name} learns from rewards, and none is named", "reward.exact.kind=exact")
    least, compared = (
        (1, "a prompt needs an answer") if name is ObjectiveName.ppo else (2, "an answer is compared with others to its prompt")
    )
    if rl.group_size < least:
        raise ConfigError("rl.group_size", rl.group_size, compared, f"rl.group_size={8 if least > 1 else 1}")
    _validate_draws(rl)
    if config.train.global_batch % rl.group_size:
        reason = f"is the answers of a step, and not divisible by rl.group_size = {rl.group_size}"
        near = max(1, round(config.train.global_batch / rl.group_size)) * rl.group_size
        raise ConfigError("train.global_batch", config.train.global_batch, reason, f"train.global_batch={near}")
    if rl.max_new_tokens >= config.data.seq_len:
        reason = f"data.seq_len = {config.data.seq_len} holds the prompt too"
        raise ConfigError("rl.max_new_tokens", rl.max_new_tokens, reason, f"data.seq_len={2 * rl.max_new_tokens}")
    if config.train.steps is not None and config.train.steps % rl.steps_per_rollout:
        reason = f"is not divisible by rl.steps_per_rollout = {rl.steps_per_rollout}: answers would be given that nothing trains on"
        steps = -(-config.train.steps // rl.steps_per_rollout) * rl.steps_per_rollout
        raise ConfigError("train.steps", config.train.steps, reason, f"train.steps={steps}")
    _validate_vllm(config)
    if name is ObjectiveName.ppo:
        _validate_critic(config)
    _refuse_files_of_two_models(config)
    _validate_ahead(config)
    _validate_environment(config)
    _refuse_what_does_not_go(config)


def _validate_draws(rl: RlConfig) -> None:
    """Refuse draws that cannot be, and several held-out answers that would all be the same."""
    if not 0 < rl.temperature < math.inf:
        raise ConfigError(
            "rl.temperature", rl.temperature, "divides the logits of what is trained, and must be above 0", "rl.temperature=1"
        )
    if rl.curriculum is not None and not 0 < rl.curriculum <= 1:
        reason = "is how often prompts are drawn that teach nothing now, and must be above 0 and at most 1"
        raise ConfigError("rl.curriculum", rl.curriculum, reason, "rl.curriculum=0.1, or rl.curriculum=null")
    if rl.eval_samples < 1:
        raise ConfigError("rl.eval_samples", rl.eval_samples, "must be greater than 0", "rl.eval_samples=1")
    if rl.eval_temperature is not None and not 0 <= rl.eval_temperature < math.inf:
        raise ConfigError("rl.eval_temperature", rl.eval_temperature, "must be 0 or more", "rl.eval_temperature=null")
    if rl.eval_temperature == 0 and rl.eval_samples > 1:
        reason = "are all the same with rl.eval_temperature=0, which takes the likeliest token"
        raise ConfigError("rl.eval_samples", rl.eval_samples, reason, "rl.eval_samples=1")


def _validate_vllm(config: RunConfig) -> None:
    """Refuse a Python that cannot be started, words for nobody, adapters, and servers that are started and run already."""
    rl = config.rl
    if (rl.vllm is not None or rl.servers) and config.peft.method not in OF_THE_MODEL:
        path, value = ("rl.servers", str(rl.servers)) if rl.servers else ("rl.vllm", str(rl.vllm))
        reason = f"is given whole models, and peft.method={config.peft.method} writes an adapter"
        raise ConfigError(path, value, reason, f"{path}={'[]' if rl.servers else 'null'}, or peft=none")
    _validate_servers(rl)
    if rl.vllm is None:
        if rl.vllm_words:
            raise ConfigError("rl.vllm_words", rl.vllm_words, "are a vLLM server's, and rl.vllm is empty", "rl.vllm_words=[]")
        return
    for word in rl.vllm_words:
        if is_option(name := word.partition("=")[0]):
            reason = "is a secret, which config.yaml would hold; a server that is started here has a key of its own"
            raise ConfigError("rl.vllm_words", name, reason, "leave it out; any other secret goes by its variable, such as HF_TOKEN")
    if not os.access(rl.vllm, os.X_OK):
        raise ConfigError("rl.vllm", rl.vllm, "is not a program", "the Python of an environment with vLLM, or rl.vllm=null")


def _validate_servers(rl: RlConfig) -> None:
    """Refuse what is not an address or holds a secret, and one server for two."""
    for url in rl.servers:
        if masked(url) != url:
            reason = "holds a secret, which config.yaml would hold too"
            raise ConfigError(
                "rl.servers", masked(url), reason, "the address alone, with the key in FULLTUNE_ENDPOINT_KEY, or rl.servers=[]"
            )
        if not re.fullmatch(r"https?://[^/\s]+(/v1)?/?", url):
            raise ConfigError("rl.servers", url, "is not a server's address", "an address such as http://HOST:PORT, or rl.servers=[]")
    if len(set(rl.servers)) < len(rl.servers):
        raise ConfigError(
            "rl.servers", str(rl.servers), "names a server twice, and each has a part of the answers", "each server once, or rl.servers=[]"
        )
    if rl.servers and rl.vllm is not None:
        raise ConfigError("rl.vllm", rl.vllm, f"starts servers, and rl.servers={rl.servers} run already", "rl.vllm=null, or rl.servers=[]")


def _validate_ahead(config: RunConfig) -> None:
    """Refuse what a rollout cannot be given with while a step is taken."""
    rl = config.rl
    if not rl.staleness:
        return
    if rl.vllm is not None or rl.servers:
        reason = "asks generators what they say of answers that are there, to prove their weights, and a vLLM server is not asked for that"
        raise ConfigError("rl.staleness", rl.staleness, reason, "rl.staleness=0, or rl.vllm=null and rl.servers=[]")
    if config.objective.name is ObjectiveName.ppo:
        reason = "lets answers be older than the policy, and PPO's critic expects the rewards of the policy of now"
        raise ConfigError("rl.staleness", rl.staleness, reason, "rl.staleness=0, or objective=grpo")
    for name, reward in config.reward.items():
        if reward.kind is RewardKind.function:
            reason = f"rewards answers while a step is taken, and an alarm ends a function that is late (reward.{name}) between steps alone"
            raise ConfigError("rl.staleness", rl.staleness, reason, "rl.staleness=0, or rewards of other kinds")


def _validate_critic(config: RunConfig) -> None:
    """Refuse numbers that PPO's formulas do not allow, a critic that does not exist, and what only one model of a run can have."""
    objective, peft, train = config.objective, config.peft, config.train
    if objective.gamma > 1:
        reason = "must be above 0 and at most 1: later rewards would count more than those of now"
        raise ConfigError("objective.gamma", objective.gamma, reason, "objective.gamma=1")
    if objective.kl_estimator is not KL.k1 and not objective.kl_weight:
        reason = "is of the divergence from the reference, and objective.kl_weight is 0"
        raise ConfigError("objective.kl_estimator", str(objective.kl_estimator), reason, "objective.kl_weight=0.05")
    if objective.critic is not None and looks_local(objective.critic):
        require_model_directory("objective.critic", objective.critic)
    two = "objective=ppo trains two models"
    if peft.method in (*VIRTUAL, PeftMethod.adalora):
        reason = f"{two}, and this method does not go with the critic's head of scores, or counts the steps of one"
        raise ConfigError("peft.method", str(peft.method), reason, "peft=lora")
    if train.activations is Activations.auto:
        raise ConfigError("train.activations", "auto", f"{two}, and auto measures one", "train.activations=block")


def _refuse_files_of_two_models(config: RunConfig) -> None:
    """Refuse state on NVMe where a run has a second engine: its critic, or the reference that the policy is kept near."""
    is_ppo = config.objective.name is ObjectiveName.ppo
    if not is_ppo and not config.objective.kl_weight:
        return
    why = "objective=ppo trains two models" if is_ppo else "objective.kl_weight holds the model that training begins with once more"
    for name in ("offload_param", "offload_optimizer"):
        if getattr(config.engine, name) is Offload.nvme:
            remedy = f"engine.{name}=cpu" + ("" if is_ppo else ", or objective.kl_weight=0")
            raise ConfigError(f"engine.{name}", "nvme", f"{why}, and both models' files would be in one folder", remedy)


def _validate_environment(config: RunConfig) -> None:
    """Refuse an environment that cannot be, limits of no conversation, and settings of none."""
    rl = config.rl
    if rl.environment is None:
        remedies = dict.fromkeys(
            ("max_turns", "environment_timeout_s", "environment_processes"), "leave it out, or rl.environment=module:Class"
        )
        refuse_foreign("rl", rl, "a run without rl.environment", remedies)
        return
    if not PATH.fullmatch(rl.environment):
        remedy = "module:Class, in this folder or in PYTHONPATH"
        raise ConfigError("rl.environment", rl.environment, "does not name a class of a module", remedy)
    if config.objective.name is ObjectiveName.ppo:
        reason = "gives rewards of whole conversations, and objective=ppo values each token of one answer"
        raise ConfigError("rl.environment", rl.environment, reason, "objective=grpo, or rl.environment=null")
    if rl.staleness:
        reason = "gives rollouts while steps are taken, and rl.environment holds its conversations between them"
        raise ConfigError("rl.staleness", rl.staleness, reason, "rl.staleness=0, or rl.environment=null")
    if "environment" in config.reward:
        reason = "is the name of what rl.environment gives"
        raise ConfigError("reward.environment", str(config.reward["environment"].kind), reason, "another name")
    for name in ("max_turns", "environment_timeout_s", "environment_processes"):
        value = getattr(rl, name)
        if not 0 < value < MOST:
            raise ConfigError(f"rl.{name}", value, f"must be above 0 and below {MOST:g}", f"rl.{name}={getattr(RlConfig(), name)}")


def _refuse_what_does_not_go(config: RunConfig) -> None:
    """Refuse what is about rows that are there before the run."""
    data, objective = config.data, f"objective={config.objective.name}"
    own = f"with {objective} the model writes the answers"
    refused = {
        "data.packing": (data.packing, f"{own}, and each is a row of its own", "data.packing=false"),
        "data.mix": (sorted(data.mix), f"{objective} takes the prompts of one source", "data.path=FILE with the rows of all"),
        "data.streaming": (data.streaming, f"{objective} goes through its prompts in epochs of all", "data.streaming=false"),
        "data.document": (data.document is not DocumentOf.row, f"{own} to the last turn of a row", "data.document=row"),
        "data.reasoning": (data.reasoning is not Reasoning.keep, f"{own}, reasoning included", "data.reasoning=keep"),
        "data.layout": (data.layout is not Layout.auto, f"{objective} takes the turns before the answer of any layout", "data.layout=auto"),
        "data.skip_bad_rows": (data.skip_bad_rows, f"{objective} takes every row's prompt", "data.skip_bad_rows=false"),
        "data.too_long": (data.too_long is TooLong.split, "a prompt cannot be split", "data.too_long=truncate"),
        "train.on_spike": (
            config.train.on_spike is OnSpike.rollback,
            f"{own}: there are no rows that could be left out",
            "train.on_spike=skip",
        ),
    }
    for path, (is_asked, reason, remedy) in refused.items():
        if is_asked:
            group, _, name = path.partition(".")
            value = getattr(getattr(config, group), name)
            raise ConfigError(path, value if isinstance(value, bool | int | float) else str(value), reason, remedy)
