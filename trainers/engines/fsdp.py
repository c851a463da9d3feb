"""PyTorch's fully_shard (FSDP2): one group a block, embedding, final norm and head in the root group."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from trainers.batch import Batch, token_logps
from trainers.config import OptimConfig, Precision, RunConfig
from trainers.model import Blueprint, Weights, tied_names, weight_keys
from trainers.world import World

log = logging.getLogger("fulltune")
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


class FSDPEngine:
    """The Engine over fully_shard; parameters, gradients and AdamW state are float32 DTensors, split over all ranks."""

    def __init__(self, config: RunConfig, world: World, blueprint: Blueprint) -> None:
        """Build on meta, shard, materialise, read this rank's slices, make the optimizer: in this order."""
        self.world, self.blueprint, self.precision = world, blueprint, config.train.precision
        self.clip = config.optim.clip
        self.model = blueprint.build()
        weights = Weights(blueprint.folder) if blueprint.folder else None
        keys = weight_keys(self.model, weights) if weights else None
        if config.train.activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.groups = self._shard(config)
        materialise(self.model, world.device)
        if weights and keys:
            _load_slices(self.model, weights, keys)
        else:
            if weights:
                log.warning("this checkpoint is converted while loading: every rank holds all of it in host memory for a moment")
            _copy_slices(self.model, blueprint.converted() if weights else blueprint.build("cpu"))
        self.optimizer = make_optimizer(self.model, config.optim)
        _begin_state(self.optimizer)
        self.accumulates = config.train.global_batch > world.size * config.train.microbatch
        self.model.train()
        if getattr(blueprint.config.get_text_config(), "router_aux_loss_coef", 0):
            log.warning("the experts' router is trained by the objective alone: its auxiliary balancing loss is not added")

    def _shard(self, config: RunConfig) -> int:
        mesh = init_device_mesh(self.world.device.type, (self.world.size,), mesh_dim_names=("shard",))
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[self.precision], reduce_dtype=torch.float32)
        blocks = find_blocks(self.model)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.engine.reshard_after_forward)
        fully_shard(self.model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        return len(blocks) + 1

    def token_logps(self, batch: Batch) -> Tensor:
        """Return (B, S) float32 log-probabilities of the labels."""
        return token_logps(self.model, batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients; they are reduced over ranks at the last microbatch. FSDP takes means, so the loss grows by the world size."""
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        (loss * self.world.size).backward()

    def step(self, lr: float) -> float:
        """Clip, update and clear; return the gradient norm before clipping. A non-finite norm updates nothing."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = _whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if norm.isfinite():
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self.model.train(mode)

    def save(self, folder: Path) -> None:
        """Write this rank's shards of model and optimizer."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Restore model and optimizer, resharded to this world size."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=StateDictOptions(cpu_offload=False))
        return {"model": model, "optimizer": optimizer}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export, gathered one at a time and cast to the base checkpoint's type."""
        tied, dtype = tied_names(self.model), self.blueprint.saved_dtype
        for name, tensor in self.model.state_dict().items():
            if name not in tied:
                whole = _whole(tensor)
                yield name, (whole.to(dtype) if whole.is_floating_point() else whole).cpu()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what `weights` yields."""
        tied = tied_names(self.model)
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items() if name not in tied}

    def report(self) -> dict[str, str]:
        """Return what is stored, computed and reduced in which type; raises RuntimeError if live tensors say otherwise."""
        parameters = list(self.model.named_parameters())
        wrong = [name for name, p in parameters if p.dtype != torch.float32]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        if wrong or any(value.dtype != torch.float32 for value in moments):
            raise RuntimeError(f"master weights and optimizer state must be float32; {wrong[:1] or 'the optimizer state'} is not")
        local = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for _, p in parameters)
        kept = sum(p.numel() * 4 for _, p in parameters) if self.accumulates else local
        return {
            "parameters": f"{sum(p.numel() for _, p in parameters):,}, all trained, in {self.groups} groups over {self.world.size} ranks",
            "master weights": f"float32, {local / 2**20:,.1f} MiB a rank",
            "gradients": f"reduced in float32, {kept / 2**20:,.1f} MiB a rank" + (", whole until the last microbatch" * self.accumulates),
            "optimizer": f"AdamW, float32, {2 * local / 2**20:,.1f} MiB a rank",
            "compute": str(DTYPES[self.precision]).removeprefix("torch."),
            "attention": str(self.model.config._attn_implementation),
            "export": str(self.blueprint.saved_dtype).removeprefix("torch."),
        }


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the repeated blocks of an architecture: the lists of modules that transformers must not split.

    Raises RuntimeError where there is none: a model in one group would be gathered whole on every rank.
    """
    names = set(model._no_split_modules or [])
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [child for layers in lists if type(layers[0]).__name__ in names for child in layers]
    if not found:
        raise RuntimeError(f"{type(model).__name__} names no repeated blocks, so it cannot be sharded block by block")
    return found


def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give meta parameters memory on `device`, keep the real buffers, and tie again what to_empty unties."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()


def _local_block(tensor: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Return this rank's part of a tensor, its shape and its offset in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(tensor.shape), (0,) * tensor.ndim
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(shape), tuple(offset)


@torch.no_grad()
def _load_slices(model: PreTrainedModel, weights: Weights, keys: dict[str, str]) -> None:
    """Read this rank's slice of every tensor; `keys` holds all of them, so none stays unwritten."""
    state = model.state_dict()
    for name, key in keys.items():
        local, shape, offset = _local_block(state[name])
        if local.numel():
            local.copy_(weights.read(key, offset, shape))


@torch.no_grad()
def _copy_slices(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Copy this rank's slice from a whole model on the CPU: random weights, which are small, or a converted checkpoint."""
    whole = source.state_dict()
    for name, tensor in model.state_dict().items():
        local, shape, offset = _local_block(tensor)
        block = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        local.copy_(whole[name][block])


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return fused AdamW with weight decay on matrices and embeddings only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def _begin_state(optimizer: torch.optim.AdamW) -> None:
    """Make AdamW's state now, at step 0: memory is short at the start, and a checkpoint before the first update is exact.

    torch's get_state_dict would otherwise take a step with zero gradients to make it, and count that step.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
