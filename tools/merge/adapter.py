"""An adapter on its base: which tensors it changes, and into what, by the peft library's own layers, one module at a time.

It is put on its base on `meta`, so that peft itself says which modules it changes and where each tensor of its file belongs. Then one
module at a time gets its values and is merged, in float32. Nothing else of the model is held.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.config.errors import ConfigError
from trainers.model.safetensors_files import FLOATS, Weights, listed
from trainers.model.weights import is_finite, tied_names
from trainers.peft.base import ADAPTER, FILE, library
from trainers.rundir import paths

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts in front of a model's names."""
REBUILT = ("pissa", "olora")
"""Initialisations that change the base, and that peft makes again from the base alone."""
CHANGING = (*REBUILT, "corda", "loftq", "lora_ga")
"""All that change the base."""
NOT_SAVED = {"ranknum", "trainable_tokens_original"}
"""Tensors of peft's layers that merging needs no file for."""


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
    if not (folder / CONFIG).is_file():
        hint = f"; {folder / 'export'} has one" if (folder / paths.EXPORT / CONFIG).is_file() else ""
        raise Unfit(f"{folder} {f'is not an adapter, it has no {CONFIG}' if folder.is_dir() else 'is not a directory'}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields of later versions of peft
            config: Any = library().PeftConfig.from_pretrained(str(folder))
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
    if method == "BOTTLENECK":
        return "bottleneck adapters have an activation between two matrices, and no weight does the same; load them with peft"
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
        self.units = units_of(model)
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


def units_of(model: nn.Module) -> dict[str, Any]:
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


def _is_plain_lora(unit: Any) -> bool:
    """Tell whether a unit is a layer with LoRA's A and B alone."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Embedding, Linear

    plain = isinstance(unit, LoraLayer) and isinstance(unit, (Linear, Embedding))
    return plain and not unit.lora_variant and not any(unit.lora_bias.values())
