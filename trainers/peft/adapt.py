"""What of a model is trained: all of it, a part, or an adapter. `adapt` changes a model on `meta`, before an engine shards it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from trainers.config.choices import PeftMethod, Quantisation
from trainers.config.errors import ConfigError, did_you_mean
from trainers.config.methods import VIRTUAL
from trainers.config.schema import PeftConfig, RunConfig
from trainers.model.blueprint import Blueprint
from trainers.model.reach import find_unreached, groups_of
from trainers.model.safetensors_files import listed
from trainers.model.saved_form import saved_form, types_of
from trainers.model.weights import Origin
from trainers.peft.base import Adaptation, Adapter, FullTraining, VirtualTokens
from trainers.peft.layers import inject
from trainers.peft.nf4 import pack_base
from trainers.peft.saved import Continued, require_same_adapter
from trainers.peft.tokens import prepend_tokens


def adapt(model: PreTrainedModel, origin: Origin, config: RunConfig, blueprint: Blueprint, compute: torch.dtype) -> Adaptation:
    """Apply the run's method to a model on `meta`: what is frozen is stored in the compute type, what is trained in float32.

    What the data never reach is frozen first: no method trains it. Raises ConfigError, before any value is read, for what the model
    does not have or the method cannot do with it.
    """
    method, settings = config.peft.method, config.peft
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unreached = find_unreached(model, config.data.seq_len)
    parts = list(groups_of(unreached, numels))
    left = {id(model.get_parameter(name)) for name in unreached}
    for name in unreached:
        model.get_parameter(name).requires_grad_(False)
    adaptation: Adaptation
    if method is PeftMethod.none or method is PeftMethod.freeze:
        adaptation = _train_part(model, origin, settings, blueprint)
    elif blueprint.vocab_on_disk is not None:
        reason = f"the model grows from {blueprint.vocab_on_disk} rows, and an adapter is loaded onto a base that has not grown"
        raise ConfigError("peft.method", str(method), reason, "train with tokens that the base has rows for, or peft=none or freeze")
    else:
        adaptation = prepend_tokens(model, origin, config) if method in VIRTUAL else inject(model, origin, config, unreached, parts)
    adaptation.unreached = {name for name, parameter in model.named_parameters() if id(parameter) in left}
    if unreached:
        adaptation.notes["never reached"] = _unreached_words(parts, unreached, numels)
    if settings.quantise is Quantisation.nf4:
        pack_base(model, adaptation)
    if settings.adapter is not None:
        assert isinstance(adaptation, Adapter | VirtualTokens)
        require_same_adapter(settings.adapter, adaptation.library_config)
        adaptation.origin = Continued(adaptation, Path(settings.adapter))
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    return adaptation


def _unreached_words(parts: list[str], unreached: set[str], numels: dict[str, int]) -> str:
    """Say what the data never reach, and its share of all parameters."""
    share = sum(numels[name] for name in unreached) / sum(numels.values())
    return f"{listed(parts, most=4)}: {len(unreached)} tensors, {share:.2%} of all parameters, frozen and exported as they came"


def _train_part(model: PreTrainedModel, origin: Origin, settings: PeftConfig, blueprint: Blueprint) -> FullTraining:
    """Train every parameter, or those that are not frozen; the export is a whole model, with frozen tensors as the base has them."""
    if settings.method is PeftMethod.freeze:
        frozen = _before_last_blocks(model, settings.last_blocks) if settings.last_blocks else _matching(model, settings.freeze)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError("peft.freeze", settings.freeze, "freezes every parameter that the data reach", "fewer patterns")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters, form = dict(model.named_parameters()), saved_form(model, origin, blueprint.config, types_of(model, blueprint.saved_dtype))
    live = {name for name in form.live if name not in parameters or name in trained}
    return FullTraining(origin=origin, trained=trained, form=form, live=live, dtype=blueprint.saved_dtype)


def _matching(model: PreTrainedModel, patterns: list[str]) -> set[str]:
    """Return the parameters that any pattern matches; raises ConfigError for a pattern without."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError("peft.freeze", pattern, "matches no parameter of the model", did_you_mean(pattern, names, 3))
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _before_last_blocks(model: PreTrainedModel, count: int) -> set[str]:
    """Return what comes before the last `count` blocks in the model's order; raises ConfigError where it has not so many."""
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists or count > lists[0][1]:
        reason = f"the model has {lists[0][1] if lists else 'no'} blocks"
        raise ConfigError(
            "peft.last_blocks", count, reason, f"peft.last_blocks={lists[0][1]} or less" if lists else "peft.freeze=[PATTERN]"
        )
    names = [name for name, _ in model.named_parameters()]
    prefix = f"{lists[0][0]}.{lists[0][1] - count}."
    return set(names[: next(number for number, name in enumerate(names) if name.startswith(prefix))])
