"""Bottleneck adapters as a method of the peft library: importing this file registers it. It needs torch, transformers and peft alone.

    import bottleneck_adapter
    model = peft.PeftModel.from_pretrained(base, "the directory that this file is in")

An adapter is scale x up(activation(down(x))), added to the output of a module. Serial ones read that output (Houlsby et al., arXiv
1902.00751; Pfeiffer et al., arXiv 2005.00247), parallel ones the module's input (He et al., arXiv 2110.04366). `up` begins at zero.

`peft.utils.register_peft_method` accepts only names in peft's own enum, so that the three tables that it fills are filled here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

NAME, PREFIX = "BOTTLENECK", "bottleneck_"
ACTIVATIONS: dict[str, Any] = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh}


class Unsuitable(TypeError):
    """A module that no bottleneck adapter can be put on."""


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """The settings of bottleneck adapters; names are peft's where it has them."""

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    bottleneck_size: int = 64
    """Features between `down` and `up`."""
    activation: str = "relu"
    scale: float = 1.0
    parallel: bool = False
    """Read the input of a module instead of its output."""
    hidden_size: int | None = None
    """Features of a module that is neither nn.Linear nor Conv1D, such as a whole feed-forward."""

    def __post_init__(self) -> None:
        """Take lists as sets, as peft's own configs do; raises ValueError for an activation that is not known."""
        super().__post_init__()
        self.peft_type = NAME  # type: ignore[assignment]  # peft's enum is closed
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not known: it may be {', '.join(ACTIVATIONS)}")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(given := getattr(self, name), list):
                setattr(self, name, set(given))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and this file next to it: what registers the method where the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        copy = Path(save_directory) / Path(__file__).name
        if not (copy.exists() and copy.samefile(__file__)):
            shutil.copyfile(__file__, copy)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module with bottleneck adapters."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, hidden_size: int | None) -> None:
        """Wrap a module, without an adapter yet; raises Unsuitable where its sizes are not known."""
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters, self._active_adapter = False, adapter_name
        if isinstance(base_layer, nn.Linear):
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        elif isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = base_layer.weight.shape
        elif hidden_size is not None and not isinstance(base_layer, nn.Embedding):
            self.in_features = self.out_features = hidden_size
        else:
            raise Unsuitable(f"no bottleneck adapter is put on {type(base_layer).__name__}")

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter: `down` as nn.Linear begins, `up` zero."""
        self.configs[adapter_name] = config
        down = nn.Linear(self.in_features if config.parallel else self.out_features, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, self.out_features)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        tuner: Any = self  # what peft's layers have
        first = next(self.base_layer.parameters())
        if not first.is_meta:
            tuner._move_adapter_to_device_of_base_layer(adapter_name, first.device)
        tuner.set_adapter(tuner.active_adapters, inference_mode=config.inference_mode)

    def merge(self, *_: Any, **__: Any) -> None:
        """Raise NotImplementedError."""
        raise NotImplementedError("a bottleneck adapter has an activation between two matrices: no weight of the base does the same")

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the module's output with what the active adapters add, one after another; raises Unsuitable for sizes that differ."""
        tuner: Any = self
        out = self.base_layer(*args, **kwargs)
        if tuner.disable_adapters:
            return out  # type: ignore[no-any-return]
        for name in tuner.active_adapters:
            if name in self.bottleneck_down:
                config, down, up = self.configs[name], tuner.bottleneck_down[name], tuner.bottleneck_up[name]
                x = (args[0] if args else None) if config.parallel else out
                for tensor, size in ((x, down.in_features), (out, self.out_features)):
                    if not isinstance(tensor, Tensor) or tensor.shape[-1] != size:
                        found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                        raise Unsuitable(f"{type(self.base_layer).__name__} takes or returns {found}, and not a tensor of {size} features")
                inner = ACTIVATIONS[config.activation](down(tuner._cast_input_dtype(x, down.weight.dtype)))
                out = out + (up(inner) * config.scale).to(out.dtype)
        return out  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """Return what peft's layers are called in a printed model."""
        return f"bottleneck.{super().__repr__()}"


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model with bottleneck adapters."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  # peft's name for a method's own choice: there is none

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config.hidden_size)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


if NAME not in PEFT_TYPE_TO_CONFIG_MAPPING:
    PEFT_TYPE_TO_CONFIG_MAPPING[NAME] = BottleneckConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[NAME] = BottleneckModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[NAME] = PREFIX  # type: ignore[index]
