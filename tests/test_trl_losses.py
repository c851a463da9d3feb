"""Losses of answers equal TRL's own on the same log-probabilities, recorded in golden/trl.json by record_trl.py, with their gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.batch import IGNORE, Batch, Output
from trainers.config.choices import FDivergence, ObjectiveName, PreferenceLoss
from trainers.config.derived import DESIRABLE
from trainers.config.objectives import validate_objective
from trainers.config.schema import ObjectiveConfig
from trainers.objectives import REFERENCE, make_objective
from trainers.objectives.base import Measured

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text())["cases"]
PAIRS = 4
TYPED = {"name": ObjectiveName, "loss": PreferenceLoss, "f_divergence": FDivergence}


def batch_of(case: dict[str, Any], order: list[int]) -> tuple[Output, Batch]:
    """Return a row for each answer, in an order, as a forward of the model would."""
    size = max(map(len, case["logps"])) + 1
    logps, labels = torch.zeros(len(order), size), torch.full((len(order), size), IGNORE)
    documents = torch.full((len(order), size), -1)
    for row, number in enumerate(order):
        count = len(case["logps"][number])
        logps[row, :count] = torch.tensor(case["logps"][number])
        labels[row, :count] = 1
        documents[row, : count + 1] = row
    signals = {REFERENCE: torch.tensor([case["reference"][number] for number in order])}
    signals[DESIRABLE] = torch.tensor([float(number < PAIRS) for number in order])
    fields = {"num_rows": len(order), "num_tokens": size, "num_documents": len(order)}
    ids = torch.zeros_like(labels)
    batch = Batch(input_ids=ids, labels=labels, position_ids=ids, documents=documents, signals=signals, **fields)
    return Output(logps=logps.requires_grad_()), batch


def ours(case: dict[str, Any]) -> tuple[float, list[list[float]]]:
    """Return our loss of a case and its gradient at each token's log-probability, answers as TRL has them: preferred ones first."""
    config = ObjectiveConfig(**{name: TYPED.get(name, lambda value: value)(value) for name, value in case["settings"].items()})
    validate_objective(config)
    is_kto = config.name is ObjectiveName.kto
    order = list(range(2 * PAIRS)) if is_kto else [number + half for number in range(PAIRS) for half in (0, PAIRS)]
    output, batch = batch_of(case, order)
    objective = make_objective(config, batch.signals)
    if isinstance(objective, Measured):
        objective = objective.given(sum(case["ratios"]) / len(case["ratios"]))
    loss = objective(output, batch).total / (2 * PAIRS if is_kto else PAIRS)
    loss.backward()
    assert output.logps.grad is not None
    by_answer = dict(zip(order, output.logps.grad.tolist(), strict=True))
    return float(loss.detach()), [by_answer[number][: len(case["logps"][number])] for number in range(2 * PAIRS)]


@pytest.mark.parametrize("name", [name for name in TABLE if not name.endswith("ragged")])
def test_losses_and_gradients_are_those_of_trl(name: str) -> None:
    loss, gradient = ours(TABLE[name])
    assert loss == pytest.approx(TABLE[name]["loss"], rel=1e-5)
    for row, theirs in zip(gradient, TABLE[name]["gradient"], strict=True):
        assert row == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in TABLE if name.endswith("ragged")])
def test_the_preferred_answers_own_loss_is_a_mean_over_answers_and_not_over_tokens(name: str) -> None:
    """The one definition that differs: TRL's weighs long answers more, and depends on how a step is split into microbatches."""
    case = TABLE[name]
    chosen = case["logps"][:PAIRS]
    of_tokens = -sum(map(sum, chosen)) / sum(map(len, chosen))
    of_answers = -sum(sum(answer) / len(answer) for answer in chosen) / PAIRS
    weight = case["settings"].get("nll_weight", 1.0)
    assert abs(of_tokens - of_answers) > 0.005
    assert ours(case)[0] - weight * of_answers == pytest.approx(case["loss"] - weight * of_tokens, rel=1e-5)
