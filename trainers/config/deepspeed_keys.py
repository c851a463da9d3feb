"""Which keys of DeepSpeed's JSON `engine.overrides` may set: the rest is refused before a job is submitted.

tests/test_engine_config.py compares this with the installed DeepSpeed. It is here, and not next to the engine, so that a
login node can check it without importing DeepSpeed.
"""

from __future__ import annotations

from typing import Any

from trainers.config.errors import ConfigError, alike

ZERO = [
    "contiguous_gradients",
    "reduce_scatter",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "leaf_module",
]
OFFLOAD_PARAM = ["buffer_count", "buffer_size", "max_in_cpu"]
OFFLOAD_OPTIMIZER = ["buffer_count", "pipeline_read", "pipeline_write"]
AIO = ["block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"]
TOP = ["zero_optimization", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level"]

KNOWN: dict[str, list[str]] = {
    "": TOP,
    "zero_optimization": [*ZERO, "offload_param", "offload_optimizer"],
    "zero_optimization.offload_param": OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": OFFLOAD_OPTIMIZER,
    "aio": AIO,
}
OURS = {
    "optimizer": "optim.name and optim.lr",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip",
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.microbatch",
    "gradient_accumulation_steps": "train.global_batch and train.microbatch",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "zero_optimization.stage": "engine.name",
    "zero_optimization.overlap_comm": "engine.overlap_comm",
    "zero_optimization.sub_group_size": "engine.sub_group_size",
    "zero_optimization.reduce_bucket_size": "engine.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size": "engine.prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold": "engine.param_persistence_threshold",
    **{f"zero_optimization.{part}.device": f"engine.{part}" for part in ("offload_param", "offload_optimizer")},
    **{f"zero_optimization.{part}.nvme_path": "engine.nvme_path" for part in ("offload_param", "offload_optimizer")},
    **{f"zero_optimization.{part}.pin_memory": "engine.pin_memory" for part in ("offload_param", "offload_optimizer")},
}
"""Keys that a field of ours sets, with its name: two sources for one thing would be one too many."""
INERT = {
    "zero_optimization.round_robin_gradients": "DeepSpeed reads it in ZeRO stages 1 and 2 only",
    **{
        f"zero_optimization.{key}": "DeepSpeed reads it in ZeRO stages 1 and 2 only"
        for key in ("allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce")
    },
    "zero_optimization.offload_optimizer.ratio": "the part left on the device would keep its first learning rate and lose its state",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "DeepSpeed reads it in SuperOffload only",
    "zero_optimization.memory_efficient_linear": "the engine always uses it, for its own model alone",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "exports are gathered tensor by tensor, from float32",
}


def check_overrides(overrides: dict[str, Any], prefix: str = "") -> None:
    """Raise ConfigError for the first key that is unknown (with the nearest name), does nothing, or has a field of its own."""
    for key, value in overrides.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        full = f"engine.overrides.{path}"
        if path in OURS:
            raise ConfigError(full, value, f"is set by {OURS[path]}", f"set {OURS[path]}")
        if path in INERT:
            raise ConfigError(full, value, INERT[path], "leave it out")
        known = KNOWN.get(prefix)
        if known is not None and key not in known:
            raise ConfigError(full, value, "DeepSpeed has no such key, or not for ZeRO-3", _nearest(path, str(key)))
        if path in KNOWN:
            if not isinstance(value, dict):
                raise ConfigError(full, value, f"must be a mapping of {', '.join(KNOWN[path][:3])}, ...")
            check_overrides(value, path)


def _nearest(path: str, key: str) -> str:
    """Name the nearest known key, at any level: most mistakes are a typo, a missing stage3_, or a key one level too high."""
    section = path.rpartition(".")[0]
    known = {f"{at}.{name}".lstrip("."): name for at, names in KNOWN.items() for name in names}
    known |= {name: name.rpartition(".")[2] for name in OURS}
    here = {full: name for full, name in known.items() if full.rpartition(".")[0] == section}
    for names in (here, known):
        for wanted in (f"stage3_{key}", key):
            for name in alike(wanted, names.values(), 1, 0.6 if wanted == key else 0.99):
                full = next(full for full, last in names.items() if last == name)
                return f"did you mean {OURS[full]}?" if full in OURS else f"did you mean engine.overrides.{full}?"
    at = f"engine.overrides.{section}".removesuffix(".")
    return f"{at} has: {', '.join(KNOWN[section])}"
