"""More ranks share rows than a model has heads: groups gather keys and values, and the steps stay those of one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from meshed import EARLY, LATE, compare, compare_continued, needle_of, train
from small_models import small
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tools.bench.plan import CASES as CASES_OF_PLAN
from tools.bench.plan import measure, predict
from trainers.config.choices import Activations, Attention, ObjectiveName, OptimizerName
from trainers.config.schema import ObjectiveConfig
from trainers.model import attention, queries
from trainers.model.blueprint import Blueprint
from trainers.model.queries import after, pieces_of, spans_of, zigzag
from trainers.world import World


def of_heads(kind: str, heads: int, kv_heads: int) -> Blueprint:
    """A small model with so many heads."""
    model = small(kind)
    model.config.num_attention_heads, model.config.num_key_value_heads = heads, kv_heads
    model.config.vocab_size = 36  # divides over two ranks that split layers, too
    return model


def test_each_token_is_in_one_span_and_each_group_has_as_much_to_do() -> None:
    assert zigzag(3) == [0, 5, 1, 4, 2, 3]
    assert spans_of(48, 2, 0, 24) == ((0, 12), (36, 48))
    assert spans_of(48, 2, 24, 48) == ((12, 36),), "neighbours are one"
    assert spans_of(48, 4, 12, 24) == ((6, 12), (36, 42))
    for groups, ranks in ((2, 4), (3, 6), (3, 9), (4, 4), (5, 10)):
        length = 2 * groups * ranks
        spans = [spans_of(length, groups, rank * length // ranks, (rank + 1) * length // ranks) for rank in range(ranks)]
        tokens = [[token for span in own for token in range(*span)] for own in spans]
        assert sorted(chain(*tokens)) == list(range(length))
        together = [tokens[first : first + ranks // groups] for first in range(0, ranks, ranks // groups)]
        assert len({sum(chain(*own)) for own in together}) == 1, "a token sees as many as are before it"


def masked(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    behind = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None] - torch.arange(key.shape[2])
    return scaled_dot_product_attention(query, key, value, (behind >= 0)[None, None], scale=scaling)


@pytest.mark.parametrize(("own", "before", "width"), [(5, 7, 8), (1, 3, 8), (40, 1, 8), (6, 9, 4)])
def test_attention_to_earlier_tokens_is_that_of_one_mask(own: int, before: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, own, 8), (2, 3, own + before, 8), (2, 3, own + before, width))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    found, wanted = (attend(*inputs, 0.3) for attend in (after, masked))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for mine, one in zip(*(torch.autograd.grad((output * weights).sum(), inputs) for output in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-12)


def by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's varlen_attn computes, sequence by sequence: the last query and the last key of each are of one token."""
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)
    outputs = []
    for (first, last), (begin, end) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert last - first <= max_q
        assert end - begin <= max_k
        own = (tensor.transpose(0, 1)[None] for tensor in (query[first:last], key[begin:end], value[begin:end]))
        behind = torch.arange(end - begin - (last - first), end - begin)[:, None] - torch.arange(end - begin)
        seen = (behind >= 0) & (behind <= (window_size[0] if window_size[0] >= 0 else end))
        outputs.append(scaled_dot_product_attention(*own, seen[None, None], scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("segments", [(96,), (30, 2, 40, -24), (-96,), (5, 7, 70, 14), (24, 24, 24, 24)])
def test_the_gpu_kernel_gets_what_the_cpu_computes(monkeypatch: pytest.MonkeyPatch, segments: tuple[int, ...], window: int | None) -> None:
    """With a reference in the kernel's place: a GPU has its own test below."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_kernel)
    monkeypatch.setattr(queries, "kernel_options", lambda: frozenset({"enable_gqa", "window_size"}))
    both(segments, window, torch.device("cpu"), torch.float32, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: would compare torch's kernel in bf16 with float32 on the CPU")
def test_a_gpu_computes_what_the_cpu_does() -> None:
    for segments in ((96,), (30, 2, 40, -24), (5, 7, 70, 14)):
        for window in (None, 7):
            both(segments, window, torch.device("cuda"), torch.bfloat16, 2e-2)


def both(segments: tuple[int, ...], window: int | None, device: torch.device, compute: torch.dtype, most: float) -> None:
    """Hold the kernel's outputs of documents next to those of the CPU, for each of two and three groups."""
    generator = torch.Generator().manual_seed(1)
    packed = attention.Packed(segments, torch.empty(0), max(segments), torch.empty(0), window)
    key, value = (torch.randn((1, 1, 96, 16), generator=generator) for _ in range(2))
    for groups in (2, 3):
        for group in range(groups):
            spans = spans_of(96, groups, group * 96 // groups, (group + 1) * 96 // groups)
            query = torch.randn((1, 2, 96 // groups, 16), generator=generator)
            module: Any = type("Module", (torch.nn.Module,), {"num_key_value_groups": 2})()
            wanted = queries._piece_by_piece(module, query, key, value, packed, spans, 0.0, 0.2)
            found = queries._with_kernel(*(x.to(device, compute) for x in (query, key, value)), packed, spans, 0.2).cpu().float()
            kinds = [[is_padding] * (end - first) for span in spans for _, first, end, is_padding in pieces_of(segments, *span)]
            is_document = ~torch.tensor([*chain(*kinds)])
            torch.testing.assert_close(found[:, is_document], wanted[:, is_document], rtol=0, atol=most)


DPO = {"objective": ObjectiveConfig(name=ObjectiveName.dpo, beta=0.5)}
CASES: list[Any] = [
    (("llama", 2, 1), 4, {"context": 4}, {}),
    (("llama", 1, 1), 4, {"context": 4}, DPO),
    (("llama", 2, 2), 4, {"context": 4}, {"attention": Attention.sdpa, "train": {"microbatch": 2}}),
    (("gemma3_text", 2, 1), 4, {"context": 4}, {"train": {"activations": Activations.selective}}),
    (("gemma3_text", 2, 1), 4, {"context": 4}, {"attention": Attention.eager}),
    (("deepseek_v3", 4, 4), 3, {"context": 3}, {"train": {"global_batch": 3, "activations": Activations.block, "logits_chunk": 7}}),
]
MORE: list[Any] = [
    (("llama", 2, 2), 4, {"context": 2, "tensor": 2}, {}),
    (("qwen3_moe", 2, 1), 4, {"context": 4}, {"train": {"balance_loss": 1.0}}),
    (("llama", 2, 1), 8, {"context": 4, "replicate": 2}, {}),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:]]
SLOW += [pytest.param(*case, marks=pytest.mark.soak) for case in MORE]


@pytest.mark.parametrize(("model", "size", "engine", "settings"), [CASES[0], *SLOW])
def test_ranks_beyond_the_heads_equal_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, model: tuple[str, int, int], size: int, engine: dict[str, Any], settings: dict[str, Any]
) -> None:
    (whole,) = ranks(1).call(train, tmp_path / "whole", of_heads(*model), {}, dict(settings))
    for split in ranks(size).call(train, tmp_path / "split", of_heads(*model), engine, dict(settings)):
        compare(split, whole)


@pytest.mark.slow
def test_a_checkpoint_continues_beyond_the_heads(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Saved by 4 ranks with 2 heads, continued by these, by 2, and the other way round."""
    meshes: dict[str, tuple[int, dict[str, Any]]] = {"beyond": (4, {"context": 4}), "within": (2, {"context": 2})}
    continued = {"beyond": ("within",), "within": ("beyond",)}
    compare_continued(ranks, tmp_path, of_heads("llama", 2, 1), {"optim": OptimizerName.adamw}, meshes, continued)


def needle(world: World, run_dir: Path, engine: dict[str, Any], backend: Attention) -> np.ndarray[Any, Any]:
    """Return the needle's gradient in the places of this rank's tokens in the whole row, (S, H)."""
    own = needle_of(world, run_dir, of_heads("qwen3", 2, 1), engine, backend)
    whole = np.zeros((48, own.shape[-1]), np.float32)
    spans = spans_of(48, 2, world.rank * 12, world.rank * 12 + 12) if engine else ((0, 48),)
    whole[[token for span in spans for token in range(*span)]] = own
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("backend", [Attention.varlen, Attention.eager])
def test_a_late_token_looks_at_an_early_one_of_another_group_and_at_no_other_document(
    ranks: Callable[[int], Ranks], tmp_path: Path, backend: Attention
) -> None:
    """Token 27 is in the third slice, 24 to 35 of the second group; token 3 in the first slice, of the first group."""
    (whole,) = ranks(1).call(needle, tmp_path, {}, backend)
    split = np.sum(ranks(4).call(needle, tmp_path, {"context": 4}, backend), axis=0)
    np.testing.assert_allclose(split, whole, rtol=0, atol=1e-6 * np.abs(whole).max())
    assert np.abs(whole[EARLY]).max() > 1e-4 * np.abs(whole).max()
    assert not split[LATE + 1 :].any()


@pytest.mark.slow
def test_the_plan_has_the_bytes_of_real_runs() -> None:
    cases = [case for case in CASES_OF_PLAN if case.size == "pair"]
    assert len(cases) == 2
    for case, found in zip(cases, measure(4, cases), strict=True):
        planned = predict(case)
        assert planned["state"] == found["state"], case.name
        assert planned["peak"] == pytest.approx(found["peak"], rel=0.05), case.name
