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
from trainers.config.schema import PeftConfig
from trainers.model.safetensors_files import listed

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
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
    wanted = [("targets", name, adaptable, "layer") for name in settings.targets if name != "all-linear"]
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


def targets_that_work(model: PreTrainedModel, put: Callable[[PreTrainedModel, list[str]], object], parts: Sequence[str]) -> list[str]:
    """Return the names of a model's linear layers that `put` puts adapters on without an error, each tried on a copy on `meta`."""
    left_out, head = re.compile(exclusion(parts) or "(?!)"), model.get_output_embeddings()
    linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    names = dict.fromkeys(_leaf(path) for path in linear if not left_out.fullmatch(path))
    work = []
    for name in names:
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
    total, covered = sum(numels.values()), {id(p) for layer in layers.values() for p in layer.get_base_layer().parameters()}
    share = sum(numels.get(number, 0) for number in covered) / total
    words = f"on {len(layers)} layers ({listed(list(dict.fromkeys(map(_leaf, layers))), 8)}), {share:.1%} of all parameters"
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


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
