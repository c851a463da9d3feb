"""Log-probabilities equal plain cross-entropy, what is masked contributes exactly nothing, and no field of a batch is forgotten."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, BartForCausalLM

from trainers.batch import IGNORE, NO_DOCUMENT, Batch, Needs, Sizes, by_document
from trainers.model.forward import forward, takes_positions
from trainers.model.head import Head
from trainers.objectives import NextToken


def make_batch(labels: torch.Tensor, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 33, labels.shape, generator=generator)
    positions = torch.arange(labels.shape[1]).expand(labels.shape)
    return Batch.of(ids, labels, positions)


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
            loss = NextToken()(forward(model, batch), batch).total
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
    loss = NextToken()(forward(model, batch), batch)
    assert NextToken().targets(Sizes(rows=2, tokens=18)) == 0
    assert loss.total.item() == 0.0
    loss.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_labels_decide_where_logps_stand(tiny_llama: Path) -> None:
    labels = torch.full((2, 9), IGNORE)
    labels[0, 4], labels[1, 6] = 5, 8
    batch = make_batch(labels)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    logps = forward(model, batch).logps.detach()
    whole = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.log_softmax(-1)
    assert (logps != 0).nonzero().tolist() == [[0, 4], [1, 6]]
    torch.testing.assert_close(logps[0, 4], whole[0, 4, 5].detach())
    torch.testing.assert_close(logps[1, 6], whole[1, 6, 8].detach())


def test_large_vocabulary_is_reduced_in_chunks() -> None:
    from trainers.model.forward import _chunk_rows, label_logps

    logits = torch.randn(40, 300_000, requires_grad=True)
    assert _chunk_rows(logits) < 40
    labels = torch.randint(0, 300_000, (40,))
    label_logps(logits.clone(), labels).sum().backward()
    mine, logits.grad = logits.grad, None
    logits.log_softmax(-1).gather(-1, labels[:, None]).sum().backward()
    torch.testing.assert_close(mine, logits.grad, rtol=1e-4, atol=1e-6)


def test_flash_attention_gets_its_documents_in_one_row(tiny_llama: Path) -> None:
    """transformers keeps packed documents apart under flash attention in a single row only; one row gives the same figures."""
    labels = torch.randint(0, 33, (3, 17), generator=torch.Generator().manual_seed(1))
    labels[1] = IGNORE
    batch, model = make_batch(labels), AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        apart = forward(model, batch).logps
        together = forward(model, batch.in_one_row()).logps.view(labels.shape)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    seen = []
    model.config._attn_implementation = "flash_attention_2"
    model.forward = lambda **inputs: seen.append(tuple(inputs["input_ids"].shape)) or (_ for _ in ()).throw(StopIteration)
    with pytest.raises((StopIteration, RuntimeError)):
        forward(model, batch)
    assert seen == [(1, 51)]


def test_what_wraps_a_model_does_not_hide_that_it_takes_positions(tiny_llama: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *inputs: object, **more: object) -> object:
            return self.inner(*inputs, **more)

    small_bart = BartConfig(d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, vocab_size=33)
    assert takes_positions(Wrapper(AutoModelForCausalLM.from_pretrained(tiny_llama)))
    assert not takes_positions(Wrapper(BartForCausalLM(small_bart)))


@pytest.mark.parametrize("masked", [False, True])
def test_entropy_is_that_of_the_whole_distribution(tiny_llama: Path, masked: bool) -> None:
    labels = torch.randint(0, 33, (3, 17), generator=torch.Generator().manual_seed(1))
    if masked:
        labels[0, :4], labels[:, 9:] = IGNORE, IGNORE
    batch, model = make_batch(labels), AutoModelForCausalLM.from_pretrained(tiny_llama)
    output = forward(model, batch, Needs(entropy=True))
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    expected = torch.distributions.Categorical(logits=logits).entropy().where(labels != IGNORE, 0.0)
    torch.testing.assert_close(output.entropy, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not output.entropy.requires_grad
    assert torch.equal(output.logps, forward(model, batch).logps)
    assert forward(model, batch).entropy is None


def packed_batch() -> Batch:
    """Two rows: documents of 3 and 2 tokens and one of padding; one of 4 and two of padding."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, -1, -1]])
    labels = torch.tensor([[IGNORE, 5, IGNORE, 6, IGNORE, IGNORE], [7, 8, 9, IGNORE, IGNORE, IGNORE]])
    signals = {"of_document": torch.tensor([1.0, 2.0, 3.0]), "of_token": torch.arange(12.0).view(2, 6)}
    counts = {"num_rows": 2, "num_tokens": 9, "num_documents": 3}
    return Batch(
        input_ids=torch.ones_like(positions), labels=labels, position_ids=positions, documents=documents, signals=signals, **counts
    )


def test_sums_by_document_count_labels_alone() -> None:
    values = torch.arange(12.0).view(2, 6).requires_grad_()
    sums = by_document(values, packed_batch())
    assert sums.tolist() == [1.0, 3.0, 6.0 + 7.0 + 8.0]
    sums.sum().backward()
    assert values.grad.flatten().tolist() == [0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0]


def test_map_reaches_every_tensor_of_a_batch() -> None:
    batch = packed_batch()
    doubled = batch.map(lambda tensor: tensor * 2)
    for item in dataclasses.fields(Batch):
        before, after = getattr(batch, item.name), getattr(doubled, item.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(after, before * 2), item.name
        elif isinstance(before, dict):
            assert all(torch.equal(after[name], before[name] * 2) for name in before)
        else:
            assert after == before, item.name


def test_rows_in_one_row_keep_their_documents_and_signals() -> None:
    row = packed_batch().in_one_row()
    assert row.documents.tolist() == [[0, 0, 0, 1, 1, -1, 2, 2, 2, 2, -1, -1]]
    assert row.signals["of_token"].shape == (1, 12)
    assert row.signals["of_document"].tolist() == [1.0, 2.0, 3.0]
    assert row.columns.tolist() == [1, 3, 6, 7, 8]
    assert by_document(torch.arange(12.0)[None], row).tolist() == [1.0, 3.0, 21.0]


def test_segments_are_the_documents_and_paddings_of_the_rows() -> None:
    batch = packed_batch()
    assert batch.segments == (3, 2, -1, 4, -2)
    assert batch.starts.tolist() == [0, 3, 5, 6, 10, 12]
    assert batch.longest == 4
    assert (batch.in_one_row().segments, batch.in_one_row().starts.tolist()) == (batch.segments, batch.starts.tolist())
    padded = torch.full((1, 150), -1)
    padded[0, :10] = 0
    one = Batch(input_ids=padded, labels=padded, position_ids=padded, documents=padded, num_rows=1, num_tokens=10, num_documents=1)
    assert (one.segments, one.segments_kept, one.starts.tolist(), one.longest) == ((10, -140), (10, -6), [0, 10, 16], 10)
    every = dataclasses.replace(one, kept=torch.arange(150), starts=one.starts[:0])
    assert (every.starts.tolist(), every.longest) == ([0, 10, 74, 138, 150], 64)


def test_one_row_leaves_padding_out() -> None:
    """What is computed are documents and the first padding up to a multiple of 16; numbers of it go back to their places."""
    documents = torch.full((3, 24), NO_DOCUMENT)
    documents[0, :13], documents[1, :20], documents[1, 20:] = 0, 1, 2
    positions = torch.arange(24).repeat(3, 1)
    ids = torch.arange(72).view(3, 24)
    labels = ids.where((documents == 1) & (ids > 30), IGNORE)
    signals = {"of_token": ids.float(), "of_document": torch.tensor([1.0, 2.0, 3.0])}
    batch = Batch(
        input_ids=ids, labels=labels, position_ids=positions, documents=documents, signals=signals,
        num_rows=3, num_tokens=37, num_documents=3,
    )  # fmt: skip
    row = batch.in_one_row()
    expected = [*range(13), *range(24, 48), *range(13, 24)]
    assert row.input_ids.tolist() == [expected]
    assert row.signals["of_token"].tolist() == [expected]
    assert row.signals["of_document"].tolist() == [1.0, 2.0, 3.0]
    assert row.segments == (13, 20, 4, -11)
    assert row.starts.tolist() == [0, 13, 33, 37, 48]
    assert row.columns.tolist() == [20 + number for number in range(13)]
    assert row.sizes() == batch.sizes()
    assert batch.out_of_one_row(row.input_ids).tolist() == ids.where(torch.isin(ids, torch.tensor(expected)), 0).tolist()
    again = row.in_one_row()
    assert torch.equal(again.input_ids, row.input_ids)
    none = torch.empty(0, dtype=torch.int64)
    padding = dataclasses.replace(
        batch, documents=torch.full_like(documents, NO_DOCUMENT), segments=(-72,), columns=none, kept=none, labelled=none, starts=none
    )
    assert padding.in_one_row().input_ids.tolist() == [list(range(16))]


@pytest.mark.parametrize("head", [None, 5])
def test_a_step_without_padding_is_one_with_it(tiny_llama: Path, head: int | None) -> None:
    documents = torch.tensor([0] * 9 + [NO_DOCUMENT] * 22 + [1] * 31 + [NO_DOCUMENT] * 31).view(3, 31)
    ids = torch.randint(0, 33, (3, 31), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(31).expand(3, 31)
    labels = ids.roll(-1, 1).where((documents != NO_DOCUMENT) & (positions % 3 > 0), IGNORE)
    batch = Batch(input_ids=ids, labels=labels, position_ids=positions, documents=documents, num_rows=2, num_tokens=40, num_documents=2)
    found = {}
    for backend in ("varlen", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=backend)
        seen = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape[:2])))
        output = forward(model, batch, Needs(entropy=True), head=head and Head(model, head))
        (output.logps * torch.arange(1, 32)).sum().backward()
        found[backend] = [output.logps.detach(), output.entropy, *(p.grad for p in model.parameters())]
        assert seen == [(1, 48) if backend == "varlen" else (3, 31)]
    for ours, theirs in zip(found["varlen"], found["sdpa"], strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
