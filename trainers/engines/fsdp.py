"""PyTorch's fully_shard (FSDP2): one group a block, embedding, final norm and head in the root group."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from trainers.batch import Batch, Needs, Output
from trainers.config.choices import Float8, Offload
from trainers.config.errors import ConfigError, plural
from trainers.config.optimizers import host_bytes
from trainers.config.schema import OptimConfig, RunConfig
from trainers.engines.base import (
    COMPUTE,
    HOST,
    Accepts,
    Placed,
    accepts_all,
    activations_statement,
    counted,
    frozen_statement,
    head_of,
    home_of_state,
    in_short,
    keep_for_backward,
    move_buffers,
    require_state_bytes,
    require_type,
    state_statement,
    statement,
    table_parameters,
    unpacked_numel,
    update_statement,
    update_tensors,
)
from trainers.engines.stored import load_state
from trainers.model.blueprint import Blueprint, find_blocks
from trainers.model.experts import experts_words, mixtures, routing_of
from trainers.model.forward import forward
from trainers.model.reach import groups_of
from trainers.model.weights import Origin, forget, load_parts, materialise, origin_of, require_tied, tied_names
from trainers.optim import decay_groups, make_optimizer, set_lr, tensors_of
from trainers.peft.adapt import adapt
from trainers.peft.base import Adaptation
from trainers.peft.tokens import ENCODER
from trainers.peft.update import Part
from trainers.world import World, read

if TYPE_CHECKING:
    from trainers.engines.compiling import CompiledBlocks

log = logging.getLogger("fulltune")
CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it."""
STRAY_SHARE = 0.1
"""Largest share of all parameters that may be outside blocks and embeddings."""


class FSDPEngine:
    """The Engine over fully_shard; parameters, gradients and AdamW state are float32 DTensors, split over all ranks."""

    settling_steps = 0

    def __init__(self, config: RunConfig, world: World, blueprint: Blueprint) -> None:
        """Build on meta, adapt and shard: all that needs neither values nor memory for them."""
        self.world, self.blueprint, self.config = world, blueprint, config
        self.parts: dict[str, Part] = {}
        """What an update hook looks at, from `squares` to the end of `step`."""
        self.compute, engine = COMPUTE[config.train.precision], config.engine
        self.offloaded = engine.offload_param is Offload.cpu
        self.visits = engine.offload_optimizer is Offload.cpu and self.steps_on_device(config)
        """The optimizer's state lives on the host and visits the device parameter by parameter."""
        self.model = blueprint.build()
        self.routing = routing_of(self.model, config)
        apart = self.compute is not torch.float32 and not config.train.compile  # a compiled block runs no hooks of groups inside it
        routers = [mixture.router for mixture in mixtures(self.model)] if apart else []
        self.adaptation = adapt(self.model, origin_of(self.model, blueprint), config, blueprint, self.compute)
        self.head, self.logits = head_of(self.model, config, self.compute)
        self.blocks = find_blocks(self.model)
        self.float8 = self._convert_to_float8() if config.train.float8 is not Float8.none else None
        """What multiplies in float8, in words."""
        self.inputs = keep_for_backward(self.blocks, config, self._pins())
        self.unreached = unreached_modules(self.model, self.adaptation.unreached, self.blocks)
        self.routers = [self.model.get_submodule(path) for path in routers]
        require_groups(self.model, [*self.blocks, *self.unreached])
        self.compiled = self._compile() if config.train.compile else None
        self._shard()
        self.keeps_whole_gradients = not engine.sync_each_microbatch and config.train.global_batch > world.size * config.train.microbatch

    @staticmethod
    def require_parts(config: RunConfig) -> None:
        """Need nothing but torch, a compiler where blocks are compiled, and torchao for float8."""
        if config.train.float8 is not Float8.none:
            from trainers.engines.float8 import require_float8

            require_float8(config.train.float8)
        if config.train.compile:
            from trainers.engines.compiling import require_compiler

            require_compiler()

    @staticmethod
    def reach(config: RunConfig, blocks: Sequence[nn.Module]) -> int:
        """Return how many blocks are gathered ahead."""
        return config.engine.prefetch

    @staticmethod
    def on_host(config: RunConfig) -> dict[str, int]:
        """Return bytes a trainable parameter takes on the host, by part: parameters include gradients and state."""
        parameters, optimizer = config.engine.offload_param is Offload.cpu, config.engine.offload_optimizer is Offload.cpu
        return bytes_on_host(optimizer=optimizer, parameters=parameters, state=host_bytes(config.optim))

    @staticmethod
    def steps_on_device(config: RunConfig) -> bool:
        """Tell whether the optimizer's state visits the device, where it does not live there."""
        return config.engine.offload_param is Offload.none

    def fill(self, origin: Origin | None) -> None:
        """Give this rank's slices memory, with the values of `origin` where there is one, and make the optimizer."""
        materialise(self.model, torch.device("cpu") if self.offloaded else self.world.device)
        if origin is not None:
            _load(self.model, origin)
            forget(origin)
        move_buffers(self.model, self.world.device)  # an offloaded model's parameters visit the device, its buffers live there
        self.optimizer = optimizer_of(self.model, self.config.optim, self.adaptation)
        _begin_state(self.optimizer, self._pieces)
        self._send_home()
        if (update := self.adaptation.update) is not None:
            update.begin({name: _local_block(self.model.get_parameter(name).detach())[0].view(-1) for name in update.names})
        self.model.train()

    def _convert_to_float8(self) -> str:
        from trainers.engines.float8 import convert

        if not self.config.train.compile and self.world.device.type == "cuda":
            log.warning("train.float8 without train.compile=true is slower than bf16: each cast reads and writes its matrix by itself")
        return convert(self.model, self.blocks, self.config.train.float8, self.world.device.type)

    def _compile(self) -> CompiledBlocks:
        from trainers.engines.compiling import CompiledBlocks

        return CompiledBlocks(self.blocks, self.config, self.world.local_size, self.world.device.type)

    def _shard(self) -> None:
        engine, device = self.config.engine, self.world.device.type
        if engine.replicate > 1:
            mesh = init_device_mesh(device, (engine.replicate, self.world.size // engine.replicate), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device, (self.world.size,), mesh_dim_names=("shard",))
        how: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=self._pins()) if self.offloaded else OffloadPolicy(),
        }
        if self.adaptation.packed:
            from trainers.engines.integers import shard_integers

            shard_integers()
        unreached = {id(self.model.get_parameter(name)) for name in self.adaptation.unreached}
        used = [block for block in self.blocks if any(id(p) not in unreached for p in block.parameters())]
        for router in self.routers:  # small, so that each stays gathered from its first use in a step to its last
            fully_shard(router, reshard_after_forward=False, **how | {"mp_policy": MixedPrecisionPolicy(torch.float32, torch.float32)})
        for block in (*self.blocks, *self.unreached):
            fully_shard(block, reshard_after_forward=engine.reshard_after_forward, **how)
        fully_shard(self.model, reshard_after_forward=False, **how)
        if engine.prefetch > 1:  # 1 is fully_shard's own: the next block in backward, and what the CPU has issued ahead in forward
            for number, block in enumerate(used):
                ahead, behind = used[number + 1 :], used[:number][::-1]
                block.set_modules_to_forward_prefetch(ahead[: engine.prefetch])  # type: ignore[operator]
                block.set_modules_to_backward_prefetch(behind[: engine.prefetch])  # type: ignore[operator]

    def _pins(self) -> bool:
        return self.config.engine.pin_memory and self.world.device.type == "cuda"

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Output:  # noqa: B008 - frozen
        """Return the log-probabilities of the labels and what else is needed."""
        if self.routing is not None:
            return self.routing.with_balance(batch, lambda: forward(self.model, batch, needs, head=self.head))
        if self.compiled is None and self.float8 is None:
            return forward(self.model, batch, needs, head=self.head)
        from trainers.engines.compiling import forward_filled_up

        return forward_filled_up(self.model, batch, needs, self.compiled, self.head)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, reduced over ranks now or at the last microbatch. FSDP takes means, so the loss grows by the world size."""
        self.model.set_requires_gradient_sync(last or self.config.engine.sync_each_microbatch)  # type: ignore[operator]
        self.model.set_requires_all_reduce(last)  # type: ignore[operator]
        self.model.set_reshard_after_backward(last or self.config.engine.reshard_after_backward)  # type: ignore[operator]
        (loss * self.world.size).backward()

    def squares(self) -> Tensor:
        """Return the sum of this rank's squared gradients, with what an update hook adds to them; a copy's share, where there are copies.

        Collective where there is such a hook.
        """
        update = self.adaptation.update
        if update is not None:
            self.parts = self._parts(update.names)
            update.before(self.parts, lambda name: _whole(self.model.get_parameter(name)))
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        require_type("gradients", grads, torch.float32)
        squares = sum_of_squares(grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads)
        return squares.to(self.world.device) / self.config.engine.replicate

    def step(self, lr: float, accepts: Accepts = accepts_all, norm: float | None = None) -> float:
        """Clip, update and clear; return the gradient norm before clipping."""
        if norm is None:
            norm = math.sqrt(self.world.sum(read([self.squares()]))[0])
        update, parts = self.adaptation.update, self.parts
        self.parts = {}
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        clip = self.config.optim.clip
        if math.isfinite(norm) and accepts(norm):
            if clip is not None and norm + CLIP_EPS > clip:  # else it would multiply by 1
                nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm, dtype=torch.float32))
            set_lr(self.optimizer.param_groups, lr)
            if self.visits:
                self._step_with_visiting_state(parameters)
            else:
                self.optimizer.step()
            if update is not None:
                copies = self.config.engine.replicate
                update.after(parts, lambda values: [value / copies for value in self.world.sum(values)])
        self.optimizer.zero_grad(set_to_none=True)
        if self.compiled is not None:
            self.compiled.done(training=True)
        return norm

    @torch.no_grad()
    def _parts(self, names: Iterable[str]) -> dict[str, Part]:
        """Return this rank's rows of each tensor as flat views of the live ones: clipping is seen in them, and a new value is in place."""
        parts = {}
        for name in names:
            p = self.model.get_parameter(name)
            if p.grad is None:  # of a layer that no row went through
                p.grad = torch.zeros_like(p)
            value, offset = _local_block(p)
            start = offset[0] * p.shape[1:].numel()
            parts[name] = Part(value=value.view(-1), grad=_local_block(p.grad)[0].view(-1), start=start)
        return parts

    def _step_with_visiting_state(self, parameters: list[nn.Parameter]) -> None:
        """Update parameter by parameter: its state comes from the host, is used where the parameter is, and goes back."""
        grads = [p.grad for p in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        for p, grad in zip(parameters, grads, strict=True):
            home = self.optimizer.state[p]
            self.optimizer.state[p], p.grad = _moved(p, home, p.device), grad
            self.optimizer.step()
            for name, value in home.items():
                _local_block(value)[0].copy_(_local_block(self.optimizer.state[p][name])[0])
            self.optimizer.state[p], p.grad = home, None

    def _send_home(self) -> None:
        """Move the optimizer's moments to where they live between steps."""
        if self.visits:
            for p, state in self.optimizer.state.items():
                self.optimizer.state[p] = _moved(p, state, torch.device("cpu"), self._pins())

    def train(self, mode: bool) -> None:
        """Switch dropout on or off; without it the parameters are what would be exported, where an optimizer averages them."""
        self.model.train(mode)
        if self.compiled is not None and mode:
            self.compiled.done(training=False)
        self._average(not mode)

    def _average(self, on: bool) -> None:
        """Let the parameters hold their averages or what is trained, where the optimizer knows both."""
        change: Any = getattr(self.optimizer, "average", None)
        if change is not None and change(on):
            for module in (*self.blocks, *self.unreached, self.model):
                module.reshard()  # type: ignore[operator]  # what an evaluation has gathered holds the old values

    def load(self, folder: Path) -> None:
        """Restore model and optimizer, resharded to this world size."""
        self._average(False)
        state = self.state()
        own: Any = self.optimizer if hasattr(self.optimizer, "saved") else None
        if own is not None:
            own.expect(state["optimizer"], lambda part: load_state({"optimizer": part}, folder))
        load_state(state, folder)
        model = state["model"]
        if own is not None:
            own.take(state["optimizer"])
        if hasattr(own, "trained"):  # the checkpoint's model is an average
            model = {name: kinds["y"] for name, kinds in state["optimizer"]["state"].items()}
        set_model_state_dict(self.model, model, options=StateDictOptions(strict=False))  # load_state misses no key
        if self.adaptation.update is not None:
            self.adaptation.update.load(state)

    def state(self) -> dict[str, Any]:
        """Return the live shards of what is trained, and of the optimizer; averages where that averages, which are copies."""
        model = get_model_state_dict(self.model, options=StateDictOptions(ignore_frozen_params=True))
        named, own = dict(self.model.named_parameters(remove_duplicate=False)), cast("Any", self.optimizer)
        state: dict[str, Any] = {
            "model": {name: tensor for name, tensor in model.items() if name not in named or named[name].requires_grad}
        }
        if hasattr(own, "saved"):
            state["optimizer"] = own.saved(self._placed, self._of_each_rank)
        else:
            state["optimizer"] = {"state": {name: own.state[p] for name, p in self.model.named_parameters() if p in own.state}}
        if hasattr(own, "averaged"):
            state["model"] |= {name: self._placed(name, own.averaged(named[name])) for name in state["model"] if name in named}
        return state if self.adaptation.update is None else state | self.adaptation.update.state(self._placed)

    def _of_each_rank(self, values: Tensor) -> Tensor:
        """Return a part of a tensor that holds as many values of each rank."""
        p: Any = next(iter(self.optimizer.state))
        return DTensor.from_local(values, p.device_mesh, p.placements, run_check=False)

    def _pieces(self) -> dict[Tensor, list[Any]]:
        """Return which elements of which tensor each trained parameter has here."""
        from trainers.optim.sharded import Piece

        tables = table_parameters(self.model)
        found: dict[Tensor, list[Any]] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                values, offset = _local_block(p)
                unit = p.shape[1:].numel()
                where = {"start": offset[0] * unit if offset else 0, "begin": 0, "end": values.numel(), "unit": unit}
                ranks = self.world.size // self.config.engine.replicate
                found[p] = [Piece(name=name, shape=tuple(p.shape), ranks=ranks, is_table=id(p) in tables, **where)]
        return found

    def _placed(self, name: str, elements: Tensor) -> Tensor:
        """Return flat elements of this rank as a part of a whole that is split as the parameter is; shares memory."""
        p: Any = self.model.get_parameter(name)
        return DTensor(elements.view(_local_block(p)[0].shape), p._spec, requires_grad=False)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export, gathered one at a time and cast to its type there."""
        state, averaged = self.model.state_dict(), getattr(self.optimizer, "averaged", None)

        def gather(name: str) -> Tensor:
            tensor = state[name]
            if averaged is not None and (p := self.model.get_parameter(name)) in self.optimizer.state:
                tensor = self._placed(name, averaged(p))
            return _whole(tensor)

        yield from self.adaptation.exported(gather)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole model's tensors."""
        tied = tied_names(self.model)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items() if name not in tied}
        return shapes | self.adaptation.packed

    def tensors(self) -> list[Placed]:
        """Return this rank's live tensors; the model's buffers are always on the device."""
        weights, state = self.config.engine.offload_param, home_of_state(self.config)
        return [
            Placed("parameters", Offload.none, list(self.model.buffers())),
            Placed("parameters", weights, list(self.model.parameters())),
            Placed("gradients", weights, [p.grad for p in self.model.parameters() if p.grad is not None]),
            Placed("optimizer", state, self._moments()),
            Placed("optimizer", weights, update_tensors(self.adaptation.update)),
            Placed("activations", Offload.cpu, [] if self.inputs is None else self.inputs.tensors()),
        ]

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's parts of live tensors by class; gradients are whole where they wait for the last microbatch."""
        parameters, frozen = self._trained_and_frozen()
        local = local_bytes(parameters)
        gradients = sum(p.nbytes for p in parameters) if self.keeps_whole_gradients else local
        return {"frozen": local_bytes(frozen), "trainable": local, "gradients": gradients, "optimizer": local_bytes(self._moments())}

    def _trained_and_frozen(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        everything = list(self.model.parameters())
        return [p for p in everything if p.requires_grad], [p for p in everything if not p.requires_grad]

    def _moments(self) -> list[Tensor]:
        return tensors_of(self.optimizer)

    def report(self) -> dict[str, str]:
        """Return what is stored, computed and reduced in which type; raises RuntimeError if live tensors say otherwise."""
        (parameters, frozen), moments, size = self._trained_and_frozen(), self._moments(), self.state_bytes()
        total = sum(unpacked_numel(self.adaptation, name, p.numel()) for name, p in self.model.named_parameters())
        trained = sum(p.numel() for p in parameters)
        require_state_bytes(self.config.optim, size["optimizer"], size["trainable"] // 4)
        policies = {module._get_fsdp_state()._mp_policy.param_dtype for module in (*self.blocks, self.model)}  # type: ignore[operator]
        if policies != {self.compute}:
            raise RuntimeError(f"compute must be {in_short(self.compute)}, and fully_shard has {policies}")
        home = HOST if self.offloaded else ""
        until = "whole until the last microbatch" if self.keeps_whole_gradients else home
        state = state_statement(self.config.optim, moments, size["optimizer"], HOST if self.visits else home)
        return {
            "parameters": f"{counted(total, trained)}, in {self._layout()}",
            "storage": statement("master weights", parameters, torch.float32, size["trainable"], home),
            "compute": in_short(self.compute),
            "gradient reduction": statement("gradients", [], torch.float32, size["gradients"], until),
            "optimizer state": state,
            "frozen weights": frozen_statement(((p, _local_block(p)[0]) for p in frozen), self.compute, home),
            **self.adaptation.notes,
            **update_statement(self.adaptation.update, home),
            "saved": in_short(self.adaptation.dtype),
            "attention": f"{self.model.config._attn_implementation}: {self.blueprint.attention}",
            **activations_statement(self.config),
            **({} if self.float8 is None else {"float8": self.float8}),
            **({} if self.compiled is None else {"compiled": self.compiled.words()}),
            **experts_words(self.model),
            **({"routers": f"computed in float32, in {plural(len(self.routers), 'group')} of their own"} if self.routers else {}),
            "logits": self.logits,
        }

    def close(self) -> None:
        """Look no more at what is compiled; all else that remains is in the run directory."""
        if self.compiled is not None:
            self.compiled.close()

    def _layout(self) -> str:
        """Say how the model is cut: groups, the largest one's share, ranks, and copies where there are several."""
        groups, copies = (
            [sum(p.nbytes for p in block.parameters()) for block in (*self.blocks, *self.unreached)],
            self.config.engine.replicate,
        )
        total = sum(p.nbytes for p in self.model.parameters())
        largest = max(*groups, total - sum(groups)) / total
        words = f"{plural(len(groups) + 1, 'group')}, the largest {largest:.0%} of all, over {plural(self.world.size // copies, 'rank')}"
        return words + (f", in {copies} copies" if copies > 1 else "")


def unreached_modules(model: nn.Module, unreached: set[str], blocks: list[nn.Module]) -> list[nn.Module]:
    """Return the modules outside of blocks that the data never reach: as groups of their own they are never gathered."""
    inside = {id(module) for block in blocks for module in block.modules()}
    found: list[nn.Module] = []
    for path in groups_of(unreached, {name: p.numel() for name, p in model.named_parameters()}):
        module = dict(model.named_modules()).get(path)
        found += module if isinstance(module, nn.ModuleList) else [module] if module is not None else []
    return [module for module in found if id(module) not in inside]


def require_groups(model: PreTrainedModel, blocks: list[nn.Module]) -> None:
    """Raise ConfigError where a model has no blocks, or much of it is outside of blocks and embeddings.

    That would be one group, gathered whole on every rank.
    """
    remedy = "engine=zero3, which splits each tensor by itself"
    if not blocks:
        reason = f"{type(model).__name__} names no repeated blocks, so fsdp cannot shard it block by block"
        raise ConfigError("engine.name", "fsdp", reason, remedy)
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, ENCODER, None))
    placed = {id(p) for module in (*blocks, *ends) if module is not None for p in module.parameters()}
    stray = {name: p.numel() for name, p in model.named_parameters() if id(p) not in placed}
    total = sum(p.numel() for p in model.parameters())
    if sum(stray.values()) > STRAY_SHARE * total:
        largest = max(stray, key=lambda name: stray[name])
        share = sum(stray.values()) / total
        reason = f"{share:.0%} of {type(model).__name__} is outside its blocks ({largest}, ...): it would be gathered whole on every rank"
        raise ConfigError("engine.name", "fsdp", reason, remedy)


def _load(model: PreTrainedModel, origin: Origin) -> None:
    """Read this rank's block of every tensor; none stays unwritten."""
    tied = tied_names(model)
    load_parts(origin, {name: _local_block(tensor) for name, tensor in model.state_dict().items() if name not in tied})
    require_tied(model)


def _local_block(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's part of a tensor and its offset in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def bytes_on_host(*, optimizer: bool, parameters: bool, state: int = 8) -> dict[str, int]:
    """Return bytes a trainable parameter takes on the host, by part, where these are offloaded; `state` are the optimizer's."""
    parts = {"float32 parameters": 4, "float32 gradients": 4} if parameters else {}
    return parts | ({"optimizer state": state} if parameters or optimizer else {})


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of this rank's parts."""
    return sum(_local_block(tensor)[0].nbytes for tensor in tensors)


def optimizer_of(model: nn.Module, optim: OptimConfig, adaptation: Adaptation) -> torch.optim.Optimizer:
    """Return the optimizer of what is trained, with weight decay on matrices and embeddings only."""
    groups = decay_groups(((p, p.ndim, adaptation.lr_scale(name)) for name, p in model.named_parameters()), optim.weight_decay)
    return make_optimizer(groups, optim)


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares, () float64: torch's float32 norm of 60 million CPU elements is off by half a percent."""
    parts = (part for tensor in tensors for part in tensor.reshape(-1).split(1 << 24))
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def _begin_state(optimizer: torch.optim.Optimizer, pieces: Callable[[], dict[Tensor, list[Any]]]) -> None:
    """Make the optimizer's state now, at step 0: memory is short at the start, and a checkpoint before the first update is exact."""
    begin: Any = getattr(optimizer, "begin", None)
    if begin is not None:
        begin(pieces())
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.AdamW) else ():
        for p in group["params"]:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def _moved(p: Tensor, state: dict[str, Tensor], device: torch.device, pin: bool = False) -> dict[str, Tensor]:
    """Return moments, without counters, on another device than, perhaps, a mesh's: DTensor.from_local would move them back."""
    moved = dict(state)
    for name in [name for name, value in state.items() if value.ndim]:
        local = _local_block(state[name])[0].to(device)
        local = local.pin_memory() if pin else local
        moved[name] = DTensor(local, p._spec, requires_grad=False) if isinstance(p, DTensor) else local
    return moved


def _whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
