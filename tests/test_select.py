"""The best answers by reward become rows and pairs that the project trains on; what has no reward is counted and never taken."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tools.command import Refused
from tools.select import __main__ as select
from tools.select.choose import Limits, choose
from tools.select.rewards import read
from trainers.config.choices import Layout, RewardKind
from trainers.config.errors import ConfigError
from trainers.config.schema import RewardConfig
from trainers.data import fields
from trainers.data.formats import recognise, to_messages
from trainers.data.masks import CHATML
from trainers.data.preferences import to_preference
from trainers.rewards.score import Rewards
from trainers.rewards.shapes import NoReward, fits, require_known


def answer(text: str, question: str = "2 + 2?", **more: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt, "answer": text, "finish": "stop", "ids": [1] * len(text), "reference": "#### 4", "row": {}} | more


def column(rows: list[dict[str, Any]], text: str, folder: Path) -> tuple[list[float | None], dict[str, int]]:
    with Rewards(read([text]), folder) as rewards:
        found = rewards.score(rows)
    (values,), (failures,) = found.parts.values(), found.failures.values()
    return [None if math.isnan(value) else round(value, 6) for value in values], dict(failures)


def test_each_reward_by_hand(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer", "minimum": 2}}}')
    rows = [answer("so #### 4"), answer('{"a": 3}', reference="none"), answer('{"a": 1}', ids=None), answer("")]
    assert column(rows, "exact:extract=hashes", tmp_path) == ([1, None, 0, 0], {"the row has no reference": 1})
    assert column(rows, f"json:schema={tmp_path / 'schema.json'}", tmp_path) == ([0, 1, 0, 0], {})
    assert column(rows, "json", tmp_path) == ([None] * 4, {"the row has no schema": 4})
    assert column(rows, "length:min=2,max=8,soft=4,unit=characters", tmp_path) == ([0.75, 1, 1, 0.5], {})
    assert column(rows, "length:max=8", tmp_path)[0] == [0, 1, None, 1]
    assert column(rows, r"format:weight=2,pattern=so #+ \d{1,2}", tmp_path) == ([1, 0, 0, 0], {})


def test_a_function_that_fails_or_is_late_gives_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_select.py").write_text(
        "import time\n"
        "def value(row):\n"
        "    if row['answer'] == 'slow':\n"
        "        try:\n            time.sleep(20)\n        except Exception:\n            return 1\n"
        "    if row['answer'] == 'exit':\n        raise SystemExit(3)\n"
        "    if row['answer'] == 'deaf':\n        try:\n            time.sleep(20)\n        except:\n            time.sleep(20)\n"
        "    return {'nan': float('nan')}.get(row['answer']) or len(row['answer']) / (row['answer'] != 'bad')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [answer(text) for text in ("good!", "slow", "nan", "bad", "exit", "deaf", "good")]
    found, failures = column(rows, "function:path=mine_for_select:value,timeout_s=0.2", tmp_path)
    assert found == [5, None, None, None, None, None, 4]
    raised = {"raises ZeroDivisionError: division by zero": 1, "raises SystemExit: 3": 1}
    assert failures == {"takes longer than 0.2 s": 2, "is not a finite number": 1} | raised
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_function_whose_module_cannot_be_imported_is_refused_by_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text, said in (
        ("raising_mine", "raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("bad_mine", "def", "Syntax"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(ConfigError, match=rf"`reward\.own\.path` = '{name}:value'.*could not be imported: {said}"):
            Rewards({"own": RewardConfig(kind=RewardKind.function, path=f"{name}:value")}, tmp_path)


def test_scoring_ends_where_it_is_to_stop(tmp_path: Path) -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 3:
            raise InterruptedError

    with Rewards(read(["length:max=8"]), tmp_path) as rewards, pytest.raises(InterruptedError):
        rewards.score([answer("a")] * 9, look)
    assert len(looks) == 3


@pytest.mark.slow
@pytest.mark.for_real
def test_mathematics_is_compared_as_mathematics(tmp_path: Path) -> None:
    """Where math-verify is installed."""
    pytest.importorskip("math_verify")
    pairs = [(r"\boxed{\frac{1}{2}}", r"so \boxed{0.5}"), ("$x^2+1$", "It is $1+x^2$."), ("4", "5"), ("words", "4"), ("", "4")]
    rows = [answer(text, reference=reference) for reference, text in pairs]
    found, failures = column(rows, "math", tmp_path)
    assert found == [1, 1, 0, None, None]
    assert failures == {"the reference is not mathematics": 1, "the row has no reference": 1}
    found, failures = column([answer("$9^{9^{9^9}}$", reference="$3$")], "math:timeout_s=6", tmp_path)
    assert (found, failures) == ([None], {"takes longer than 6 s": 1})


@pytest.mark.for_real
def test_a_comparison_that_hangs_costs_its_own_reward_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own limit: math-verify's, which call what they end different, are off."""
    (tmp_path / "math_verify.py").write_text(
        "import time\n"
        "def parse(text, parsing_timeout=0):\n    time.sleep(0 if parsing_timeout == 0 or text != 'slow' else 60)\n    return [text]\n"
        "def verify(one, other, timeout_seconds=0):\n    assert timeout_seconds is None\n    return one == other\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    found, failures = column([answer("5"), answer("slow"), answer("#### 4")], "math:timeout_s=1", tmp_path)
    assert (found, failures) == ([0, None, 1], {"takes longer than 1 s": 1})


def test_mathematics_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.rewards.mathematics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        column([answer("4")], "math", tmp_path)


SCHEMA = {"type": "array", "items": {"enum": ["x", 1]}, "minItems": 1, "maxItems": 2}


@pytest.mark.parametrize(
    ("value", "wanted", "is_right"),
    [
        (["x", 1], SCHEMA, True),
        ([], SCHEMA, False),
        (["x"] * 3, SCHEMA, False),
        ([True], SCHEMA, False),
        (2.0, {"type": "integer"}, True),
        (True, {"type": ["number", "null"]}, False),
        ({"a": 1, "b": 2}, {"properties": {"a": True}, "additionalProperties": False}, False),
        ({"a": "t"}, {"additionalProperties": {"const": "t"}}, True),
        (11, {"maximum": 10}, False),
    ],
)
def test_what_a_schema_takes(value: Any, wanted: dict[str, Any], is_right: bool) -> None:
    assert fits(value, wanted) == is_right


def test_a_schema_with_an_unknown_word_is_refused_also_deep_inside() -> None:
    with pytest.raises(NoReward, match="oneOf"):
        require_known({"properties": {"a": {"items": {"oneOf": []}}}})


@pytest.mark.parametrize(
    "wanted",
    [
        {"properties": []},
        {"enum": 3},
        {"minimum": "1"},
        {"maxItems": True},
        {"required": "a"},
        {"required": [[]]},
        {"items": []},
        {"type": {}},
        {"type": [["null"]]},
        {"type": "text"},
        "{",
    ],
    ids=str,
)
def test_a_schema_that_is_none_gives_no_reward(wanted: Any, tmp_path: Path) -> None:
    for row in ({"schema": wanted}, {"schema": wanted if wanted == "{" else {"items": wanted}}):
        found, failures = column([answer('[{"a": 1}]', row=row)], "json", tmp_path)
        assert found == [None]
        assert "schema" in next(iter(failures))


def test_the_best_are_chosen_and_each_text_once() -> None:
    rows = [answer(text) for text in ("a", "b", "b", "c", "d", " ", "e")] + [answer("only", question="other?")]
    rows[4]["finish"] = "length"
    total = [0.2, 1.0, 0.9, 0.5, 2.0, 3.0, math.nan, 0.1]
    chosen = choose(rows, total, Limits(threshold=0.3, per_prompt=1, pairs_per_prompt=2))
    assert chosen.best == [1]
    assert chosen.pairs == [(1, 0)]  # the second best is not above what is left
    assert (chosen.prompts, chosen.without) == (2, 1)
    left = {"was cut": 1, "is another's text": 1, "is empty": 1, "has no reward": 1}
    assert chosen.left == left | {"is below the threshold": 2, "is not among the best of its prompt": 1}
    assert sum(chosen.left.values()) + len(chosen.best) == len(rows)
    assert choose(rows, total, Limits(per_prompt=3, keep_cut=True, cap=2)).best == [1, 4]
    assert choose(rows, total, Limits(margin=0.9)).pairs == []


def test_an_answer_without_a_reward_leaves_the_others_in_order() -> None:
    chosen = choose([answer(text) for text in "abc"], [0.1, math.nan, 0.9], Limits())
    assert (chosen.best, chosen.pairs) == ([2], [(2, 0)])
    assert chosen.left == {"has no reward": 1, "is not among the best of its prompt": 1}


def test_chosen_rows_and_pairs_are_ones_that_the_project_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("#### 5", "#### 4", "so #### 4", "#### 3")
    rows = [answer(text, question=f"{n}?", sample=n, line=n, file="f", tools=[{"type": "function"}]) for n in range(3) for text in texts]
    answers, out, pairs = (tmp_path / name for name in ("answers.jsonl", "best.jsonl", "pairs.jsonl"))
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(answers), "--reward", "exact", "--reward", "length:max=6,soft=10,weight=0.1", "--out", str(out), "--pairs", str(pairs)]
    assert select.main([*words, "--threshold", "1"]) == 0
    said = capsys.readouterr().out
    assert "3 of 12 answers of 3 prompts" in said
    assert "3 pairs" in said
    best, paired = ([json.loads(line) for line in file.read_text().splitlines()] for file in (out, pairs))
    for number, (row, pair) in enumerate(zip(best, paired, strict=True)):
        assert recognise(row) is Layout.messages
        fields.check(row, Layout.messages)
        assert [turn["content"] for turn in to_messages(row, Layout.messages)] == [f"{number}?", "#### 4"]
        assert row["reward"] == pytest.approx(1.1)
        assert row["rewards"] == {"exact": 1, "length": 1}
        assert row["from"] == {"at": f"{answers}:{number * 4 + 2}", "file": "f", "line": number, "sample": number}
        assert row["tools"] == pair["tools"] == [{"type": "function"}]
        fields.check(pair, recognise(pair))
        found = to_preference(pair)
        assert [found.chosen[0]["content"], found.rejected[0]["content"]] == ["#### 4", "#### 3"]
        assert pair["from"][1]["at"] == f"{answers}:{number * 4 + 4}"
    told = json.loads(Path(f"{out}.json").read_text())
    assert told["parts"]["exact"] == {"mean": 0.5, "chosen": 1.0, "failures": {}}


def test_wrong_input_is_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (
        "exakt",
        "exact:how=x",
        "exact:extract=(",
        r"exact:extract=\d+",
        "code:timeout_s=inf",
        "code:processes=0.5",
        "code:memory_mib=0",
        "code:disk_mib=-1",
        "math:timeout_s=nan",
        "exact:weight=nan",
        "length:soft=-1",
        "length:max=x",
        "length:unit=miles",
        "format",
        "format:pattern=(",
        "function:path=no.such",
        "judge:url=x",
    ):
        with pytest.raises((ConfigError, Refused), match=text.split(":")[0]):
            Rewards(read([text]), tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": []}\n')
    for file, expected in ((bad, "bad.jsonl:1"), (tmp_path / "none", "no such file")):
        assert select.main([str(file), "--reward", "exact", "--out", str(tmp_path / "out")]) == 2
        assert expected in capsys.readouterr().err
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(answer("x")) + "\n")
    assert select.main([str(good), "--reward", "exact", "--out", str(tmp_path / "out"), "--margin", "-1"]) == 2
    assert "--margin" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_model_without_a_chat_template_is_refused_by_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(chat_template=None, name_or_path="a/model")
    monkeypatch.setattr("trainers.rewards.scored.AutoTokenizer", SimpleNamespace(from_pretrained=lambda folder: tokenizer))
    monkeypatch.setattr("trainers.rewards.scored.reopen_scores", lambda *_: SimpleNamespace(to=lambda device: None))
    with pytest.raises(ConfigError, match=r"`reward\.good\.path` = 'a/model'.*no chat template"):
        Rewards({"good": RewardConfig(kind=RewardKind.model, path="a/model")}, tmp_path)


def test_a_reward_model_scores_an_empty_answer_like_any_other(base: Path, tmp_path: Path) -> None:
    """Also after an empty turn of the model; each is the conversation with its answer, as plain transformers scores it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    again = [{"role": "assistant", "content": ""}, {"role": "user", "content": "the mat"}]
    rows = [answer(text, "the cat") for text in ("", " ", "sat on a mat")]
    rows.append(answer("", prompt=[*rows[0]["prompt"], *again]))
    with Rewards(read([f"model:path={tmp_path}"]), tmp_path) as rewards:
        found, of_none = rewards.score(rows), rewards.score([])
    assert found.reasons["model"] == [""] * 4
    assert of_none.total.tolist() == []
    for row, reward in zip(rows, found.total, strict=True):
        turns = [*row["prompt"], {"role": "assistant", "content": row["answer"]}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert reward == pytest.approx(float(model(input_ids=ids).logits[0, 0]), abs=1e-5)
    assert len(set(np.round(found.total, 6))) >= 3
    assert choose(rows, found.total.tolist(), Limits()).left["is empty"] == 3
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    assert column(rows[:2], f"model:path={tmp_path}", tmp_path) == ([None, None], {"is not a finite number": 2})
