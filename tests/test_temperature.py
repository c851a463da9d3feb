"""Answers are drawn at a temperature, and trained on at the same: generator and trainer use softmax(logits / temperature)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks, save_tiny
from tables import LENGTHS, blueprint_for, config_for, ragged_table
from torch.nn.functional import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainers.batch import IGNORE, Batch, Needs
from trainers.config.choices import EngineName
from trainers.config.schema import EngineConfig
from trainers.engines.build import build_engine
from trainers.generate.decode import decode, stops_of
from trainers.generate.request import Sampling
from trainers.model.forward import forward
from trainers.model.head import Head
from trainers.rl.measured import label_logps
from trainers.rl.sync import temper
from trainers.world import World

TEMPERATURE = 0.6
TINY = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("tokens", [0, 3], ids=["whole", "a few at a time"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_models_numbers_are_those_of_logits_over_the_temperature(kind: str, tokens: int) -> None:
    """Log-probabilities, entropies and gradients, also of logits that a model caps softly; and the model's own once it is over."""
    torch.manual_seed(0)
    more = {"head_dim": 8, "num_key_value_heads": 2, "initializer_range": 0.2} | (
        {"final_logit_softcapping": 3.0} if kind == "gemma2" else {}
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **more)).train()
    ids, labels = torch.randint(3, 33, (2, 9)), torch.randint(3, 33, (2, 9))
    labels[0, 2:5] = IGNORE
    plain = log_softmax(model(input_ids=ids, use_cache=False).logits / TEMPERATURE, -1)
    expected = plain.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(labels != IGNORE, 0.0)
    weights = torch.randn(2, 9)
    wanted = torch.autograd.grad((expected * weights).sum(), [*model.parameters()], retain_graph=True)
    batch, head = Batch.of(ids, labels, torch.arange(9).expand(2, -1)), Head(model, tokens) if tokens else None
    before = forward(model, batch, head=head).logps.detach()
    end = temper(model, TEMPERATURE)
    found = forward(model, batch, Needs(entropy=True), head=head)
    torch.testing.assert_close(found.logps, expected, rtol=1e-5, atol=1e-6)
    entropy = -(plain.exp() * plain).sum(-1).where(labels != IGNORE, 0.0).detach()
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad((found.logps * weights).sum(), [*model.parameters()]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    end()
    assert torch.equal(forward(model, batch, head=head).logps, before)


def tempered(world: World, run_dir: Path, model: Path, engine: EngineConfig) -> np.ndarray:
    run_dir.mkdir(exist_ok=True)
    config = replace(config_for(run_dir, model, steps=3, global_batch=6, microbatch=1), engine=engine)
    built = build_engine(config, world, blueprint_for(model))
    temper(built.model, TEMPERATURE)
    return label_logps(built, ragged_table(LENGTHS), world, 3, 0)


@pytest.mark.parametrize(
    "engine",
    [
        EngineConfig(tensor=2),
        pytest.param(EngineConfig(), marks=pytest.mark.slow),
        pytest.param(EngineConfig(context=2), marks=pytest.mark.slow),
        pytest.param(EngineConfig(name=EngineName.zero3), marks=pytest.mark.slow),
    ],
)
def test_an_engines_numbers_are_too(ranks: Callable[[int], Ranks], tmp_path: Path, engine: EngineConfig) -> None:
    folder, table = save_tiny(tmp_path / "model", tied=True, vocab_size=36), ragged_table(LENGTHS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = []
    for begin, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        ids, kept = torch.from_numpy(table.tokens[begin:end].astype(np.int64)), torch.from_numpy(table.supervised[begin:end][1:] > 0)
        with torch.no_grad():
            logps = log_softmax(model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE, -1)
        plain += logps.gather(-1, ids[1:, None])[kept, 0].tolist()
    for found in ranks(2).call(tempered, tmp_path / "run", folder, engine):
        np.testing.assert_allclose(found, plain, atol=1e-5)


def test_a_generators_numbers_are_of_what_it_draws_from(base: Path) -> None:
    """And its draws are the same as of a generator that gives the model's own."""
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    stops, prompts = stops_of(model, AutoTokenizer.from_pretrained(base)), {number: [1, 6 + number] for number in range(5)}
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=7, tempered=True)
    found = dict(decode(model, prompts, 3, sampling, stops, 0, {number: number for number in prompts}))
    own = dict(decode(model, prompts, 3, replace(sampling, tempered=False), stops, 0, {number: number for number in prompts}))
    for key, answer in found.items():
        assert answer.ids == own[key].ids
        with torch.no_grad():
            logits = model(torch.tensor([prompts[key] + answer.ids])).logits[0, len(prompts[key]) - 1 : -1]
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert answer.logps == pytest.approx(logps.tolist(), abs=1e-5)
