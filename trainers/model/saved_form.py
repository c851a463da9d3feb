"""How a model is written: under the names and in the shapes that transformers' save_pretrained gives it, with the rest of its base."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from trainers.health.activity import watch
from trainers.model.safetensors_files import TYPES, Weights, listed
from trainers.model.weights import Conversion, Origin, StoredModel, is_finite, tied_names

log = logging.getLogger("fulltune")
Pieces = Iterable[tuple[str, Tensor]]


@dataclass(kw_only=True)
class WayBack:
    """What files hold of tensors that transformers has made of others, such as a stack of experts; given as their elements come."""

    model: PreTrainedModel
    conversion: Conversion
    """From the model's tensors to those of files."""
    sources: dict[str, Tensor]
    """The model's tensors on `meta`, by name."""
    units: list[list[str]]
    """Names in files of what is made at a time: of each row of a stack, so that no stack is held twice, or of all."""
    held: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """Elements of the next unit that have come of each tensor, and how many."""
    done: int = 0

    def add(self, name: str, piece: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Take the next elements of a tensor and yield what they complete; raises RuntimeError for what does not fit."""
        meta, flat = self.sources[name], piece.reshape(-1)
        size = meta.numel() // len(self.units)
        while flat.numel():
            block, count = self.held.get(name, (flat, 0))
            take = min(size - count, flat.numel())
            if piece.dtype != meta.dtype or not take or self.done == len(self.units):
                raise misfit(name, piece)
            if take < size:
                block = block if count else torch.empty(size, dtype=meta.dtype)
                block[count : count + take] = flat[:take]
            self.held[name] = (block[:size], count + take)
            flat = flat[take:]
            if all(self._is_whole(source) for source in self.sources):
                yield from self._convert()

    def _is_whole(self, name: str) -> bool:
        return name in self.held and self.held[name][1] * len(self.units) == self.sources[name].numel()

    def _convert(self) -> Iterator[tuple[str, Tensor]]:
        held, self.held = self.held, {}
        rows = {name: (meta.shape[0] // len(self.units), *meta.shape[1:]) for name, meta in self.sources.items()}
        made = self.conversion.run(self.model, lambda name: held[name][0].view(rows[name]))
        yield from zip(self.units[self.done], made.values(), strict=True)
        self.done += 1


@dataclass(kw_only=True)
class SavedForm:
    """What an export holds, and how it is made of the model's tensors."""

    live: dict[str, Tensor]
    """The model's tensors on `meta` by their names in the model, in the type of the export; tied ones once."""
    contents: dict[str, Tensor]
    """The tensors of the files on `meta`, by name, in the order in which they come."""
    names: dict[str, str]
    """Names in files of the tensors that are written as they are."""
    ways: dict[str, WayBack]
    """How the others are written, by their names in the model."""
    config: PreTrainedConfig
    """What config.json says: the base's, or that of the model alone."""
    rest: dict[str, Callable[[], Iterator[Tensor]]]
    """Tensors of the base that the model has no place for, and that are copied."""

    def written(self, weights: Pieces) -> Iterator[tuple[str, Tensor]]:
        """Yield the rest of the base, then what files hold of the model's tensors, whole or in consecutive pieces.

        Raises RuntimeError for values that are not finite; the rest is copied whatever it holds. The end of `weights` comes last.
        """
        for key, pieces in self.rest.items():
            yield from ((key, piece) for piece in watch.each(pieces()))
        for way in self.ways.values():
            way.done, way.held = 0, {}
        for name, piece in finite(weights):
            if name in self.ways:
                yield from self.ways[name].add(name, piece)
            else:
                yield self.names.get(name, name), piece


def finite(weights: Pieces) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors or pieces of them; raises RuntimeError for values that are not finite."""
    for name, piece in weights:
        if not is_finite(piece):
            raise RuntimeError(f"not exported: {name} holds values that are not finite in {str(piece.dtype).removeprefix('torch.')}")
        yield name, piece


def misfit(name: str, piece: Tensor) -> RuntimeError:
    """Return the error for elements that the model does not have."""
    return RuntimeError(f"not exported: {name} is {piece.dtype} of {list(piece.shape)}, which does not fit the model")


def stored_model(origin: object) -> StoredModel | None:
    """Return the checkpoint that an origin reads from; None for random values."""
    while origin is not None and not isinstance(origin, StoredModel):
        origin = getattr(origin, "origin", None)
    return origin


def saved_form(
    model: PreTrainedModel, origin: Origin | None, config: PreTrainedConfig, dtype_of: Callable[[str], torch.dtype]
) -> SavedForm:
    """Return how a model on `meta` is written whose base's config is `config`, its floating-point tensors in the type of `dtype_of`.

    The names are those of save_pretrained after from_pretrained of the same files, which are the base's. Tensors of the base that the
    model has no place for are copied. Where a part of a larger model cannot take its place in the base, it is written alone.
    Without a checkpoint in `origin` the names are those of save_pretrained of a new model.
    """
    model, stored = copy.deepcopy(model), stored_model(origin)
    tied = tied_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    types = {name: dtype_of(name) if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    live = {name: torch.empty(tensor.shape, dtype=types[name], device="meta") for name, tensor in state.items()}
    rest = {} if stored is None else {key: stored.weights.stored[key] for key in stored.rest}
    names, ways = _reverse(model, live, default_mapping(model) if stored is None else stored.used)
    if stored is not None and rest:
        names, fits = _as_in_base(model, stored, names, ways)
        if not fits:
            log.warning("the export is the model that is trained alone, without %d tensors of the base: %s", len(rest), listed(list(rest)))
            rest = {}
    contents = _made(live, names, ways)
    is_part = type(model.config) is not type(config)
    written = copy.deepcopy(model.config if is_part and not rest else config)
    if not rest or not written.architectures:
        written.architectures = [type(model).__name__]
    if written.is_encoder_decoder and "lm_head.weight" in live:
        written.tie_word_embeddings = False  # transformers 5 goes by the files, all others by this field
    copied = {key: torch.empty(place.shape, dtype=TYPES[place.type], device="meta") for key, place in rest.items()}
    return SavedForm(
        live=live,
        contents=contents | copied,
        names=names,
        ways=ways,
        config=written,
        rest={} if stored is None else {key: _reader(stored.weights, key) for key in rest},
    )


def types_of(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """Return the type in which save_pretrained writes each tensor of a model that is saved in `dtype`: some stay in float32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return lambda _: dtype
    patterns, pattern_of, _ = build_glob_alternation(list(plan))

    def type_of(name: str) -> torch.dtype:
        match = patterns.search(name)
        return plan[pattern_of[str(match.lastgroup)]] if match else dtype

    return type_of


def default_mapping(model: PreTrainedModel) -> list[WeightTransform]:
    """Return transformers' conversions for a model without a checkpoint, as its revert_weight_conversion chooses them."""
    return [entry for entry in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(entry, PrefixChange)]


def _reverse(
    model: PreTrainedModel, live: dict[str, Tensor], mapping: Sequence[WeightTransform]
) -> tuple[dict[str, str], dict[str, WayBack]]:
    """Return names in files, and the ways back of what is converted: transformers' revert_weight_conversion, without its values."""
    reverse = [entry.reverse_transform() for entry in mapping[::-1]]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names: dict[str, str] = {}
    found: dict[str, Conversion] = {}
    for name in sorted(live, key=dot_natural_key):
        first, pattern = rename_source_key(name, [], converters, reverse=True)
        if pattern is None:
            names[name] = _renamed(name, renamings)
        else:
            found.setdefault(first, Conversion(first, by_pattern[pattern])).sources.setdefault(pattern, []).append(name)
    ways: dict[str, WayBack] = {}
    for conversion in found.values():
        sources = {name: live[name] for keys in conversion.sources.values() for name in keys}
        made = [_renamed(name, renamings) for name in conversion.run(model, live.__getitem__)]
        way = WayBack(model=model, conversion=conversion, sources=sources, units=_units(conversion, sources, made))
        ways |= dict.fromkeys(sources, way)
    return names, ways


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    return rename_source_key(name, renamings, [], reverse=True)[0]


def _units(conversion: Conversion, sources: dict[str, Tensor], names: list[str]) -> list[list[str]]:
    """Return the names of what each row of a stack becomes, or all names together where it needs several rows at once."""
    *first, last = conversion.converter.operations
    rows = next(iter(sources.values())).shape[0] if len(sources) == 1 else 0
    splits = type(last) is SplitModulelist and last.dim == 0 and all(type(op) is Chunk and op.dim > 0 for op in first)
    return [names[row::rows] for row in range(rows)] if splits and rows and len(names) % rows == 0 else [names]


def _as_in_base(
    model: PreTrainedModel, stored: StoredModel, names: dict[str, str], ways: dict[str, WayBack]
) -> tuple[dict[str, str], bool]:
    """Give names the prefix that they have in the base, which loading adds or takes away; tell whether the base has all of them then."""
    prefix, base = f"{model.base_model_prefix}.", stored.weights.stored

    def known(name: str) -> str:
        return next((key for key in (name, prefix + name, name.removeprefix(prefix)) if key in base), name)

    names = {name: known(key) for name, key in names.items()}
    for way in ways.values():
        way.units = [[known(key) for key in unit] for unit in way.units]
    split = tied_names(stored.model).keys()  # a name of its own for what the base has once
    keys = [
        *(key for name, key in names.items() if name not in split),
        *(key for way in ways.values() for unit in way.units for key in unit),
    ]
    return names, all(key in base for key in keys)


def _made(live: dict[str, Tensor], names: dict[str, str], ways: dict[str, WayBack]) -> dict[str, Tensor]:
    """Return what files hold of the model's tensors, on `meta`, in the model's order."""
    contents: dict[str, Tensor] = {}
    for name, tensor in live.items():
        if name not in ways:
            contents[names[name]] = tensor
            continue
        way = ways[name]
        if way.units[0][0] not in contents:
            whole = list(way.conversion.run(way.model, live.__getitem__).values())
            count = len(way.units)
            contents |= {key: whole[row + count * place] for row, unit in enumerate(way.units) for place, key in enumerate(unit)}
    return contents


def _reader(weights: Weights, key: str) -> Callable[[], Iterator[Tensor]]:
    return lambda: weights.pieces(key)
