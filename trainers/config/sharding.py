"""What the settings of an engine may be, and how many ranks they fit. No torch."""

from __future__ import annotations

from trainers.config.choices import EngineName, Offload
from trainers.config.deepspeed_keys import check_overrides
from trainers.config.errors import ConfigError, plural
from trainers.config.foreign import refuse_foreign
from trainers.config.schema import EngineConfig, RunConfig

FSDP_ONLY = ("reshard_after_forward", "reshard_after_backward", "replicate", "shard", "prefetch", "sync_each_microbatch")
ZERO3_ONLY = (
    "sub_group_size",
    "reduce_bucket_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "overlap_comm",
    "overrides",
)


def validate_engine(engine: EngineConfig) -> None:
    """Refuse what the named engine does not have or cannot do."""
    fsdp = engine.name is EngineName.fsdp
    foreign, other = (ZERO3_ONLY, "zero3") if fsdp else (FSDP_ONLY, "fsdp")
    refuse_foreign("engine", engine, f"engine.name={engine.name}", dict.fromkeys(foreign, f"engine={other}, or leave it out"))
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
            f"train.global_batch={near(train.global_batch, share)}",
        )
    _check_mesh(config.engine, world_size)


def near(size: int, share: int) -> str:
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
