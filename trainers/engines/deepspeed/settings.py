"""What DeepSpeed is told, and what it needs of a machine: compiled parts, a folder on NVMe, host memory."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from trainers.config.choices import Offload, OptimizerName, OptimizerState
from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig
from trainers.engines.base import COMPUTE, NVME_BUFFERS
from trainers.engines.ops import import_deepspeed, require_op
from trainers.world import World

REUSED = 1_000_000_000
"""Elements up to which DeepSpeed keeps what it will need again, and gathers at most; its own defaults of both."""


def settings(config: RunConfig, hidden_size: int, largest_part: int, nvme: Path | None, world: World) -> dict[str, Any]:
    """Return the JSON that DeepSpeed gets: our fields, their auto rules, and `engine.overrides` on top.

    `largest_part` is the elements of a rank's largest partition: parameters come from NVMe through buffers of that size.
    """
    engine = config.engine
    square = hidden_size * hidden_size
    pin = engine.pin_memory and world.device.type == "cuda"
    offloads: dict[str, dict[str, Any]] = {
        part: {"device": str(where), "pin_memory": pin} | ({"nvme_path": str(nvme)} if where is Offload.nvme else {})
        for part, where in (("offload_param", engine.offload_param), ("offload_optimizer", engine.offload_optimizer))
        if where is not Offload.none
    }
    if engine.offload_param is Offload.nvme:
        offloads["offload_param"] |= {"buffer_count": NVME_BUFFERS, "buffer_size": largest_part}
    zero = {
        "stage": 3,
        "overlap_comm": engine.overlap_comm,
        "contiguous_gradients": True,
        "sub_group_size": engine.sub_group_size,
        "reduce_bucket_size": engine.reduce_bucket_size or max(square, 1 << 20),
        "stage3_prefetch_bucket_size": engine.prefetch_bucket_size or int(0.9 * square),
        "stage3_param_persistence_threshold": (
            10 * hidden_size if engine.param_persistence_threshold is None else engine.param_persistence_threshold
        ),
        "memory_efficient_linear": False,  # it would replace torch's linear in the whole process; the engine does so for its own calls
        "leaf_module": {"classes": [], "names": [], "name_suffixes": []},  # its default is blocks of experts, also where these are stacks
        **offloads,
    }
    ours = {
        "train_micro_batch_size_per_gpu": config.train.microbatch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # our loop says where a step ends
        "gradient_clipping": config.optim.clip or 0.0,
        "bf16": {"enabled": COMPUTE[config.train.precision] is torch.bfloat16},
        **(
            {"fp16": {"enabled": True, "loss_scale": 1.0}} if COMPUTE[config.train.precision] is torch.float16 else {}
        ),  # ours is set by step
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return _merged(ours, engine.overrides)


def believe_float16() -> None:
    """Let DeepSpeed compute in float16 on a CPU without instructions for it, which torch does in float32 and rounds."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(ours[key], theirs[key]) for key in ours.keys() & theirs.keys() if isinstance(ours[key], dict)}
    return ours | theirs | both


def bytes_on_host(*, optimizer: bool, parameters: bool, swapped: bool = False, compute_bytes: int = 2, state: int = 8) -> dict[str, int]:
    """Return bytes a trainable parameter takes on the host, by part, where these are offloaded to `cpu`.

    `swapped` says that the optimizer is on NVMe: reduced gradients stay on the host all the same, and a checkpoint passes through
    it whole. In host memory DeepSpeed holds gradients twice, as they are summed and as the optimizer gets them.
    `compute_bytes` is 2 for bf16 and 4 for fp32; `state` those of the optimizer: 8 for AdamW and 0 for plain SGD.
    """
    parts = {"float32 master weights": 4, "optimizer state": state, "float32 gradients": 8} if optimizer else {}
    parts |= {"float32 gradients": 4, "a checkpoint on its way": 4 + state} if swapped else {}
    return parts | ({"parameters in the compute type": compute_bytes} if parameters else {})


def require_ops(config: RunConfig) -> None:
    """Have DeepSpeed's compiled parts that this run needs, built if need be; raises ConfigError. Not collective."""
    engine = config.engine
    if engine.nvme_path is not None and not Path(engine.nvme_path).expanduser().is_dir():
        raise _no_nvme(engine.nvme_path, f"there is no such directory on {os.uname().nodename}")
    import_deepspeed()
    if takes_cpu_adam(config):
        require_op("cpu_adam", "engine.offload_optimizer", str(engine.offload_optimizer))
    if engine.nvme_path is not None:
        require_op("async_io", "engine.nvme_path", engine.nvme_path)


def takes_cpu_adam(config: RunConfig) -> bool:
    """Tell whether DeepSpeed's own AdamW takes the step, on the host: it is compiled, and knows float32 state only."""
    is_plain = config.optim.name is OptimizerName.adamw and config.optim.state is OptimizerState.fp32
    return is_plain and config.engine.offload_optimizer is not Offload.none


def begin_nvme(config: RunConfig, world: World, num_parameters: int) -> Path | None:
    """Return this run's own, empty folder under `engine.nvme_path` on every node, or None; collective.

    Raises ConfigError, on every rank, where it is missing, takes no direct I/O, or has too little space for what goes there.
    """
    if config.engine.nvme_path is None:
        return None
    path = Path(config.engine.nvme_path).expanduser()
    folder = path / f"fulltune-{hashlib.sha256(config.run_dir.encode()).hexdigest()[:12]}"
    failures = [
        text for text in world.gather(_make_nvme(config, world, num_parameters, path, folder) if world.local_rank == 0 else "") if text
    ]
    if failures:
        raise _no_nvme(str(path), str(failures[0]))
    return folder


def _make_nvme(config: RunConfig, world: World, num_parameters: int, path: Path, folder: Path) -> str:
    """Make the folder on this node; return why it cannot be used, or nothing."""
    node = os.uname().nodename
    engine, compute = config.engine, COMPUTE[config.train.precision].itemsize
    each = (compute if engine.offload_param is Offload.nvme else 0) + (16 if engine.offload_optimizer is Offload.nvme else 0)
    need = each * num_parameters * world.local_size // world.size
    try:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(path).free
        if free < need:
            return f"needs {need:,} bytes on {node} for the state of {plural(world.local_size, 'rank')}, and has {free:,} free"
        folder.mkdir()
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        return f"cannot be written with direct I/O on {node}: {error.strerror}"
    return ""


def _no_nvme(path: str, reason: str) -> ConfigError:
    return ConfigError("engine.nvme_path", path, reason, "a directory on each node's local disk, with the space it needs")
