"""Adapters combined and merged into their base, tensor by tensor; the model is never held whole."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.merge.adapter import PREFIX, Adapter, AdapterFiles, Unfit
from trainers.config.errors import ConfigError
from trainers.model.blueprint import Blueprint, read_config
from trainers.model.safetensors_files import FLOATS, listed
from trainers.model.saved_form import SavedForm, saved_form, types_of
from trainers.model.weights import Grown, Origin, origin_of, tied_names
from trainers.peft.base import ADAPTER, read_whole, seeded

PIECE_BYTES = 64 << 20
METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""How deltas of whole matrices are combined: their weighted sum, or by the function of this name in peft.utils.merge_utils."""
LIBRARY_METHODS = tuple(
    f"peft:{name}" for name in ("linear", "svd", "cat", *(f"{name}{end}" for name in METHODS[1:] for end in ("", "_svd")))
)
"""How peft's add_weighted_adapter combines LoRA matrices A and B into new ones, layer by layer."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How several adapters become one."""

    method: str = "linear"
    """One of METHODS or LIBRARY_METHODS."""
    density: float | None = None
    """Share of a delta's values that is kept, in (0, 1]; for what prunes."""
    svd_rank: int | None = None
    """Rank that peft:*svd cuts to; None is the largest of the adapters'."""
    seed: int = 0
    """Of what dare drops at random; a function of (seed, tensor's name)."""

    @property
    def prunes(self) -> bool:
        """Tell whether a density is needed."""
        return any(word in self.method for word in ("ties", "dare", "prune"))


class Merge:
    """Adapters merged into their base, by name and tensor by tensor, never whole."""

    def __init__(self, blueprint: Blueprint, adapters: Sequence[AdapterFiles], weights: Sequence[float], combination: Combination) -> None:
        """Match everything before a value of the base is read; raises Unfit, or ConfigError for the base's files."""
        assert blueprint.folder is not None
        model = blueprint.build()
        self.tied = tied_names(model)
        self.origin: Origin = origin_of(model, blueprint)
        self.adapters = [Adapter(files, copy.deepcopy(model), blueprint.folder) for files in adapters]
        self.weights, self.combination, self.blueprint = list(weights), combination, blueprint
        self.untied = set().union(*(adapter.unties for adapter in self.adapters))
        if self.untied:
            for part in (blueprint.config, blueprint.config.get_text_config()):
                part.tie_word_embeddings = False
            if still := sorted(self.untied & tied_names(blueprint.build()).keys()):
                names = ", ".join(str(files.folder) for files in adapters)
                raise Unfit(f"{names} changes one of {still[0]} and {self.tied[still[0]]}, which this architecture always ties")
        self.held: tuple[str, dict[str, Tensor]] = ("", {})
        if combination.method in LIBRARY_METHODS:
            self._require_plain_lora()

    def _require_plain_lora(self) -> None:
        for adapter in self.adapters:
            if more := adapter.beside_plain_lora():
                reason = f"{adapter.files.folder} has more at {listed(more, 3)}; without `peft:` it combines whole matrices of any method"
                raise Unfit(f"--method {self.combination.method} combines the matrices of plain LoRA alone, and {reason}")

    def form(self, dtype: torch.dtype | None) -> SavedForm:
        """Return what the merged model holds and how it is written; in `dtype`, or each tensor in the type of the base's."""
        model = self.blueprint.build()
        return saved_form(model, self.origin, self.blueprint.config, self._type if dtype is None else types_of(model, dtype))

    def _type(self, name: str) -> torch.dtype:
        """Return the type that the base's file has a tensor in; the widest of those that it is made of."""
        name = self.tied.get(name, name)
        origin: Any = self.origin.origin if isinstance(self.origin, Grown) else self.origin
        keys = [origin.keys[name]] if name in origin.keys else itertools.chain(*origin.conversions[name].sources.values())
        types = [FLOATS[origin.weights.stored[key].type] for key in keys]
        return max(types, key=lambda kind: (kind.itemsize, str(kind)))

    def pieces(self, contents: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged model's tensors in the order to read in: changed ones whole, the others in pieces of the base's."""
        for name in dict.fromkeys([*self.origin.names(), *sorted(self.untied)]):
            meta = contents[name]
            changing = [(adapter, weight) for adapter, weight in zip(self.adapters, self.weights, strict=True) if adapter.changes(name)]
            made = self._combined(name, changing).to(meta.dtype) if changing else None
            if made is not None:
                yield name, made
                continue
            source, shape = self.tied.get(name, name), tuple(meta.shape)
            rows = max(1, PIECE_BYTES // max(1, math.prod(shape[1:]) * meta.itemsize))
            for start in range(0, shape[0], rows) if shape else (None,):
                offset = (start, *(0 for _ in shape[1:])) if start is not None else ()
                block = (min(rows, shape[0] - start), *shape[1:]) if start is not None else ()
                yield name, self.origin.read(source, offset, block).to(meta.dtype)

    def _base(self, name: str) -> Tensor:
        return read_whole(self.origin, self.tied.get(name, name)).float()

    @torch.no_grad()
    def _combined(self, name: str, changing: list[tuple[Adapter, float]]) -> Tensor:
        """Return a tensor with the changes of its adapters, float32."""
        combination = self.combination
        if combination.method in LIBRARY_METHODS:
            return self._by_library(name, changing)
        if len(self.adapters) == 1 and self.weights == [1.0] and not combination.prunes:
            return changing[0][0].make(name, self._base)
        before = self._base(name)
        deltas = (adapter.make(name, self._base).sub_(before) for adapter, _ in changing)
        weights = [weight for _, weight in changing]
        if not combination.prunes:
            total = torch.zeros_like(before)
            for delta, weight in zip(deltas, weights, strict=True):
                total.add_(delta, alpha=weight)
            return before.add_(total)
        from peft.utils import merge_utils

        with seeded(combination.seed, name):
            return before.add_(getattr(merge_utils, combination.method)(list(deltas), torch.tensor(weights), combination.density))

    def _by_library(self, name: str, changing: list[tuple[Adapter, float]]) -> Tensor:
        path = changing[0][0].unit_of[name]
        if self.held[0] != path or name not in self.held[1]:
            self.held = ("", {})
            self.held = (path, self._weighted(path, changing))
        return self.held[1].pop(name)

    def _weighted(self, path: str, changing: list[tuple[Adapter, float]]) -> dict[str, Tensor]:
        """Let peft's add_weighted_adapter combine the LoRA matrices of one layer, and merge the result into it.

        Each adapter's scale is given as alpha / rank, since peft multiplies the result of rank-stabilised ones by sqrt(rank).
        """
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        units = [adapter.filled(path, self._base if number == 0 else None) for number, (adapter, _) in enumerate(changing)]
        alone: Any = nn.Module()
        alone.add_module("layer", units[0].get_base_layer())
        tuner: Any = None
        names = [f"adapter{number}" for number in range(len(units))]
        for name, unit in zip(names, units, strict=True):
            rank = unit.r[ADAPTER]
            config = LoraConfig(
                r=rank, lora_alpha=unit.scaling[ADAPTER] * rank, target_modules={"layer"}, fan_in_fan_out=unit.fan_in_fan_out
            )
            if tuner is None:
                tuner = LoraModel(alone, config, name)
            else:
                tuner.peft_config[name] = config
                tuner.inject_adapter(alone, name)
            values = {key: value for key, value in unit.state_dict().items() if "base_layer" not in key}
            alone.layer.load_state_dict({key.replace(f".{ADAPTER}", f".{name}"): value for key, value in values.items()}, strict=False)
        with seeded(self.combination.seed, path):
            tuner.add_weighted_adapter(names, [weight for _, weight in changing], "merged", **self.library_options())
        alone.layer.merge(adapter_names=["merged"])
        return {f"{path}.{name}": tensor for name, tensor in alone.layer.get_base_layer().state_dict().items()}

    def library_options(self) -> dict[str, Any]:
        """Return the options that peft's add_weighted_adapter takes of the combination."""
        combination = self.combination
        return {
            "combination_type": combination.method.removeprefix("peft:"),
            "svd_rank": combination.svd_rank,
            "svd_full_matrices": False,
            "density": combination.density,
        }


def base_blueprint(folder: Path, trust_remote_code: bool, adapters: Sequence[AdapterFiles]) -> Blueprint:
    """Return what the merged model is built of: the base's config, with as many rows as the adapters' own embeddings have.

    Raises Unfit for a base that is quantised, or adapters that do not agree.
    """
    try:
        config = read_config(folder, trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise Unfit(f"the base {folder} cannot be opened: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        remedy = "--model DIR names the model in bf16 or fp32 that it was made of"
        raise Unfit(f"the base {folder} {error.reason}: {remedy}" if "quantised" in error.reason else f"the base {error}") from error
    blueprint = Blueprint(config=config, folder=folder, revision=None, seed=0, trust_remote_code=trust_remote_code)
    model = blueprint.build()
    embedding: Any = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    old, *width = embedding.weight.shape
    keys = [f"{PREFIX}{path}.{name}" for name in ("weight", "base_layer.weight")]
    shapes = [files.weights.stored[key].shape for files in adapters for key in keys if key in files.weights.stored]
    rows = {shape[0] for shape in shapes if shape[1:] == tuple(width)}
    if len(rows) > 1:
        raise Unfit(f"the adapters have embeddings of {' and '.join(map(str, sorted(rows)))} rows, and one model has one")
    if rows and rows != {old}:
        blueprint.vocab_on_disk = old
        for part in (config, config.get_text_config()):
            if getattr(part, "vocab_size", None) == old:
                (part.vocab_size,) = rows
    return blueprint
