"""Where the values of a model's tensors come from, read block by block, so that no rank holds more than its own part.

An engine builds the model on `meta`, asks `origin_of` for its Origin, gives its parts memory with `materialise`, reads the block of
each, and proves with `require_written` that none was left out; `load_parts` does the last two.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from trainers.config.errors import ConfigError
from trainers.health.activity import watch
from trainers.model.safetensors_files import FLOATS, TYPES, Weights, listed
from trainers.processes import raise_exhausted

log = logging.getLogger("fulltune")

LEGACY = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")
"""Buffers that earlier versions of transformers saved, and that are calculated now."""
MEAN_ROWS = 1024
"""Rows of an embedding that are read at once for its mean."""


class Origin(Protocol):
    """Where values come from: a checkpoint, or random numbers. Not collective: every rank reads for itself."""

    def names(self) -> list[str]:
        """Return every parameter and persistent buffer by its state_dict name, tied ones once, in a good order to read in."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        ...

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return the block of `shape` at `offset` on the CPU, in the type it has; raises ConfigError for values that are not finite."""
        ...

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Tell whether no value loses anything in `dtype`."""
        ...


class Values(Protocol):
    """What of a Blueprint decides the values of a model: see there."""

    folder: Path | None
    seed: int
    vocab_on_disk: int | None
    scores: bool


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return names that are other names of the same tensor, with the name that it is read and written under."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


class Conversion:
    """Tensors of the model that transformers makes of others on disk, such as a stack of experts."""

    def __init__(self, first: str, converter: WeightConverter) -> None:
        """Convert into `first`, and into the converter's other targets."""
        self.first, self.converter = first, converter
        self.sources: dict[str, list[str]] = {}

    def stacks(self, num_rows: int) -> bool:
        """Tell whether row i of the result is made of the i-th tensor of each source alone."""
        merge, *rest = self.converter.operations
        rowwise = type(merge) is MergeModulelist and merge.dim == 0 and all(type(op) is Concatenate and op.dim > 0 for op in rest)
        return rowwise and {len(keys) for keys in self.sources.values()} == {num_rows}

    def run(self, model: PreTrainedModel, tensor_of: Callable[[str], Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
        """Return the results by their names in the model, of all sources or of some rows of each."""
        converter = copy.deepcopy(self.converter)
        for pattern, keys in self.sources.items():
            for key in keys[rows]:
                converter.add_tensor(self.first, key, pattern, tensor_of(key))  # type: ignore[arg-type]  # a future is one way
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class StoredModel:
    """The Origin in a directory of safetensors files, keys matched with names as transformers' from_pretrained does."""

    def __init__(self, model: PreTrainedModel, weights: Weights, shapes: dict[str, tuple[int, ...]], keep_rest: bool = True) -> None:
        """Match `weights` with a model on `meta` whose tensors have `shapes` on disk; without `keep_rest` other parts are left out.

        Raises ConfigError that names what is missing, has another shape or cannot be read as it is; warns of what has no place.
        """
        self.model, self.weights, self.shapes, self.keep_rest = model, weights, shapes, keep_rest
        self.keys: dict[str, str] = {}
        self.conversions: dict[str, Conversion] = {}
        self.twins: dict[str, str] = {}
        self.held: tuple[Conversion | None, dict[str, Tensor]] = (None, {})
        self.used: list[WeightTransform] = []
        """transformers' conversions that any key took, which save_pretrained would take back."""
        self.rest: list[str] = []
        """Keys of parts that the model does not have."""
        made, wrong = self._match()
        self._tie()
        missing = [name for name in shapes if name not in self.keys and name not in self.conversions]
        made |= {name: weights.stored[key].shape for name, key in self.keys.items()}
        misshapen = [
            f"{name} is {list(made[name])} on disk, {list(shapes[name])} by config.json" for name in made if made[name] != shapes[name]
        ]
        wrong += [f"the checkpoint lacks {listed(missing)}"] if missing else []
        wrong += [listed(misshapen, most=3)] if misshapen else []
        if wrong:
            raise ConfigError("model.id", str(weights.folder), "; ".join(wrong), "config.json and weights must belong together")
        for name, twin in self.twins.items():
            if weights.stored[twin].shape != shapes[name]:
                raise self._untied(name)
        quantised = sorted({weights.stored[key].type for key in self._float_keys()} - set(FLOATS))
        if quantised:
            reason = f"holds weights as {listed(quantised)}: quantised, which cannot be trained further as they are"
            raise ConfigError("model.id", str(weights.folder), reason, "name the checkpoint in bf16 or fp32")

    def _match(self) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        """Give every key its place; return the shapes of what is converted, found without reading, and what went wrong."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        found: dict[str, Conversion] = {}
        unplaced: dict[str, str] = {}
        for key in sorted(self.weights.stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:  # saved under the model's own names
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                unplaced[key] = name
            elif pattern is None:
                self.keys.setdefault(name, key)
            else:
                conversion = found.setdefault(name, Conversion(name, by_pattern[pattern]))
                conversion.sources.setdefault(pattern, []).append(key)
        self.used = [entry for entry in mapping if entry.was_used()]
        self._sort_unplaced(unplaced)
        return self._try(found.values())

    def _try(self, conversions: Iterable[Conversion]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
        made: dict[str, tuple[int, ...]] = {}
        wrong = []
        for conversion in conversions:
            try:
                results = conversion.run(self.model, lambda key: torch.empty(self.weights.stored[key].shape, device="meta"))
            except Exception as error:  # whatever transformers or torch raises for shapes that do not fit
                raise_exhausted(error)
                wrong.append(f"{conversion.first} cannot be made of {listed(list(itertools.chain(*conversion.sources.values())))}: {error}")
                results = {conversion.first: torch.empty(self.shapes.get(conversion.first, ()), device="meta")}
            for name, tensor in results.items():
                self.conversions[name], made[name] = conversion, tuple(tensor.shape)
        return made, wrong

    def _sort_unplaced(self, unplaced: dict[str, str]) -> None:
        """Tell parts of a larger model from leftovers, such as unused buffers of modules that the model has.

        `unplaced` has the keys, and the names that they would have in the model.
        """
        modules = dict(self.model.named_modules())
        for key, name in unplaced.items():
            path = name.rpartition(".")[0]
            owns = path in modules and any(True for _ in modules[path].parameters(recurse=False))
            in_block = path in modules and any(part.isdigit() for part in path.split("."))
            if not (owns or in_block or LEGACY.search(key)) and self.weights.stored[key].type in TYPES:
                self.rest.append(key)
        others = set(self.rest)
        if self.rest and not self.keep_rest:
            log.info("the head of scores takes the place of the base's %s", listed(self.rest))
            self.rest = []
        if self.rest:
            absent = {next(path for path in _paths(unplaced[key]) if path not in modules) for key in self.rest}
            parts = listed(sorted(absent))
            log.warning(
                "%d tensors of the base are of parts that this model does not have, and stay as they are: %s", len(self.rest), parts
            )
        ignored = [LEGACY, *map(re.compile, self.model._keys_to_ignore_on_load_unexpected or ())]
        left = [key for key in unplaced if key not in others and not any(pattern.search(key) for pattern in ignored)]
        if left:
            log.warning("the model has no place for %d tensors of the checkpoint, which are left out: %s", len(left), listed(left))

    def _tie(self) -> None:
        """Read a tied tensor under whichever of its names is on disk; where both are, they are compared block by block."""
        for alias, name in tied_names(self.model).items():
            if alias in self.keys:
                key = self.keys.pop(alias)
                if self.keys.setdefault(name, key) != key:
                    self.twins[name] = key

    def _float_keys(self) -> Iterator[str]:
        state = self.model.state_dict()
        yield from (key for name, key in self.keys.items() if state[name].is_floating_point())
        for conversion in self.conversions.values():
            yield from itertools.chain(*conversion.sources.values())

    def names(self) -> list[str]:
        """Return the model's order, with what one conversion makes together."""
        order: dict[str, None] = {}
        for name in self.shapes:
            conversion = self.conversions.get(name)
            together = [other for other in self.shapes if self.conversions.get(other) is conversion] if conversion else [name]
            order |= dict.fromkeys(together if name not in order else ())
        return list(order)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape on disk, which conversions give."""
        return self.shapes[name]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block, its values finite and the same under every name that the tensor has."""
        block = self._convert(name, offset, shape) if name in self.conversions else self.weights.read(self.keys[name], offset, shape)
        if not is_finite(block):
            raise ConfigError(
                "model.id", str(self.weights.folder), f"{name} holds values that are not finite", "the checkpoint is unusable"
            )
        if name in self.twins and not torch.equal(block.float(), self.weights.read(self.twins[name], offset, shape).float()):
            raise self._untied(name)
        return block

    def _untied(self, name: str) -> ConfigError:
        reason = f"config.json ties {self.keys[name]} and {self.twins[name]}, and the checkpoint holds different values for them"
        return ConfigError("model.id", str(self.weights.folder), reason, "tie_word_embeddings: false in its config.json")

    def _convert(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of what is converted: of a stack only its rows are read, one by one; the rest is kept whole for the next."""
        conversion, read = self.conversions[name], self.weights.read_whole
        if conversion.stacks(self.shapes[name][0]):
            rows = range(offset[0], offset[0] + shape[0])
            inner = slices(offset[1:], shape[1:])
            made = (conversion.run(self.model, read, slice(row, row + 1))[name][0][inner] for row in rows)
            return _stack(made, shape)
        if self.held[0] is not conversion:
            self.held = (None, {})
            self.held = (conversion, conversion.run(self.model, lambda key: read(key).float()))
        return self.held[1][name][slices(offset, shape)]

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Tell it by the types on disk; a conversion may calculate, so that only stacks count as they are."""
        stacks = all(conversion.stacks(self.shapes[name][0]) for name, conversion in self.conversions.items())
        types = {FLOATS[self.weights.stored[key].type] for key in self._float_keys()}
        return (stacks or dtype == torch.float32) and all(torch.promote_types(kind, dtype) == dtype for kind in types)


def slices(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of a block."""
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def read_elements(origin: Origin, name: str, shape: tuple[int, ...], start: int, end: int) -> Tensor:
    """Return elements start to end of the flattened tensor, reading only the rows that they are in."""
    if start >= end:
        return torch.empty(0)
    if not shape:
        return origin.read(name, (), ()).reshape(1)
    row = max(1, torch.Size(shape[1:]).numel())
    first, last = start // row, -(-end // row)
    rows = origin.read(name, (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    return rows.reshape(-1)[start - first * row : end - first * row]


def _stack(rows: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
    """Return rows as one tensor, holding one more of them at a time."""
    block = torch.empty(0)
    for number, row in enumerate(rows):
        if not number:
            block = torch.empty(tuple(shape), dtype=row.dtype)
        block[number] = row
    return block.view(tuple(shape))


class Grown:
    """An Origin with more rows: each new row of input embedding and head is the mean of the old ones.

    Hewitt 2021, "Initializing new word embeddings for pretrained language models". The mean is taken in float64 and given in
    float32, read in pieces, by the ranks that hold a new row.
    """

    def __init__(self, origin: Origin, shapes: dict[str, tuple[int, ...]], num_rows: int) -> None:
        """Grow the tensors named in `shapes`, which says how large they are in `origin`, to `num_rows`."""
        self.origin, self.shapes, self.num_rows = origin, shapes, num_rows

    def names(self) -> list[str]:
        """Return the names of the origin."""
        return self.origin.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape, grown."""
        whole = self.origin.shape(name)
        return (self.num_rows, *whole[1:]) if name in self.shapes else whole

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block, float32 where it holds a new row."""
        if name not in self.shapes or offset[0] + shape[0] <= self.shapes[name][0]:
            return self.origin.read(name, offset, shape)
        kept = max(0, self.shapes[name][0] - offset[0])
        block = torch.empty(tuple(shape))
        block[kept:] = self._mean(name, offset[1:], shape[1:])
        if kept:
            block[:kept] = self.origin.read(name, offset, (kept, *shape[1:]))
        return block

    def _mean(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        rows = self.shapes[name][0]
        total = torch.zeros(tuple(shape), dtype=torch.float64)
        for start in range(0, rows, MEAN_ROWS):
            total += self.origin.read(name, (start, *offset), (min(MEAN_ROWS, rows - start), *shape)).double().sum(0)
        return total / rows

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """A mean needs float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)


class Headed:
    """An Origin with tensors that its checkpoint lacks, as a head that the base was never trained with: they begin at random."""

    def __init__(self, origin: Origin, fresh: Origin, made: Collection[str]) -> None:
        """Take the tensors `made` from `fresh`, and all others from `origin`."""
        self.origin, self.fresh, self.made = origin, fresh, made

    def names(self) -> list[str]:
        """Return the names of the origin, and those that it lacks."""
        return [*self.origin.names(), *self.made]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return (self.fresh if name in self.made else self.origin).shape(name)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block."""
        return (self.fresh if name in self.made else self.origin).read(name, offset, shape)

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Random numbers are drawn in float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)


class Random:
    """The Origin of a model from random weights, by transformers' own initialisation, one unit at a time.

    A unit is a repeated block, or one of the modules around them. Its values are a function of (seed, its name), whatever the
    number of ranks and the order of reading. Every rank makes every unit that it holds a part of.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        """Take a model on `meta`, which is filled and emptied again unit by unit."""
        self.model, self.seed = model, seed
        lists = {path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
        outer = [path for path in lists if not lists & set(_parents(path))]
        self.holders = {parent for path in outer for parent in (path, *_parents(path))}
        self.held: tuple[str | None, dict[str, Tensor]] = (None, {})

    def names(self) -> list[str]:
        """Return the model's order, in which units lie together."""
        tied = tied_names(self.model)
        return [name for name in self.model.state_dict() if name not in tied]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the model has."""
        return tuple(self.model.state_dict()[name].shape)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of a unit that is made, or held since the last call."""
        unit = self._unit_of(name)
        if unit != self.held[0]:
            self.held = (None, {})
            self.held = (unit, self._make(unit))
        return self.held[1][name][slices(offset, shape)]

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Random numbers are drawn in float32."""
        return dtype == torch.float32

    def _unit_of(self, name: str) -> str:
        """Return the path of a tensor's unit: an item of an outermost list, a module without lists, or one around them."""
        path = ""
        for part in name.split(".")[:-1]:
            if path not in self.holders:
                break
            path = _join(path, part)
        return path

    def _make(self, unit: str) -> dict[str, Tensor]:
        """Return a unit's tensors by name, initialised within the unit from the leaves up, then by the modules that it is in."""
        root = self.model.get_submodule(unit)
        paths = [unit] if unit in self.holders else list(_leaves_first(root, unit))
        modules = [self.model.get_submodule(path) for path in paths]
        owned = [(module, *named) for module in modules for named in module.named_parameters(recurse=False, remove_duplicate=False)]
        real = {p: nn.Parameter(torch.full(p.shape, math.nan, dtype=p.dtype), requires_grad=p.requires_grad) for *_, p in owned}
        try:
            for module, name, p in owned:
                setattr(module, name, real[p])
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                digest = hashlib.sha256(f"{self.seed} {unit}".encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
                for path in [*paths, *_parents(unit)]:
                    self._owner(path)._init_weights(self.model.get_submodule(path))
            state = root.state_dict(prefix=_join(unit, ""))
            values = {name: tensor for name, tensor in state.items() if not tensor.is_meta}
        finally:
            for module, name, p in owned:
                setattr(module, name, p)
        left = [name for name, tensor in values.items() if not is_finite(tensor)]
        if left:
            raise ConfigError("model.architecture", self.model.config.model_type, f"transformers initialises no {listed(left)}")
        return values

    def _owner(self, path: str) -> Any:
        """Return the innermost model at or around a module: its rules initialise it."""
        modules = map(self.model.get_submodule, (path, *_parents(path)))
        return next(module for module in modules if isinstance(module, PreTrainedModel))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parents(path: str) -> list[str]:
    """Return the paths that contain a path, innermost first, the root "" last; the root has none."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)] if path else []


def _paths(name: str) -> list[str]:
    """Return the paths that lead to a name, from its first part to all of it."""
    return [*_parents(name)[-2::-1], name]


def _leaves_first(module: nn.Module, path: str) -> Iterator[str]:
    """Yield the paths of a module and of all in it, children before parents, as initialisation goes."""
    for name, child in module.named_children():
        yield from _leaves_first(child, _join(path, name))
    yield path


def origin_of(model: PreTrainedModel, blueprint: Values) -> Origin:
    """Return where the values of a model on `meta` come from; the model stays the caller's.

    Raises ConfigError, before any value is read, where files are missing or damaged, or do not fit the model.
    """
    model = copy.deepcopy(model)
    if blueprint.folder is None:
        return Random(model, blueprint.seed)
    tied = tied_names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    rows = blueprint.vocab_on_disk
    grown = {} if rows is None else {name: (rows, *shapes[name][1:]) for name in _rows_of_vocabulary(model) if name in shapes}
    weights, made = Weights(blueprint.folder), set[str]()
    if blueprint.scores:
        from trainers.model.scores import FRESH

        made = {FRESH} - weights.stored.keys()
        if not made and weights.stored[FRESH].shape != shapes[FRESH]:
            reason = f"its head has {weights.stored[FRESH].shape[0]} scores, and this run needs {shapes[FRESH][0]}"
            raise ConfigError("model.id", str(blueprint.folder), reason, "the classes that it has, by objective.labels, or its own base")
    stored = {name: shape for name, shape in (shapes | grown).items() if name not in made}
    origin: Origin = StoredModel(model, weights, stored, keep_rest=not blueprint.scores)
    if grown:
        origin = Grown(origin, grown, max(shapes[name][0] for name in grown))
    return Headed(origin, Random(model, blueprint.seed), made) if made else origin


def _rows_of_vocabulary(model: PreTrainedModel) -> set[str]:
    """Return the names of what has a row for each token: input embedding, output head and its bias."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    rows = {parameter for end in ends for parameter in (getattr(end, "weight", None), getattr(end, "bias", None)) if parameter is not None}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in rows}


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values of a tensor are finite, without a copy of it: NaN and infinity reach the extremes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() and high.isfinite())


@torch.no_grad()
def materialise(model: PreTrainedModel, device: torch.device) -> None:
    """Give meta parameters memory on `device`, NaN until they are written; keep the real buffers, and tie again what to_empty unties."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(math.nan)


@torch.no_grad()
def load_parts(origin: Origin, parts: Mapping[str, tuple[Tensor, Sequence[int]]]) -> None:
    """Write this rank's parts, each with its offset in the whole tensor, by name; raises RuntimeError if any stays unwritten."""
    names = origin.names()
    for name in watch.each(names):
        part, offset = parts[name]
        if part.numel():
            part.copy_(origin.read(name, offset, part.shape))
    require_written({name: part for name, (part, _) in parts.items()}, names)


def forget(origin: Any) -> None:
    """Free what an origin, and those it reads from, hold of what was read last: with a large vocabulary gigabytes of host memory."""
    while origin is not None:
        if hasattr(origin, "held"):
            origin.held = {} if isinstance(origin.held, dict) else (None, {})
        origin = getattr(origin, "origin", None)


def require_written(parts: Mapping[str, Tensor], written: Collection[str]) -> None:
    """Raise RuntimeError that names the parts which were not written, or hold NaN still. `parts` are this rank's, by name."""
    left = [name for name, part in parts.items() if name not in written or not is_finite(part)]
    if left:
        raise RuntimeError(f"not all of the model was loaded: {listed(left)} stayed unwritten")


def require_tied(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless every two names that are tied mean one parameter."""
    for alias, name in tied_names(model).items():
        if model.get_parameter(alias) is not model.get_parameter(name):
            raise RuntimeError(f"{alias} and {name} must be one tensor and are two")
