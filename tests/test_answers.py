"""Answers that are wanted or not, and ranked lists: read from every layout, counted, and paired by a rule that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import marked, prepared, write

from trainers.config.choices import PairsOf
from trainers.config.derived import DESIRABLE
from trainers.config.errors import ConfigError
from trainers.data.mismatched import all_mismatched, longest_row, mismatched, partners_of
from trainers.data.report import summary

HI, BYE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Bye"}
OTHER = {"prompt": "Bye", "completion": "so long", "label": False}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def judged(tmp_path: Path, *rows: dict[str, Any], **data: Any) -> Any:
    return prepared(write(tmp_path / "judged.jsonl", list(rows)), "kto", **data)


UNPAIRED = {
    "texts": {"prompt": "Hi", "completion": "good", "label": True},
    "a text for true": {"prompt": "Hi", "response": "good", "label": "True"},
    "one for true": {"prompt": "Hi", "completion": "good", "label": 1},
    "turns": {"prompt": [HI], "completion": [says("good")], "label": True},
    "a conversation": {"messages": [HI, says("good")], "label": True},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "good"}], "label": True},
}


@pytest.mark.parametrize("layout", UNPAIRED)
def test_every_unpaired_layout_gives_the_same_document(layout: str, tmp_path: Path) -> None:
    table = judged(tmp_path, UNPAIRED[layout], OTHER).train
    before = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert marked(table)[0].strip() == f"{before}⟦good<|im_end|>⟧"
    assert table.signals[DESIRABLE].tolist() == [1, 0]
    assert table.units is None


def test_only_the_last_answer_of_a_conversation_is_judged(tmp_path: Path) -> None:
    table = judged(tmp_path, {"messages": [HI, says("Hello"), BYE, says("good")], "label": False}, OTHER).train
    assert marked(table)[0].split("⟦")[1].startswith("good")
    assert "Hello" in marked(table)[0].split("⟦")[0]


def test_pairs_are_an_answer_that_is_wanted_and_one_that_is_not(tmp_path: Path) -> None:
    data = judged(tmp_path, *({"prompt": f"Hi {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)))
    assert data.train.signals[DESIRABLE].tolist() == [1, 0] * 3
    assert "3 answers are wanted, 3 are not" in summary(data.report)
    for document, partner in enumerate(data.train.partners):
        assert document // 2 != partner // 2, "an answer to its own prompt is no mismatch"


BAD = {
    "no label": ({"prompt": "Hi", "completion": "good", "label": None}, "has no `label`"),
    "another label": ({"prompt": "Hi", "completion": "good", "label": 2}, "neither true nor false"),
    "no completion": ({"prompt": "Hi", "completion": None, "label": True}, "has no `response`"),
    "an empty answer": ({"prompt": "Hi", "completion": " ", "label": True}, "empty assistant turn"),
    "no answer": ({"messages": [HI, says("a"), HI], "label": True}, "no answer of the assistant"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_is_not_judged_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        judged(tmp_path, UNPAIRED["texts"], BAD[case][0])
    assert "judged.jsonl:2" in str(caught.value)
    assert BAD[case][1] in str(caught.value)


def test_rows_that_do_not_fit_the_objective_are_refused_by_name(tmp_path: Path) -> None:
    chats = write(tmp_path / "chats.jsonl", [{"messages": [HI, says("good")]}])
    with pytest.raises(ConfigError, match="rows of layout messages have none"):
        prepared(chats, "kto")
    with pytest.raises(ConfigError, match="more than half of the train rows have one prompt"):
        judged(tmp_path, *(UNPAIRED["texts"] | {"completion": f"good {n}"} for n in range(3)), OTHER)
    ranked = write(tmp_path / "ranked.jsonl", [RANKED["responses"]])
    with pytest.raises(ConfigError, match="rows are lists of answers"):
        prepared(ranked, "sft")
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "Hi", "chosen": "good", "rejected": "bad"}])
    with pytest.raises(ConfigError, match="of layout preference have none"):
        prepared(pairs, "dpo", pairs=PairsOf.all)


# The baseline's documents.


def test_partners_are_a_permutation_without_an_answer_to_the_same_prompt() -> None:
    assert partners_of(np.arange(5, dtype=np.uint64)).tolist() == [1, 2, 3, 4, 0]
    groups = np.array([7, 7, 3, 9, 3, 7, 1, 9], np.uint64)
    partners = partners_of(groups)
    assert sorted(partners) == list(range(8))
    assert (groups[partners] != groups).all()
    assert partners_of(np.array([7, 7, 3], np.uint64)) is None
    assert partners_of(np.zeros(0, np.uint64)) is None


@pytest.mark.parametrize("packing", [True, False])
def test_mismatched_documents_are_a_prompt_and_the_answer_to_another(packing: bool, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Question {n} {'why ' * n}", "completion": f"answer {n} " + "yes " * (3 * n), "label": n % 2 == 0} for n in range(7)
    ]
    table = judged(tmp_path, *rows, packing=packing, seq_len=256 if packing else 64, max_lost_fraction=0.9).train
    (other,) = all_mismatched(table)
    for document, text in enumerate(marked(other)):
        partner = int(table.partners[document])
        prompt, answer = text.split("⟦")[0], text.split("⟦")[1].split("⟧")[0]
        assert prompt == marked(table)[document].split("⟦")[0]
        assert marked(table)[partner].split("⟦")[1].startswith(answer)
    assert int(other.row_lengths().max()) <= int(table.row_lengths().max())
    assert (len(other) < len(other.offsets) - 1) == packing
    some = mismatched(table, np.array([5, 2, 5]), longest_row(table))
    assert marked(some) == [marked(other)[number] for number in (5, 2, 5)]


# Ranked lists.

ANSWERS = {"best": 5.0, "good": 4.0, "fair": 4.0, "bad": 1.0}
RANKED = {
    "responses": {"prompt": "Hi", "responses": ["fair", "best", "bad", "good"], "scores": [4, 5, 1, 4]},
    "ranks": {"prompt": [HI], "responses": ["fair", "best", "bad", "good"], "ranks": [2, 1, 4, 2]},
    "UltraFeedback": {
        "instruction": "Hi",
        "completions": [{"model": "m", "response": text, "overall_score": ANSWERS[text]} for text in ("fair", "best", "bad", "good")],
    },
    "Nectar": {
        "prompt": "\n\nHuman: Hi\n\nAssistant: ",
        "answers": [{"answer": text, "rank": 6 - ANSWERS[text]} for text in ("fair", "best", "bad", "good")],
    },
}
RULES = {
    PairsOf.best_worst: ["best", "bad"],
    PairsOf.all: ["best", "fair", "best", "good", "best", "bad", "fair", "bad", "good", "bad"],
    PairsOf.neighbours: ["best", "fair", "good", "bad"],
}


@pytest.mark.parametrize("layout", RANKED)
@pytest.mark.parametrize("rule", RULES)
def test_ranked_lists_become_pairs_by_a_rule(layout: str, rule: PairsOf, tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "ranked.jsonl", [RANKED[layout]]), "dpo", pairs=rule)
    answers = [text.split("⟦")[1].removesuffix("<|im_end|>⟧\n").removesuffix("<|im_end|>⟧") for text in marked(data.train)]
    assert [text.split("<")[0] for text in answers] == RULES[rule]
    assert data.train.units.tolist() == [number // 2 for number in range(len(answers))]
    assert data.report["layout"] == "ranked"
    equal = 0 if rule is PairsOf.best_worst else 1
    assert data.report["equal"] == equal
    assert not equal or "1 pair of a ranked list with one score" in summary(data.report)


def test_a_random_answer_below_the_best_is_drawn_by_the_prompt(tmp_path: Path) -> None:
    rows = [RANKED["responses"] | {"prompt": f"Hi {number}"} for number in range(12)]
    table = prepared(write(tmp_path / "ranked.jsonl", rows), "dpo", pairs=PairsOf.best_random).train
    drawn = [text.split("⟦")[1].split("<")[0] for text in marked(table)]
    assert set(drawn[0::2]) == {"best"}
    assert set(drawn[1::2]) == {"good", "fair", "bad"}
    assert table.units[-1] == 11


UNRANKED = {
    "one answer": ({"prompt": "Hi", "responses": ["a"], "scores": [1]}, "has 1 answer in `responses`"),
    "too few scores": ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1]}, "2 answers in `responses` and 1 numbers in `scores`"),
    "no number": ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, "high"]}, "answer 2 has a `score` that is 'high'"),
    "no score": ({"prompt": "Hi", "answers": [{"text": "a", "rank": 1}, {"text": "b"}]}, "answer 2 has no score"),
    "no prompt": ({"responses": ["a", "b"], "scores": [1, 2]}, "has no `prompt`"),
    "empty": ({"prompt": "Hi", "responses": ["a", " "], "scores": [1, 2]}, "empty assistant turn"),
}


@pytest.mark.parametrize("case", UNRANKED)
def test_a_list_that_ranks_nothing_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(write(tmp_path / "ranked.jsonl", [RANKED["responses"], UNRANKED[case][0]]), "dpo")
    assert "ranked.jsonl:2" in str(caught.value)
    assert UNRANKED[case][1] in str(caught.value)
