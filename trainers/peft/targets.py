"""Which modules an adapter is aimed at: those that the model has and the data reach, and what to say of the others."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainers.config.errors import ConfigError, did_you_mean
from trainers.config.mixtures import STACKS, names_stacks
from trainers.config.schema import PeftConfig
from trainers.model.experts import stacks
from trainers.model.forward import SCORE, gives_scores
from trainers.model.safetensors_files import listed

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
ALL_LINEAR = "all-linear"
LEAST_SHARE = 0.0005
"""Of all parameters: smaller ones without an adapter are not listed."""


def ends(path: str, name: str) -> bool:
    """Tell whether a name means the module at a path, as peft matches them."""
    return path == name or path.endswith(f".{name}")


def exclusion(parts: Sequence[str]) -> str | None:
    """Return the expression by which peft leaves out the modules at some paths, and all within them; None where there are none."""
    return rf"({'|'.join(map(re.escape, parts))})(\..*)?" if parts else None


def require_modules(model: PreTrainedModel, settings: PeftConfig, parts: Sequence[str]) -> None:
    """Raise ConfigError for a name that no module has, or none that the data reach, with those that are near."""
    left_out = re.compile(exclusion(parts) or "(?!)")
    modules = {path: module for path, module in model.named_modules() if path}
    adaptable = [path for path, module in modules.items() if isinstance(module, ADAPTABLE)]
    weighty = [path for path, module in modules.items() if next(module.parameters(), None) is not None]
    aimed = weighty if settings.parallel else adaptable
    wanted = [("targets", name, aimed, "layer") for name in settings.targets if name not in (ALL_LINEAR, *names_stacks(settings.targets))]
    wanted += [("modules_to_save", name, weighty, "module with weights") for name in settings.modules_to_save]
    for where, name, paths, what in wanted:
        found = [path for path in paths if ends(path, name)]
        if any(not left_out.fullmatch(path) for path in found):
            continue
        reached = [path for path in paths if not left_out.fullmatch(path)]
        leaves = [_leaf(path) for path in reached if not _leaf(path).isdigit()]
        reason = f"{type(model).__name__} has no {what} of this name"
        if found:
            reason = f"the data never reach {listed(found, 2)}, so that it would not be trained"
        remedy = did_you_mean(name, leaves, 3) or f"it has {listed(list(dict.fromkeys(leaves)), 12)}"
        raise ConfigError(f"peft.{where}", name, reason, remedy)


def stack_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's stacks of experts by their names in `peft.targets`, as `experts.gate_up_proj`."""
    return {
        f"{_leaf(path)}.{name}": tuple(parameter.shape)
        for path, module in stacks(model).items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def aimed_stacks(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Return the stacks that `peft.targets` names; raises ConfigError for a name that the model has no stack for."""
    wanted = names_stacks(list(targets))
    known = stack_names(model) if wanted else {}
    for name in wanted:
        if not any(name in (stack, STACKS) for stack in known):
            reason = f"{type(model).__name__} has no stack of experts of this name"
            raise ConfigError("peft.targets", name, reason, f"it has {listed(list(known))}" if known else "peft.targets=[all-linear]")
    return [stack for stack in known if stack in wanted or STACKS in wanted]


def stack_of(layer: Any) -> str | None:
    """Return the name of the stack that one of peft's layers adapts; None for a layer that adapts a module."""
    return getattr(layer, "parameter_name", None)


def linear_beside_stacks(model: PreTrainedModel, parts: Sequence[str]) -> list[str] | None:
    """Return the names of the linear layers that all-linear means; None where peft's own `all-linear` finds no stacks instead.

    peft takes names that experts had when they were layers (gate_proj, w1) for the stacks that they are in now; it does so again when
    an adapter is opened, so that layers of such names, as DeepSeek's shared experts, have no adapter.
    """
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not stack_names(model):
        return None

    def is_taken(name: str) -> bool:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two that are one stack now
            return True
        return bool(config.target_parameters)

    names = _linear_names(model, parts)
    return [name for name in names if not is_taken(name)]


def _linear_names(model: PreTrainedModel, parts: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that the data reach, but for the head."""
    left_out = re.compile(exclusion(parts) or "(?!)")
    head = getattr(model, SCORE) if gives_scores(model) else model.get_output_embeddings()
    linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    return list(dict.fromkeys(_leaf(path) for path in linear if not left_out.fullmatch(path)))


def targets_that_work(model: PreTrainedModel, put: Callable[[PreTrainedModel, list[str]], object], parts: Sequence[str]) -> list[str]:
    """Return the names of a model's linear layers that `put` puts adapters on without an error, each tried on a copy on `meta`."""
    work = []
    for name in _linear_names(model, parts):
        try:
            put(copy.deepcopy(model), [name])
        except ConfigError:
            continue
        work.append(name)
    return work


def adapted_words(base: Mapping[str, Tensor], layers: Mapping[str, Any], settings: PeftConfig, unreached: Collection[str]) -> str:
    """Say how much of a model has adapters, and which of the larger parts that the data reach are not trained.

    `base` has the tensors of the model without adapters by name, `layers` the modules that peft made by path.
    """
    numels = {id(tensor): tensor.numel() for tensor in base.values() if isinstance(tensor, nn.Parameter)}
    total, covered = sum(numels.values()), {id(p) for layer in layers.values() for p in _adapted(layer)}
    share = sum(numels.get(number, 0) for number in covered) / total
    kinds = listed(list(dict.fromkeys(_word(path, layer) for path, layer in layers.items())), 8)
    words = f"on {len(layers)} layers ({kinds}), {share:.1%} of all parameters"
    without: dict[str, int] = {}
    for name, tensor in base.items():
        size = numels.pop(id(tensor), 0)  # a tied one counts once
        if (
            id(tensor) not in covered
            and name not in unreached
            and not any(ends(_parent(name), whole) for whole in settings.modules_to_save)
        ):
            kind = ".".join([part for part in name.removesuffix(".weight").split(".") if not part.isdigit()][-2:])
            without[kind] = without.get(kind, 0) + size
    rest = [
        f"{kind} ({size / total:.1%})" for kind, size in sorted(without.items(), key=lambda item: -item[1]) if size > LEAST_SHARE * total
    ]
    return words + (f"; none on {listed(rest)}" if rest else "")


def _adapted(layer: Any) -> list[Tensor]:
    """Return the parameters of the base that one of peft's layers adapts."""
    base, stack = layer.get_base_layer(), stack_of(layer)
    return list(base.parameters()) if stack is None else [getattr(base, stack)]


def _word(path: str, layer: Any) -> str:
    """Return what an adapted layer is called; a stack with the module that it is in."""
    stack = stack_of(layer)
    return _leaf(path) if stack is None else f"{_leaf(path.replace('.base_layer', ''))}.{stack}"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
