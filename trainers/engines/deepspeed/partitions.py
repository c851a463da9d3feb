"""Which elements of each parameter this rank has: where they come from, and where DeepSpeed keeps them."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from trainers.engines.base import move_buffers, table_parameters
from trainers.model.weights import Origin, read_elements, require_tied, tied_names
from trainers.peft.update import Part
from trainers.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


def part_of(numel: int, world: World) -> tuple[int, int]:
    """Return where this rank's elements of a tensor begin and end: ceil(numel / ranks) each, the last ones fewer or none."""
    share = -(-numel // world.size)
    return min(numel, world.rank * share), min(numel, (world.rank + 1) * share)


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


def believe_ranks() -> None:
    """Let DeepSpeed not compare what ranks have with what it reads of rank 0: of ranks that are not there no value can be read."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    coordinator.assert_ints_same_as_other_ranks = lambda *_, **__: None


def partition(model: PreTrainedModel, origin: Origin | None, settings: dict[str, Any], compute: torch.dtype, world: World) -> None:
    """Give each parameter on `meta` its partition, read from `origin`; no rank ever fills more than its own elements.

    What zero.Init does at birth, without making, initialising and broadcasting whole values first.
    """
    from deepspeed.runtime.zero import Init

    init = Init(module=nn.Module(), config_dict_or_path=copy.deepcopy(settings))  # `dtype` would be ignored on some machines
    made: dict[str, Any] = {}
    for name, meta in list(model.named_parameters()):
        dtype = compute if meta.is_floating_point() else meta.dtype
        if origin is None:
            whole = torch.empty(meta.shape, dtype=dtype, device=world.device)
        else:
            whole = _untouched(meta.shape, dtype, world.device)
            start, end = part_of(meta.numel(), world)
            whole.view(-1)[start:end].copy_(read_elements(origin, name, tuple(meta.shape), start, end))
        made[name] = nn.Parameter(whole, requires_grad=meta.requires_grad)
        init._convert_to_deepspeed_param(made[name])
        made[name].partition()
        _replace(model, name, made[name])
    for alias, name in tied_names(model).items():
        _replace(model, alias, made[name])
    if origin is not None:
        _read_buffers(model, origin, made)
    move_buffers(model, world.device)
    require_tied(model)


def _read_buffers(model: PreTrainedModel, origin: Origin, made: dict[str, Any]) -> None:
    """Read what is not a parameter; raises RuntimeError if anything of the model stays unwritten."""
    names, buffers = set(origin.names()), dict(model.named_buffers())
    for name in names - set(made):
        buffers[name].copy_(origin.read(name, (0,) * buffers[name].ndim, tuple(buffers[name].shape)))
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    left += [name for name in made if name not in names]
    if left:
        raise RuntimeError(f"not all of the model was loaded: {', '.join(left[:5])} stayed unwritten")


class Partitions:
    """This rank's elements of each parameter where DeepSpeed keeps them: compute values, master weights, gradients, optimizer state.

    DeepSpeed joins parameters in sub-groups, each with one flat tensor of master weights.
    """

    def __init__(self, model: PreTrainedModel, optimizer: Any, world: World, mesh: DeviceMesh) -> None:
        """Look at what DeepSpeed's optimizer holds of a model."""
        self.model, self.optimizer, self.world, self.mesh = model, optimizer, world, mesh
        self.parameters: dict[str, Any] = dict(model.named_parameters())

    @contextmanager
    def present(self, number: int) -> Iterator[None]:
        """Bring a sub-group's master weights and moments from NVMe, and write them back."""
        swapped = self.optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if swapped:
            self.optimizer._optimizer_states_and_gradient_swap_out(number)

    def sub_groups(self) -> Iterator[tuple[int, Tensor, dict[str, tuple[int, int]]]]:
        """Yield each sub-group: its number, its flat master weights, and where each parameter's elements are in them."""
        names = {p.ds_id: name for name, p in self.parameters.items()}
        for number, group in enumerate(self.optimizer.fp16_groups):
            places, offset = {}, 0
            for p in group:
                start, end = part_of(p.ds_numel, self.world)
                places[names[p.ds_id]] = (offset, offset + max(0, end - start))
                offset += p.partition_numel()
            yield number, self.optimizer.fp32_partitioned_groups_flat[number], places

    def pieces(self) -> dict[Tensor, list[Any]]:
        """Return which elements of which tensors each sub-group's master weights hold."""
        from trainers.optim.sharded import Piece

        tables, found = table_parameters(self.model), dict[Tensor, list[Any]]()
        for _, master, places in self.sub_groups():
            found[master] = []
            for name, (begin, end) in places.items():
                p = self.parameters[name]
                where = {"start": part_of(p.ds_numel, self.world)[0], "begin": begin, "end": end, "unit": 1}
                found[master].append(Piece(name=name, shape=tuple(p.ds_shape), ranks=self.world.size, is_table=id(p) in tables, **where))
        return found

    def state_of(self, master: Tensor, places: dict[str, tuple[int, int]]) -> dict[str, dict[str, Tensor]]:
        """Return the optimizer's state of each tensor of a sub-group, by kind: this rank's elements, live."""
        own: Any = self.optimizer.optimizer
        if hasattr(own, "elements"):
            return own.elements(master)  # type: ignore[no-any-return]
        state = own.state.get(master, {})
        return {name: {kind: state[kind][slice(*place)] for kind in MOMENTS} for name, place in places.items()} if state else {}

    def live_parts(self, names: Collection[str]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield each sub-group with this rank's elements of some of its parameters: views of master weights and moments."""
        for number, master, places in self.sub_groups():
            with self.present(number):
                parts = [master.data[slice(*place)] for name, place in places.items() if name in names]
                parts += [part for name, kinds in self.state_of(master, places).items() if name in names for part in kinds.values()]
                yield number, parts

    def parts(self, names: Collection[str]) -> dict[str, Part]:
        """Return this rank's elements of each tensor: of the master weights, and of the gradients before they are clipped."""
        parts: dict[str, Part] = {}
        buffers = self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for _, master, places in self.sub_groups():
            for name, (begin, end) in places.items():
                if name in names:
                    p = self.parameters[name]
                    start = part_of(p.ds_numel, self.world)[0]
                    parts[name] = Part(value=master.data[begin:end], grad=buffers[p.ds_id][: end - begin], start=start)
        return parts

    def set_master(self, origin: Origin) -> None:
        """Read the master weights again in float32: those that DeepSpeed made from bfloat16 have lost what the disk holds."""
        for number, master, places in self.sub_groups():
            with self.present(number):
                for name, (start, end) in places.items():
                    p = self.parameters[name]
                    mine = part_of(p.ds_numel, self.world)
                    master.data[start:end].copy_(read_elements(origin, name, tuple(p.ds_shape), *mine))

    def take_over(self) -> None:
        """Give the parameters the values of the master weights, after these were changed."""
        for number in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)  # as after a step
        self.gather_persistent()

    def gather_persistent(self) -> None:
        """Take what stays whole on every rank over from its partitions, after these were given other values."""
        if persistent := self.optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        self.optimizer.invalidate_secondary_tensor()

    def masters(self) -> list[Tensor]:
        """Return the master weights, one flat tensor a sub-group."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def gradients(self) -> list[Tensor]:
        """Return what is reduced, and what the optimizer gets of it."""
        masters = self.masters()
        return [self.optimizer.grad_partitions_flat_buffer, *(master.grad for master in masters if master.grad is not None)]

    def clear_gradients(self) -> None:
        """Leave no gradient: DeepSpeed would take it again for a parameter that gets none in the next step."""
        self.optimizer.grad_partitions_flat_buffer.zero_()
        for master in self.masters():
            if master.grad is not None:
                master.grad.zero_()

    def placed(self, name: str, elements: Tensor) -> DTensor:
        """Return this rank's elements of a tensor as a part of the whole, flattened; shares memory on a CPU."""
        return self.flat(elements, self.parameters[name].ds_numel, copy=False)

    def of_each_rank(self, values: Tensor) -> DTensor:
        """Return a part of a tensor that holds as many values of each rank."""
        return DTensor.from_local(values.cpu(), self.mesh, [Shard(0)], run_check=False)

    def flat(self, local: Tensor, numel: int, copy: bool) -> DTensor:
        """Wrap this rank's elements as a part of the flattened tensor: torch splits (numel,) over ranks as DeepSpeed does."""
        part = local.detach().cpu()
        part = part.clone() if copy else part
        return DTensor.from_local(part, self.mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))
