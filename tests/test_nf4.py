"""A base in 4 bits: the bytes are torchao's, every rank holds its own, and what is gathered is the whole, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ranks, blueprint_for, save_tiny
from peft_cases import (
    config_for,
    locals_of,
)
from transformers import AutoModelForCausalLM

from trainers.config.checks import validate
from trainers.config.choices import AdapterInit, DataSource, PeftMethod, Precision, Quantisation
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, PeftConfig
from trainers.engines.build import build_engine
from trainers.peft.nf4 import dequantise, packed_shape, quantise, round_trip
from trainers.world import World

TORCHAO = {(32, 32): "7217369127c61ba1", (64, 172): "5aa738bf7117ad41", (512, 1024): "afafa0d4f57e6e0b", (3, 64): "8963e1eb7f7f2ec9"}
"""Begin of the SHA-256 of what torchao 0.18.0 makes of these matrices, `to_nf4(part, 64, group).get_original_weight()` group by group.

torchao itself is not installed with the tests: peft would import it wherever it is found, for seconds and with warnings.
"""


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("shape", TORCHAO)
def test_values_are_torchaos(shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    rounded = round_trip(weight)
    assert hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16] == TORCHAO[shape]
    assert (weight - rounded).pow(2).mean().sqrt() < 0.1 * weight.std()


@pytest.mark.parametrize("shape", [(33, 7), (130, 130), (1, 1), (129, 256)])
def test_any_shape_comes_back(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    back = round_trip(weight)
    assert back.shape == weight.shape
    assert (back - weight).abs().max() < 0.2 * weight.abs().max()


def test_zeros_and_equal_values_are_exact() -> None:
    for value in (0.0, -3.0):
        assert torch.equal(round_trip(torch.full((64, 64), value)), torch.full((64, 64), value))
    part = torch.zeros(2, 64)
    part[1] = 1.0
    assert torch.equal(round_trip(part)[0], part[0])


def test_rows_of_bytes_do_not_depend_on_each_other() -> None:
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    whole = quantise(weight, 256)
    assert whole.shape == packed_shape(weight.numel())
    parts = [quantise(rows, 256) for rows in weight.split(64)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(dequantise(whole, weight.shape, torch.bfloat16), round_trip(weight).bfloat16())


def gathered(world: World, folder: Path, engine_name: str) -> dict[str, Any]:
    """Each packed tensor whole, this rank's bytes of all frozen ones, and the words of the start-up table."""
    engine: Any = build_engine(config_for(folder, "loftq", engine_name, precision=Precision.bf16), world, blueprint_for(folder))
    trained, packed = engine.adaptation.trained, engine.adaptation.packed
    state = locals_of(engine)
    resident = sum(local.nbytes for name, (_, local) in state.items() if name not in trained)
    whole = {}
    for name in packed:
        p = state[name][0]
        if hasattr(p, "ds_id"):
            p.all_gather()
            whole[name] = p.detach().clone().numpy()
            p.partition()
        else:
            whole[name] = p.detach().full_tensor().numpy()
    return {"whole": whole, "resident": resident, "shapes": packed, "report": engine.report()}


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_what_is_gathered_is_the_whole(ranks: Callable[[int], Ranks], tmp_path: Path, engine: str) -> None:
    folder = save_tiny(tmp_path / "model", tied=True, hidden_size=160, intermediate_size=448, num_hidden_layers=2)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    results = ranks(3).call(gathered, folder, engine)
    for name, shape in results[0]["shapes"].items():
        weight = base[name.replace(".base_layer", "")]
        assert tuple(weight.shape) == shape
        for result in results:
            found = dequantise(torch.from_numpy(result["whole"][name]), shape, torch.float32)
            assert torch.equal(found, round_trip(weight)), name
    parameters = sum(base[name].numel() for name in base if name != "lm_head.weight")
    resident = sum(result["resident"] for result in results)
    assert len(results[0]["shapes"]) == 14
    assert resident / parameters <= 0.6
    assert f"{parameters:,}" not in results[0]["report"]["parameters"]  # adapters count, too
    assert "nf4" in results[0]["report"]["frozen weights"]


REFUSED = [
    ({"method": PeftMethod.none, "quantise": Quantisation.nf4}, "peft.quantise", "4 bits cannot hold a small step"),
    ({"method": PeftMethod.freeze, "last_blocks": 1, "quantise": Quantisation.nf4}, "peft.quantise", "4 bits cannot hold"),
    ({"method": PeftMethod.dora, "quantise": Quantisation.nf4}, "peft.quantise", "has no such setting"),
    ({"method": PeftMethod.lora, "init": AdapterInit.loftq}, "peft.init", "the base is not quantised"),
    ({"method": PeftMethod.lora, "init": AdapterInit.pissa, "quantise": Quantisation.nf4}, "peft.init", "would belong to no base"),
]


@pytest.mark.parametrize(("fields", "path", "reason"), REFUSED)
def test_what_cannot_be_is_refused(tiny_llama: Path, fields: dict[str, Any], path: str, reason: str) -> None:
    config = config_for(tiny_llama, "lora")
    config.data = DataConfig(source=DataSource.python_docs, eval_fraction=0.05)
    config.peft = PeftConfig(**fields)
    with pytest.raises(ConfigError, match=reason) as refused:
        validate(config)
    assert refused.value.path == path
