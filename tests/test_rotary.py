"""A document's rotary embedding is that of its own length, whatever else is in its rows, in its microbatch or came before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import TEXT
from small_rows import rows_of, run_config, spread
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainers.batch import Batch
from trainers.config.choices import Activations
from trainers.config.errors import ConfigError
from trainers.engines.activations import keep_for_backward
from trainers.engines.build import attending, attention_of
from trainers.model.attention import documents_of
from trainers.model.blueprint import Blueprint, find_blocks
from trainers.model.forward import forward
from trainers.model.rotary import by_document, require_short

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 5.0, 9.0]}
LENGTHS: dict[str, dict[str, Any]] = {
    "phi3": TEXT | {"original_max_position_embeddings": 18, "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0} | FACTORS},
    "llama": TEXT | {"max_position_embeddings": 18, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}},
}
"""Documents of more than 18 tokens have other frequencies: each of them its own length's (dynamic), or one set (longrope)."""


def blueprint_of(kind: str, backend: str) -> Blueprint:
    config = AutoConfig.for_model(kind, **LENGTHS[kind])
    blueprint = Blueprint(config=config, folder=None, revision=None, seed=0, trust_remote_code=False)
    return attending(blueprint, attention_of(run_config(backend), blueprint, "cpu"))


def plain_logps(model: PreTrainedModel, kind: str, batch: Batch) -> Tensor:
    """Return what transformers gives of each document alone, by a model that has seen no other."""
    logps = torch.zeros(batch.labels.shape)
    for number in range(batch.num_documents):
        where = batch.documents == number
        fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LENGTHS[kind]), attn_implementation="eager").eval()
        fresh.load_state_dict(model.state_dict())
        ids = batch.input_ids[where]
        all_logps = fresh(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        logps[where.nonzero()[:-1].unbind(1)] = all_logps[:-1].gather(1, ids[1:, None]).squeeze(1)
    return logps


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("backend", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_a_document_is_as_transformers_computes_it_alone(kind: str, backend: str, rows: str) -> None:
    model, batch = spread(blueprint_of(kind, backend).build("cpu").eval()), rows_of(rows)
    with torch.no_grad():
        first, again = forward(model, batch).logps, forward(model, batch).logps
        alone = plain_logps(model, kind, batch)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, again)  # nothing is left of the longest document


@pytest.mark.parametrize("kind", LENGTHS)
def test_a_microbatch_does_not_matter(kind: str) -> None:
    """Rows by themselves and together have one gradient, with blocks that are computed again."""
    batch, gradients = rows_of("packed"), []
    for together in (True, False):
        model = spread(blueprint_of(kind, "varlen").build("cpu").train())
        keep_for_backward(find_blocks(model), Activations.block, pin_memory=False)
        rows = [batch] if together else [one_row(batch, row) for row in range(len(batch.labels))]
        for part in rows:
            forward(model, part).logps.sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([parameter.grad for parameter in model.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_opened_for_evaluation_has_it_too() -> None:
    """Once, whoever opens it: what generates with it has no documents, and is left to transformers."""
    model, batch = blueprint_of("phi3", "eager").build("cpu").eval(), rows_of("padded")
    fresh = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        before = fresh(input_ids=batch.input_ids[:1], use_cache=False).logits
        for _ in range(2):
            by_document(fresh)
        assert torch.equal(forward(fresh, batch).logps, forward(model, batch).logps)
        assert torch.equal(fresh(input_ids=batch.input_ids[:1], use_cache=False).logits, before)


def test_rows_whose_positions_transformers_counts_are_as_alone() -> None:
    """As `tools.logprobs` asks a teacher: a document at the begin of each row, padding after it, and no positions."""
    model = spread(blueprint_of("phi3", "eager").build("cpu").eval())
    rows = rows_of("padded")
    with torch.no_grad():
        with documents_of(rows):
            logits = model(input_ids=rows.input_ids, use_cache=False).logits
        for row, length in enumerate((40, 17, 33)):
            alone = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
            alone.load_state_dict(model.state_dict())
            wanted = alone(input_ids=rows.input_ids[row : row + 1, :length], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, :length], wanted, rtol=1e-4, atol=1e-5)


def one_row(batch: Batch, row: int) -> Batch:
    part = slice(row, row + 1)
    documents = batch.documents[part]
    first = int(documents[documents >= 0].min())
    numbered = (documents - first).where(documents >= 0, documents)
    counts = {"num_rows": 1, "num_tokens": int((documents >= 0).sum()), "num_documents": int(numbered.max()) + 1}
    tensors = {"input_ids": batch.input_ids[part], "labels": batch.labels[part], "position_ids": batch.position_ids[part]}
    return Batch(**tensors, documents=numbered, **counts)


def test_ranks_that_share_rows_refuse_what_they_cannot_tell() -> None:
    for kind in LENGTHS:
        config = blueprint_of(kind, "eager").config
        require_short(config, 18, 2)
        with pytest.raises(ConfigError, match=r"above 18 tokens, and a rank sees a slice of it") as raised:
            require_short(config, 19, 2)
        assert "data.seq_len=18" in str(raised.value)
    require_short(AutoConfig.for_model("llama", **TEXT), 1 << 20, 2)
