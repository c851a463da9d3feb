"""What the settings of a parameter-efficient method may be, and what they ask of others. No torch."""

from __future__ import annotations

from pathlib import Path

from trainers.config.choices import AdapterInit, Attention, Offload, PeftMethod, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.foreign import of_others, refuse_foreign
from trainers.config.mixtures import names_stacks
from trainers.config.schema import PeftConfig, RunConfig

LORA = ("lr", "rank", "alpha", "dropout", "targets", "bias", "modules_to_save", "rank_stabilised", "adapter", "lr_ratio")
ADALORA = ("target_rank", "tinit", "tfinal", "delta_t", "beta1", "beta2", "orth_reg_weight")
BOTTLENECK = ("bottleneck", "activation", "scale", "parallel")
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
    PeftMethod.bottleneck: ("lr", "targets", "modules_to_save", "adapter", *BOTTLENECK),
}
VIRTUAL = (PeftMethod.prompt, PeftMethod.prefix, PeftMethod.ptuning)
INITS = {
    PeftMethod.lora: (AdapterInit.default, AdapterInit.gaussian, AdapterInit.pissa, AdapterInit.loftq),
    PeftMethod.prompt: (AdapterInit.default, AdapterInit.vocabulary),
}


def validate_peft(config: RunConfig) -> None:
    """Refuse what the named method does not have or cannot do."""
    peft = config.peft
    if peft.quantise is not Quantisation.none and peft.method in (PeftMethod.none, PeftMethod.freeze):
        reason = f"peft.method={peft.method} trains weights of the model itself, and 4 bits cannot hold a small step"
        raise ConfigError("peft.quantise", str(peft.quantise), reason, "peft=qlora, which trains adapters in addition to them")
    refuse_foreign("peft", peft, f"peft.method={peft.method}", of_others(PEFT_FIELDS, peft.method))
    if peft.method is PeftMethod.none:
        return
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
