"""PyTorch's fully_shard (FSDP2): one group a block, embedding, final norm and head in the root group."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_

from trainers.batch import Batch, Needs, Output
from trainers.config.choices import Float8, Offload
from trainers.config.derived import microbatches
from trainers.config.errors import plural
from trainers.config.mesh import mesh_of
from trainers.config.optimizers import host_bytes
from trainers.config.schema import RunConfig
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
    scale_of,
    state_statement,
    statement,
    unpacked_numel,
    update_statement,
    update_tensors,
)
from trainers.engines.fsdp.groups import data_mesh, has_use, layout, require_groups, shard, unreached_modules
from trainers.engines.fsdp.state import (
    begin_state,
    bytes_on_host,
    clip_by_mesh,
    load,
    load_in_place,
    load_values,
    local_block,
    local_bytes,
    moved,
    optimizer_of,
    pieces,
    placed,
    state_of,
    whole,
)
from trainers.engines.stored import load_state
from trainers.model.blueprint import Blueprint, find_blocks, model_class
from trainers.model.experts import experts_words, mixtures, routing_of
from trainers.model.forward import forward
from trainers.model.weights import Origin, forget, materialise, origin_of, tied_names
from trainers.optim import set_lr, tensors_of
from trainers.peft.adapt import adapt
from trainers.peft.update import Part
from trainers.world import World, read

if TYPE_CHECKING:
    from trainers.engines.compiling import CompiledBlocks
    from trainers.engines.fsdp.dealt import Dealt
    from trainers.engines.fsdp.split import Split
    from trainers.model.context import Slices

log = logging.getLogger("fulltune")
CLIP_EPS = 1e-6
"""What torch adds to a norm before it divides by it."""


ALL: tuple[Callable[[str, Tensor], Tensor], Callable[[dict[str, Any]], dict[str, Any]]] = (lambda _, tensor: tensor, lambda state: state)
"""Which part of a whole a tensor is, and what a checkpoint holds, where no rank splits layers."""


class FSDPEngine:
    """The Engine over fully_shard; parameters, gradients and AdamW state are float32 DTensors, split over all ranks.

    One rank that computes in float32 has nothing to split, gather or cast: its tensors are plain, and so is its model.
    """

    settling_steps = 0

    def __init__(self, config: RunConfig, world: World, blueprint: Blueprint) -> None:
        """Build on meta, adapt and shard: all that needs neither values nor memory for them."""
        self.world, self.blueprint, self.config = world, blueprint, config
        self.parts: dict[str, Part] = {}  # what an update hook looks at, from `squares` to the end of `step`
        self.compute, engine = COMPUTE[config.train.precision], config.engine
        self.offloaded = engine.offload_param is Offload.cpu
        # the optimizer's state lives on the host and visits the device parameter by parameter
        self.visits = engine.offload_optimizer is Offload.cpu and self.steps_on_device(config)
        self.scale = scale_of(config)
        self.mesh, self.model = mesh_of(engine, world.size), blueprint.build()
        self.slices = self._begin_slices() if self.mesh.context > 1 else None  # the ranks with which this one shares rows
        self.routing = routing_of(self.model, config)
        apart = self.compute is not torch.float32 and not config.train.compile  # a compiled block runs no hooks of groups inside it
        routers = [mixture.router for mixture in mixtures(self.model)] if apart else []
        self.adaptation = adapt(self.model, origin_of(self.model, blueprint), config, blueprint, self.compute)
        # what of each layer this rank has, where ranks split layers
        self.blocks, self.split = find_blocks(self.model), self._split() if self.mesh.tensor * self.mesh.expert > 1 else None
        self.part, self.saved, self.head, self.logits = (
            self.split.told if self.split else (*ALL, *head_of(self.model, config, self.compute))
        )
        self.float8 = self._convert_to_float8() if config.train.float8 is not Float8.none else None  # what multiplies in float8, in words
        self.inputs = keep_for_backward(self.blocks, config, self._pins())
        self.unreached = unreached_modules(self.model, self.adaptation.unreached, self.blocks)
        self.routers = [self.model.get_submodule(path) for path in routers]
        require_groups(self.model, [*self.blocks, *self.unreached])
        self.compiled, self.is_cut = self._compile() if config.train.compile else None, has_use(config, self.compute, world.size)
        if self.is_cut:
            self._shard()
        self.keeps_whole_gradients = not engine.sync_each_microbatch and microbatches(config.train, self.mesh.data_size) > 1

    def _shard(self) -> None:
        if self.adaptation.packed:
            from trainers.engines.integers import shard_integers

            shard_integers()
        shard(
            self.model,
            self.blocks,
            self.unreached,
            self.routers,
            never_used=self.adaptation.unreached,
            compute=self.compute,
            engine=self.config.engine,
            mesh=data_mesh(self.mesh, self.world.device.type) if self.split is None else self.split.data_mesh,
            apart=None if self.split is None else self.split.apart,
            device=self.world.device.type,
        )

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
            load_values(self.model, origin, self.part)
            forget(origin)
        move_buffers(self.model, self.world.device)  # an offloaded model's parameters visit the device, its buffers live there
        self.optimizer = optimizer_of(self.model, self.config.optim, self.adaptation, self.mesh.expert > 1)
        begin_state(self.optimizer, lambda: pieces(self.model, self.mesh.copy_size))
        self._send_home()
        if (update := self.adaptation.update) is not None:
            update.begin({name: local_block(self.model.get_parameter(name).detach())[0].view(-1) for name in update.names})
        self.model.train()

    def _convert_to_float8(self) -> str:
        from trainers.engines.float8 import convert

        if not self.config.train.compile and self.world.device.type == "cuda":
            log.warning("train.float8 without train.compile=true is slower than bf16: each cast reads and writes its matrix by itself")
        return convert(self.model, self.blocks, self.config.train.float8, self.world.device.type)

    def _compile(self) -> CompiledBlocks:
        from trainers.engines.compiling import CompiledBlocks

        return CompiledBlocks(self.blocks, self.config, self.world.local_size, self.world.device.type)

    def _begin_slices(self) -> Slices:
        from trainers.model.backends import require_shareable
        from trainers.model.context import require_no_state, slices_of

        require_shareable(self.blueprint.config, model_class(self.blueprint.config), self.config.engine)
        require_no_state(self.model, self.mesh.context, self.config.data.seq_len)
        heads = getattr(self.blueprint.config.get_text_config(), "num_attention_heads", None)
        return slices_of(self.mesh, self.world.rank, self.world.device.type, heads if isinstance(heads, int) else None)

    def _split(self) -> Split | Dealt:
        if self.mesh.expert > 1:
            from trainers.engines.fsdp.dealt import Dealt

            over = data_mesh(self.mesh, self.world.device.type)
            return Dealt(self.model, self.config, self.mesh, self.world.rank, over, self.compute)
        from trainers.engines.fsdp.split import Split

        return Split(self.model, self.config, self.mesh, self.world.rank, self.world.device.type, self.compute.itemsize)

    def _pins(self) -> bool:
        return self.config.engine.pin_memory and self.world.device.type == "cuda"

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Output:  # noqa: B008 - frozen
        """Return the log-probabilities of the labels and what else is needed."""
        if self.slices is None and self.routing is None and self.compiled is None and self.float8 is None:
            return forward(self.model, batch, needs, head=self.head)
        if self.slices is not None:
            from trainers.model.context import forward_in_slices

            return forward_in_slices(self.model, batch, needs, self.slices, self.head, self.routing)
        if self.routing is not None:
            return self.routing.with_balance(batch, lambda: forward(self.model, batch, needs, head=self.head))
        from trainers.engines.compiling import forward_filled_up

        return forward_filled_up(self.model, batch, needs, self.compiled, self.head)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, reduced over ranks now or at the last microbatch. FSDP takes means, so the loss grows by the ranks of one.

        In float16 it grows by the loss scale alone, so that gradients overflow alike on any number of ranks; `squares` divides.
        """
        if self.is_cut:
            self.model.set_requires_gradient_sync(last or self.config.engine.sync_each_microbatch)  # type: ignore[operator]
            self.model.set_requires_all_reduce(last)  # type: ignore[operator]
            self.model.set_reshard_after_backward(last or self.config.engine.reshard_after_backward)  # type: ignore[operator]
        (loss * (self.world.size // self.mesh.tensor if self.scale is None else self.scale.factor)).backward()

    def squares(self) -> Tensor:
        """Return the sum of this rank's squared gradients, with what an update hook adds to them; a copy's share, where there are copies.

        Collective where there is such a hook.
        """
        if self.scale is not None:
            for p in self.model.parameters():
                if p.grad is not None:
                    local_block(p.grad)[0].mul_(self.world.size // self.mesh.tensor / self.scale.factor)
        update = self.adaptation.update
        if update is not None:
            self.parts = self._parts(update.names)
            update.before(self.parts, lambda name: whole(self.model.get_parameter(name)))
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        require_type("gradients", grads, torch.float32)
        own = (grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads)
        squares = sum_of_squares(own) if self.split is None else self.split.squares(self.model, sum_of_squares)
        return squares.to(self.world.device) / self.mesh.replicate

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
                (clip_by_mesh if self.mesh.expert > 1 else clip_grads_with_norm_)(parameters, clip, torch.tensor(norm, dtype=torch.float32))
            set_lr(self.optimizer.param_groups, lr)
            if self.visits:
                self._step_with_visiting_state(parameters)
            else:
                self.optimizer.step()
            if update is not None:
                copies = self.mesh.replicate
                update.after(parts, lambda values: [value / copies for value in self.world.sum(values)])
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale is not None:
            self.scale.after(math.isfinite(norm))
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
            value, offset = local_block(p)
            start = offset[0] * p.shape[1:].numel()
            parts[name] = Part(value=value.view(-1), grad=local_block(p.grad)[0].view(-1), start=start)
        return parts

    def _step_with_visiting_state(self, parameters: list[nn.Parameter]) -> None:
        """Update parameter by parameter: its state comes from the host, is used where the parameter is, and goes back."""
        grads = [p.grad for p in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        for p, grad in zip(parameters, grads, strict=True):
            home = self.optimizer.state[p]
            self.optimizer.state[p], p.grad = moved(p, home, p.device), grad
            self.optimizer.step()
            for name, value in home.items():
                local_block(value)[0].copy_(local_block(self.optimizer.state[p][name])[0])
            self.optimizer.state[p], p.grad = home, None

    def _send_home(self) -> None:
        """Move the optimizer's moments to where they live between steps."""
        if self.visits:
            for p, state in self.optimizer.state.items():
                self.optimizer.state[p] = moved(p, state, torch.device("cpu"), self._pins())

    def train(self, mode: bool) -> None:
        """Switch dropout on or off; without it the parameters are what would be exported, where an optimizer averages them."""
        self.model.train(mode)
        if self.compiled is not None and mode:
            self.compiled.done(training=False)
        self._average(not mode)

    def _average(self, on: bool) -> None:
        """Let the parameters hold their averages or what is trained, where the optimizer knows both."""
        change: Any = getattr(self.optimizer, "average", None)
        if change is not None and change(on) and self.is_cut:
            for module in (*self.blocks, *self.unreached, self.model):
                module.reshard()  # type: ignore[operator]  # what an evaluation has gathered holds the old values

    def state(self) -> dict[str, Any]:
        """Return the live shards of what is trained, and of the optimizer; averages where that averages, which are copies."""
        return self.saved(state_of(self.model, self.optimizer, self.adaptation.update, self.scale))

    def load(self, folder: Path, part: str | None = None) -> None:
        """Restore model and optimizer, resharded to this world size."""
        self._average(False)
        if self.split is None:
            load(self.model, self.optimizer, self.adaptation.update, self.scale, partial(load_state, folder=folder, part=part))
        else:
            load_in_place(self.state(), self.scale, partial(load_state, folder=folder, part=part))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export, gathered one at a time and cast to its type there."""
        state, averaged = self.model.state_dict(), getattr(self.optimizer, "averaged", None)

        def gather(name: str) -> Tensor:
            tensor = state[name]
            if averaged is not None and (p := self.model.get_parameter(name)) in self.optimizer.state:
                tensor = placed(self.model, name, averaged(p))
            return whole(tensor) if self.split is None else self.split.wholes.whole(name, tensor)

        yield from self.adaptation.exported(gather)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole model's tensors."""
        tied = tied_names(self.model)
        shapes = {name: tuple(self.part(name, tensor).shape) for name, tensor in self.model.state_dict().items() if name not in tied}
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
        total = sum(unpacked_numel(self.adaptation, name, self.part(name, p).numel()) for name, p in self.model.named_parameters())
        trained = sum(self.part(name, p).numel() for name, p in self.model.named_parameters() if p.requires_grad)
        require_state_bytes(self.config.optim, size["optimizer"], size["trainable"] // 4)
        cut = self._layout()
        home = HOST if self.offloaded else ""
        until = "whole until the last microbatch" if self.keeps_whole_gradients else home
        state = state_statement(self.config.optim, moments, size["optimizer"], HOST if self.visits else home)
        return {
            "parameters": f"{counted(total, trained)}, {cut}",
            "storage": statement("master weights", parameters, torch.float32, size["trainable"], home),
            "compute": in_short(self.compute),
            **({} if self.scale is None else {"loss scale": self.scale.words()}),
            "gradient reduction": statement("gradients", [], torch.float32, size["gradients"], until),
            "optimizer state": state,
            "frozen weights": frozen_statement(((p, local_block(p)[0]) for p in frozen), self.compute, home),
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

    def _layout(self) -> str:
        """Say how the model is cut; raises RuntimeError if its groups compute in another type than the run."""
        if not self.is_cut:
            return "whole: one rank that computes in float32 has nothing to gather or to cast"
        policies = {module._get_fsdp_state()._mp_policy.param_dtype for module in (*self.blocks, self.model)}  # type: ignore[operator]
        if policies != {self.compute}:
            raise RuntimeError(f"compute must be {in_short(self.compute)}, and fully_shard has {policies}")
        return f"in {layout(self.model, [*self.blocks, *self.unreached], self.mesh)}{'' if self.split is None else self.split.words()}"

    def close(self) -> None:
        """Look no more at what is compiled; all else that remains is in the run directory."""
        if self.compiled is not None:
            self.compiled.close()


def sum_of_squares(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares, () float64: torch's float32 norm of 60 million CPU elements is off by half a percent."""
    parts = (part for tensor in tensors for part in tensor.reshape(-1).split(1 << 24))
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
