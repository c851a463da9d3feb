"""The engine that a config names: what it needs of this machine, its outline without values, and the whole of it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence

import torch

from trainers import host
from trainers.config.choices import EngineName, Offload, Precision
from trainers.config.errors import ConfigError
from trainers.config.methods import VIRTUAL
from trainers.config.mixtures import OF_LABELS
from trainers.config.optimizers import BITSANDBYTES
from trainers.config.schema import RunConfig
from trainers.engines.base import COMPUTE, Engine, require_host
from trainers.model.backends import Choice, Surroundings, choose
from trainers.model.blueprint import Blueprint, model_class
from trainers.peft.base import Adaptation
from trainers.world import World

log = logging.getLogger("fulltune")


def class_of(config: RunConfig) -> type[Engine]:
    """Return the class of the engine that the config names; one that is not named is not imported."""
    if config.engine.name is EngineName.fsdp:
        from trainers.engines.fsdp.engine import FSDPEngine

        return FSDPEngine
    from trainers.engines.deepspeed.engine import ZeRO3Engine

    return ZeRO3Engine


def missing_package(name: EngineName) -> str | None:
    """Return the package that an engine needs and that is not installed; None where it has what it needs."""
    return "deepspeed" if name is EngineName.zero3 and importlib.util.find_spec("deepspeed") is None else None


def require_parts(config: RunConfig, world: World) -> None:
    """Have what the engine needs on this machine, before data is prepared or ranks wait for each other; raises ConfigError."""
    engine = config.engine
    if engine.offload_param is not Offload.none or engine.offload_optimizer is not Offload.none:
        threads = host.threads_per_rank(world.local_size)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # DeepSpeed's optimizer brings an OpenMP of its own, which reads this
        torch.set_num_threads(threads)
    if config.optim.name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        reason = "needs bitsandbytes, which is not installed"
        raise ConfigError("optim.name", str(config.optim.name), reason, "pip install 'fulltune[speed]'")
    cuda = world.device.type == "cuda"
    if config.train.precision is Precision.bf16 and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        log.warning("%s has no bf16 and emulates it slowly: train.precision=fp16", torch.cuda.get_device_name())
    class_of(config).require_parts(config)


def outline(config: RunConfig, world: World, blueprint: Blueprint) -> Engine:
    """Build the engine without values: model on `meta`, adapters, sharding. `fill` gives it memory."""
    if blueprint.attention is None:
        blueprint = attending(blueprint, attention_of(config, blueprint, world.device.type))
    return class_of(config)(config, world, blueprint)


def attention_of(config: RunConfig, blueprint: Blueprint, device: str) -> Choice:
    """Return the attention backend of a run on `cuda` or `cpu`; raises ConfigError where the one that is named does not work there."""
    said = {"virtual": config.peft.method in VIRTUAL, "compiled": config.train.compile, "shared": config.engine.context > 1}
    where = Surroundings(device=device, compute=COMPUTE[config.train.precision], **said)
    return choose(config.model.attention, blueprint.config, model_class(blueprint.config), where)


def attending(blueprint: Blueprint, choice: Choice) -> Blueprint:
    """Return the blueprint with a backend. A config that is shared with another model would change that one, too."""
    config = copy.deepcopy(blueprint.config)
    config._attn_implementation = choice.name
    return dataclasses.replace(blueprint, config=config, attention=choice.why)


def build_engine(
    config: RunConfig,
    world: World,
    blueprint: Blueprint,
    before_weights: Callable[[Adaptation], None] = lambda _: None,
    next_to: Sequence[Engine] = (),
) -> Engine:
    """Build the engine the config names, weights loaded; what `before_weights` raises ends it before one is read.

    The node's memory must hold it together with the engines that it is `next_to`.
    """
    coefficient = getattr(blueprint.config.get_text_config(), "router_aux_loss_coef", None)
    if coefficient and config.train.balance_loss is None and config.objective.name in OF_LABELS:
        log.warning(
            "the experts' router is trained by the objective alone: train.balance_loss=%s adds the balance loss that the model's "
            "config names (router_aux_loss_coef)",
            coefficient,
        )
    engine = outline(config, world, blueprint)
    trained = ",".join(sorted(engine.adaptation.trained))
    world.require_agreement("which parameters are trained", hashlib.sha256(trained.encode()).hexdigest())
    world.require_agreement("the attention backend", str(engine.model.config._attn_implementation))
    require_host(config, world, engine, next_to)
    try:
        before_weights(engine.adaptation)
        engine.fill(engine.adaptation.origin)
    except BaseException:
        engine.close()
        raise
    return engine


def end_groups() -> None:
    """End torch's process groups with those that an engine's library remembers, so that others can be begun."""
    if "deepspeed" in sys.modules:
        from trainers.engines.deepspeed.engine import end_groups

        end_groups()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
