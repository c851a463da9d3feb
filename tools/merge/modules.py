"""Merging: what adapters make of their base, tensor by tensor, by the peft library's own layers.

An adapter is put on its base on `meta`, so that peft itself says which modules it changes and where each tensor of its file belongs.
Then one module at a time gets its values and is merged, in float32. Nothing else of the model is held.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainers.config.errors import ConfigError
from trainers.model.blueprint import Blueprint
from trainers.model.safetensors_files import FLOATS, Weights, listed
from trainers.model.weights import Grown, Origin, is_finite, origin_of, tied_names
from trainers.peft.base import ADAPTER, FILE, read_whole, seeded

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts in front of a model's names."""
PIECE_BYTES = 64 << 20
METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""How deltas of whole matrices are combined: their weighted sum, or by the function of this name in peft.utils.merge_utils."""
LIBRARY_METHODS = tuple(
    f"peft:{name}" for name in ("linear", "svd", "cat", *(f"{name}{end}" for name in METHODS[1:] for end in ("", "_svd")))
)
"""How peft's add_weighted_adapter combines LoRA matrices A and B into new ones, layer by layer."""
REBUILT = ("pissa", "olora")
"""Initialisations that change the base, and that peft makes again from the base alone."""
CHANGING = (*REBUILT, "corda", "loftq", "lora_ga")
"""All that change the base."""
NOT_SAVED = {"ranknum", "trainable_tokens_original"}
"""Tensors of peft's layers that merging needs no file for."""
PROBE_ROWS, PROBE_TOKENS = 2, 32


class Unfit(Exception):
    """An adapter or a base that cannot be merged: names it and says why."""


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter directory: peft's config of it, and its tensors on disk."""

    folder: Path
    config: Any
    weights: Weights


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter's config and the header of its file; raises Unfit for what is missing, damaged or cannot be merged."""
    import peft

    if not (folder / CONFIG).is_file():
        hint = f"; {folder / 'export'} has one" if (folder / "export" / CONFIG).is_file() else ""
        raise Unfit(f"{folder} {f'is not an adapter, it has no {CONFIG}' if folder.is_dir() else 'is not a directory'}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields of later versions of peft
            config: Any = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever text other than a config parses to
        raise Unfit(f"{folder / CONFIG} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if why := _why_not(config):
        raise Unfit(f"{folder} cannot be merged: {why}")
    try:
        weights = Weights(folder, FILE)
    except ConfigError as error:
        raise Unfit(f"{folder}: {error.reason}; {error.remedy}") from error
    if strange := sorted({tensor.type for tensor in weights.stored.values()} - set(FLOATS)):
        raise Unfit(f"{folder / FILE} holds {listed(strange)}, and only floating-point numbers can be merged")
    return AdapterFiles(folder=folder, config=config, weights=weights)


def _why_not(config: Any) -> str | None:
    """Return why an adapter of this config has no merged weights, or None."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuners: dict[Any, Any] = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    method = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        return f"{method} puts virtual tokens in front of each row and changes no weight; load it together with its base, with peft"
    if method not in tuners or config.is_adaption_prompt or method in ("XLORA", "POLY", "SHADOW"):
        return f"{method} is not a change of the base's weights; load it together with its base, with peft"
    if tuners[config.peft_type].uses_shared_state:
        return f"the layers of {method} share matrices, which is not merged here yet"
    if config.task_type not in (None, "CAUSAL_LM"):
        return f"its task is {config.task_type}, and only causal language models are merged here"
    if getattr(config, "layer_replication", None):
        return "its layer_replication makes another model of the base"
    if getattr(config, "alora_invocation_tokens", None):
        return "it acts only after its invocation tokens"
    begun = str(getattr(config, "init_lora_weights", None)).lower()
    if "niter" in begun or (begun.startswith(CHANGING) and not begun.startswith(REBUILT)):
        remedy = "save it as plain LoRA, by save_pretrained with path_initial_model_for_weight_conversion"
        return f"init_lora_weights={begun} began by changing the base, which cannot be done again just so; {remedy}"
    return None


def base_blueprint(folder: Path, trust_remote_code: bool, adapters: Sequence[AdapterFiles]) -> Blueprint:
    """Return what the merged model is built of: the base's config, with as many rows as the adapters' own embeddings have.

    Raises Unfit for a base that is quantised, or adapters that do not agree.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise Unfit(f"the base {folder} cannot be opened: {' '.join(str(error).split())}") from error
    if getattr(config, "quantization_config", None):
        raise Unfit(f"the base {folder} is quantised: --model DIR names the model in bf16 or fp32 that it was made of")
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


class Adapter:
    """An adapter on its base: which tensors of the base it changes, and into what."""

    def __init__(self, files: AdapterFiles, model: PreTrainedModel, base: Path) -> None:
        """Put it on a model on `meta`, which becomes its own; raises Unfit unless every tensor of the one has its place in the other."""
        self.files, self.library_config = files, files.config
        before: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        tied = tied_names(model)
        self.names = {id(tensor): tied.get(name, name) for name, tensor in before.items()}
        self.begun = copy.deepcopy(files.config)
        self.rebuilds = str(getattr(self.begun, "init_lora_weights", None)).lower().startswith(REBUILT)
        adapted = self._put_on(model)
        state: dict[str, Tensor] = {name.removeprefix(PREFIX): tensor for name, tensor in adapted.state_dict(keep_vars=True).items()}
        self.units = _units(model)
        self.sources = self._place(adapted)
        made = {f"{path}.{name}": path for path, unit in self.units.items() for name in _inner(unit).state_dict()}
        self.unit_of = {name: path for name, path in made.items() if before[name].is_floating_point()}
        self.follows = {alias: name for alias, name in tied.items() if self._is_one(alias, name)}
        self._require_fit(state, base)
        own = {self.names[id(state[name])]: name for name in self.sources if id(state[name]) in self.names}
        self.own = {name: own[self.names[id(tensor)]] for name, tensor in before.items() if self.names[id(tensor)] in own}
        self.unties = {
            alias for alias, name in tied.items() if alias not in self.follows and (alias in self.unit_of or name in self.unit_of)
        }
        self.held: tuple[str, dict[str, Tensor]] = ("", {})

    def _put_on(self, model: PreTrainedModel) -> Any:
        import peft

        config = self.library_config
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # on meta; what changes the base is made in `_filled`
        pattern = None
        if config.peft_type is peft.PeftType.ADALORA:
            pattern, config.rank_pattern = config.rank_pattern, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tied weights, which are untied here
                adapted = peft.PeftModel(model, config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
                for name, kept in (pattern or {}).items():  # AdaLoRA's ranks as they were left
                    layer: Any = model.get_submodule(name.partition(".lora_E")[0])
                    layer.update_layer(ADAPTER, sum(kept), config.lora_alpha, config=config)
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            raise Unfit(f"{self.files.folder} does not fit the base: {' '.join(str(error).split())}") from error
        return adapted

    def _place(self, adapted: Any) -> dict[str, str | Tensor]:
        """Return the adapter's tensors by the model's names: keys of the file, or values where peft makes several keys one.

        peft's own loader says it: it is asked to load, and what it would write is taken instead.
        """
        import peft

        stored = [key for key in self.files.weights.stored if ".modules_to_save." not in key]  # written twice where a vocabulary has grown
        for real in (False, True):
            given = {key: self._read(key) if real else torch.empty(self.files.weights.stored[key].shape, device="meta") for key in stored}
            found: dict[str, Tensor] = {}
            adapted.load_state_dict = lambda state, found=found, **options: found.update(state)
            try:
                peft.set_peft_model_state_dict(adapted, given, ADAPTER)
            except KeyError as error:
                raise Unfit(f"{self.files.folder} does not fit the base: it lacks {error.args[0]}") from error
            finally:
                del adapted.load_state_dict
            keys = {id(tensor): key for key, tensor in given.items()}
            if real or all(id(tensor) in keys for tensor in found.values()):
                break
        return {name.removeprefix(PREFIX): keys.get(id(tensor), tensor) for name, tensor in found.items()}

    def _is_one(self, alias: str, name: str) -> bool:
        """Tell whether the adapter changes two tied tensors as one, so that they stay tied."""
        unit = self.units.get(self.unit_of.get(alias, ""))
        tokens = getattr(unit, "token_adapter", None)
        both = bool(getattr(self.library_config, "ensure_weight_tying", False)) and name in self.unit_of
        return unit is not None and (both or bool(getattr(tokens, "tied_adapter", None)))

    def _require_fit(self, state: dict[str, Tensor], base: Path) -> None:
        followers = {self.unit_of[alias] for alias in self.follows}
        lacks = [
            f"{path}.{name}"
            for path, unit in self.units.items()
            if path not in followers
            for name, tensor in itertools.chain(unit.named_parameters(), unit.named_buffers())
            if tensor.is_meta and id(tensor) not in self.names and f"{path}.{name}" not in self.sources
            if not NOT_SAVED & set(name.split("."))
        ]
        foreign = [name for name in self.sources if name not in state]
        shapes = {name: self._shape(name) for name in self.sources}
        misshapen = [
            f"{name.replace(f'.{ADAPTER}', '')} is {list(shape)} in the adapter and would be {list(state[name].shape)} on this base"
            for name, shape in shapes.items()
            if name in state and shape != tuple(state[name].shape)
        ]
        kinds = ((misshapen, ""), (foreign, "the base has no place for "), (lacks, "it lacks "))
        if wrong := [f"{says}{listed([name.replace(f'.{ADAPTER}', '') for name in names], 3)}" for names, says in kinds if names]:
            belongs = f" (it names {self.begun.base_model_name_or_path} as its base)" if self.begun.base_model_name_or_path else ""
            raise Unfit(f"{self.files.folder} does not fit the base {base}{belongs}: {'; '.join(wrong)}")

    def _shape(self, name: str) -> tuple[int, ...]:
        source = self.sources[name]
        return self.files.weights.stored[source].shape if isinstance(source, str) else tuple(source.shape)

    def _read(self, key: str) -> Tensor:
        value = self.files.weights.read_whole(key)
        if not is_finite(value):
            raise RuntimeError(f"{self.files.folder / FILE}: {key} holds values that are not finite")
        return value.float()

    def _value(self, name: str) -> Tensor:
        source = self.sources[name]
        return self._read(source) if isinstance(source, str) else source.float().clone()

    def changes(self, name: str) -> bool:
        """Tell whether the adapter makes something else of a tensor of the base."""
        return self.follows.get(name, name) in self.unit_of or name in self.own

    def beside_plain_lora(self) -> list[str]:
        """Return what the adapter changes by anything but LoRA's matrices A and B on the base as it is."""
        odd = [path for path, unit in self.units.items() if self.rebuilds or not _is_plain_lora(unit)]
        return odd + sorted(self.own)

    def make(self, name: str, base: Callable[[str], Tensor]) -> Tensor:
        """Return what the adapter makes of a tensor that it changes, float32; `base` returns one of the base, as new memory."""
        name = self.follows.get(name, name)
        path = self.unit_of.get(name)
        if path is None:
            return self._value(self.own[name])
        if self.held[0] != path or name not in self.held[1]:
            self.held = ("", {})
            self.held = (path, self._merged(path, base))
        return self.held[1].pop(name)

    @torch.no_grad()
    def _merged(self, path: str, base: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Let peft merge one module, whose values are read for it, and return its tensors by the base's names."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        unit = self.filled(path, base)
        try:
            if hasattr(unit, "unload_and_optionally_merge_module"):
                unit = unit.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                for layer in [module for module in unit.modules() if isinstance(module, BaseTunerLayer)]:
                    layer.merge()
                unit = unit.get_base_layer()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise Unfit(f"{self.files.folder}: peft does not merge {path}: {' '.join(str(error).split())}") from error
        made = {f"{path}.{name}": tensor for name, tensor in unit.state_dict().items()}
        if unmade := [name for name, tensor in made.items() if tensor.is_meta]:
            raise Unfit(f"{self.files.folder}: peft's layer makes no {listed(unmade)} of its file alone")
        return made

    def filled(self, path: str, base: Callable[[str], Tensor] | None) -> Any:
        """Return a module as peft adapts it, with its values in float32; without those of the base if `base` is None."""
        from peft.utils.other import ModulesToSaveWrapper

        meta = self.units[path]
        unit = copy.deepcopy(meta)
        replaced = isinstance(meta, ModulesToSaveWrapper)
        ours: dict[str, Tensor] = {}
        for name, tensor in meta.state_dict(keep_vars=True).items():
            whole = f"{path}.{name}"
            if id(tensor) in self.names:
                source = self.names[id(tensor)]
                if base is not None and not replaced:
                    value = self._value(self.own[source]) if source in self.own else base(source)
                    unit.load_state_dict({name: value}, strict=False, assign=True)
            elif whole in self.sources:
                ours[name] = self._value(whole)
            elif name == f"ranknum.{ADAPTER}":  # AdaLoRA scales by the rank it began with, which is not saved
                ours[name] = torch.tensor([float(self.library_config.init_r)])
        if self.rebuilds and hasattr(unit, "lora_alpha"):
            unit.update_layer(ADAPTER, unit.r[ADAPTER], lora_alpha=unit.lora_alpha[ADAPTER], config=self.begun)
        unit.load_state_dict(ours, strict=False, assign=True)
        return unit


def _units(model: nn.Module) -> dict[str, Any]:
    """Return the outermost modules that peft adapted or copied, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    units: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not any(path.startswith(f"{outer}.") for outer in units):
            units[path] = module
    return units


def _inner(unit: Any) -> nn.Module:
    """Return the base's module in a unit."""
    inner: nn.Module = unit.get_base_layer() if hasattr(unit, "get_base_layer") else unit.original_module
    return inner


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

    def plan(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Return what the merged model holds, on `meta`, in the order to read in; in `dtype`, or each tensor in the type of the base's."""
        state = self.blueprint.build().state_dict()
        names = list(dict.fromkeys([*self.origin.names(), *sorted(self.untied)]))
        kinds = {name: (dtype or self._type(name)) if state[name].is_floating_point() else state[name].dtype for name in names}
        return {name: torch.empty(state[name].shape, dtype=kinds[name], device="meta") for name in names}

    def _type(self, name: str) -> torch.dtype:
        """Return the type that the base's file has a tensor in; the widest of those that it is made of."""
        name = self.tied.get(name, name)
        origin: Any = self.origin.origin if isinstance(self.origin, Grown) else self.origin
        keys = [origin.keys[name]] if name in origin.keys else itertools.chain(*origin.conversions[name].sources.values())
        types = [FLOATS[origin.weights.stored[key].type] for key in keys]
        return max(types, key=lambda kind: (kind.itemsize, str(kind)))

    def pieces(self, plan: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged model's tensors in order: changed ones whole, the others in pieces of the base's."""
        for name, meta in plan.items():
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
            tuner.add_weighted_adapter(names, [weight for _, weight in changing], "merged", **self._library_options())
        alone.layer.merge(adapter_names=["merged"])
        return {f"{path}.{name}": tensor for name, tensor in alone.layer.get_base_layer().state_dict().items()}

    def _library_options(self) -> dict[str, Any]:
        combination = self.combination
        return {
            "combination_type": combination.method.removeprefix("peft:"),
            "svd_rank": combination.svd_rank,
            "svd_full_matrices": False,
            "density": combination.density,
        }

    def adapted(self) -> PreTrainedModel | None:
        """Return the base whole, float32, with its adapters, as plain peft runs them; None for what it cannot run unmerged."""
        import peft

        method, library = self.combination.method, self.combination.method in LIBRARY_METHODS
        together = len(self.adapters) > 1 or self.weights != [1.0] or method != METHODS[0]
        stabilised = any(getattr(adapter.begun, "use_rslora", False) for adapter in self.adapters)
        if "dare" in method or (library and stabilised) or method in METHODS[1:]:
            return None
        if together and any(adapter.beside_plain_lora() for adapter in self.adapters):
            return None
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(self.blueprint.folder), dtype=torch.float32, trust_remote_code=self.blueprint.trust_remote_code
        )
        if self.blueprint.vocab_on_disk is not None:
            model.resize_token_embeddings(self.blueprint.config.get_text_config().vocab_size, mean_resizing=False)
        names = [f"adapter{number}" for number in range(len(self.adapters))] if together else [ADAPTER]
        opened: Any = peft.PeftModel.from_pretrained(model, str(self.adapters[0].files.folder), names[0])
        for name, adapter in zip(names[1:], self.adapters[1:], strict=True):
            opened.load_adapter(str(adapter.files.folder), name)
        if library:
            opened.add_weighted_adapter(names, self.weights, "merged", **self._library_options())
            opened.set_adapter("merged")
        elif together:
            opened.base_model.set_adapter(names)
            for unit in _units(opened.base_model.model).values():
                for name, weight in zip(names, self.weights, strict=True):
                    if name in unit.scaling:
                        unit.scaling[name] *= weight
        return opened  # type: ignore[no-any-return]


def _is_plain_lora(unit: Any) -> bool:
    """Tell whether a unit is a layer with LoRA's A and B alone."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Embedding, Linear

    plain = isinstance(unit, LoraLayer) and isinstance(unit, (Linear, Embedding))
    return plain and not unit.lora_variant and not any(unit.lora_bias.values())


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the merged model's logits are from those of base and adapters, on the probe batch."""

    largest: float
    """Largest absolute difference of two logits."""
    scale: float
    """Largest absolute logit."""
    same: int
    """Positions whose most likely next token is the same."""
    positions: int


def compare(folder: Path, merge: Merge) -> Difference | None:
    """Run a fixed batch through the merged directory and through base and adapters, whole and in float32; None where peft runs no such.

    Token ids are random, the same each time, among those that the base has.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights
        adapted = merge.adapted()
    if adapted is None:
        return None
    config = merge.blueprint.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    rows = min(config.vocab_size, merge.blueprint.vocab_on_disk or config.vocab_size)
    ids = torch.randint(rows, (PROBE_ROWS, length), generator=torch.Generator().manual_seed(0))
    expected = _logits(adapted, ids)
    del adapted
    trust = merge.blueprint.trust_remote_code
    got = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust), ids)
    return Difference(
        largest=(got - expected).abs().max().item(),
        scale=expected.abs().max().item(),
        same=int((got.argmax(-1) == expected.argmax(-1)).sum()),
        positions=ids.numel(),
    )


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return logits
