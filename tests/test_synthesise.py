"""Rows that a model writes have their method's form and their origin; what filters take is counted, and a stopped command continues."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
from chat_tokenizers import TOKENS, tokenizer_of
from command import ROOT, environment, wait_for
from synthesising import (
    SENTENCE,
    Scripted,
    kinds,
    reference_rouge_l,
    report,
    save_bigrams,
    scripted,
    synthesise,
    write_rows,
)

from tools.synthesise import __main__ as command
from tools.synthesise.bm25 import Index
from tools.synthesise.methods.documents import quoted
from tools.synthesise.methods.magpie import Header
from tools.synthesise.prompts import FOLDER, listed, marked
from tools.synthesise.similar import Pool, rouge_l
from tools.synthesise.work import Reply
from trainers.config.choices import Layout
from trainers.data.formats import recognise, to_messages
from trainers.data.preferences import to_preference
from trainers.data.template import fill, template_of
from trainers.generate.request import LENGTH, STOP

TEN = [{"question": f"Why does the {number}. cat sit on the mat?", "answer": f"It is warm there, {number}."} for number in range(10)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with scripted() as url:
        yield url


@pytest.fixture
def server(url: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Scripted.faults, Scripted.asked = [], []
    return [f"model.path={url}", "model.name=m"]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return f"source={write_rows(tmp_path / 'rows.jsonl', TEN)}"


def test_rouge_l_is_the_textbooks() -> None:
    """Of texts with words in common, in any order; the pool finds the largest, and a limit is met exactly."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(["the", "Cat", "sat", "on", "a", "mat", "3.5"], k=draw.randint(1, 12))) for _ in range(60)]
    for text, other in zip(texts, reversed(texts), strict=True):
        assert rouge_l(text, other) == pytest.approx(reference_rouge_l(text, other), abs=1e-12)
    pool = Pool()
    for text in texts[:40]:
        pool.add(text)
    for text in texts[40:]:
        largest = max(reference_rouge_l(text, other) for other in texts[:40])
        assert pool.reaches(text, 0.0) == pytest.approx(largest, abs=1e-12)
        assert pool.reaches(text, largest - 1e-6) is not None
        assert pool.reaches(text, largest + 1e-6) is None
    ten = Pool()
    ten.add("a b c d e f g h i j")
    assert ten.reaches("a b c d e f g x y z", 0.7) == 0.7  # 0.7 is not below 0.7
    assert ten.reaches("한국어 낱말도 낱말이다", 0.7) is None


def test_replies_are_read_by_their_form() -> None:
    assert listed("Sure:\n1. one\n   more of it\n2) two\n\n- three\n4. four", 3) == ["one more of it", "two", "three"]
    assert listed("no list here", 3) == []
    assert marked("**Question:** a\nb\nQuote: c\nanswer: d: e", "Question|질문", "Quote", "Answer") == ["a\nb", "c", "d: e"]
    assert marked("질문: 가\n답: 나", "Question|질문", "Answer|답") == ["가", "나"]
    assert marked("Output: x\nInput: y", "Input", "Output") is None
    assert quoted("sat  on\nthe mat", SENTENCE)
    assert not quoted("sat on a mat", SENTENCE)
    assert not quoted("the", SENTENCE)


def test_prompts_of_both_languages_ask_for_the_same() -> None:
    names = {path.name for path in (FOLDER / "en").iterdir()}
    assert names == {path.name for path in (FOLDER / "ko").iterdir()}
    for name in sorted(names):
        texts = [(FOLDER / language / name).read_text("utf-8") for language in ("en", "ko")]
        assert len({frozenset(Template(text).get_identifiers()) for text in texts}) == 1, name
        assert re.search("[가-힣]", texts[1]) or name == "context.txt"


@pytest.mark.parametrize("name", ["chatml", *(name for name in TOKENS if name != "chatml")])
def test_magpie_begins_and_ends_a_users_turn_as_the_template_does(name: str) -> None:
    """Ids before the content are those of the rendered conversation; what the template writes after it, and any header, ends it."""
    tokenizer = tokenizer_of(name)
    template = template_of(tokenizer, "chat template")
    assert template is not None
    header = Header(template, tokenizer)
    answered = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    system = [{"role": "system", "content": "Be brief."}]
    for before in ([], answered, system, [*system, *answered]):
        turns = [*before, {"role": "user", "content": "Say hi."}]
        rendered = fill(template, turns, None, add_generation_prompt=True)
        start, after = header.around(before)
        assert rendered == f"{start}Say hi.{after}"
        ids = header.ids(before)
        assert tokenizer.encode(rendered, add_special_tokens=False)[: len(ids)] == ids
        assert tokenizer.decode(ids) == start.rstrip(" ")
        assert header.content(before, Reply(0, f" Say hi.{after}Of course.", LENGTH)) == "Say hi."
        assert header.content(before, Reply(0, "Say hi.", STOP)) == "Say hi."
        assert header.content(before, Reply(0, "Say hi and", LENGTH)) is None


def test_magpie_asks_a_server_in_ids(server: list[str], tmp_path: Path) -> None:
    """Two turns of the user, each cut where the template ends it; tokens are counted here."""
    Scripted.tokenizer = tokenizer_of("inst")
    Scripted.tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [*server, f"model.tokenizer={tmp_path / 'tokenizer'}", "magpie.turns=2", "magpie.round=4", "rows=6"]
    found = synthesise("magpie", out := tmp_path / "out.jsonl", *words)
    assert len(found) == 6
    for row in found:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
        assert all(re.fullmatch(r"Say( word[a-j]{6}){6}", turn["content"]) for turn in row["messages"][::2])
        assert all(re.fullmatch(r"An answer \d+\.", turn["content"]) for turn in row["messages"][1::2])
        assert (len(row["from"]["requests"]), row["from"]["turns"]) == (4, 2)
    assert Scripted.asked[0] == "<s>[INST]"
    last = next(text for text in Scripted.asked if text.count("[INST]") == 2)
    assert re.fullmatch(r"<s>\[INST\] Say [\w ]+ \[/INST\] An answer \d+\. </s>\[INST\]", last)
    assert report(out)["prompt_tokens"] == sum(len(Scripted.tokenizer.encode(text, add_special_tokens=False)) for text in Scripted.asked)


def test_tasks_are_new_and_classification_has_its_label_first(
    server: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Faults of a server are asked again, a refused request is counted, and money is what its usage costs."""
    Scripted.faults = [500, 200]
    seeds = write_rows(
        tmp_path / "seeds.jsonl",
        [{"instruction": f"Tell the mood of text {number}", "output": "good"} for number in range(6)],
    )
    out = tmp_path / "out.jsonl"
    prices = ["cost.prompt=0.5", "cost.answer=2", "cost.currency=EUR"]
    found = synthesise("self_instruct", out, *server, f"source={seeds}", "rows=30", "self_instruct.round=4", *prices)
    assert len(found) == 30
    for row in found:
        prompt, answer = (turn["content"] for turn in to_messages(row, recognise(row)))
        assert row["from"]["method"] == "self_instruct"
        assert len(row["from"]["examples"]) == 3
        assert len(row["from"]["requests"]) == 2
        assert (answer == "good") == row["from"]["classification"] == ("mood" in prompt)
    about = report(out)
    assert about["rows"] == 30
    assert about["money"] == pytest.approx((about["prompt_tokens"] * 0.5 + about["answer_tokens"] * 2) / 1000)
    assert about["removed"] == {}
    said = capsys.readouterr().out
    assert re.search(r"about 64 requests, [\d,]+ prompt tokens and at most 32,768 answer tokens: at most about [\d.]+ EUR", said)
    assert f"30 rows: {out}" in said
    assert "EUR" in said.splitlines()[-1]
    texts = [row["messages"][0]["content"] for row in found]
    assert max(reference_rouge_l(one, other) for one in texts for other in texts if one != other) < 0.7
    asked = len(Scripted.asked)
    assert synthesise("self_instruct", out, *server, f"source={seeds}", "rows=30", "self_instruct.round=4", *prices) == found
    assert len(Scripted.asked) == asked
    assert "there already" in capsys.readouterr().out


def test_a_server_that_goes_down_is_asked_for_the_rest_alone(
    server: list[str], rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The money ends it too. Rows are those of a command that nothing has stopped."""
    words = [*server, rows, "answers.n=2", "model.at_once=1"]
    whole = synthesise("answers", tmp_path / "whole.jsonl", *words)
    assert len(whole) == 20
    Scripted.asked.clear()
    Scripted.faults = [0] * 7 + [500] * 40
    out = tmp_path / "out.jsonl"
    assert synthesise("answers", out, *words, "model.attempts=1", expect=1) == []
    assert "replies of answers are missing: HTTP 500 (10), not asked" not in (said := capsys.readouterr().err)
    assert "13 replies of answers are missing: HTTP 500 (10)" in said
    Scripted.faults = []
    assert synthesise("answers", out, *words, "cost.prompt=10", "cost.most=0.001", expect=1) == []
    assert "are spent, and cost.most is 0.001" in capsys.readouterr().err
    assert synthesise("answers", out, *words, "cost.prompt=10", "cost.most=100") == whole
    assert len(Scripted.asked) == 7 + 10 + 13
    assert synthesise("answers", out, *words, "seed=1", expect=2) == whole
    assert "holds other answers" in capsys.readouterr().err


def test_money_ends_a_command_within_a_round(server: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 100 requests those of the slices that the money pays for; a server that reports no tokens has them estimated."""
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"no usage, number {number}"} for number in range(100)])
    words = [*server, f"source={prompts}", "model.at_once=2", "cost.answer=1000"]
    out = tmp_path / "out.jsonl"
    assert synthesise("answers", out, *words, "cost.most=300", expect=1) == []
    asked = len(Scripted.asked)
    assert asked % 8 == 0
    assert 8 <= asked < 60
    assert "cost.most is 300" in capsys.readouterr().err
    found = synthesise("answers", out, *words)
    assert len(found) == len(Scripted.asked) == 100
    sizes = [len(row["messages"][1]["content"]) // 4 for row in found]
    assert report(out)["answer_tokens"] == sum(sizes)


def test_each_method_writes_rows_that_training_reads(server: list[str], rows: str, tmp_path: Path) -> None:
    """With what each filter removed; of rows, requests and removals nothing is lost."""
    document = tmp_path / "docs"
    document.mkdir()
    (document / "a.md").write_text("The river is long and green. It ends in the sea.\n\nHills are near.\n")
    (document / "b.txt").write_text("A lamp burns all night. Nobody knows why.")

    found = synthesise("evol_instruct", out := tmp_path / "evol.jsonl", *server, rows, "evol_instruct.rounds=2")
    removed = report(out)["removed"]
    evolved = [row for row in found if "operations" in row["from"]]
    assert len(found) == 10 + len(evolved)
    assert len(evolved) + sum(removed.values()) == 20
    assert removed["eliminated: equal to its instruction, as the model says"] > 0
    assert {len(row["from"]["operations"]) for row in evolved} <= {1, 2}
    assert all(row["messages"][0]["content"] != row["from"]["instruction"] for row in evolved)

    found = synthesise("documents", out := tmp_path / "qa.jsonl", *server, f"source={document}", "documents.context=true")
    assert [Path(row["from"]["document"]["file"]).name for row in found] == ["a.md", "b.txt"]
    assert all(row["from"]["quote"] in row["messages"][0]["content"] for row in found)
    assert report(out)["removed"] == {"questions: the quote is not in the passage": 2, "questions: no quote or no answer": 2}

    for name in ("paraphrase", "back_translation"):
        found = synthesise(name, out := tmp_path / f"{name}.jsonl", *server, rows)
        copies = [row for row in found if "original" not in row["from"]]
        assert len(found) == 10 + len(copies)
        assert 10 < len(copies) <= 20
        assert len(copies) + sum(report(out)["removed"].values()) == 20
        for row in found:
            before = TEN[row["from"]["row"]["line"] - 1]
            assert row["messages"][1]["content"] == before["answer"]
            assert re.findall(r"\d\.", row["messages"][0]["content"])[:1] or "original" not in row["from"]
    assert kinds(copies, "language").keys() == {"German", "Japanese"}

    found = synthesise("personas", tmp_path / "tree.jsonl", *server, "tree.breadth=2", "tree.personas=2", "language=ko")
    assert {row["from"]["topic"][0] for row in found} == set((FOLDER / "ko" / "topics.txt").read_text().splitlines()[1:])
    assert {len(row["from"]["topic"]) for row in found} == {2}
    assert all(row["from"]["persona"].startswith("word") for row in found)

    found = synthesise("critique", tmp_path / "critique.jsonl", *server, rows, "critique.pairs=true", "critique.initial=row")
    pairs = [to_preference(row) for row in found]
    assert all(recognise(row) is Layout.preference for row in found)
    assert [pair.rejected[0]["content"] for pair in pairs] == [row["answer"] for row in TEN]
    assert all(len(row["from"]["principles"]) == 1 and len(row["from"]["requests"]) == 2 for row in found)

    found = synthesise("safety", tmp_path / "safety.jsonl", *server)
    assert kinds(found, "kind")["harmful"] == kinds(found, "kind")["harmless"] > 10
    assert all(row["messages"][1]["content"].startswith("I'm sorry") == (row["from"]["kind"] == "harmful") for row in found)


def test_bm25_is_its_formula() -> None:
    """By hand, for two words of three passages, and against a plain loop over random ones."""
    index = Index(["a b b", "b c", "d d d d"])
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)
    longer = [1.5 * (0.25 + 0.75 * size / 3) for size in (3, 2, 4)]
    assert index.scores("A b?").tolist() == pytest.approx(
        [rare * 2.5 / (1 + longer[0]) + common * 5 / (2 + longer[0]), common * 2.5 / (1 + longer[1]), 0.0], abs=1e-12
    )
    draw = random.Random(0)
    texts = [draw.choices("abcdefgh", k=draw.randint(1, 20)) for _ in range(30)]
    mean = sum(map(len, texts)) / len(texts)
    found = Index([" ".join(words) for words in texts]).scores("a c c z")
    for words, score in zip(texts, found, strict=True):
        expected = 0.0
        for word in "accz":
            having = sum(word in other for other in texts)
            times = words.count(word)
            expected += math.log(1 + (30 - having + 0.5) / (having + 0.5)) * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * len(words) / mean))
        assert score == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("absent", ["answer", "say_so"])
def test_raft_rows_have_one_document_that_answers_or_none(server: list[str], tmp_path: Path, absent: str) -> None:
    """The golden one is quoted by its number; distractors are the nearest, without the quote; a row does not depend on the others."""
    texts = [f"Lamp {at} is {'green' if at % 3 else 'red'} and stands near river {at // 2}. Nobody knows why." for at in range(40)]
    texts += texts[:5]
    source = write_rows(tmp_path / "docs.jsonl", [{"text": text} for text in texts])
    words = [*server, f"source={source}", "raft.distractors=3", "raft.without=0.3", f"raft.absent={absent}"]
    found = synthesise("raft", out := tmp_path / "out.jsonl", *words)
    removed = report(out)["removed"]
    assert len(found) + removed["answer: the quote is not in the passage"] == 45
    golden = [row for row in found if row["from"]["golden"] is not None]
    assert 0 < len(found) - len(golden) < len(found) / 2
    places = [row["from"]["golden"] for row in golden]
    assert set(places) == {1, 2, 3, 4}
    for row in found:
        prompt, answer = (turn["content"] for turn in to_messages(row, recognise(row)))
        of = row["from"]
        shown = re.findall(r"^Document \d+:\n(.*?)\n\n", prompt, re.MULTILINE | re.DOTALL)
        assert shown == [texts[place["line"] - 1] for place in of["documents"]]
        assert len(set(shown)) == len(shown) == 4
        having = [number for number, text in enumerate(shown, 1) if of["quote"] in text]
        assert having == ([] if of["golden"] is None else [of["golden"]])
        if of["golden"] is None:
            assert answer == ("The documents do not answer this question." if absent == "say_so" else of["answer"])
        else:
            assert answer.startswith(f'Document {of["golden"]} says: "{of["quote"]}"')
            assert answer.endswith(f"Answer: {of['answer']}")
    assert synthesise("raft", tmp_path / "few.jsonl", *words, "rows=5") == found[:5]


def test_raft_levels_are_a_question_with_each_number_of_distractors(server: list[str], tmp_path: Path) -> None:
    texts = [f"Lamp {at} is {'green' if at % 3 else 'red'} and stands near river {at // 2}. Nobody knows why." for at in range(12)]
    source = write_rows(tmp_path / "docs.jsonl", [{"text": text} for text in texts])
    found = synthesise("raft", tmp_path / "out.jsonl", *server, f"source={source}", "raft.distractors=3", "raft.levels=true")
    assert len(found) % 4 == 0
    for at in range(0, len(found), 4):
        of = [row["from"] for row in found[at : at + 4]]
        assert [one["distractors"] for one in of] == [0, 1, 2, 3]
        assert len({(one["quote"], one["answer"]) for one in of}) == 1
        places = [[place["line"] for place in one["documents"]] for one in of]
        assert all(set(fewer) < set(more) for fewer, more in itertools.pairwise(places))
        for row, lines in zip(found[at : at + 4], places, strict=True):
            assert len(re.findall(r"(?m)^Document [0-9]+:", row["messages"][0]["content"])) == len(lines)
            assert row["from"]["quote"] in texts[lines[row["from"]["golden"] - 1] - 1]


def test_raft_levels_are_whole_questions_and_none_is_there_twice(server: list[str], tmp_path: Path) -> None:
    """Three passages leave two distractors at most, and the limit on rows takes no part of a question."""
    texts = [f"Lamp {at} is {'green' if at % 3 else 'red'} and stands near river {at // 2}. Nobody knows why." for at in range(12)]
    source = write_rows(tmp_path / "docs.jsonl", [{"text": text} for text in texts])
    words = [*server, f"source={source}", "raft.distractors=3", "raft.levels=true"]
    found = synthesise("raft", tmp_path / "six.jsonl", *words, "rows=6")
    assert [row["from"]["distractors"] for row in found] == [0, 1, 2, 3]
    few = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in texts[:3]])
    found = synthesise("raft", tmp_path / "out.jsonl", *server, f"source={few}", "raft.distractors=3", "raft.levels=true")
    assert found
    assert [row["from"]["distractors"] for row in found] == [0, 1, 2] * (len(found) // 3)


def test_a_judge_filters_and_the_least_alike_rows_stay(server: list[str], rows: str, tmp_path: Path) -> None:
    url = server[0].removeprefix("model.path=").replace("//", "//me:s3cret@")
    judge = ["judge={url: '%s', model: j, least: 3}" % url, "diversity={rows: 3}"]  # noqa: UP031
    found = synthesise("answers", out := tmp_path / "out.jsonl", f"model.path={url}", *server[1:], rows, *judge)
    assert "s3cret" not in out.read_text() + Path(f"{out}.json").read_text(), "neither the writer's nor the judge's"
    assert len(found) == 3
    assert all(row["score"] >= 3 for row in found)
    removed = report(out)["removed"]
    assert removed["judge: a score below 3"] + removed["diversity: not among the rows that are least alike"] == 7
    assert not list(tmp_path.glob("*.asked"))


def test_refused_requests_are_counted_and_no_row_is_an_error(server: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": Scripted.refused}, {"prompt": "Say something."}])
    found = synthesise("answers", out := tmp_path / "out.jsonl", *server, f"source={prompts}")
    assert [row["from"]["row"]["line"] for row in found] == [2]
    assert report(out)["failed"] == {"answers: HTTP 400": 1}
    assert report(out)["removed"] == {"answer: failed": 1}
    assert synthesise("answers", tmp_path / "none.jsonl", *server, f"source={prompts}", "filters.answer_least=1000", expect=1) == []
    assert "removed: answer: shorter than 1000 characters (1)" in capsys.readouterr().err


def test_a_dry_run_shows_costs_and_asks_nothing(server: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "conf/synthesise/topics.yaml"), *server, "cost.answer=1", "--out", str(tmp_path / "out.jsonl"), "--dry-run"]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    assert "about 1,310 requests" in said
    assert "List 5 different subtopics" in said
    assert Scripted.asked == []
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_one_clear_message(server: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"completion": "y"}\n')
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "paraphrase.txt").write_text("Say $txt again")
    local = [f"model.path={base}"]
    seeds = f"source={write_rows(tmp_path / 'rows.jsonl', TEN)}"
    cases = [
        ("answers", [], "`model.path` = None", "model.path=runs/mine"),
        ("answers", local, "answers begins with rows of any layout", "source=FILE"),
        ("answers", ["model.path=http://h/v1"], "nothing says which model", "model.name=NAME"),
        ("answers", [*local, "model.name=x", seeds], "goes with a server", "leave it out"),
        ("answers", [*local, seeds, "model.temperature=-1"], "`model.temperature` = -1", ""),
        ("answers", [*local, seeds, "answers.m=2"], "`answers.m` = 2", "settings are n, system"),
        ("answers", [*local, seeds, "answers.n=two"], "`answers.n` = 'two'", "default is 1"),
        ("answers", [*local, seeds, "answers.n=0"], "is not between 1", "answers.n: 1"),
        ("answers", [*local, seeds, "rows"], "is not KEY=VALUE", "model.path=runs/mine"),
        ("answers", [*local, seeds, "rowss=3"], "`rowss` = 3", "did you mean rows?"),
        ("answers", [*local, seeds, "magpie.turns=2"], "settings of another method", "method: magpie"),
        ("answers", [*local, seeds, "method=magpi"], "is not a method", "did you mean magpie?"),
        ("answers", [*local, seeds, "language=de"], "is not one of en, ko", ""),
        ("answers", [*local, f"source={tmp_path / 'bad.jsonl'}"], "bad.jsonl:1 has no", "rows with `messages`"),
        ("answers", [*local, seeds, "judge={least: 3}"], "a judge needs judge.url", "judge.url="),
        ("evol_instruct", [*local, seeds, "evol_instruct.operations=[deepn]"], "is not one of constraints", "did you mean deepen?"),
        ("paraphrase", [*local, seeds, f"prompts={tmp_path / 'own'}"], "has a name without a value: 'txt'", "$text"),
        ("critique", [*local, seeds, "critique.principles=none.txt"], "no such file", "an entry a line"),
        ("magpie", [*local, "rows=null"], "would never end", "rows=1000"),
        ("raft", [*local, seeds, "rows=2", "raft.levels=true", "raft.distractors=2"], "a question is 3 rows", "raft.distractors=1"),
        ("magpie", [*local], "has no chat template", "a model that was trained on conversations"),
        ("magpie", server, "a server that renders messages takes none", "model.tokenizer=DIR"),
        ("safety", [*local, seeds], "safety begins with categories", "safety.categories=FILE"),
        ("topics", [*local, "source=none.txt"], "cannot be read", "an entry a line"),
        ("topics", ["model.path=runs/none"], "`model.path` = 'runs/none'", ""),
    ]
    for preset, words, reason, remedy in cases:
        synthesise(preset, tmp_path / "out.jsonl", *words, expect=2)
        said = capsys.readouterr().err
        assert said.startswith("error: `"), said
        assert reason in said, (words, said)
        assert remedy in said, (words, said)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_killed_synthesis_ends_with_the_rows_of_one_that_was_not(cache: Path, tmp_path: Path) -> None:
    """Of a real model of this machine, in rounds that depend on each other; killed in the middle of a round, with another batch after."""
    model = save_bigrams(tmp_path / "model", **{"1.": 8.0, "Input:": 4.0})
    words = [f"model.path={model}", "model.max_new_tokens=50", "model.top_p=1", "rows=8", "self_instruct.round=4", "self_instruct.idle=50"]

    def line(out: Path, *more: str) -> list[str]:
        preset = "conf/synthesise/self_instruct.yaml"
        return [sys.executable, "-m", "tools.synthesise", preset, *words, *more, "--out", str(out)]

    def run(out: Path, *more: str) -> str:
        done = subprocess.run(line(out, *more), cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=150, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    whole, out, part = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    run(whole)
    rows = [json.loads(text) for text in whole.read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["messages"][1]["content"] and row["from"]["requests"] for row in rows)
    about = report(whole)
    assert about["removed"]["tasks: no list in the reply"] > 0
    assert about["answer_tokens"] > about["requests"]
    with subprocess.Popen(line(out, "model.batch=1"), cwd=ROOT, env=environment(cache), start_new_session=True) as process:
        wait_for(lambda: part.exists() and len(part.read_bytes().splitlines()) > about["requests"] // 2)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    kept = len(part.read_bytes().splitlines())
    assert about["requests"] // 2 < kept < about["requests"]
    run(out, "model.batch=5")
    assert out.read_bytes() == whole.read_bytes()
    again = report(out)
    assert {name: again[name] for name in again if name != "key"} == {name: about[name] for name in about if name != "key"}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_each_method_with_a_real_model(tmp_path: Path) -> None:
    """Random words in the forms that prompts ask for: format, origins and counts of each method, twice the same."""
    lists, free = save_bigrams(tmp_path / "lists", **{"1.": 40.0}), save_bigrams(tmp_path / "free")
    questions = save_bigrams(tmp_path / "questions", **{"Question:": 40.0})
    reasons = save_bigrams(tmp_path / "reasons", **{"Question:": 40.0, "Quote:": 40.0})
    source = f"source={write_rows(tmp_path / 'rows.jsonl', TEN)}"
    (tmp_path / "doc.md").write_text(f"{SENTENCE}. {SENTENCE}~. " * 40 + "Far away there are hills and rivers and green lamps. " * 9)
    loose = ["paraphrase.numbers=false", "back_translation.numbers=false"]
    methods = [
        ("answers", free, [source]),
        ("evol_instruct", free, [source]),
        ("documents", questions, [f"source={tmp_path / 'doc.md'}", "documents.characters=100", "filters.instruction_least=3"]),
        (
            "raft",
            reasons,
            [
                f"source={tmp_path / 'doc.md'}",
                "raft.characters=100",
                "raft.distractors=2",
                "raft.without=0.5",
                "filters.instruction_least=3",
            ],
        ),
        ("paraphrase", free, [source, loose[0]]),
        ("back_translation", free, [source, loose[1]]),
        ("magpie", free, ["rows=20", "magpie.turns=2"]),
        ("topics", lists, ["tree.breadth=2", "tree.depth=1"]),
        ("personas", lists, ["tree.breadth=2", "tree.depth=1"]),
        ("critique", free, [source]),
        ("safety", save_bigrams(tmp_path / "safety", **{"1.": 14.0, "I'm sorry, but I can't help with that.": 14.0}), []),
    ]
    for name, model, words in methods:
        more = [f"model.path={model}", "model.max_new_tokens=60", "model.top_p=1", *words]
        found = synthesise(name, out := tmp_path / f"{name}.jsonl", *more)
        print(name, len(found), report(out)["removed"])
        assert found
        for row in found:
            assert all(turn["content"].strip() for turn in to_messages(row, recognise(row)))
            assert row["from"]["method"] == report(out)["settings"]["method"]
        assert synthesise(name, tmp_path / f"{name}.again.jsonl", *more, "model.batch=3") == found
