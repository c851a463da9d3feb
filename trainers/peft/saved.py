"""Adapter directories: writing, checking and reopening them, and training on from one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from trainers.config.errors import ConfigError
from trainers.model.blueprint import Blueprint
from trainers.model.export import Sums, rehearse, require_same, write_folder
from trainers.model.safetensors_files import Weights, listed
from trainers.model.saved_form import finite
from trainers.model.weights import is_finite
from trainers.peft.base import FILE, Adaptation, Adapter, VirtualTokens, library


def require_same_adapter(adapter: str, ours: Any) -> None:
    """Raise ConfigError where an adapter to begin with is of another method, base or size than the run's."""
    theirs = library().PeftConfig.from_pretrained(adapter)
    if theirs.peft_type != ours.peft_type:
        wanted, found = (getattr(config.peft_type, "value", config.peft_type) for config in (ours, theirs))
        raise ConfigError("peft.adapter", adapter, f"is {found}, the run {wanted}", "the same peft.method")
    if theirs.base_model_name_or_path != ours.base_model_name_or_path:
        reason = f"belongs to {theirs.base_model_name_or_path}, the run to {ours.base_model_name_or_path}"
        remedy = f"model.id={theirs.base_model_name_or_path}, or correct its adapter_config.json where it is the same base elsewhere"
        raise ConfigError("peft.adapter", adapter, reason, remedy)
    sizes = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "num_virtual_tokens")
    for name in (*sizes, "bottleneck_size", "activation", "scale", "parallel"):
        wanted, found = (getattr(config, name, None) for config in (ours, theirs))
        if wanted != found:
            raise ConfigError("peft.adapter", adapter, f"was made with {name}={found}, the run asks for {wanted}", "give it the same")


class Continued:
    """An Origin whose adapter is another run's, read from its directory; the base comes from the origin below."""

    def __init__(self, adaptation: Adapter | VirtualTokens, folder: Path) -> None:
        """Match the files with what the run's adapter has; raises ConfigError that names what is missing, left over or misshapen."""
        if isinstance(adaptation, VirtualTokens) and len(adaptation.trained) > 1:
            reason = "holds tokens, and not the network that made them, which would be trained further"
            raise ConfigError("peft.adapter", str(folder), reason, "leave it out, or peft=prompt")
        self.origin, self.names_there = adaptation.origin, adaptation.names
        try:
            self.weights = Weights(folder, FILE)
        except ConfigError as error:
            raise ConfigError("peft.adapter", str(folder), error.reason, error.remedy) from error
        stored, expected = self.weights.stored, adaptation.contents()
        wrong = [f"lacks {listed(lost)}"] if (lost := sorted(expected.keys() - stored.keys())) else []
        wrong += [f"holds {listed(more)}, which the run's has not"] if (more := sorted(stored.keys() - expected.keys())) else []
        wrong += [
            f"has {key} as {list(stored[key].shape)}, the run's as {list(tensor.shape)}"
            for key, tensor in expected.items()
            if key in stored and stored[key].shape != tuple(tensor.shape)
        ][:3]
        if wrong:
            raise ConfigError("peft.adapter", str(folder), "; ".join(wrong), "the peft settings that it was made with, on its base")

    def names(self) -> list[str]:
        """Return the names of the origin below."""
        return self.origin.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.origin.shape(name)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return a block of the adapter as it was left, or of the base."""
        if name not in self.names_there:
            return self.origin.read(name, offset, shape)
        block = self.weights.read(self.names_there[name], offset, shape)
        if not is_finite(block):
            raise ConfigError("peft.adapter", str(self.weights.folder), f"{name} holds values that are not finite", "it is unusable")
        return block

    def is_exact_in(self, dtype: torch.dtype) -> bool:
        """An adapter is trained in float32."""
        return dtype == torch.float32 and self.origin.is_exact_in(dtype)


def export_adapter(
    weights: Iterable[tuple[str, Tensor]],
    adaptation: Adaptation,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    write: bool,
    mark: str = "",
    config: PreTrainedConfig | None = None,
) -> Sums:
    """Write a PEFT adapter directory, complete or absent. Every rank drains `weights`; the one with `write` writes.

    `config` is written, too, where the base's own does not say what it becomes with the adapter, such as a classifier.
    """
    configure = partial(_configure, adaptation, tokenizer, config)
    return write_folder(finite(weights), adaptation.contents(), configure, folder, write, file=FILE, mark=mark)


def _configure(adaptation: Adaptation, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None, staging: Path) -> None:
    adaptation.library_config.save_pretrained(str(staging))
    tokenizer.save_pretrained(staging)
    if config is not None:
        config.save_pretrained(staging)


def rehearse_adapter(adaptation: Adaptation, blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Rehearse the export of an adapter; raises ConfigError."""

    def reopened(place: Path) -> None:
        library().PeftConfig.from_pretrained(str(place))
        if blueprint.folder is not None:
            with suppress(OSError):  # there is none, and transformers makes one
                GenerationConfig.from_pretrained(blueprint.folder)  # of the base, which is opened at the end
        require_same(tokenizer, place, blueprint.trust_remote_code)

    configure = partial(_configure, adaptation, tokenizer, blueprint.config if blueprint.scores else None)
    rehearse(adaptation.contents(), configure, reopened, blueprint, folder, FILE)


def reopen_adapter(folder: Path, base: PreTrainedModel) -> PreTrainedModel:
    """Load the adapter onto its base as a user would, with plain peft; raises RuntimeError where a key is missing or left over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened: Any = library().PeftModel.from_pretrained(base, str(folder))
    lost = [str(word.message) for word in said if "missing" in str(word.message) or "unexpected" in str(word.message)]
    if lost:
        raise RuntimeError(f"the export in {folder} is wrong: {lost[0]}")
    opened.eval()
    warnings.filterwarnings("ignore", message="Position ids are not supported")  # said by peft as often as it generates
    if opened.active_peft_config.is_prompt_learning:
        opened.forward = partial(_forward_of_rows, opened, opened.forward)
    return opened  # type: ignore[no-any-return]


def _forward_of_rows(model: Any, forward: Callable[..., Any], logits_to_keep: Any, **inputs: Any) -> Any:
    """Call plain peft, which numbers positions itself and counts virtual tokens among the columns, as a model without is called."""
    in_front = 0 if model.active_peft_config.peft_type == "PREFIX_TUNING" else model.active_peft_config.num_virtual_tokens
    length = inputs["input_ids"].shape[1]
    columns = torch.arange(length) if isinstance(logits_to_keep, int) else logits_to_keep
    del inputs["position_ids"]
    return forward(logits_to_keep=columns + in_front, **inputs)
