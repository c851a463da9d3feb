"""Rows that are chosen by a score and by being unlike each other: by closed forms, for any number of processes, and after a failure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from curating import contents, lines, run, sentence, write
from local_server import JsonRequests, LocalServer

from tools.curate import diversity, pipeline
from tools.curate.config import Diversity, Quality, Settings
from tools.curate.job import Job
from tools.curate.quality import judge_of
from tools.curate.sets import vectors_of
from trainers.rewards.judged import CRITERIA, mean_scores

ANSWER = re.compile(r"<answer>\nAnswer (\d+)")


def of_plain_python(vectors: np.ndarray, relevance: np.ndarray, count: int, weight: float) -> list[int]:
    """Maximal marginal relevance, one row at a time, over similarities of integers."""
    similar = (vectors.astype(int) @ vectors.astype(int).T) / 127**2
    taken: list[int] = []
    for _ in range(count):
        values = {
            row: weight * relevance[row] - (1 - weight) * max([0.0, *similar[row, taken]])
            for row in range(len(vectors))
            if row not in taken
        }
        taken.append(max(values, key=lambda row: (values[row], -row)))
    return taken


@pytest.mark.parametrize(("rows", "count", "weight"), [(100, 40, 0.5), (80, 80, 0.0), (120, 50, 1.0), (10, 5, 0.3), (90, 50, 0.2)])
def test_the_rows_taken_are_those_of_a_plain_loop(rows: int, count: int, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "AT_ONCE", 16)
    rng = np.random.default_rng(rows)
    vectors = np.array([diversity.whole(rng.normal(size=12) + rng.integers(3)) for _ in range(rows)])
    vectors[5] = vectors[6]
    relevance = np.round(rng.random(rows), 1)
    assert diversity.choose(vectors, relevance, count, weight) == of_plain_python(vectors, relevance, count, weight)


@pytest.mark.parametrize("embedding", [False, True])
def test_diverse_rows_are_one_of_each_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedding: bool) -> None:
    monkeypatch.setattr(pipeline, "PART_BYTES", 5_000)
    rng = np.random.default_rng(1)
    subjects = [sentence(rng, 40).split() for _ in range(12)]
    rows = []
    for number in rng.permutation(60).tolist():
        words = list(subjects[number % 12])
        words[int(rng.integers(40))] = "changed"
        vector = np.eye(12)[number % 12] + rng.normal(size=12) / 100
        rows.append({"text": "x" if embedding else " ".join(words), "subject": number % 12, "score": number} | {"vector": vector.tolist()})
    file = write(tmp_path / "in.jsonl", rows)
    config = f"quality: {{field: score}}\ndiversity: {{rows: 12, relevance: 0.1{', embedding: vector' * embedding}}}"
    for processes in (1, 3):
        assert run(config, file, out=tmp_path / str(processes), processes=processes) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    stay = lines(tmp_path / "1" / "rows" / "in.jsonl")
    assert sorted(row["subject"] for row in stay) == list(range(12))
    assert min(row["score"] for row in stay) >= 24, "of a subject a good one"
    assert {row["reason"] for row in lines(tmp_path / "1" / "removed.jsonl")} == {"is not among the 12 most diverse rows"}


def test_the_best_share_of_the_scored_rows_stays(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "meta": {"score": number}} for number in (5, 1, 9, 7, 3, 8, 2, 6, 4, 0)]
    rows += [{"text": "none"}, {"text": "words", "meta": {"score": "high"}}]
    file = write(tmp_path / "in.jsonl", rows)
    for name, config, stay, unscored in (
        ("top", "top: 0.25", [9, 7, 8], 0),
        ("least", "least: 6", [9, 7, 8, 6], 0),
        ("both", "top: 0.5, least: 8, missing: keep", [9, 8], 2),
    ):
        assert run(f"quality: {{field: meta.score, {config}}}", file, out=tmp_path / name) == 0
        found = lines(tmp_path / name / "rows" / "in.jsonl")
        assert [row["meta"]["score"] for row in found[: len(found) - unscored]] == stay
        gone = lines(tmp_path / name / "removed.jsonl")
        assert sum("score" in row for row in gone) == 10 - len(stay)
        assert len(lines(tmp_path / name / "scores.jsonl")) == 10
    assert "has a score of 7.000, less than 8" in [row["reason"] for row in gone]


class Judging(JsonRequests):
    """Gives an answer its number modulo five, plus one, on all criteria; says something else of every seventh."""

    def do_GET(self) -> None:
        self.reply({"data": []})

    def do_POST(self) -> None:
        prompt = json.loads(self.body())["messages"][0]["content"]
        number = int(ANSWER.search(prompt)[1])  # type: ignore[index]
        self.server.asked.append(number)
        if len(self.server.asked) > self.server.answers:
            self.send_error(503)
            return
        said = "I like it." if number % 7 == 0 else f"So: {json.dumps(dict.fromkeys(CRITERIA, number % 5 + 1))}"
        self.reply({"choices": [{"message": {"role": "assistant", "content": said}}]})


class JudgeServer(LocalServer):
    requests = Judging

    def __init__(self, answers: int) -> None:
        self.answers, self.asked = answers, []
        super().__init__()


@pytest.mark.slow
def test_a_judge_that_goes_down_is_asked_only_for_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"Say {number}", "answer": f"Answer {number}"} for number in range(40)]
    file = write(tmp_path / "in.jsonl", rows)
    server = JudgeServer(answers=25)
    config = f"quality: {{by: judge, url: {server.url}/v1, model: any, top: 0.5, at_once: 4}}"
    with server.serving():
        assert run(config, file, out=tmp_path / "out") == 1
        assert "HTTP 503; the same command asks for them again" in capsys.readouterr().err
        answered, server.answers = set(server.asked[:25]), 10_000
        server.asked.clear()
        assert run(config, file, out=tmp_path / "out") == 0
        assert {number for number in server.asked if number % 7} == {number for number in range(40) if number % 7} - answered
    found = lines(tmp_path / "out" / "rows" / "in.jsonl")
    scored = sorted(-(number % 5 + 1) for number in range(40) if number % 7)
    assert sorted(-(int(row["answer"].split()[1]) % 5 + 1) for row in found) == scored[:17]
    assert [row["reason"] for row in lines(tmp_path / "out" / "removed.jsonl")].count("has no score") == 6
    assert run(config, file, out=tmp_path / "down") == 2
    assert "quality.url" in capsys.readouterr().err


def test_how_a_judge_is_asked_and_a_cut_line_lose_no_reply(tmp_path: Path) -> None:
    def key(**more: object) -> str:
        settings = Settings(quality=Quality(**({"by": "judge", "url": "http://a/v1", "model": "m"} | more)))
        return Job(settings, (), ()).key()

    assert key() == key(url="http://b/v1", timeout_s=900.0, at_once=1) != key(model="n")
    replies = tmp_path / "replies.jsonl"
    replies.write_text('{"index": 0, "scores')
    assert mean_scores([], judge_of(Quality(by="judge", url="http://localhost:1/v1", model="m")), replies).tolist() == []
    assert replies.read_text() == ""


def test_another_reward_model_in_the_same_folder_is_another_curation(tmp_path: Path) -> None:
    job = Job(Settings(quality=Quality(by="reward", model=str(tmp_path))), (), ())
    (tmp_path / "model.safetensors").write_text("one")
    before = job.key()
    (tmp_path / "model.safetensors").write_text("two")
    assert job.key() != before


def test_a_part_without_rows_has_no_embeddings() -> None:
    assert vectors_of([], [], Diversity(embedding="meta.vector")).shape == (0, 0)


@pytest.mark.slow
def test_a_reward_model_scores_rows_as_plain_transformers_does(tmp_path: Path, base: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for turn in messages %}<|im_start|>{{ turn['role'] }} {{ turn['content'] }} <|im_end|>{% endfor %}"
    torch.manual_seed(0)
    made = AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForSequenceClassification.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rng = np.random.default_rng(3)
    asked = [(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, int(rng.integers(2, 12))))) for _ in range(30)]
    rows = [{"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]} for one, other in asked]
    config = f"quality: {{by: reward, model: {tmp_path / 'model'}, top: 0.3}}"
    assert run(config, write(tmp_path / "in.jsonl", rows), out=tmp_path / "out") == 0
    with torch.no_grad():
        ids = [tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt") for row in rows]
        wanted = [float(model(**one).logits[0, 0]) for one in ids]
    found = [row["score"] for row in lines(tmp_path / "out" / "scores.jsonl")]
    assert found == pytest.approx(wanted, abs=1e-5)
    best = sorted(range(30), key=lambda row: -wanted[row])[:9]
    assert lines(tmp_path / "out" / "rows" / "in.jsonl") == [rows[row] for row in sorted(best)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("quality: true", "quality.by: field needs quality.field alone"),
        ("quality: {by: judge, url: http://localhost:1/v1}", "needs quality.url and quality.model"),
        ("quality: {by: reward, model: none, top: 0.5}", "holds no sequence-classification model"),
        ("quality: {field: score, missing: keep}", "keeps every row"),
        ("quality: {field: score, top: 2}", "is not between 0 and 1"),
        ("diversity: {rows: 0}", "is not between 1 and"),
        ("diversity: {rows: 1, embedding: vector}", "a row has no embedding"),
    ],
)
def test_a_wrong_choice_is_refused(tmp_path: Path, config: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, write(tmp_path / "in.jsonl", [{"text": "one"}, {"text": "two"}]), out=tmp_path / "out") == 2
    assert words in capsys.readouterr().err
