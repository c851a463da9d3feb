"""Rows with margins, scores and labels, and what the objectives of a head of scores make of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import tokenizer_of
from preparing import marked, prepared, write

from trainers.batch import Batch, Output, Sizes, last_tokens
from trainers.config.choices import ObjectiveName, TooLong
from trainers.config.errors import ConfigError
from trainers.config.schema import ObjectiveConfig
from trainers.data.loader import make_batch
from trainers.data.report import summary
from trainers.data.scored import choose_pad
from trainers.objectives import Objective, make_objective
from trainers.objectives.scored import BINS, Classify

HI = {"role": "user", "content": "Hi"}
PAIR = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
WORDS = "one two three four five six seven eight nine ten "


def batch_of(signals: dict[str, list[float]]) -> Batch:
    """Four documents, a token each."""
    documents = torch.arange(4).view(2, 2)
    return Batch(
        input_ids=documents,
        labels=documents,
        position_ids=documents * 0,
        documents=documents,
        signals={name: torch.tensor(values) for name, values in signals.items()},
        num_rows=2,
        num_tokens=4,
        num_documents=4,
    )


def loss_of(objective: Objective, scores: list[list[float]], **signals: list[float]) -> Any:
    output = Output(logps=torch.zeros(2, 2), scores=torch.tensor(scores, requires_grad=True))
    loss = objective(output, batch_of(signals))
    loss.total.backward()
    return loss


def test_a_reward_is_bradley_and_terry_with_margins_and_centred() -> None:
    config = ObjectiveConfig(name=ObjectiveName.reward, center=0.25)
    loss = loss_of(make_objective(config, ["margin"]), [[1.5], [0.25], [-2.0], [0.5]], margin=[1.0, 1.0, 0.0, 0.0])
    expected = math.log1p(math.exp(-(1.25 - 1.0))) + 0.25 * 1.75**2 + math.log1p(math.exp(2.5)) + 0.25 * 1.5**2
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    figures = {name: float(value) for name, value in loss.figures.items()}
    assert figures == pytest.approx({"reward_chosen": -0.5, "reward_rejected": 0.75, "reward_margin": -1.25, "accuracy": 1.0})


def test_scores_are_regressed() -> None:
    objective = make_objective(ObjectiveConfig(name=ObjectiveName.reward), ["score"])
    loss = loss_of(objective, [[1.0], [2.0], [3.0], [4.0]], score=[1.5, 2.0, 1.0, 4.0])
    assert loss.total.item() == pytest.approx(0.25 + 4.0)
    assert float(loss.figures["absolute_error"]) == pytest.approx(2.5)
    assert objective.targets(Sizes(units=0, documents=4)) == 4
    assert objective.targets(Sizes(units=2, documents=4)) == 2


LOGITS = [[2.0, 0.0, -1.0], [0.0, 0.5, 0.0], [1.0, 1.5, 0.0], [0.0, 0.0, 3.0]]
TRUE = [0.0, 1.0, 0.0, 2.0]


def test_a_class_is_trained_by_its_weighted_cross_entropy() -> None:
    objective = make_objective(ObjectiveConfig(name=ObjectiveName.classify), ["label", "class_weight"])
    weights = [0.5, 2.0, 0.5, 1.0]
    expected = sum(
        weight * (math.log(sum(map(math.exp, row))) - row[int(label)]) for row, label, weight in zip(LOGITS, TRUE, weights, strict=True)
    )
    loss = loss_of(objective, LOGITS, label=TRUE, class_weight=weights)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert float(loss.figures["accuracy"]) == 3


def test_f1_and_calibration_are_those_of_their_definitions() -> None:
    objective = Classify(ObjectiveConfig(name=ObjectiveName.classify))
    parts = [objective.tally(Output(logps=torch.zeros(2, 2), scores=torch.tensor(LOGITS)), batch_of({"label": TRUE})) for _ in range(2)]
    found = objective.summary((parts[0] + parts[1]).tolist())
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)  # precision 1 and recall 1/2; 1/2 and 1; 1 and 1
    confidence = [max(map(math.exp, row)) / sum(map(math.exp, row)) for row in LOGITS]
    bins: dict[int, float] = {}
    for value, right in zip(confidence, [True, True, False, True], strict=True):
        at = int(value * BINS)
        bins[at] = bins.get(at, 0.0) + value - right
    assert found["calibration_error"] == pytest.approx(sum(map(abs, bins.values())) / 4, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_the_last_token_of_each_document_is_found(packing: bool, tmp_path: Path) -> None:
    rows = [PAIR | {"chosen": WORDS * (1 + number % 3), "margin": number / 4} for number in range(9)]
    table = prepared(write(tmp_path / "pairs.jsonl", rows), "reward", packing=packing, seq_len=256).train
    batch = make_batch(table, np.arange(len(table)), len(table) + 1, 0)
    order = np.concatenate([table.documents(row) for row in range(len(table))])
    for rows_of in (batch, batch.in_one_row()):
        assert rows_of.input_ids.flatten()[last_tokens(rows_of)].tolist() == table.tokens[table.offsets[1:][order] - 1].tolist()
    assert batch.signals["margin"].tolist() == pytest.approx([document // 2 / 4 for document in order])


def test_signals_stay_with_their_documents_where_some_are_dropped(tmp_path: Path) -> None:
    rows = [{"text": "a " * 90 if number % 3 == 0 else "a", "score": number} for number in range(10)]
    table = prepared(write(tmp_path / "a.jsonl", rows), "reward", seq_len=64, too_long=TooLong.drop, max_lost_fraction=1.0).train
    assert table.signals["score"].tolist() == [1, 2, 4, 5, 7, 8]


def test_labels_are_found_sorted_and_reported(tmp_path: Path) -> None:
    rows = [{"messages": [HI], "label": name} for name in ("yes", "no", "yes", "perhaps")]
    data = prepared(write(tmp_path / "a.jsonl", rows), "classify")
    assert data.train.signals["label"].tolist() == [2, 0, 2, 1]
    assert {name: count["train"] for name, count in data.report["labels"].items()} == {"no": 1, "perhaps": 1, "yes": 2}
    assert "labels  3 classes (train): no 1, perhaps 1, yes 2" in summary(data.report)
    assert marked(data.train)[0].startswith("⟦") or "user" in marked(data.train)[0]
    numbers = prepared(write(tmp_path / "b.jsonl", [{"text": "a", "label": number} for number in (10, 9, True)][:2]), "classify")
    assert list(numbers.report["labels"]) == ["9", "10"]


BAD = {
    "no score": ("reward", {"text": "a", "score": 1}, {"text": "a"}, "has no `score`"),
    "a score of words": ("reward", {"text": "a", "score": 1}, {"text": "a", "score": "high"}, "not a number"),
    "a margin of words": ("reward", PAIR, PAIR | {"margin": "wide"}, "not a number"),
    "no label": ("classify", {"text": "a", "label": "b"}, {"text": "a"}, "has no `label`"),
    "labels": ("classify", {"text": "a", "label": "b"}, {"text": "a", "label": ["b"]}, "not a name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_without_its_number_or_name_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    objective, good, bad, reason = BAD[case]
    file = write(tmp_path / "a.jsonl", [good, {**good, "label": "c"} if objective == "classify" else good, bad])
    with pytest.raises(ConfigError, match=reason) as caught:
        prepared(file, objective)
    assert "a.jsonl:3" in str(caught.value)


def test_rows_and_objective_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a document has one class"):
        prepared(write(tmp_path / "a.jsonl", [PAIR]), "classify")
    with pytest.raises(ConfigError, match="1 different values: b"):
        prepared(write(tmp_path / "b.jsonl", [{"text": "a", "label": "b"}] * 3), "classify")


def test_what_pads_the_export_ends_no_document() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.pad_token = tokenizer.eos_token
    assert choose_pad(tokenizer, set()) == tokenizer.pad_token_id
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert choose_pad(tokenizer, ends) not in ends
    with pytest.raises(ConfigError, match="ends some document"):
        choose_pad(tokenizer, set(range(len(tokenizer))))
