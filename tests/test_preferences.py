"""Pairs of answers: read from every layout, cut together, kept in one row; and what each objective makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preparing import marked, prepared, write

from trainers.batch import IGNORE, Batch, Output, Sizes
from trainers.config.choices import ObjectiveName, PreferenceLoss, TooLong
from trainers.config.errors import ConfigError
from trainers.config.schema import ObjectiveConfig
from trainers.data.loader import make_batch
from trainers.objectives import REFERENCE, make_objective
from trainers.objectives.preference import log_odds

HI, BYE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def pairs(tmp_path: Path, *rows: dict[str, Any], **data: Any) -> Any:
    return prepared(write(tmp_path / "pairs.jsonl", list(rows)), "dpo", **data).train


LAYOUTS = {
    "texts": {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
    "turns with a prompt of turns": {"prompt": [HI], "chosen": [says("good")], "rejected": [says("bad")]},
    "whole conversations": {"chosen": [HI, says("good")], "rejected": [HI, says("bad")]},
    "whole conversations and the prompt": {"prompt": "Hi", "chosen": [HI, says("good")], "rejected": [HI, says("bad")]},
    "whole conversations and turns of the prompt": {"prompt": [HI], "chosen": [HI, says("good")], "rejected": [HI, says("bad")]},
    "also as messages": {"messages": [HI, says("good")], "chosen": [HI, says("good")], "rejected": [HI, says("bad")]},
    "transcripts": {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"},
    "an open transcript": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " good".strip(), "rejected": "bad"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_two_documents(layout: str, tmp_path: Path) -> None:
    table = pairs(tmp_path, LAYOUTS[layout])
    before = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [text.strip() for text in marked(table)] == [f"{before}⟦{answer}<|im_end|>⟧" for answer in ("good", "bad")]
    assert table.units.tolist() == [0, 0]


def test_no_turn_of_the_prompt_is_trained(tmp_path: Path) -> None:
    said = [HI, says("Hello"), BYE]
    table = pairs(tmp_path, {"chosen": [*said, says("good")], "rejected": [*said, says("bad"), BYE, says("worse")]}, packing=True)
    assert [text.count("⟦") for text in marked(table)] == [1, 2]
    assert all("Hello<|im_end|>" in text.split("⟦")[0] for text in marked(table))
    assert len(table) == 1


def test_a_transcript_of_several_turns_is_divided_where_the_answers_part(tmp_path: Path) -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Say: Human: x\n\nAssistant:"
    table = pairs(tmp_path, {"chosen": f"{shared} good", "rejected": f"{shared} bad"})
    assert [text.split("⟦")[1].split("⟧")[0] for text in marked(table)] == ["good<|im_end|>", "bad<|im_end|>"]
    assert "Say: Human: x" in marked(table)[0].split("⟦")[0]


BAD = {
    "equal": ({"prompt": "Hi", "chosen": "good", "rejected": "good"}, "equal answers"),
    "empty": ({"prompt": "Hi", "chosen": "good", "rejected": " "}, "empty assistant turn"),
    "missing": ({"prompt": "Hi", "chosen": "good", "rejected": None}, "has no `rejected`"),
    "no prompt": ({"chosen": [says("good")], "rejected": [says("bad")]}, "without a `prompt`"),
    "different prompts": ({"chosen": [HI, says("good")], "rejected": [BYE, says("bad")]}, "different prompts"),
    "different turns": (
        {"chosen": [HI, says("a"), HI, says("b")], "rejected": [HI, says("a"), BYE, says("b")]},
        "differ in a turn of the user",
    ),
    "another prompt": ({"prompt": "Bye", "chosen": [HI, says("good")], "rejected": [HI, says("bad")]}, "not in the conversations"),
    "no answer": ({"prompt": "Hi", "chosen": [says("good"), BYE], "rejected": [says("bad")]}, "ends with a turn of the user"),
    "one begins the other": ({"chosen": [HI, says("a"), BYE, says("b")], "rejected": [HI, says("a")]}, "answer"),
    "a flag": ({"prompt": "Hi", "chosen": [says("good") | {"weight": 0}], "rejected": [says("bad")]}, "takes whole answers"),
    "an image": ({"prompt": "Hi", "chosen": "good", "rejected": "bad", "images": ["x"]}, "only text is trained"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pair_that_compares_nothing_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    row, reason = BAD[case]
    with pytest.raises(ConfigError) as caught:
        pairs(tmp_path, LAYOUTS["texts"] | dict.fromkeys(row, None), row)
    assert "pairs.jsonl:2" in str(caught.value)
    assert reason in str(caught.value)


def test_rows_and_objective_must_fit(tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", [LAYOUTS["texts"]])
    with pytest.raises(ConfigError, match="pairs of answers") as caught:
        prepared(file, "sft")
    assert "objective=dpo" in caught.value.remedy
    with pytest.raises(ConfigError, match="compares two answers"):
        prepared(write(tmp_path / "chats.jsonl", [{"prompt": "Hi", "completion": "good"}]), "dpo")


WORDS = "one two three four five six seven eight nine ten "


def test_both_answers_of_a_pair_are_cut_at_one_length_or_left_out(tmp_path: Path) -> None:
    long, short = {"prompt": "Hi", "chosen": WORDS * 9, "rejected": WORDS * 8}, {"prompt": "Hi", "chosen": WORDS * 9, "rejected": "no"}
    for packing, expected in ((False, [64, 64, 64]), (True, [32, 32, None])):
        found = pairs(tmp_path, long, short, seq_len=64, packing=packing, max_lost_fraction=0.99)
        lengths = np.diff(found.offsets)
        assert lengths[:2].tolist() == expected[:2]
        assert lengths[2] == (expected[2] or 64 - lengths[3])
        assert not packing or max(found.row_lengths()) <= 64
    prompt = {"prompt": WORDS * 9, "chosen": "a", "rejected": "b"}
    data = prepared(write(tmp_path / "both.jsonl", [LAYOUTS["texts"], prompt]), "dpo", seq_len=64, max_lost_fraction=0.99)
    assert (len(data.train), data.report["dropped"], data.report["truncated"]) == (1, 1, 0)
    dropped = prepared(
        write(tmp_path / "c.jsonl", [LAYOUTS["texts"], long]), "dpo", seq_len=64, max_lost_fraction=0.99, too_long=TooLong.drop
    )
    assert (len(dropped.train), dropped.report["dropped"]) == (1, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_the_documents_of_a_pair_are_neighbours_in_a_batch(packing: bool, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "chosen": WORDS * (1 + number % 3), "rejected": f"no {number}"} for number in range(9)]
    table = pairs(tmp_path, *rows, packing=packing, seq_len=256)
    batch = make_batch(table, np.arange(len(table)), len(table) + 1, 0)
    order = np.concatenate([table.documents(row) for row in range(len(table))])
    assert (order[0::2] % 2 == 0).all()
    assert (order[1::2] == order[0::2] + 1).all()
    assert table.sizes(np.arange(len(table))).units == 9 == batch.num_documents / 2
    shape = (len(table) + 1, batch.labels.shape[1]) if packing else (20, batch.labels.shape[1])
    assert batch.input_ids.shape == shape


# Objectives, in float64 and word by word from their papers.

LOGPS = [[-1.5, -0.25, -2.0], [-0.5, -3.0], [-0.125], [-4.0, -0.5]]
"""Of the labels of four documents: two pairs."""
KNOWN = [-4.0, -3.0, -0.5, -4.25]


def batch_of() -> tuple[Output, Batch]:
    labels, documents, logps = (torch.full((2, 8), value) for value in (IGNORE, -1, 0.0))
    documents, labels = documents.long(), labels.long()
    for number, values in enumerate(LOGPS):
        row, start = number // 2, 4 * (number % 2)
        documents[row, start : start + 1 + len(values)] = number
        labels[row, start : start + len(values)] = 7
        logps[row, start : start + len(values)] = torch.tensor(values)
    ids = torch.zeros_like(labels)
    signals = {REFERENCE: torch.tensor(KNOWN)}
    batch = Batch(
        input_ids=ids, labels=labels, position_ids=ids, documents=documents, signals=signals, num_rows=2, num_tokens=12, num_documents=4
    )
    return Output(logps=logps.requires_grad_()), batch


def sigmoid_loss(x: float) -> float:
    return math.log1p(math.exp(-x))


def closed_form(name: str, config: ObjectiveConfig) -> float:
    sums, counts, total = [sum(values) for values in LOGPS], [len(values) for values in LOGPS], 0.0
    for w, r in ((0, 1), (2, 3)):
        beta, mean_w, mean_r = config.beta, sums[w] / counts[w], sums[r] / counts[r]
        if name == "simpo":
            total += sigmoid_loss(beta * mean_w - beta * mean_r - config.margin)
            continue
        if name == "orpo":
            odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (mean_w, mean_r)]
            total += -mean_w + beta * sigmoid_loss(math.log(odds[0] / odds[1]))
            continue
        ratios = [sums[at] - (KNOWN[at] if name == "dpo" else 0.0) for at in (w, r)]
        if config.length_normalised:
            ratios = [ratio / counts[at] for ratio, at in zip(ratios, (w, r), strict=True)]
        h, eps = ratios[0] - ratios[1], config.label_smoothing
        if config.loss is PreferenceLoss.hinge:
            loss = max(0.0, 1 - beta * h)
        elif config.loss is PreferenceLoss.ipo:
            loss = (h - 1 / (2 * beta)) ** 2
        elif config.robust:
            loss = ((1 - eps) * sigmoid_loss(beta * h) - eps * sigmoid_loss(-beta * h)) / (1 - 2 * eps)
        else:
            loss = (1 - eps) * sigmoid_loss(beta * h) + eps * sigmoid_loss(-beta * h)
        total += loss - config.nll_weight * mean_w
    return total


FORMULAS = [
    ("dpo", {}),
    ("dpo", {"beta": 0.5, "loss": PreferenceLoss.hinge}),
    ("dpo", {"loss": PreferenceLoss.ipo, "length_normalised": True}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2, "robust": True}),
    ("dpo", {"nll_weight": 0.7, "length_normalised": True}),
    ("cpo", {"beta": 0.3, "nll_weight": 1.0}),
    ("simpo", {"beta": 2.5, "margin": 1.375}),
    ("orpo", {"beta": 0.2}),
]


@pytest.mark.parametrize(("name", "settings"), FORMULAS, ids=str)
def test_each_objective_is_its_formula(name: str, settings: dict[str, Any]) -> None:
    config = ObjectiveConfig(name=ObjectiveName(name), **settings)
    objective = make_objective(config, [REFERENCE])
    output, batch = batch_of()
    loss = objective(output, batch)
    assert float(loss.total) == pytest.approx(closed_form(name, config), rel=1e-6)
    loss.total.backward()
    assert output.logps.grad is not None
    assert (output.logps.grad[batch.labels == IGNORE] == 0).all()
    assert float(loss.figures["reward_margin"]) == pytest.approx(
        float(loss.figures["reward_chosen"] - loss.figures["reward_rejected"]), rel=1e-5
    )
    assert float(loss.figures["nll_chosen"]) == pytest.approx(3.75 / 3 + 0.125)
    assert 0 <= float(loss.figures["accuracy"]) <= 2
    assert objective.targets(Sizes(units=2, labels=8)) == 2


def test_a_microbatch_without_pairs_has_no_loss_and_a_graph() -> None:
    objective = make_objective(ObjectiveConfig(name=ObjectiveName.simpo), [])
    ids = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(input_ids=ids, labels=ids - 100, position_ids=ids, documents=ids - 1, num_rows=0, num_tokens=0, num_documents=0)
    logps = torch.zeros(1, 4, requires_grad=True)
    loss = objective(Output(logps=logps * 1.0), batch)
    loss.total.backward()
    assert float(loss.total) == 0
    assert logps.grad is not None


def test_log_odds_are_exact_at_both_ends() -> None:
    means = torch.tensor([-1e-6, -0.1, -math.log(2), -5.0, -60.0], dtype=torch.float64)
    exact = [math.log(math.exp(float(m)) / -math.expm1(float(m))) for m in means]
    assert log_odds(means.float()).tolist() == pytest.approx(exact, rel=1e-5, abs=1e-6)


def test_a_signal_that_the_rows_lack_is_named() -> None:
    with pytest.raises(ConfigError, match="reads reference"):
        make_objective(ObjectiveConfig(name=ObjectiveName.dpo), [])


def test_the_report_of_pairs_counts_them(tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "pairs.jsonl", [LAYOUTS["texts"]] * 3), "dpo")
    assert json.loads((data.path / "report.json").read_text())["layout"] == "preference"
    assert data.report["splits"]["train"]["pairs"] == 3
