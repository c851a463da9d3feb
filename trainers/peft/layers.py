"""Adapters on layers: the peft library says what they are and how they begin, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.config.choices import ENCODER_DECODERS, AdapterBias, AdapterInit, PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.mixtures import names_stacks
from trainers.config.schema import PeftConfig, RunConfig
from trainers.model.forward import SCORE, gives_scores
from trainers.model.safetensors_files import listed
from trainers.model.weights import Origin, slices, tied_names
from trainers.peft import adalora
from trainers.peft.base import ADAPTER, Adapter, base_name, plain_list, seeded
from trainers.peft.nf4 import round_trip
from trainers.peft.targets import (
    ADAPTABLE,
    ALL_LINEAR,
    adapted_words,
    aimed_stacks,
    ends,
    exclusion,
    linear_beside_stacks,
    require_modules,
    stack_of,
    targets_that_work,
)
from trainers.processes import raise_exhausted


def inject(model: PreTrainedModel, origin: Origin, config: RunConfig, unreached: Collection[str], parts: Sequence[str]) -> Adapter:
    """Put an adapter on each layer that is aimed at, and freeze the rest.

    `unreached` names the parameters that the data never reach, and `parts` the modules that they make up: no adapter is put there.
    """
    settings = config.peft
    if gives_scores(model):  # the head begins at random: it is trained whole
        settings = dataclasses.replace(settings, modules_to_save=[*settings.modules_to_save, SCORE])
    require_modules(model, settings, parts)
    before: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    library_config = _library_config(settings, model, parts)
    library_config.base_model_name_or_path = base_name(config)
    library_config.revision = config.model.revision
    layers = _adapted(model, library_config, settings, parts)
    if settings.method is PeftMethod.bottleneck:
        from trainers.peft.bottleneck import require_suitable

        require_suitable(model, settings)
    for name in unreached:
        before[name].requires_grad_(False)  # `bias: all` has let it be trained
    _require_rank(settings, layers)
    if settings.method is PeftMethod.adalora:
        for layer in layers.values():
            layer.ranknum.requires_grad_(False)  # as it is off `meta`
    after: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    _require_untied(model, before, after)
    adapters = Adapters(origin, after, before, layers, library_config, settings, config.seed)
    adapters.begin_names(tied_names(model))
    keys = _keys(model, after)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved_config, expected = (
        adapters.saved_config(),
        {key: torch.empty(adapters.saved_shape(name), device="meta") for name, key in keys.items()},
    )
    pruning = None
    if settings.method is PeftMethod.adalora:
        pruning = adalora.Pruning({name: adapters.shape(name) for name in sorted(trained)}, settings, saved_config)
    return Adapter(
        origin=adapters,
        trained=trained,
        names=keys,
        contents=lambda: expected if pruning is None else {key: pruning.as_saved(key, tensor) for key, tensor in expected.items()},
        as_saved=adapters.as_saved if pruning is None else pruning.as_saved,
        library_config=saved_config,
        notes={"adapters": adapted_words(before, layers, settings, unreached)},
        lr_scales={name: settings.lr_ratio for name in trained if "lora_B" in name or after[name].ndim == 1},  # as peft's LoRA+ divides
        update=pruning,
    )


def _adapted(model: PreTrainedModel, library_config: Any, settings: PeftConfig, parts: Sequence[str]) -> dict[str, Any]:
    """Let peft adapt a model and return its layers by path; raises ConfigError with the targets that can be adapted."""
    pristine = copy.deepcopy(model)
    try:
        return _single_layers(model, library_config)
    except ConfigError as error:
        asked = dataclasses.replace(settings, modules_to_save=[])
        stacked = names_stacks(settings.targets)

        def put(other: PreTrainedModel, names: list[str]) -> object:
            return _single_layers(other, _library_config(dataclasses.replace(asked, targets=names), other, parts))

        work = targets_that_work(pristine, put, parts)
        work += [name for name in stacked if work]
        remedy = f"peft.targets=[{','.join(work)}]" if work and set(work) != set(settings.targets) else error.remedy
        raise ConfigError(error.path, settings.targets, error.reason, remedy) from error


def _single_layers(model: PreTrainedModel, library_config: Any) -> dict[str, Any]:
    """Put peft's layers into a model and return them by path; raises ConfigError where it refuses, or would adapt a stack unasked."""
    aimed = set(getattr(library_config, "target_parameters", None) or ())
    _put_in(library_config, model)
    layers = _tuner_layers(model)
    for path, layer in layers.items():
        if hasattr(library_config, "bottleneck_size"):  # which a module of several layers may have
            break
        if not isinstance(layer.get_base_layer(), ADAPTABLE) and not any(name.endswith(f".{stack_of(layer)}") for name in aimed):
            raise _no_stacks([path])
    if aimed:
        from trainers.peft.stacks import compute_grouped

        compute_grouped(model)
    return layers


def _no_stacks(names: Sequence[str]) -> ConfigError:
    reason = f"the matrices of {listed(names)} are one stack, such as all experts of a block, and no adapter is put on a stack here"
    return ConfigError("peft.targets", list(names), reason)


def _library_config(settings: PeftConfig, model: PreTrainedModel, parts: Sequence[str]) -> Any:
    import peft

    named = [name for name in settings.targets if name not in names_stacks(settings.targets)]
    targets: Any = named if settings.targets else None
    if named == [ALL_LINEAR]:
        is_lora = settings.method in (PeftMethod.lora, PeftMethod.dora)
        targets = (linear_beside_stacks(model, parts) if is_lora else None) or ALL_LINEAR
    encodes = model.config.model_type in ENCODER_DECODERS
    task = "SEQ_CLS" if gives_scores(model) else "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"
    same: dict[str, Any] = {"task_type": task, "target_modules": targets, "modules_to_save": settings.modules_to_save or None}
    same |= {"exclude_modules": exclusion(parts)}
    if settings.method is PeftMethod.ia3:
        return peft.IA3Config(**same, feedforward_modules=_feedforward(settings, model))
    if settings.method is PeftMethod.bottleneck:
        from trainers.peft.bottleneck import library_config

        return library_config(settings, model, **same)
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    if settings.method is PeftMethod.adalora:
        return adalora.library_config(settings, alpha, **same)
    return peft.LoraConfig(
        **same,
        r=settings.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        bias="lora_only" if settings.bias is AdapterBias.adapted else str(settings.bias),  # type: ignore[arg-type]
        use_rslora=settings.rank_stabilised,
        use_dora=settings.method is PeftMethod.dora,
        target_parameters=aimed_stacks(model, settings.targets) or None,
    )


def _feedforward(settings: PeftConfig, model: PreTrainedModel) -> list[str] | None:
    """Return IA3's targets that scale inputs: those that peft knows as feed-forward; None leaves both lists to peft."""
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as KNOWN

    known = KNOWN.get(model.config.model_type, ["down_proj", "fc2", "wo"])
    if not settings.targets:
        return None
    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)] if "all-linear" in settings.targets else []
    aimed = [*settings.targets, *names]
    return [name for name in aimed if any(ends(name, suffix) for suffix in known)]


def _put_in(library_config: Any, model: nn.Module, empty: bool = True) -> None:
    """Let peft put its layers into a model; raises ConfigError for what it refuses."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of base types and tied weights, which are checked here
        try:
            peft.inject_adapter_in_model(library_config, model, ADAPTER, low_cpu_mem_usage=empty)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise_exhausted(error)
            if stacks := getattr(library_config, "target_parameters", None):
                raise _no_stacks(sorted(stacks)) from error
            reason, remedy = re.sub(r"^\[PEFT:\w+\] ", "", " ".join(str(error).split())).partition(". ")[0], ""
            if not library_config.target_modules:
                reason, remedy = f"peft has no choice of its own for {type(model).__name__}", "peft.targets=[NAME,...] or [all-linear]"
            raise ConfigError("peft.targets", plain_list(library_config.target_modules or []), reason, remedy) from error


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _keys(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors that peft saves by their names in the model, with the names it gives them."""
    import peft

    saved = peft.get_peft_model_state_dict(model, dict(state), ADAPTER, save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in state.items()}
    return {names[id(tensor)]: f"base_model.model.{key}" for key, tensor in saved.items()}


def _require_rank(settings: PeftConfig, layers: Mapping[str, Any]) -> None:
    """Raise ConfigError where a matrix has fewer rows or columns than LoRA's rank."""
    for path, layer in layers.items() if settings.method not in (PeftMethod.ia3, PeftMethod.bottleneck) else ():
        smaller = min(layer.in_features, layer.out_features)
        if settings.rank > smaller:
            reason = f"{path} is {layer.out_features} x {layer.in_features}, so that no larger rank can be told from {smaller}"
            raise ConfigError("peft.rank", settings.rank, reason, f"peft.rank={smaller} or less, or leave it out of peft.targets")


def _require_untied(model: PreTrainedModel, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Raise ConfigError where an adapter is on one of two tied tensors: the base's file would not hold the pair any more."""
    for alias, name in tied_names(model).items():
        for tied in (alias, name):
            if after.get(tied) is not before[tied]:
                reason = f"the model ties {alias} and {name}: trained apart, they would not be one any more"
                raise ConfigError("peft.targets", tied.rpartition(".")[0], reason, "leave it out of peft.targets and peft.modules_to_save")


class Adapters:
    """The Origin of a base with adapters: values that peft itself makes, layer by layer, as a function of (seed, layer's name).

    Initialisations that look at the base (PiSSA, DoRA) read one layer's weight whole, one layer at a time, on every rank.
    """

    def __init__(
        self,
        origin: Origin,
        state: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        layers: Mapping[str, Any],
        library_config: Any,
        settings: PeftConfig,
        seed: int,
    ) -> None:
        """Take the tensors of the model on `meta` with and without adapters, and the layers that peft made."""
        self.origin, self.library_config, self.settings, self.seed = origin, library_config, settings, seed
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.bases = {path: copy.deepcopy(layer.get_base_layer()) for path, layer in layers.items()}
        self.stacks = {path: stack for path, layer in layers.items() if (stack := stack_of(layer)) is not None}
        self.inward = {path for path, layer in layers.items() if getattr(layer, "is_feedforward", False)}
        self.is_pissa = settings.init is AdapterInit.pissa
        self.looks_at_base = settings.init in (AdapterInit.pissa, AdapterInit.loftq)
        self.held: tuple[str | None, dict[str, Tensor]] = (None, {})
        self.sources = _sources(state, base)
        self.made = {name: path for path in layers for name in state if name.startswith(f"{path}.") and name not in self.sources}
        if self.is_pissa:
            self.made |= {f"{path}.base_layer.weight": path for path in layers}
        self.order: list[str] = []

    def begin_names(self, tied: Collection[str]) -> None:
        """Put names into the base's order, an adapter's after the weight of its layer; names that are others' aliases are left out."""
        place = {name: number for number, name in enumerate(self.origin.names())}
        first = {path: next(name for name, _ in base.named_parameters()) for path, base in self.bases.items()}
        of_layer = {path: place[self._source(path, self.stacks.get(path, first[path]))] for path in self.bases}
        places = {name: of_layer[self.made[name]] if name in self.made else place.get(self.sources[name]) for name in self.shapes}
        kept = [(number, name) for name, number in places.items() if number is not None and name not in tied]
        self.order = [name for _, name in sorted(kept, key=lambda item: item[0])]

    def _source(self, path: str, name: str) -> str:
        """Return the base's name of a tensor of an adapted layer; layers of stacks are inside one another."""
        inner = f"{path}.base_layer"
        while inner in self.bases:
            inner += ".base_layer"
        return self.sources[f"{inner}.{name}"]

    def names(self) -> list[str]:
        """Return the base's order, an adapter after its layer's weight."""
        return self.order

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.shapes[name]

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of the base as it is, or of what is made for a layer, which is held until the next one's."""
        if name not in self.made:
            return self.origin.read(self.sources[name], offset, shape)
        return self._layer(self.made[name])[name][slices(offset, shape)]

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """Adapters are float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)

    def _layer(self, path: str) -> dict[str, Tensor]:
        if path != self.held[0]:
            self.held = (None, {})
            self.held = (path, self._make(path))
        return self.held[1]

    def _make(self, path: str) -> dict[str, Tensor]:
        """Let peft adapt this one layer alone, and return what it made by the model's names."""
        base = copy.deepcopy(self.bases[path])
        for name, parameter in list(base.named_parameters()):
            whole = name == "weight" and (self.looks_at_base or self.settings.method is PeftMethod.dora)
            value = self._whole(self._source(path, name), parameter.shape).float() if whole else torch.zeros(()).expand(parameter.shape)
            owner, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        alone = nn.Module()
        alone.add_module("layer", base)
        with seeded(self.seed, path):
            _put_in(self._config_of_one(path), alone, empty=False)
            if self.settings.init is AdapterInit.loftq:
                _begin_at_loss(alone.get_submodule("layer"))
        state = {f"{path}{name.removeprefix('layer')}": tensor for name, tensor in alone.state_dict().items()}
        return {name: tensor for name, tensor in state.items() if self.made.get(name) == path}

    def _whole(self, name: str, shape: Sequence[int]) -> Tensor:
        return self.origin.read(name, (0,) * len(shape), tuple(shape))

    def _config_of_one(self, path: str) -> Any:
        config = copy.deepcopy(self.library_config)
        config.exclude_modules = None
        stack = self.stacks.get(path)
        config.target_modules, config.modules_to_save, config.bias = set() if stack else {"layer"}, None, "none"
        if self.stacks:
            config.target_parameters = {f"layer.{stack}"} if stack else None
        if self.settings.method is PeftMethod.ia3:
            config.feedforward_modules = {"layer"} if path in self.inward else set()
        elif self.settings.init not in (AdapterInit.default, AdapterInit.loftq):
            config.init_lora_weights = str(self.settings.init)
        return config

    def as_saved(self, name: str, whole: Tensor) -> Tensor:
        """Return an exported tensor. PiSSA changed the base, so that B A - B0 A0 is saved: LoRA of twice the rank on the base as it was.

        The conversion of peft's save_pretrained (`path_initial_model_for_weight_conversion`); A0 and B0 are made again.
        """
        if not self.is_pissa or name not in self.made:
            return whole
        first = self._layer(self.made[name])[name].to(whole.device)
        return torch.cat([whole, first]) if ".lora_A." in name else torch.cat([whole, -first], dim=1)

    def saved_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an exported tensor."""
        shape = self.shapes[name]
        if not self.is_pissa or name not in self.made:
            return shape
        return (2 * shape[0], *shape[1:]) if ".lora_A." in name else (shape[0], 2 * shape[1])

    def saved_config(self) -> Any:
        """Return peft's config of the export, which says how it is loaded and not how it began."""
        config = copy.deepcopy(self.library_config)
        config.inference_mode = True
        config.target_modules = plain_list(config.target_modules)
        if self.stacks:
            config.target_parameters = plain_list(set(config.target_parameters))
        if self.is_pissa:  # the scale, alpha / rank or alpha / sqrt(rank), stays what it was
            config.r = 2 * config.r
            config.lora_alpha *= math.sqrt(2) if self.settings.rank_stabilised else 2
        return config


def _begin_at_loss(layer: Any) -> None:
    """Let LoRA hold what NF4 loses of its layer, as far as its rank goes.

    LoftQ (arXiv 2310.08659, algorithm 1) with one alternation, peft's default: the base stays NF4 of what it was, so that the
    adapter belongs to it. The singular values are divided by LoRA's scale, which LoftQ leaves out.
    """
    weight = layer.get_base_layer().weight
    lost = (weight - round_trip(weight)) / layer.scaling[ADAPTER]
    left, values, right = torch.linalg.svd(lost, full_matrices=False)
    rank, roots = layer.r[ADAPTER], values.sqrt()
    layer.lora_B[ADAPTER].weight.copy_(left[:, :rank] * roots[:rank])
    layer.lora_A[ADAPTER].weight.copy_(roots[:rank, None] * right[:rank])


def _sources(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the base's name of each tensor that is the base's own, or a trained copy of it (`modules_to_save`)."""
    names = {id(tensor): name for name, tensor in base.items()}
    found = {name: name if base.get(name) is tensor else names[id(tensor)] for name, tensor in state.items() if id(tensor) in names}
    copied = {name: name.replace(f".modules_to_save.{ADAPTER}.", ".") for name in state.keys() - found.keys()}
    return found | {name: source for name, source in copied.items() if source != name and source in base}
