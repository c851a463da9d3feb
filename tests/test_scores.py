"""Scores of answers are what their definitions say, by hand and by an independent reference."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tools.evaluate import intervals, record, say
from tools.evaluate.scores import common_length, is_json, is_refusal, repetition, rouge_l, score
from trainers.config.choices import Metric
from trainers.config.schema import EvaluationConfig, plain
from trainers.rewards.matches import exact_match, extract

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = 72 clips altogether.\n#### 72"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("#### 72", 1.0),
        ("So it is 70.\n#### 72.0", 1.0),
        ("#### $72", 1.0),
        ("#### 72 clips in all", 1.0),
        ("#### 71\nno, wait:\n#### 72", 1.0),
        ("72", 0.0),  # where the reference is marked, an answer that is not was not told apart from its working
        ("#### 27", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_answers_are_the_number_behind_the_marks(answer: str, score: float) -> None:
    assert exact_match(answer, GSM8K) == score


@pytest.mark.parametrize(
    ("text", "how", "found"),
    [
        ("#### 1,234,567", "hashes", "1234567"),
        ("#### -3.50", "hashes", "-3.5"),
        ("#### .5", "hashes", "0.5"),
        ("#### -0", "hashes", "0"),
        ("#### -$5", "hashes", "-5"),
        ("so 3-2", "number", "2"),
        ("x = -3", "number", "-3"),
        ("from 3 to 4,000.25 dollars", "number", "4000.25"),
        ("none here", "number", None),
        ("  Paris \n is  It", "whole", "paris is it"),
        ("   ", "whole", None),
        ("(A) no; answer: (B)", r"\(([A-D])\)", "b"),
        ("nothing", r"\(([A-D])\)", None),
        ("the answer is 007", r"is (\d+)", "7"),
    ],
)
def test_extracts(text: str, how: str, found: str | None) -> None:
    assert extract(text, how) == found


def test_a_reference_without_an_extract_says_nothing() -> None:
    assert exact_match("72", "no number at all", "number") is None
    assert exact_match("no number either", "7", "number") == 0.0


def test_rouge_l_of_lins_own_examples() -> None:
    # Lin 2004, section 3.1: S1 police killed the gunman; S2 police kill the gunman: 3/4; S3 the gunman kill police: 2/4
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert rouge_l("Police, KILLED the gunman!", "police killed the gunman") == 1.0
    assert rouge_l("", "police") == 0.0
    assert rouge_l("안녕 하세요 반가워", "안녕 반가워") == pytest.approx(0.8)  # of any script
    assert rouge_l("我爱你", "我恨你") == pytest.approx(2 / 3)


def table(one: list[int], other: list[int]) -> int:
    """The textbook's table of longest common subsequences."""
    row = [0] * (len(other) + 1)
    for item in one:
        row = [0, *row[1:]]
        before = 0
        for at, word in enumerate(other, 1):
            before, row[at] = row[at], before + 1 if item == word else max(row[at], row[at - 1])
    return row[-1]


def test_common_subsequences_are_the_textbooks() -> None:
    rng = random.Random(0)
    for _ in range(300):
        one, other = ([rng.randint(0, 4) for _ in range(rng.randint(0, 90))] for _ in range(2))
        assert common_length(one, other) == table(one, other)


def test_json_is_json_and_nothing_around_it() -> None:
    assert is_json(' {"a": [1, 2]}\n') == 1.0
    assert is_json("[]") == 1.0
    assert is_json("[" * 100_000) == 0.0
    for text in ('```json\n{"a": 1}\n```', '{"a": 1', "3", '"text"', "{'a': 1}", ""):
        assert is_json(text) == 0.0
    assert score(Metric.json, "[]", "", "auto") == 1.0


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([7] * 10) == pytest.approx(6 / 7)  # seven 4-grams, one of a kind
    assert repetition([1, 2, 3]) == 0.0


def test_refusals_are_told_by_how_they_begin() -> None:
    for text in (
        "I'm sorry, but I can't help with that.",
        "I cannot do this.",
        "As an AI language model, I",
        "Sorry, no.",
        "I’m unable to",
    ):
        assert is_refusal(text)
    for text in ("Return the apology string.", "I can help.", "The function cannot fail.", "", "Sorry is a word."):
        assert not is_refusal(text)


def test_scores_by_what_is_counted_in_the_prompt_and_openings_of_answers(tmp_path: Path) -> None:
    """By hand: 10 prompts of one document, all answered rightly, and 10 of three, of which 4 are; 16 of 20 answers begin alike."""
    settings = EvaluationConfig(metrics=[Metric.exact_match], extract="Answer: (.*)", count_in_prompt="(?m)^Document [0-9]+:")
    answers = []
    for number in range(20):
        shown = "\n".join(f"Document {at}:\nwords" for at in range(1, 2 if number < 10 else 4))
        opening = "The document says" if number < 16 else f"Number {number} has"
        said = f"<think>Answer: 9</think>{opening} so. Answer: {number if number < 14 else 0}"
        row = {"document": number, "prompt": shown, "reference": f"It is. Answer: {number}", "answer": said}
        answers.append(record.scored(row | {"finished": True, "tokens": 9, "reasoning": 4, "repetition": 0.0}, settings))
    evaluation = record.write(tmp_path / "evaluation", "run", {"settings": plain(settings)}, {"answers": answers})
    by_count = evaluation.score_by_count("exact_match")
    assert {count: (found.value, found.count) for count, found in by_count.items()} == {1: (1.0, 10), 3: (0.4, 10)}
    figures = json.loads((tmp_path / "evaluation" / "run.json").read_text())["figures"]
    assert [found["count"] for found in figures["exact_match_by_count"]] == [1, 3]
    assert figures["same_opening"] == record.as_json(intervals.share(16, 20))
    assert figures["same_opening_of_references"]["value"] == 1.0
    assert figures["answer_reasoning"] == 4.0
    lines = {row[0]: row[2] for row in say._scores(evaluation, None)}
    assert lines["exact_match, 3 in the prompt"].startswith("0.400")
    assert lines["of these reasoning"] == "4"
