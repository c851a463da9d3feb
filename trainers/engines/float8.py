"""train.float8: linear layers of the blocks multiply in float8 while training; weights, gradients, optimizer and export stay as they are.

torchao's Float8Linear casts inputs, weights and gradients with scales that it finds anew each time. Evaluation is in bf16, as the export
will be used: there, one document's values would move the scale of all others in its batch.
Recipes: Micikevicius et al. 2022 (arXiv 2209.05433); rowwise and tensorwise as in torchao's README of float8 training.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trainers.config.choices import Float8
from trainers.config.errors import ConfigError

MULTIPLE = 16
"""What divides each side of a matrix that is multiplied in float8, and the tokens of a microbatch (cuBLAS)."""
OLDEST = (8, 9)
"""Compute capability from which on a GPU multiplies in float8: Ada and Hopper."""
LEFT_OUT = ("gate", "router", "experts")
"""Parts of a path: what chooses experts needs more bits, and of one expert's rows nobody knows the number."""
EMULATED: bool | None = None
"""Whether products are computed on values rounded to float8; None decides by the device. A plan for GPUs sets it."""
WORDS = {Float8.rowwise: "scaled by row", Float8.tensorwise: "scaled by matrix"}


def require_float8(how: Float8) -> None:
    """Raise ConfigError where torchao is not installed, or this machine's GPU has no float8."""
    if how is Float8.none:
        return
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("train.float8", str(how), "torchao is not installed", "pip install 'fulltune[speed]', or train.float8=none")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        name, found = torch.cuda.get_device_name(), "{}.{}".format(*torch.cuda.get_device_capability())
        reason = f"{name} multiplies no float8: it is of SM {found}, and SM {OLDEST[0]}.{OLDEST[1]} or later does"
        raise ConfigError("train.float8", str(how), reason, "train.float8=none")


def convert(model: nn.Module, blocks: Sequence[nn.Module], how: Float8, device: str) -> str:
    """Let the blocks' linear layers multiply in float8, and return how many do, in words. Call it before blocks are compiled or sharded.

    Raises ConfigError where none can.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    emulated = device == "cpu" if EMULATED is None else EMULATED
    settings = Float8LinearConfig.from_recipe_name(str(how))
    object.__setattr__(settings, "emulate", emulated)  # which no recipe does; the class is frozen
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    total = sum(layer.weight.numel() for layer in linears)
    for block in blocks:
        convert_to_float8_training(block, config=settings, module_filter_fn=_fits)
    plain = {id(layer) for layer in linears}
    made = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear) and id(module) not in plain]
    if not made:
        reason = f"no linear layer of the blocks has sides that {MULTIPLE} divides"
        raise ConfigError("train.float8", str(how), reason, "train.float8=none")
    kinds: dict[type, type] = {}
    for layer in made:
        layer.__class__ = kinds.setdefault(type(layer), _in_training_alone(type(layer)))
    share = sum(layer.weight.numel() for layer in made) / total
    words = f"{len(made)} of {len(linears)} linear layers, {share:.0%} of their weights, {WORDS[how]}; bf16 while evaluating"
    return words + (" (emulated on a CPU)" if emulated else "")


def whole_rows(length: int) -> int:
    """Return the next length of a row that a product in float8 may have."""
    return -(-length // MULTIPLE) * MULTIPLE


def _fits(layer: nn.Module, path: str) -> bool:
    if not isinstance(layer, nn.Linear) or set(path.split(".")) & set(LEFT_OUT):
        return False
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _in_training_alone(kind: type) -> type:
    """Return a class of float8 layers that multiply in the compute type while they do not train."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        made: Tensor = kind.forward(self, inputs) if self.training else linear(inputs, self.weight, self.bias)  # type: ignore[attr-defined]
        return made

    return type(kind.__name__, (kind,), {"forward": forward})
