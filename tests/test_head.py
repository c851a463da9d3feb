"""A loss whose logits exist a few tokens at a time is the loss of whole logits, under any head, method and engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Ranks, blueprint_for, save_tiny
from peft_cases import config_for
from tables import EPS
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.compose import compose
from launcher.job import make_job
from launcher.proposals import changes_of
from tools.bench.plan import CASES, Case, measure, predict
from trainers.batch import IGNORE, Batch, Needs
from trainers.config.choices import Activations, Precision
from trainers.config.derived import LOGITS_BYTES, logits_chunk
from trainers.config.schema import DataConfig, PeftConfig, RunConfig, TrainConfig
from trainers.engines.base import head_of
from trainers.engines.build import build_engine
from trainers.model.forward import forward
from trainers.model.head import Head, why_not
from trainers.model.reach import twin_of
from trainers.world import World

HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
    "changed llama": {},
}
"""A plain head, softcapping, a scale by a factor and by a quotient, a bias, and all else that some model does."""
LENGTH = 17


def batch_of(seed: int = 0) -> Batch:
    """Three rows of two documents, with labels in some places, and one without any."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, 33, (3, LENGTH), generator=generator) for _ in range(2))
    labels[:, :2], labels[0, 3:9], labels[2] = IGNORE, IGNORE, IGNORE
    return Batch.of(ids, labels, torch.cat([torch.arange(9), torch.arange(LENGTH - 9)]).expand(3, -1))


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    kind = name.split()[-1]
    config = AutoConfig.for_model(kind, **({**TINY, "initializer_range": 0.2, "tie_word_embeddings": False} | HEADS[name]))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    if name == "changed llama":
        bias = torch.randn(1, 33, generator=torch.Generator().manual_seed(0))
        change(
            model, lambda logits: torch.tanh((0.5 * logits.float() + bias.to(logits.device)).contiguous()[..., :40] / 2).to(torch.float64)
        )
    return model


def change(model: Any, tail: Callable[[Any], Any]) -> None:
    """Let a model do something to its logits."""
    plain = type(model).forward

    def forward_and_change(self: Any, **inputs: Any) -> Any:
        output = plain(self, **inputs)
        output.logits = tail(output.logits)
        return output

    model.__class__ = type("Changed", (type(model),), {"forward": forward_and_change})


def measured(model: Any, tokens: int | None) -> tuple[Any, dict[str, Any]]:
    """Weigh the log-probabilities of each column otherwise, as objectives do."""
    model = copy.deepcopy(model)
    output = forward(model, batch_of(), Needs(entropy=True), head=Head(model, tokens) if tokens else None)
    (output.logps * torch.arange(1, LENGTH + 1)).sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_what_whole_logits_give(name: str) -> None:
    model = model_of(name)
    assert why_not(model) is None
    whole, gradients = measured(model, None)
    for tokens in (1, 7, 1000):
        found, others = measured(model, tokens)
        torch.testing.assert_close(found.logps, whole.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.entropy, whole.entropy, rtol=1e-6, atol=1e-6)
        assert not found.entropy.requires_grad
        assert others.keys() == gradients.keys()
        most = max(float(gradient.norm()) for gradient in gradients.values())
        for key, gradient in gradients.items():
            assert (others[key] - gradient).norm() <= 1e-6 * (gradient.norm() + 0.1 * most), key


def test_in_bf16_it_differs_by_rounding_alone() -> None:
    """Gradients of whole logits in bf16 are up to 4e-2 from those in float32; a few tokens at a time they are no further."""
    exact = measured(model_of("llama"), None)[1]
    model = model_of("llama", torch.bfloat16)
    errors = {}
    for tokens in (None, 7):
        found = measured(model, tokens)[1]
        errors[tokens] = {key: float((found[key].float() - gradient).norm() / gradient.norm()) for key, gradient in exact.items()}
    assert max(errors[None].values()) < 5e-2
    assert all(error < 1.25 * errors[None][key] for key, error in errors[7].items())


def test_without_a_gradient_and_outside_of_a_loss() -> None:
    model = model_of("gemma2")
    ids = batch_of().input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        whole = forward(model, batch_of()).logps
        head = Head(model, 5)
        assert torch.equal(forward(model, batch_of(), head=head).logps, whole)
        assert torch.equal(model(input_ids=ids).logits, logits)
        assert head.name not in vars(head.owner)


def test_a_model_with_values_is_asked_without_copying_them() -> None:
    """A model with an adapter, as tools.evaluate opens it: its twin has none of its memory, and it stays as it is."""
    peft = pytest.importorskip("peft")
    model: Any = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    twin = twin_of(model)
    assert all(p.is_meta for p in twin.parameters())
    assert [name for name, _ in twin.named_parameters()] == list(before)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert why_not(model) is None
    with torch.no_grad():
        whole = forward(model, batch_of()).logps
        torch.testing.assert_close(forward(model, batch_of(), head=Head(model, 5)).logps, whole, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_head_that_is_not_understood_makes_whole_logits(caplog: pytest.LogCaptureFixture) -> None:
    """Logits that a model changes by their place, or normalises, cannot be made a few at a time."""
    for tail in (lambda logits: logits[:, 1:], lambda logits: logits.log_softmax(-1), lambda logits: torch.softmax(logits, -1)):
        model = model_of("llama").to("meta")
        change(model, tail)
        head, words = head_of(model, RunConfig(train=TrainConfig(logits_chunk=4)), torch.float32)
        assert head is None
        assert words == "whole: the output layer is not understood"
        assert "the logits of Changed are made whole" in caplog.text
        caplog.clear()


def test_it_decides_by_the_size_of_a_microbatchs_logits() -> None:
    def tokens(seq_len: int, vocab: int, itemsize: int = 2, **train: Any) -> int:
        return logits_chunk(RunConfig(data=DataConfig(seq_len=seq_len), train=TrainConfig(**train)), vocab, itemsize)

    assert tokens(8192, 128256) == 1024
    assert 1024 * 128256 * 2 <= LOGITS_BYTES < 2048 * 128256 * 2
    assert tokens(8192, 128256, 4) == 512
    assert tokens(2048, 16384) == 0
    assert tokens(2048, 128256) == 0
    assert tokens(2048, 128256, eval_microbatch=8) == 1024
    assert tokens(8192, 128256, logits_chunk=0) == 0
    assert tokens(64, 33, logits_chunk=5) == 5


def train(world: World, folder: Path, case: str, engine: str, steps: int = 2, **train: Any) -> dict[str, Any]:
    """Train a few steps on packed rows, as many for every rank, with other numbers of labels on each; then evaluate."""
    config = config_for(folder, "lora" if case == "full" else case, engine, **train)
    config.optim.eps = EPS  # AdamW makes much of the rounding of gradients near 0
    if case == "full":
        config.peft = PeftConfig()
    elif case != "qlora":
        config.peft.targets = ["lm_head", "q_proj"] if not config.peft.modules_to_save else config.peft.targets
    built = build_engine(config, world, blueprint_for(folder))
    losses, norms = [], []
    for step in range(steps):
        batch = batch_of(seed=10 * step + world.rank)
        if world.rank == 0:
            batch = Batch.of(batch.input_ids, batch.labels.where(torch.arange(LENGTH) > 11, IGNORE), batch.position_ids)
        loss = -built.forward(batch).logps.sum()
        built.backward(loss / 40, last=True)
        norms.append(built.step(1e-2))
        losses.append(world.sum([float(loss.detach())])[0])
    words = built.report()["logits"]
    built.train(False)
    with torch.no_grad():
        losses.append(world.sum([float(built.forward(batch_of(99), Needs(entropy=True)).entropy.sum())])[0])
    return {"losses": losses, "norms": norms, "logits": words}


QUICK = [(True, "full"), (False, "lora")]
ALL = [*QUICK, (False, "full"), (False, "dora"), (False, "qlora")]
TRAINED = [pytest.param(size, engine, ALL, marks=pytest.mark.slow) for engine in ("fsdp", "zero3") for size in (1, 3)]
TRAINED += [pytest.param(2, engine, ALL[2:], marks=pytest.mark.slow) for engine in ("fsdp", "zero3", "fsdp_offload")]


@pytest.mark.parametrize(("size", "engine", "cases"), [(2, "fsdp", QUICK), (2, "zero3", QUICK), *TRAINED])
def test_engines_train_as_with_whole_logits(
    ranks: Callable[[int], Ranks], tmp_path: Path, size: int, engine: str, cases: list[tuple[bool, str]]
) -> None:
    """Tied, untied, an adapter on the head, a whole copy of it, and a decomposed adapter; some ranks have fewer chunks than others."""
    for tied, case in cases:
        folder = save_tiny(tmp_path / f"{case}-{tied}" / "model", tied=tied)
        runs = [partial(train, logits_chunk=chunk) for chunk in (0, 7)]
        whole, parts = (ranks(size).call(run, folder, case, engine)[0] for run in runs)
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-6), case
        assert parts["norms"] == pytest.approx(whole["norms"], rel=1e-5), case
        assert whole["logits"] == "whole"
        assert parts["logits"] == "of 7 tokens at once, made again in backward"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_checkpointed_blocks_virtual_tokens_and_bf16(ranks: Callable[[int], Ranks], tmp_path: Path, engine: str) -> None:
    folder = save_tiny(tmp_path / "model", tied=True)
    cases: list[tuple[str, dict[str, Any], float]] = [
        ("full", {"activations": Activations.block}, 1e-6),
        ("prompt", {}, 1e-6),
        ("full", {"precision": Precision.bf16}, 2e-2),
    ]
    for case, more, rel in cases:
        runs = [partial(train, logits_chunk=chunk, **more) for chunk in (0, 7)]
        whole, parts = (ranks(2).call(run, folder, case, engine)[0] for run in runs)
        assert parts["losses"] == pytest.approx(whole["losses"], rel=rel), case
        assert parts["norms"] == pytest.approx(whole["norms"], rel=10 * rel), case


@pytest.mark.soak
def test_a_vocabulary_of_128256_takes_a_fifth(tmp_path: Path) -> None:
    """Of the loss's bytes, in the plan and in real steps, which agree within 5 %."""
    cases = [case for case in CASES if case.size == "128k"]
    assert [case.logits_chunk for case in cases] == [0, None]
    real, planned = measure(1, cases), list(map(predict, cases))
    for found, predicted in zip(real, planned, strict=True):
        assert predicted["peak"] == pytest.approx(found["peak"], rel=0.05)
        assert predicted["state"] == found["state"]
        assert predicted["logits"] == pytest.approx(found["logits"], rel=0.05)
    for whole, parts in (real, planned):
        assert whole["logits"] > 5 * parts["logits"]
        assert parts["peak"] < 0.5 * whole["peak"]


def test_the_plan_proposes_it_where_it_is_off() -> None:
    def proposed(*overrides: str) -> list[list[str]]:
        return changes_of(make_job(compose(["model=hf", "model.id=a/b", "data.path=c/d", "train.steps=1", *overrides])))

    assert proposed("train.logits_chunk=0")[0] == ["train.logits_chunk=null"]
    assert not any("logits_chunk" in " ".join(changes) for changes in proposed())


def test_more_of_a_plan_is_known() -> None:
    """A step computes the head's logits again: a plan's time has that, and its memory less."""
    chunked, whole = (predict(Case(1, "tiny", precision=Precision.fp32, logits_chunk=chunk)) for chunk in (64, 0))
    assert chunked["logits"] < whole["logits"]
    assert chunked["flops"] == whole["flops"] + 2 * 256 * 64 * 33
