"""Packing is refused where documents of a row see each other, also with random weights, which hardly let tokens see anything."""

from __future__ import annotations

import pytest
import torch
from small_models import small
from torch import Tensor

from trainers.batch import Batch
from trainers.config.errors import ConfigError
from trainers.health.isolation import require_isolation
from trainers.model.forward import forward

APART = ["gpt_neox", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3", "gemma3", "jamba", "falcon_h1", "mamba", "qwen3_next", "bloom"]
LEAKY = ["rwkv"]
"""A state that runs on from one document into the next, in a layer without a convolution by which we would know it."""


def ask(kind: str, dtype: torch.dtype, scale: float = 1.0, rounds: bool = False, noise: float = 0.0) -> None:
    model = small(kind).build("cpu").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    generator = torch.Generator().manual_seed(0)

    def logps_of(batch: Batch) -> Tensor:
        logps = forward(model, batch).logps
        return logps + noise * torch.randn(logps.shape, generator=generator)

    require_isolation(logps_of, 33, 2, rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", APART)
def test_documents_that_are_apart_may_be_packed(kind: str, dtype: torch.dtype) -> None:
    ask(kind, dtype)
    ask(kind, dtype, scale=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LEAKY)
def test_documents_that_see_each_other_are_not_packed_whatever_the_weights(kind: str, dtype: torch.dtype) -> None:
    for scale in (1.0, 4.0):
        with pytest.raises(ConfigError, match="see each other") as refused:
            ask(kind, dtype, scale)
        assert refused.value.remedy == "data.packing=false"


def test_noise_of_a_device_is_not_taken_for_a_leak() -> None:
    """Kernels that add in another order each time move every value, and not more where the neighbour changes."""
    ask("qwen3", torch.float32, noise=1e-4)
    with pytest.raises(ConfigError, match="see each other"):
        ask("rwkv", torch.float32, noise=1e-4)
