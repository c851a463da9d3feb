"""Every attention backend gives the same losses and gradients, keeps documents apart to the bit, and is right or refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ranks
from small_models import small
from small_rows import ROWS, rows_of, run_config, spread
from torch import Tensor
from transformers import PreTrainedModel

from trainers.batch import IGNORE, NO_DOCUMENT, Batch
from trainers.config.choices import Activations, Attention
from trainers.config.errors import ConfigError
from trainers.engines.activations import keep_for_backward
from trainers.engines.build import attending, attention_of, build_engine
from trainers.model import attention
from trainers.model.backends import Surroundings, choose, stand_in
from trainers.model.blueprint import Blueprint, find_blocks, model_class
from trainers.model.forward import forward
from trainers.objectives import NextToken
from trainers.step import take_step
from trainers.world import World

KINDS = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "qwen3_5_text", "nemotron_h"]


def test_each_thread_has_documents_of_its_own_and_autograd_those_of_the_last_forward() -> None:
    """A reward model may score in another thread meanwhile."""
    found: list[attention.Packed | None] = []

    def elsewhere(grads: bool) -> None:
        with torch.set_grad_enabled(grads):
            found.append(attention.documents_now(160))

    with attention.documents_of(rows_of("packed")):
        for grads in (False, True):
            thread = threading.Thread(target=elsewhere, args=(grads,))
            thread.start()
            thread.join(20)
        here = attention.documents_now(160)
    assert here is not None
    assert found == [None, here]


def chosen(kind: str, backend: str = "auto") -> Blueprint:
    """Return a small model with the backend that a run would take."""
    blueprint = small(kind)
    return attending(blueprint, attention_of(run_config(backend), blueprint, "cpu"))


def alone(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the log-probabilities where each document has a row of its own, in their places."""
    logps = torch.zeros(batch.labels.shape)
    for number in range(batch.num_documents):
        where = batch.documents == number
        row = Batch.of(*(getattr(batch, name)[where][None] for name in ("input_ids", "labels", "position_ids")))
        logps[where] = forward(model, row).logps[0]
    return logps


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_are_as_alone(kind: str, rows: str) -> None:
    """Also windows shorter than documents, softcapping, sinks, and states that would run on into the next document."""
    model, batch = spread(chosen(kind).build("cpu").eval()), rows_of(rows)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, batch).logps, alone(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_neighbour_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model, batch = spread(chosen(kind).build("cpu").eval()).to(dtype), rows_of("packed")
    others = batch.input_ids.where(batch.documents == 1, rows_of("packed", seed=1).input_ids)
    with torch.no_grad():
        one, other = (forward(model, replace(batch, input_ids=ids)).logps for ids in (batch.input_ids, others))
    assert torch.equal(one[batch.documents == 1], other[batch.documents == 1])
    assert not torch.equal(one, other)


def gradients(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = NextToken()(forward(model.train(), batch), batch).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "deepseek_v3"])
def test_gradients_equal_those_of_written_out_attention(kind: str, rows: str) -> None:
    """Fewer heads of keys than of queries, windows, and values of another width than queries."""
    batch = rows_of(rows)
    (loss, grads), (expected, theirs) = (gradients(small(kind, name).build("cpu"), batch) for name in ("varlen", "eager"))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    for name, gradient in theirs.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_5_text"])
@pytest.mark.parametrize("kept", [Activations.block, Activations.selective])
def test_blocks_computed_again_know_their_documents(kind: str, kept: Activations) -> None:
    batch, models = rows_of("packed"), [chosen(kind).build("cpu") for _ in range(2)]
    keep_for_backward(find_blocks(models[1]), kept, pin_memory=False)
    (loss, grads), (expected, theirs) = (gradients(model, batch) for model in models)
    assert torch.equal(loss, expected)
    assert all(torch.equal(grads[name], gradient) for name, gradient in theirs.items())


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_5_text", "nemotron_h"])
def test_rows_of_padding_alone_have_a_graph(kind: str) -> None:
    """A rank that has no row left reduces the gradients of the same parameters as the others; here all are 0."""
    batch = rows_of("padded")
    grads = [gradients(chosen(kind).build("cpu"), rows)[1] for rows in (batch, one_row(batch, 3))]
    assert grads[0].keys() == grads[1].keys()
    assert not any(gradient.any() for gradient in grads[1].values())


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("a mask of all tokens was made")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    forward(small("gemma3_text", "varlen").build("cpu"), rows_of("packed"))
    with pytest.raises(AssertionError, match="a mask of all tokens"):  # without documents, as in generate
        small("qwen3", "varlen").build("cpu")(input_ids=rows_of("packed").input_ids)


def test_generation_needs_no_documents() -> None:
    prompt = rows_of("packed").input_ids[:2, :9]
    ours, theirs = (
        small("qwen3", name).build("cpu").eval().generate(prompt, max_new_tokens=4, do_sample=False) for name in ("varlen", "sdpa")
    )
    assert torch.equal(ours, theirs)


CPU = Surroundings(device="cpu", compute=torch.float32)
GPU = Surroundings(device="cuda", compute=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [
        ("llama", CPU, "varlen"),
        ("gemma3_text", CPU, "varlen"),
        ("gemma2", CPU, "eager"),
        ("gpt_oss", CPU, "eager"),
        ("bloom", CPU, "eager"),
        ("nemotron_h", CPU, "varlen"),
        ("llama", Surroundings(device="cpu", compute=torch.float32, virtual=True), "sdpa"),
        ("llama", Surroundings(device="cpu", compute=torch.float32, compiled=True), "sdpa"),
        ("llama", GPU, "varlen"),
        ("gemma3_text", GPU, "varlen"),
        ("gemma2", GPU, "flex_attention"),
        ("gpt_oss", GPU, "flex_attention"),
        ("llama", Surroundings(device="cuda", compute=torch.float32), "flex_attention"),
    ],
)
def test_auto_takes_the_fastest_and_says_why(kind: str, where: Surroundings, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # no flash-attn here, nor kernels
    config = small(kind).config
    choice = choose(Attention.auto, config, model_class(config), where)
    assert choice.name == name
    first = "varlen" if where.device == "cpu" else "flash_attention_3"
    assert choice.why.startswith("the fastest here")
    assert (f"not {first}" in choice.why) is (name != first)


@pytest.mark.parametrize(
    ("kind", "backend", "where", "reason"),
    [
        ("gemma2", "varlen", CPU, "softcapping"),
        ("gemma2", "sdpa", CPU, "softcapping"),
        ("gpt_oss", "varlen", GPU, "sinks"),
        ("gpt_oss", "sdpa", GPU, "sinks"),
        ("bloom", "varlen", CPU, "does not take attention functions"),
        ("llama", "flex", CPU, "no backward on a CPU"),
        ("llama", "flash_attention_2", CPU, "needs a GPU"),
        ("llama", "flash_attention_3", GPU, "not installed"),
        ("llama", "varlen", Surroundings(device="cuda", compute=torch.float32), "16 bits"),
        ("llama", "varlen", Surroundings(device="cpu", compute=torch.float32, virtual=True), "virtual tokens"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(
    kind: str, backend: str, where: Surroundings, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    config = small(kind).config
    with pytest.raises(ConfigError, match=reason) as refused:
        choose(Attention(backend), config, model_class(config), where)
    assert refused.value.parts() | {"reason": ""} == {
        "path": "model.attention", "value": backend, "reason": "", "remedy": "model.attention=auto",
    }  # fmt: skip


def test_a_plan_of_a_gpu_computes_without_a_mask_whatever_kernel_the_gpu_has() -> None:
    config = small("gemma2").config
    choice = choose(Attention.auto, config, model_class(config), GPU)
    assert stand_in(choice).name == "varlen"
    assert stand_in(choose(Attention.sdpa, small("llama").config, model_class(small("llama").config), GPU)).name == "sdpa"


STEPS = 5


def train_steps(world: World, folder: Path, kind: str, backend: str, engine: str, rows: str) -> tuple[list[tuple[float, float]], str]:
    """Take five steps of four rows on all ranks; return each one's loss and gradient norm, and what the start-up table says."""
    config = replace(run_config(backend, engine), run_dir=str(folder))
    built = build_engine(config, world, small(kind))
    said, result = built.report()["attention"], []
    for step in range(STEPS):
        batch = rows_of(rows, seed=step)
        mine = [one_row(batch, row) for row in range(world.rank, 4, world.size)]
        targets = int((batch.labels != IGNORE).sum())
        taken = take_step(built, NextToken(), mine, world, lr=1e-1, targets=targets)
        result.append((taken.loss, taken.grad_norm))
    built.close()
    return result, said


def one_row(batch: Batch, row: int) -> Batch:
    tensors = {name: getattr(batch, name)[row : row + 1] for name in ("input_ids", "labels", "position_ids")}
    documents = batch.documents[row : row + 1]
    kept = documents[documents >= 0]
    documents = (documents - (int(kept.min()) if len(kept) else 0)).where(documents >= 0, NO_DOCUMENT)
    count = int(documents.max()) + 1
    return Batch(**tensors, documents=documents, num_rows=1, num_tokens=int((documents >= 0).sum()), num_documents=count)


@cache
def reference(ranks: Callable[[int], Ranks], folder: Path, kind: str, rows: str) -> list[tuple[float, float]]:
    result: list[tuple[float, float]] = ranks(1).call(train_steps, folder, kind, "eager", "fsdp", rows)[0][0]
    return result


def parity_cases() -> list[Any]:
    """The whole table; what the quick suite takes of it is the backend that runs take, over ranks."""
    quick, found = {("gemma3_text", "varlen", "fsdp", 2, "packed"), ("gemma3_text", "varlen", "zero3", 2, "packed")}, []
    for kind, backend in (
        ("gemma3_text", "varlen"),
        ("qwen3_5_text", "auto"),
        ("nemotron_h", "auto"),
        ("gemma3_text", "sdpa"),
        ("gemma2", "eager"),
    ):
        for engine, size, rows in product(("fsdp", "zero3"), (1, 2), ROWS):
            case = (kind, backend, engine, size, rows)
            slow = size == 2 and rows == "packed" and kind != "gemma2" and backend != "sdpa"
            marks = () if case in quick else (pytest.mark.slow,) if slow else (pytest.mark.soak,)
            found.append(pytest.param(*case, marks=marks, id="-".join(map(str, case))))
    return found


@pytest.mark.parametrize(("kind", "backend", "engine", "size", "rows"), parity_cases())
def test_five_steps_equal_those_of_written_out_attention_in_one_process(
    ranks: Callable[[int], Ranks], tmp_path: Path, kind: str, backend: str, engine: str, size: int, rows: str
) -> None:
    """Ranks have other numbers of documents than each other, which go through recurrent layers one by one."""
    expected = reference(ranks, tmp_path.parent, kind, rows)
    for steps, said in ranks(size).call(train_steps, tmp_path, kind, backend, engine, rows):
        assert said.startswith("varlen:" if backend == "auto" else f"{backend}:")
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-5, atol=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: would compare each kernel in bf16 with float32 on the CPU")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa", "flash_attention_2"])
def test_gpu_kernels_equal_the_cpu(kind: str, backend: str, rows: str) -> None:
    """Losses in bf16 are within its rounding of those of float32 on the CPU, and a neighbour changes no bit of a document."""
    blueprint = small(kind)
    if kind != "deepseek_v3":
        blueprint.config.head_dim = 16  # the least that flex compiles
    try:
        where = Surroundings(device="cuda", compute=torch.bfloat16)
        choice = choose(Attention(backend), blueprint.config, model_class(blueprint.config), where)
    except ConfigError as refused:
        pytest.skip(refused.reason)
    model = spread(attending(blueprint, choice).build("cpu").eval())
    batch = rows_of(rows)
    with torch.no_grad():
        expected = alone(model, batch)
    model = copy.deepcopy(model).to("cuda", torch.bfloat16)
    others = batch.input_ids.where(batch.documents == 1, rows_of(rows, seed=1).input_ids)
    one, other = (
        forward(model, replace(batch, input_ids=ids).to(torch.device("cuda"))).logps.detach().cpu() for ids in (batch.input_ids, others)
    )
    torch.testing.assert_close(one, expected, rtol=0.1, atol=0.1)
    assert torch.equal(one[batch.documents == 1], other[batch.documents == 1])
    loss = -forward(model.train(), batch.to(torch.device("cuda"))).logps.sum()
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
