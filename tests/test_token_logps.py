"""Token log-probabilities equal plain cross-entropy, and what is masked contributes exactly nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE, Batch, token_logps
from trainers.objectives import NextToken


def make_batch(labels: torch.Tensor, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 33, labels.shape, generator=generator)
    positions = torch.arange(labels.shape[1]).expand(labels.shape)
    return Batch(input_ids=ids, labels=labels, position_ids=positions, num_rows=len(labels), num_tokens=labels.numel())


@pytest.mark.parametrize("masked", ["none", "prompt", "ragged", "all but one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_equal_cross_entropy(tiny_llama: Path, masked: str, dtype: torch.dtype) -> None:
    labels = torch.randint(0, 33, (3, 17), generator=torch.Generator().manual_seed(1))
    if masked == "prompt":
        labels[:, :9] = IGNORE
    elif masked == "ragged":
        labels[0, :4], labels[1, 3:], labels[2] = IGNORE, IGNORE, IGNORE
    elif masked == "all but one":
        labels[:] = IGNORE
        labels[1, 5] = 7
    batch = make_batch(labels)
    results = []
    for ours in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
        if ours:
            loss = NextToken()(token_logps(model, batch), batch).total
        else:
            logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    assert abs(results[0][0] - results[1][0]) <= bound * abs(results[1][0])
    for mine, reference in zip(results[0][1], results[1][1], strict=True):
        assert (mine - reference).norm() <= bound * reference.norm()


def test_all_masked_batch_is_exactly_zero_with_a_graph(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    batch = make_batch(torch.full((2, 9), IGNORE))
    logps = token_logps(model, batch)
    loss = NextToken()(logps, batch)
    assert NextToken().weight(batch) == 0
    assert loss.total.item() == 0.0
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_labels_decide_where_logps_stand(tiny_llama: Path) -> None:
    labels = torch.full((2, 9), IGNORE)
    labels[0, 4], labels[1, 6] = 5, 8
    batch = make_batch(labels)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    logps = token_logps(model, batch).detach()
    whole = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.log_softmax(-1)
    assert (logps != 0).nonzero().tolist() == [[0, 4], [1, 6]]
    torch.testing.assert_close(logps[0, 4], whole[0, 4, 5].detach())
    torch.testing.assert_close(logps[1, 6], whole[1, 6, 8].detach())


def test_large_vocabulary_is_reduced_in_chunks() -> None:
    from trainers.batch import _chunk_rows, _LabelLogps

    logits = torch.randn(40, 300_000, requires_grad=True)
    assert _chunk_rows(logits) < 40
    labels = torch.randint(0, 300_000, (40,))
    _LabelLogps.apply(logits.clone(), labels).sum().backward()
    mine, logits.grad = logits.grad, None
    logits.log_softmax(-1).gather(-1, labels[:, None]).sum().backward()
    torch.testing.assert_close(mine, logits.grad, rtol=1e-4, atol=1e-6)


def test_flash_attention_gets_its_documents_in_one_row(tiny_llama: Path) -> None:
    """transformers keeps packed documents apart under flash attention in a single row only; one row gives the same figures."""
    labels = torch.randint(0, 33, (3, 17), generator=torch.Generator().manual_seed(1))
    labels[1] = IGNORE
    batch, model = make_batch(labels), AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        apart = token_logps(model, batch)
        together = token_logps(model, batch.in_one_row()).view(labels.shape)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    seen = []
    model.config._attn_implementation = "flash_attention_2"
    model.forward = lambda **inputs: seen.append(tuple(inputs["input_ids"].shape)) or (_ for _ in ()).throw(StopIteration)
    with pytest.raises((StopIteration, RuntimeError)):
        token_logps(model, batch)
    assert seen == [(1, 51)]
