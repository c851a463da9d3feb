"""A model learns from a teacher's log-probabilities: the closed form, and the same under any head, split, engine and adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ranks
from tables import LENGTHS, LR, blueprint_for, config_for, plain_adamw, ragged_table
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from trainers.batch import IGNORE, Batch
from trainers.config.choices import Divergence, EngineName, ObjectiveName, PeftMethod
from trainers.config.schema import EngineConfig, ObjectiveConfig, PeftConfig
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared
from trainers.data.table import TokenTable
from trainers.engines.build import build_engine
from trainers.engines.compiling import filled_up
from trainers.loop import train
from trainers.model.forward import forward
from trainers.model.head import Head
from trainers.objectives import TEACHER_IDS, TEACHER_LOGPS, make_objective
from trainers.objectives.distil import divergence
from trainers.plan.simulate import most_of
from trainers.rundir.attempt import Attempt
from trainers.rundir.rows import read_rows, steps
from trainers.world import World

VOCABULARY = 33
DISTIL = ObjectiveConfig(name=ObjectiveName.distil, divergence=Divergence.jsd, beta=0.3, ce_weight=0.25)


def whole_divergence(teacher: torch.Tensor, student: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Of whole logits (..., V), by torch's own kl_div(log q, log p) = KL(p || q)."""
    p, q = log_softmax(teacher, -1), log_softmax(student, -1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if config.divergence is Divergence.forward_kl:
        return kl(p, q)
    if config.divergence is Divergence.reverse_kl:
        return kl(q, p)
    mixture = torch.log(config.beta * p.exp() + (1 - config.beta) * q.exp())
    return config.beta * kl(p, mixture) + (1 - config.beta) * kl(q, mixture)


def coarse(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ids (..., k), and of all others by one subtraction: as logits of k + 1 outcomes."""
    picked = log_softmax(logits, -1).gather(-1, ids)
    return torch.cat([picked, torch.log1p(-picked.exp().sum(-1, keepdim=True))], -1)


def batch_of(k: int, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """Rows with labels in some places, and a teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(3, VOCABULARY, (3, 17), generator=generator) for _ in range(2))
    labels[:, :2], labels[0, 3:9], labels[2] = IGNORE, IGNORE, IGNORE
    batch = Batch.of(ids, labels, torch.cat([torch.arange(9), torch.arange(8)]).expand(3, -1))
    teacher = 3 * torch.randn(3, 17, VOCABULARY, generator=generator)
    top = teacher.topk(k, -1).indices
    log_sums = teacher.logsumexp(-1, keepdim=True)
    rest = teacher.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    signals = {TEACHER_IDS: top.int(), TEACHER_LOGPS: torch.cat([teacher.gather(-1, top), rest], -1) - log_sums}
    kept = (labels != IGNORE)[..., None]
    return replace(batch, signals={name: values.where(kept, 0) for name, values in signals.items()}), teacher


@pytest.mark.parametrize("kind", Divergence)
@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
@pytest.mark.parametrize("tokens", [None, 1, 7])
def test_loss_and_gradients_are_the_closed_form(tiny_llama: Path, kind: Divergence, k: int, tokens: int | None) -> None:
    """With k = V it is the divergence of whole distributions; otherwise that of k + 1 outcomes."""
    config = replace(DISTIL, divergence=kind)
    batch, teacher = batch_of(k)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = copy.deepcopy(model)
    objective = make_objective(config, [TEACHER_IDS, TEACHER_LOGPS])
    loss = objective(forward(model, batch, objective.needs, head=Head(model, tokens) if tokens else None), batch)
    loss.total.backward()
    logits = plain(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    kept = batch.labels != IGNORE
    top = teacher.topk(k, -1).indices
    ours, theirs = (logits, teacher) if k == VOCABULARY else (coarse(logits.double(), top), coarse(teacher.double(), top))
    far = whole_divergence(theirs, ours, config)[kept].sum()
    own = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    expected = 0.75 * far + 0.25 * own
    expected.backward()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(loss.figures["divergence"]) == pytest.approx(float(far.detach()), rel=1e-6)
    assert float(loss.figures["cross_entropy"]) == pytest.approx(float(own.detach()), rel=1e-6)
    for (name, ours_), theirs_ in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours_.grad, theirs_.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", Divergence)
def test_the_rest_in_one_bucket_never_makes_a_divergence_larger(kind: Divergence) -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (3 * torch.randn(50, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2))
    config = replace(DISTIL, divergence=kind)
    whole = whole_divergence(teacher, student, config)
    order = teacher.topk(VOCABULARY, -1).indices
    found = [divergence(coarse(teacher, order[:, :k]), coarse(student, order[:, :k]), config) for k in (1, 4, 16, 31)]
    for fewer, more in zip(found, [*found[1:], whole], strict=True):
        assert (fewer <= more + 1e-9).all()
    assert (found[0] >= 0).all()


def test_a_teacher_that_is_sure_gives_finite_numbers() -> None:
    """The others' share is 1e-30: neither 1 - sum nor its gradient may lose it, or be no number."""
    teacher = torch.tensor([[-1e-30, -69.0]]).log_softmax(-1)
    student = torch.tensor([[-2.0, -0.1454]]).requires_grad_()
    for kind in Divergence:
        far = divergence(teacher, student, replace(DISTIL, divergence=kind)).sum()
        (gradient,) = torch.autograd.grad(far, student)
        assert torch.isfinite(far)
        assert torch.isfinite(gradient).all()


def taught(table: TokenTable, k: int, seed: int = 5) -> TokenTable:
    """Give each label of a table k tokens of a random teacher."""
    logits = 2 * torch.randn(int(table.label_starts[-1]), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    top = logits.topk(k, -1).indices
    rest = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    values = torch.cat([logits.gather(-1, top), rest], -1) - logits.logsumexp(-1, keepdim=True)
    return replace(table, signals={TEACHER_IDS: top.numpy().astype(np.int32), TEACHER_LOGPS: values.numpy()})


@pytest.mark.parametrize("packed", [None, 64])
def test_each_label_has_its_own_tokens_of_the_teacher(packed: int | None) -> None:
    """Whatever rows are in a batch, in one row or filled up for a compiler."""
    table = taught(ragged_table(LENGTHS, packed, masked=(2,)), 4)
    rows = np.array([len(table) - 1, 0, 1])
    batch = make_batch(table, rows, 4, 0)
    expected = []
    for document in np.concatenate([table.documents(int(row)) for row in rows]):
        expected += list(range(table.label_starts[document], table.label_starts[document + 1]))
    for changed in (batch, batch.in_one_row(), filled_up(batch, batch.labels.shape[1] + 8)):
        kept = changed.labels != IGNORE
        for name, signal in table.signals.items():
            np.testing.assert_array_equal(changed.signals[name][kept].numpy(), signal[expected])
            assert not changed.signals[name][~kept].any()
    assert batch.signals[TEACHER_IDS].dtype is torch.int32


def test_a_plan_carries_as_many_bytes_of_a_teacher(tiny_llama: Path, tmp_path: Path) -> None:
    """Of a batch without a gap, which is the most that rows of a length take."""
    batch = make_batch(taught(ragged_table([24] * 4), VOCABULARY), np.arange(4), 4, 0)
    planned = most_of(replace(config_for(tmp_path, tiny_llama), objective=DISTIL), 4, 24, VOCABULARY)
    for name, signal in batch.signals.items():
        assert (planned.signals[name].shape, planned.signals[name].dtype) == (signal.shape, signal.dtype)


def run_distil(
    world: World, run_dir: Path, model: Path, table: TokenTable, fields: dict[str, Any], engine: str, peft: str = "none"
) -> list[dict[str, Any]]:
    run_dir.mkdir(exist_ok=True)
    config = config_for(run_dir, model, **fields)
    adapter = PeftConfig(method=PeftMethod(peft), lr=LR, rank=4, targets=["q_proj", "v_proj"]) if peft == "lora" else PeftConfig()
    config = replace(config, objective=DISTIL, engine=EngineConfig(name=EngineName(engine)), peft=adapter)
    data = Prepared(path=run_dir, train=table, eval=None, report={}, reused=True)
    built = build_engine(config, world, blueprint_for(model))
    loader = Loader(table, config.train, seed=0, rank=world.rank, world_size=world.size, pad_id=0)
    train(config, world, Attempt(run_dir), built, data, loader, 1.0)
    return steps(read_rows(run_dir)) if world.rank == 0 else []


def plain_losses(model_dir: Path, table: TokenTable, num_steps: int) -> tuple[list[float], list[float]]:
    """One process, plain transformers and torch, one unpadded document at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    plain_step = plain_adamw(model, LR, num_steps)
    losses, norms = [], []
    for _ in range(num_steps):
        total, count = torch.zeros(()), int(table.label_starts[-1])
        for document in range(len(table.offsets) - 1):
            part = slice(table.offsets[document], table.offsets[document + 1])
            ids = torch.from_numpy(table.tokens[part].astype(np.int64))
            kept = torch.from_numpy(table.supervised[part][1:] > 0)
            logits = model(input_ids=ids[None]).logits[0, :-1][kept]
            own = slice(*table.label_starts[document : document + 2])
            top, teacher = (torch.from_numpy(table.signals[name][own].copy()) for name in (TEACHER_IDS, TEACHER_LOGPS))
            far = whole_divergence(teacher, coarse(logits, top.long()), DISTIL).sum()
            total = total + 0.75 * far + 0.25 * cross_entropy(logits, ids[1:][kept], reduction="sum")
        (total / count).backward()
        losses.append(float(total.detach()) / count)
        norms.append(plain_step())
    return losses, norms


SPLITS = [(1, 8, None, "fsdp", None), (2, 1, 64, "zero3", 7)]
SLOW = [(3, 1, 64, "fsdp", 7), (2, 3, 64, "fsdp", None), (3, 1, None, "zero3", None), (2, 4, None, "fsdp", 5)]


@pytest.mark.parametrize(
    ("size", "microbatch", "packed", "engine", "chunk"), [*SPLITS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_every_split_equals_a_plain_loop(
    ranks: Callable[[int], Ranks],
    tiny_llama: Path,
    tmp_path: Path,
    size: int,
    microbatch: int,
    packed: int | None,
    engine: str,
    chunk: int | None,
) -> None:
    table = taught(ragged_table(LENGTHS, packed), 5)
    fields = {"steps": 3, "global_batch": len(table), "microbatch": microbatch, "logits_chunk": chunk}
    rows = ranks(size).call(run_distil, tmp_path / "run", tiny_llama, table, fields, engine)[0]
    losses, norms = plain_losses(tiny_llama, table, 3)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-6 if engine == "fsdp" else 2e-6)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
