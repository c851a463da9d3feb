"""How far a merged model is from its base with the adapters: the logits of both on a fixed batch, whole and in float32."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tools.merge.adapter import units_of
from tools.merge.combine import LIBRARY_METHODS, METHODS, Merge
from trainers import host
from trainers.model.blueprint import open_config
from trainers.peft.base import ADAPTER

PROBE_ROWS, PROBE_TOKENS = 2, 32
TOLERANCE = 1e-3
"""Largest difference over the largest logit that rounding makes of float32."""


def probe(merge: Merge, contents: dict[str, Tensor], out: Path) -> int:
    """Print how far the merged model is from base and adapter; returns 1 where float32 rounding does not explain it."""
    transformers.utils.logging.disable_progress_bar()
    need, have = sum(tensor.numel() for tensor in contents.values()) * 4 * 5 // 4, host.memory_available()
    if need > have:
        print(f"not compared: the model whole and in float32 needs {need:,} bytes of memory, and {have:,} are free")
        return 0
    try:
        found = compare(out, merge)
    except Exception as error:  # whatever peft, transformers or the model's own code raise
        print(f"error: {out} is written, and could not be compared: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
        return 1
    if found is None:
        print(f"not compared: peft cannot run these adapters with their base as --method {merge.combination.method} combines them")
        return 0
    rounded = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in contents.values() if tensor.is_floating_point()} - {"float32"})
    print(
        f"largest difference of a logit to base and adapter: {found.largest:.2g}, of logits up to {found.scale:.3g};"
        f" the same most likely token at {found.same} of {found.positions} positions"
        f" ({PROBE_ROWS} x {found.positions // PROBE_ROWS} random tokens, computed in float32)"
    )
    if rounded:
        print(f"the merged weights are rounded to {' and '.join(rounded)}, the adapter's own are not: most of the difference is this")
    elif not found.largest <= TOLERANCE * max(found.scale, 1.0):
        print(f"error: {out} is written, and is not the same model: rounding would be below {TOLERANCE * found.scale:.2g}", file=sys.stderr)
        return 1
    return 0


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
        reference = adapted(merge)
    if reference is None:
        return None
    config = merge.blueprint.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    rows = min(config.vocab_size, merge.blueprint.vocab_on_disk or config.vocab_size)
    ids = torch.randint(rows, (PROBE_ROWS, length), generator=torch.Generator().manual_seed(0))
    expected = _logits(reference, ids)
    del reference
    trust = merge.blueprint.trust_remote_code
    got = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust), ids)
    return Difference(
        largest=(got - expected).abs().max().item(),
        scale=expected.abs().max().item(),
        same=int((got.argmax(-1) == expected.argmax(-1)).sum()),
        positions=ids.numel(),
    )


def adapted(merge: Merge) -> PreTrainedModel | None:
    """Return the base whole, float32, with its adapters, as plain peft runs them; None for what it cannot run unmerged."""
    import peft

    method, library = merge.combination.method, merge.combination.method in LIBRARY_METHODS
    together = len(merge.adapters) > 1 or merge.weights != [1.0] or method != METHODS[0]
    stabilised = any(getattr(adapter.begun, "use_rslora", False) for adapter in merge.adapters)
    if "dare" in method or (library and stabilised) or method in METHODS[1:]:
        return None
    if together and any(adapter.beside_plain_lora() for adapter in merge.adapters):
        return None
    assert merge.blueprint.folder is not None
    config = open_config(merge.blueprint.folder, merge.blueprint.trust_remote_code)
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(merge.blueprint.folder), config=config, dtype=torch.float32, trust_remote_code=merge.blueprint.trust_remote_code
    )
    if merge.blueprint.vocab_on_disk is not None:
        model.resize_token_embeddings(merge.blueprint.config.get_text_config().vocab_size, mean_resizing=False)
    names = [f"adapter{number}" for number in range(len(merge.adapters))] if together else [ADAPTER]
    opened: Any = peft.PeftModel.from_pretrained(model, str(merge.adapters[0].files.folder), names[0])
    for name, adapter in zip(names[1:], merge.adapters[1:], strict=True):
        opened.load_adapter(str(adapter.files.folder), name)
    if library:
        opened.add_weighted_adapter(names, merge.weights, "merged", **merge.library_options())
        opened.set_adapter("merged")
    elif together:
        opened.base_model.set_adapter(names)
        for unit in units_of(opened.base_model.model).values():
            for name, weight in zip(names, merge.weights, strict=True):
                if name in unit.scaling:
                    unit.scaling[name] *= weight
    return opened  # type: ignore[no-any-return]


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return logits
