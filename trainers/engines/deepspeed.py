"""DeepSpeed's ZeRO stage 3: each parameter's elements split evenly over the ranks, on the device, in host memory or on NVMe."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from trainers.batch import Batch, Needs, Output
from trainers.config.choices import Offload, OptimizerName, OptimizerState
from trainers.config.errors import ConfigError, plural
from trainers.config.optimizers import host_bytes
from trainers.config.schema import RunConfig
from trainers.engines.base import (
    COMPUTE,
    HOST,
    NVME_BUFFERS,
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
    state_statement,
    statement,
    table_parameters,
    unpacked_numel,
    update_statement,
    update_tensors,
)
from trainers.engines.ops import import_deepspeed, require_op
from trainers.engines.stored import load_state
from trainers.model.blueprint import Blueprint, find_blocks
from trainers.model.experts import compute_in_float32, experts_words, mixtures, one_by_one, routing_of
from trainers.model.forward import forward
from trainers.model.recurrent import recurrent_layers
from trainers.model.weights import Origin, forget, origin_of, read_elements, require_tied, tied_names
from trainers.optim import decay_groups, make_optimizer, set_lr, tensors_of
from trainers.peft.adapt import adapt
from trainers.peft.base import Adaptation
from trainers.peft.update import Part
from trainers.rundir import paths
from trainers.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")
REUSED = 1_000_000_000
"""Elements up to which DeepSpeed keeps what it will need again, and gathers at most; its own defaults of both."""


class ZeRO3Engine:
    """The Engine over DeepSpeed ZeRO-3; master weights, reduced gradients and AdamW's state are float32."""

    model: PreTrainedModel
    adaptation: Adaptation
    nvme: Path | None
    settling_steps = 1
    """The first finds out what to gather ahead."""

    def __init__(self, config: RunConfig, world: World, blueprint: Blueprint) -> None:
        """Build on meta and adapt: all that needs neither values nor memory for them."""
        self.world, self.blueprint, self.config = world, blueprint, config
        self.compute = COMPUTE[config.train.precision]
        self.nvme = None
        self.model = blueprint.build()
        self.routing = routing_of(self.model, config)
        self.routers = [mixture.router for mixture in mixtures(self.model)] if self.compute is not torch.float32 else []
        for path in self.routers:
            compute_in_float32(self.model.get_submodule(path))
        self.adaptation = adapt(self.model, origin_of(self.model, blueprint), config, blueprint, self.compute)
        self.head, self.logits = head_of(self.model, config, self.compute)
        self.blocks = find_blocks(self.model)
        self.inputs = keep_for_backward(self.blocks, config, self._pins())
        library = import_deepspeed()
        for collective in ("reduce_scatter_tensor", "all_gather_into_tensor"):
            warnings.filterwarnings("ignore", category=FutureWarning, message=f".*{collective}.*")
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it even of a process that is alone
        library.init_distributed(verbose=False, auto_mpi_discovery=False)
        self.mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))

    @staticmethod
    def require_parts(config: RunConfig) -> None:
        """Have DeepSpeed's compiled parts that this run needs, built if need be; raises ConfigError."""
        require_ops(config)

    @staticmethod
    def reach(config: RunConfig, blocks: Sequence[nn.Module]) -> int:
        """Return how many blocks DeepSpeed keeps for their next use, or gathers ahead, by its own limit in elements."""
        return -(-REUSED // max(1, sum(p.numel() for p in blocks[-1].parameters())))

    @staticmethod
    def on_host(config: RunConfig) -> dict[str, int]:
        """Return bytes a trainable parameter takes on the host, by part."""
        engine = config.engine
        return bytes_on_host(
            optimizer=engine.offload_optimizer is Offload.cpu,
            parameters=engine.offload_param is Offload.cpu,
            swapped=engine.offload_optimizer is Offload.nvme,
            compute_bytes=COMPUTE[config.train.precision].itemsize,
            state=host_bytes(config.optim),
        )

    @staticmethod
    def steps_on_device(config: RunConfig) -> bool:
        """Tell whether the optimizer runs on the device: where its state is offloaded it runs on the host."""
        return config.engine.offload_optimizer is Offload.none

    def fill(self, origin: Origin | None) -> None:
        """Give this rank's partitions memory, with the values of `origin` where there is one, and make the optimizer."""
        if origin is None:
            believe_ranks()
        else:
            self.nvme = begin_nvme(self.config, self.world, sum(p.numel() for p in self.model.parameters()))
        largest = max(p.numel() for p in self.model.parameters())
        hidden_size = self.blueprint.config.get_text_config().hidden_size
        self.settings = settings(self.config, hidden_size, -(-largest // self.world.size), self.nvme, self.world)
        self.settings["zero_optimization"]["leaf_module"]["classes"] += one_by_one(self.model)  # reduced in one order on all ranks
        if self.world.rank == 0 and origin is not None:
            (Path(self.config.run_dir) / paths.DEEPSPEED).write_text(json.dumps(self.settings, indent=1) + "\n")
        self._partition(origin)
        for layer in recurrent_layers(self.model):  # gathered once a forward on every rank, however many documents go through it
            layer.register_forward_pre_hook(_positional, with_kwargs=True)
            import_deepspeed().utils.set_z3_leaf_module(layer, True)
        self._gather_head_whole()
        self.engine, self.optimizer = import_deepspeed().initialize(
            model=self.model, optimizer=self._make_optimizer(native=origin is not None), config=copy.deepcopy(self.settings)
        )[:2]
        self.parameters: dict[str, Any] = dict(self.model.named_parameters())
        self.norm = 0.0
        self.accepts: Accepts = accepts_all
        self.with_gradient: set[str] = set()
        """Parameters that got a gradient in this step; DeepSpeed reduces the same ones on every rank."""
        for name, p in self.parameters.items():
            if p.requires_grad:
                p.register_hook(lambda _, name=name: self.with_gradient.add(name))
        self.optimizer._get_norm_groups = self._norm_groups
        if origin is not None:
            if not origin.is_exact_in(self.compute):
                self._set_master(origin)
            forget(origin)
        self._begin_state()
        if (update := self.adaptation.update) is not None:
            update.begin({name: part.value for name, part in self._parts(update.names).items()})
        self.engine.train()

    def _gather_head_whole(self) -> None:
        """Let an output layer with parts, such as an adapter, be gathered once for all its chunks: ranks may have fewer chunks than others.

        DeepSpeed gathers a leaf module with all that is in it.
        """
        layer = self.model.get_output_embeddings()
        if self.head is not None and any(layer.children()):
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(layer, True)

    def _partition(self, origin: Origin | None) -> None:
        """Give each meta parameter its partition, read from `origin`; no rank ever fills more than its own elements.

        What zero.Init does at birth, without making, initialising and broadcasting whole values first.
        """
        from deepspeed.runtime.zero import Init

        init = Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(self.settings))  # `dtype` would be ignored on some machines
        made: dict[str, Any] = {}
        for name, meta in list(self.model.named_parameters()):
            dtype = self.compute if meta.is_floating_point() else meta.dtype
            if origin is None:
                whole = torch.empty(meta.shape, dtype=dtype, device=self.world.device)
            else:
                whole = _untouched(meta.shape, dtype, self.world.device)
                start, end = part_of(meta.numel(), self.world)
                whole.view(-1)[start:end].copy_(read_elements(origin, name, tuple(meta.shape), start, end))
            made[name] = nn.Parameter(whole, requires_grad=meta.requires_grad)
            init._convert_to_deepspeed_param(made[name])
            made[name].partition()
            _replace(self.model, name, made[name])
        for alias, name in tied_names(self.model).items():
            _replace(self.model, alias, made[name])
        if origin is not None:
            self._read_buffers(origin, made)
        move_buffers(self.model, self.world.device)
        require_tied(self.model)

    def _read_buffers(self, origin: Origin, made: dict[str, Any]) -> None:
        """Read what is not a parameter; raises RuntimeError if anything of the model stays unwritten."""
        names, buffers = set(origin.names()), dict(self.model.named_buffers())
        for name in names - set(made):
            buffers[name].copy_(origin.read(name, (0,) * buffers[name].ndim, tuple(buffers[name].shape)))
        left = [name for name, tensor in self.model.state_dict(keep_vars=True).items() if tensor.is_meta]
        left += [name for name in made if name not in names]
        if left:
            raise RuntimeError(f"not all of the model was loaded: {', '.join(left[:5])} stayed unwritten")

    def _make_optimizer(self, native: bool) -> torch.optim.Optimizer:
        """Return torch's optimizer, or DeepSpeed's own for the host where the state is there; `native` allows its compiled code."""
        optim = self.config.optim
        parameters: dict[str, Any] = dict(self.model.named_parameters())
        scale = self.adaptation.lr_scale
        groups = decay_groups(((p, len(p.ds_shape), scale(name)) for name, p in parameters.items()), optim.weight_decay)
        if not takes_cpu_adam(self.config) or not native:
            return make_optimizer(groups, optim)
        require_op("cpu_adam", "engine.offload_optimizer", str(self.config.engine.offload_optimizer))
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        betas = (optim.betas[0], optim.betas[1])
        on_host: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, eps=optim.eps, adamw_mode=True)
        return on_host

    def _begin_state(self) -> None:
        """Make the state at step 0, sub-group by sub-group: memory is short at the start, and a checkpoint can be read into it."""
        own: Any = self.optimizer.optimizer
        if hasattr(own, "begin"):
            own.begin(self._pieces())
        if self.config.optim.name is not OptimizerName.adamw or hasattr(own, "begin"):
            return
        native = hasattr(self.optimizer.optimizer, "ds_opt_adam")
        for number, master in enumerate(self.optimizer.fp32_partitioned_groups_flat):
            with self._present(number):
                moments = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
                self.optimizer.optimizer.state[master] = {"step": 0 if native else torch.zeros((), device=master.device), **moments}

    @contextmanager
    def _present(self, number: int) -> Iterator[None]:
        """Bring a sub-group's master weights and moments from NVMe, and write them back."""
        swapped = self.optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(number)

    def _sub_groups(self) -> Iterator[tuple[int, Tensor, dict[str, tuple[int, int]]]]:
        """Yield each sub-group: its number, its flat master weights, and where each parameter's elements are in them."""
        names = {p.ds_id: name for name, p in self.parameters.items()}
        for number, group in enumerate(self.optimizer.fp16_groups):
            places, offset = {}, 0
            for p in group:
                start, end = part_of(p.ds_numel, self.world)
                places[names[p.ds_id]] = (offset, offset + max(0, end - start))
                offset += p.partition_numel()
            yield number, self.optimizer.fp32_partitioned_groups_flat[number], places

    def _pieces(self) -> dict[Tensor, list[Any]]:
        """Return which elements of which tensors each sub-group's master weights hold."""
        from trainers.optim.sharded import Piece

        tables, found = table_parameters(self.model), dict[Tensor, list[Any]]()
        for _, master, places in self._sub_groups():
            found[master] = []
            for name, (begin, end) in places.items():
                p = self.parameters[name]
                where = {"start": part_of(p.ds_numel, self.world)[0], "begin": begin, "end": end, "unit": 1}
                found[master].append(Piece(name=name, shape=tuple(p.ds_shape), ranks=self.world.size, is_table=id(p) in tables, **where))
        return found

    def _set_master(self, origin: Origin) -> None:
        """Read the master weights again in float32: those that DeepSpeed made from bfloat16 have lost what the disk holds."""
        for number, master, places in self._sub_groups():
            with self._present(number):
                for name, (start, end) in places.items():
                    p = self.parameters[name]
                    mine = part_of(p.ds_numel, self.world)
                    master.data[start:end].copy_(read_elements(origin, name, tuple(p.ds_shape), *mine))

    def _gather_persistent(self) -> None:
        """Take what stays whole on every rank over from its partitions, after these were given other values."""
        if persistent := self.optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        self.optimizer.invalidate_secondary_tensor()

    def _pins(self) -> bool:
        return self.config.engine.pin_memory and self.world.device.type == "cuda"

    def forward(self, batch: Batch, needs: Needs = Needs()) -> Output:  # noqa: B008 - frozen
        """Return the log-probabilities of the labels and what else is needed."""
        with _linear_of_zero3():
            if self.routing is not None:
                return self.routing.with_balance(batch, lambda: forward(self.engine, batch, needs, self.model.config, self.head))
            return forward(self.engine, batch, needs, self.model.config, self.head)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add gradients, reduced over ranks in float32 as they come. DeepSpeed takes means, so the loss grows by the world size."""
        with _linear_of_zero3():
            self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def squares(self) -> None:
        """Leave the norm to DeepSpeed, whose step finds it over all ranks."""

    def step(self, lr: float, accepts: Accepts = accepts_all, norm: float | None = None) -> float:
        """Clip, update and clear; return the gradient norm before clipping."""
        set_lr(self.optimizer.param_groups, lr)
        self.accepts = accepts
        update, parts = self.adaptation.update, {}
        if update is not None:
            parts = self._parts(update.names)
            update.before(parts, lambda name: _whole(self.parameters[name]))
            parts = {name: replace(part, grad=part.grad.clone()) for name, part in parts.items()}  # DeepSpeed clips some in place
        with self._left_alone(self.adaptation.trained - self.with_gradient - parts.keys()):
            self.engine.step()
        norm = self.norm
        if update is not None and math.isfinite(norm) and accepts(norm):
            if self.config.optim.clip is not None:
                for part in parts.values():
                    part.grad.div_(max(1.0, (norm + 1e-6) / self.config.optim.clip))
            if update.after(parts, self.world.sum):
                self._take_over()
        self._clear_gradients()
        self.with_gradient.clear()
        return norm

    @contextmanager
    def _left_alone(self, names: Collection[str]) -> Iterator[None]:
        """Undo what an update does to parameters without a gradient, which DeepSpeed steps and decays with their sub-group."""
        kept: dict[int, list[Tensor]] = {}
        if names:
            for number, parts in self._live_parts(names):
                kept[number] = [part.clone() for part in parts]
        yield
        if names:
            for number, parts in self._live_parts(names):
                for part, before in zip(parts, kept[number], strict=True):
                    part.copy_(before)
            self._take_over()

    def _live_parts(self, names: Collection[str]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each sub-group with this rank's elements of some of its parameters: views of master weights and moments."""
        for number, master, places in self._sub_groups():
            with self._present(number):
                parts = [master.data[slice(*place)] for name, place in places.items() if name in names]
                parts += [part for name, kinds in self._state_of(master, places).items() if name in names for part in kinds.values()]
                yield number, parts

    def _state_of(self, master: Tensor, places: dict[str, tuple[int, int]]) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's state of each tensor of a sub-group, by kind: this rank's elements, live."""
        own: Any = self.optimizer.optimizer
        if hasattr(own, "elements"):
            return own.elements(master)  # type: ignore[no-any-return]
        state = own.state.get(master, {})
        return {name: {kind: state[kind][slice(*place)] for kind in MOMENTS} for name, place in places.items()} if state else {}

    def _norm_groups(self) -> list[Any]:
        """Return DeepSpeed's norms of its groups; infinite where the step is not accepted, with which DeepSpeed takes none."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        groups: list[Any] = type(self.optimizer)._get_norm_groups(self.optimizer)
        self.norm = float(combine_grad_norm_groups(groups))
        return groups if self.accepts(self.norm) else [torch.tensor(math.inf)]

    def _parts(self, names: Collection[str]) -> dict[str, Part]:
        """Return this rank's elements of each tensor: of the master weights, and of the gradients before they are clipped."""
        parts: dict[str, Part] = {}
        buffers = self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for _, master, places in self._sub_groups():
            for name, (begin, end) in places.items():
                if name in names:
                    p = self.parameters[name]
                    start = part_of(p.ds_numel, self.world)[0]
                    parts[name] = Part(value=master.data[begin:end], grad=buffers[p.ds_id][: end - begin], start=start)
        return parts

    def _take_over(self) -> None:
        """Give the parameters the values of the master weights, after these were changed."""
        for number in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)  # as after a step
        self._gather_persistent()

    def _clear_gradients(self) -> None:
        """Leave no gradient: DeepSpeed would take it again for a parameter that gets none in the next step."""
        self.optimizer.grad_partitions_flat_buffer.zero_()
        for master in self.optimizer.fp32_partitioned_groups_flat:
            if master.grad is not None:
                master.grad.zero_()

    def train(self, mode: bool) -> None:
        """Switch dropout on or off; without it the parameters are what would be exported, where an optimizer averages them."""
        self.engine.train(mode)
        self._average(not mode)

    def _average(self, on: bool) -> None:
        """Let the parameters hold their averages or what is trained, where the optimizer knows both."""
        change: Any = getattr(self.optimizer.optimizer, "average", None)
        if change is not None and change(on):
            self.engine.empty_partition_cache()  # what an evaluation has gathered and kept holds the old values
            self._take_over()

    def load(self, folder: Path) -> None:
        """Restore master weights and moments at any world size, then take the parameters over from them."""
        self._average(False)
        self.engine.empty_partition_cache()
        state = self.state()
        own: Any = self.optimizer.optimizer if hasattr(self.optimizer.optimizer, "saved") else None
        if own is not None:
            own.expect(state["optimizer"], lambda part: load_state({"optimizer": part}, folder))
        load_state(state, folder)
        for number, master, places in self._sub_groups():
            with self._present(number):
                for name, (start, end) in places.items() if not hasattr(own, "trained") else ():  # its checkpoint's model is an average
                    master.data[start:end].copy_(state["model"][name].to_local())
                if own is None:
                    self._load_moments(master, places, state["optimizer"])
        if own is not None:
            own.take(state["optimizer"])
        for number in range(len(self.optimizer.fp16_groups)):
            with self._present(number):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(number)  # as after a step
        self._count_to(int(state["optimizer"].get("step", 0)))
        self._gather_persistent()
        if self.adaptation.update is not None:
            self.adaptation.update.load(state)

    def _load_moments(self, master: Tensor, places: dict[str, tuple[int, int]], saved: dict[str, Any]) -> None:
        """Take a sub-group's moments and their step over from what a checkpoint holds."""
        for name, kinds in self._state_of(master, places).items():
            for kind, part in kinds.items():
                part.copy_(saved[name][kind].to_local())
        if moments := self.optimizer.optimizer.state.get(master, {}):
            step = saved["step"]
            moments["step"] = step.to(master.device, copy=True) if isinstance(moments["step"], Tensor) else int(step)

    def _count_to(self, step: int) -> None:
        """Bring DeepSpeed's own AdamW, which multiplies beta ** step on from step to step, to where it was after `step` steps.

        After a gap it would take a power instead, which rounds otherwise: a continued run would differ in the last bit.
        """
        adam, nothing = self.optimizer.optimizer, torch.empty(0)
        for number in range(1, step + 1) if hasattr(adam, "ds_opt_adam") else ():
            betas, eps = adam.param_groups[0]["betas"], adam.param_groups[0]["eps"]
            adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, *betas, eps, 0.0, True, nothing, nothing, nothing, nothing)

    def state(self) -> dict[str, Any]:
        """Return this rank's master weights and moments as flat DTensors on the host: copies, but of what lives there."""
        state: dict[str, Any] = {"model": {}, "optimizer": {}}
        own: Any = self.optimizer.optimizer
        for number, master, places in self._sub_groups():
            swapped = self.optimizer._swappable_optimizer_subgroup(number)
            with self._present(number):
                values = own.averaged(master) if hasattr(own, "averaged") else master.data
                for name, (start, end) in places.items():
                    state["model"][name] = self._flat(values[start:end], self.parameters[name].ds_numel, swapped)
                if hasattr(own, "saved"):
                    continue
                for name, kinds in self._state_of(master, places).items():
                    numel = self.parameters[name].ds_numel
                    state["optimizer"][name] = {kind: self._flat(part, numel, swapped) for kind, part in kinds.items()}
                    state["optimizer"]["step"] = torch.as_tensor(own.state[master]["step"], dtype=torch.float32).cpu()
        if hasattr(own, "saved"):
            state["optimizer"] = own.saved(self._placed, self._of_each_rank)
        if (update := self.adaptation.update) is not None:
            state |= update.state(self._placed)
        return state

    def _placed(self, name: str, elements: Tensor) -> DTensor:
        """Return this rank's elements of a tensor as a part of the whole, flattened; shares memory on a CPU."""
        return self._flat(elements, self.parameters[name].ds_numel, copy=False)

    def _of_each_rank(self, values: Tensor) -> DTensor:
        """Return a part of a tensor that holds as many values of each rank."""
        return DTensor.from_local(values.cpu(), self.mesh, [Shard(0)], run_check=False)

    def _flat(self, local: Tensor, numel: int, copy: bool) -> DTensor:
        """Wrap this rank's elements as a part of the flattened tensor: torch splits (numel,) over ranks as DeepSpeed does."""
        part = local.detach().cpu()
        part = part.clone() if copy else part
        return DTensor.from_local(part, self.mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor of the export, gathered one at a time from the master weights and cast to its type there."""
        trains = self.model.training
        self._average(True)
        state: dict[str, Any] = self.model.state_dict(keep_vars=True)
        yield from self.adaptation.exported(lambda name: _whole(state[name]))
        self._average(not trains)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole model's tensors."""
        tied = tied_names(self.model)
        state = self.model.state_dict(keep_vars=True)
        shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in state.items() if name not in tied}
        return shapes | self.adaptation.packed

    def tensors(self) -> list[Placed]:
        """Return this rank's live tensors; the model's buffers, and those between ranks, are always on the device."""
        weights, state = self.config.engine.offload_param, self.config.engine.offload_optimizer
        return [
            Placed("parameters", Offload.none, list(self.model.buffers())),
            Placed("parameters", weights, [p.ds_tensor for p in self.parameters.values()]),
            Placed("parameters", state, list(self.optimizer.fp32_partitioned_groups_flat)),
            Placed("gradients", state, self._gradients()),
            Placed("optimizer", home_of_state(self.config), self._moments()),
            Placed("optimizer", state, update_tensors(self.adaptation.update)),
            Placed("buffers", Offload.none, [b.buffer for b in self.optimizer.ipg_buckets.values() if b.buffer is not None]),
            Placed("activations", Offload.cpu, [] if self.inputs is None else self.inputs.tensors()),
        ]

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's partitions by class, on NVMe, too; what is gathered of other ranks' is not among them.

        What is trained is there as master weights and once more in the compute type, unless DeepSpeed lets both be the same memory.
        Partitions on NVMe between uses are counted by their elements; raises RuntimeError if live tensors have other sizes.
        """
        parameters, frozen = self._trained_and_frozen()
        local = sum(p.partition_numel() for p in parameters)
        masters, moments = self.optimizer.fp32_partitioned_groups_flat, self._moments()
        held, swapped = sum(tensor.nbytes for tensor in moments), self.config.engine.offload_optimizer is Offload.nvme
        if not swapped:
            require_state_bytes(self.config.optim, held, local)
        found = sum(tensor.nbytes for tensor in masters)
        if found > 4 * local or (found < 4 * local and masters and not swapped):
            raise RuntimeError(f"the master weights take {found:,} bytes on this rank, and what is trained makes {4 * local:,}")
        shared = {master.untyped_storage().data_ptr() for master in masters} - {0}
        beside = [p for p in parameters if p.ds_tensor.untyped_storage().data_ptr() not in shared]
        return {
            "frozen": sum(p.partition_numel() * p.ds_tensor.element_size() for p in frozen),
            "trainable": 4 * local + sum(p.partition_numel() * p.ds_tensor.element_size() for p in beside),
            "gradients": sum(gradient.nbytes for gradient in self._gradients()),
            "optimizer": (8 * local if moments else 0) if swapped else held,
        }

    def _trained_and_frozen(self) -> tuple[list[Any], list[Any]]:
        everything = list(self.parameters.values())
        return [p for p in everything if p.requires_grad], [p for p in everything if not p.requires_grad]

    def _moments(self) -> list[Tensor]:
        return tensors_of(self.optimizer.optimizer)

    def _gradients(self) -> list[Tensor]:
        masters = self.optimizer.fp32_partitioned_groups_flat
        return [self.optimizer.grad_partitions_flat_buffer, *(master.grad for master in masters if master.grad is not None)]

    def report(self) -> dict[str, str]:
        """Return what is stored, computed and reduced in which type; raises RuntimeError if live tensors say otherwise."""
        (parameters, frozen), size = self._trained_and_frozen(), self.state_bytes()
        engine, compute = self.config.engine, self.compute
        total = sum(unpacked_numel(self.adaptation, name, p.ds_numel) for name, p in self.parameters.items())
        trained, local = sum(p.ds_numel for p in parameters), sum(p.partition_numel() for p in parameters)
        partitions, masters = [p.ds_tensor for p in parameters], self.optimizer.fp32_partitioned_groups_flat
        host = "" if engine.offload_optimizer is Offload.none else HOST
        home, away = _where(engine.offload_optimizer), _where(engine.offload_param)
        state = state_statement(self.config.optim, self._moments(), size["optimizer"], home)
        return {
            "parameters": f"{counted(total, trained)}, each split over {plural(self.world.size, 'rank')}",
            "storage": statement("master weights", masters, torch.float32, 4 * local, home),
            "compute": statement("parameters", partitions, compute, local * compute.itemsize, away),
            "gradient reduction": statement("gradients", self._gradients(), torch.float32, size["gradients"], host),
            "optimizer state": state,
            "frozen weights": frozen_statement(((p, p.ds_tensor) for p in frozen), compute, away),
            **self.adaptation.notes,
            **update_statement(self.adaptation.update, host),
            "saved": in_short(self.adaptation.dtype),
            "attention": f"{self.model.config._attn_implementation}: {self.blueprint.attention}",
            **activations_statement(self.config),
            **experts_words(self.model),
            **({"routers": f"computed in float32, with weights in {in_short(compute)}"} if self.routers else {}),
            "logits": self.logits,
        }

    def close(self) -> None:
        """Remove this node's files on NVMe."""
        if self.nvme is not None and self.world.local_rank == 0:
            shutil.rmtree(self.nvme, ignore_errors=True)


def bytes_on_host(*, optimizer: bool, parameters: bool, swapped: bool = False, compute_bytes: int = 2, state: int = 8) -> dict[str, int]:
    """Return bytes a trainable parameter takes on the host, by part, where these are offloaded to `cpu`.

    `swapped` says that the optimizer is on NVMe: reduced gradients stay on the host all the same, and a checkpoint passes through
    it whole. In host memory DeepSpeed holds gradients twice, as they are summed and as the optimizer gets them.
    `compute_bytes` is 2 for bf16 and 4 for fp32; `state` those of the optimizer: 8 for AdamW and 0 for plain SGD.
    """
    parts = {"float32 master weights": 4, "optimizer state": state, "float32 gradients": 8} if optimizer else {}
    parts |= {"float32 gradients": 4, "a checkpoint on its way": 4 + state} if swapped else {}
    return parts | ({"parameters in the compute type": compute_bytes} if parameters else {})


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a layer its rows by place: DeepSpeed lets go of parameters once the gradients of such arguments are there."""
    first = list(inspect.signature(type(module).forward).parameters)[1]  # after self
    return (args, kwargs) if first not in kwargs else ((kwargs[first], *args), {name: kwargs[name] for name in kwargs.keys() - {first}})


def believe_ranks() -> None:
    """Let DeepSpeed not compare what ranks have with what it reads of rank 0: of ranks that are not there no value can be read."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda *_, **__: None


def end_groups() -> None:
    """End torch's process groups with those that DeepSpeed remembers, so that others can be begun."""
    comm = import_deepspeed().comm
    if comm.is_initialized():
        comm.destroy_process_group()


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
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return _merged(ours, engine.overrides)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(ours[key], theirs[key]) for key in ours.keys() & theirs.keys() if isinstance(ours[key], dict)}
    return ours | theirs | both


def part_of(numel: int, world: World) -> tuple[int, int]:
    """Return where this rank's elements of a tensor begin and end: ceil(numel / ranks) each, the last ones fewer or none."""
    share = -(-numel // world.size)
    return min(numel, world.rank * share), min(numel, (world.rank + 1) * share)


def _whole(tensor: Any) -> Tensor:
    """Gather a parameter's master weights; collective. A buffer is whole already."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(tensor) if hasattr(tensor, "ds_id") else tensor.detach()  # type: ignore[no-any-return]


def _untouched(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor. On the CPU its pages take memory only once written, and are given back when it is freed.

    torch.empty would keep what it has freed in the allocator's heap: with 4 ranks a third of the model.
    """
    if device.type != "cpu" or not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, shape.numel() * dtype.itemsize), dtype=dtype).view(shape)


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, parameter)


@contextmanager
def _linear_of_zero3() -> Iterator[None]:
    """Let linear layers keep the parameter for backward and not its gathered values, which torch's own would keep alive."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    before = nn.functional.linear
    nn.functional.linear = zero3_linear_wrap  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = before


def _where(offload: Offload) -> str:
    return {Offload.none: "", Offload.cpu: HOST, Offload.nvme: "on NVMe"}[offload]


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


def _no_nvme(path: str, reason: str) -> ConfigError:
    return ConfigError("engine.nvme_path", path, reason, "a directory on each node's local disk, with the space it needs")


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
