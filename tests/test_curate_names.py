"""Names of persons, found by a token-classification model of this directory: masked as other personal data are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from curating import lines, run, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from tools.curate import pipeline
from tools.curate.config import Personal, Settings
from tools.curate.job import Job

WORDS = "alice bob kim met in paris at [ ] email 1 _ x . , and 김철수 wrote to @ example com".split()  # noqa: SIM905
PERSONS = {"alice", "bob", "kim", "김철수"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model without layers: each token's embedding says whether it is a person's name. It is 16 tokens wide."""
    folder = tmp_path_factory.mktemp("names")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    labels = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
    sizes = {"hidden_size": 4, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 16}
    made = BertForTokenClassification(BertConfig(vocab_size=len(vocabulary), id2label=labels, **sizes))
    with torch.no_grad():
        embeddings = made.bert.embeddings
        for part in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            part.weight.zero_()
        for word, number in vocabulary.items():
            embeddings.word_embeddings.weight[number] = torch.eye(4)[1 if word in PERSONS else 3 if word == "paris" else 0]
        made.classifier.weight.copy_(5 * torch.eye(4))
        made.classifier.bias.zero_()
    made.save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_names_are_masked_by_one_placeholder_a_row(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PART_BYTES", 200)
    long = "met in Paris and " * 9
    rows = [
        chat("Alice met Bob in Paris.", "bob wrote to Alice, and to alice@example.com"),
        chat("In Paris.", "At 1."),
        chat(f"{long}김철수", f"{long}Kim"),
    ]
    wanted = [
        chat("[NAME_1] met [NAME_2] in Paris.", "[NAME_2] wrote to [NAME_1], and to [EMAIL_1]"),
        rows[1],
        chat(f"{long}[NAME_1]", f"{long}Kim"),
    ]
    config = f"personal: {{names: {model}, allow: [Kim]}}"
    file = write(tmp_path / "in.jsonl", rows)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        assert run(config, file, out=out, processes=processes) == 0
        assert lines(out / "rows" / "in.jsonl") == wanted
        report = json.loads((out / "report.json").read_text())
        assert report["steps"]["personal"] == {"removed": 0, "changed": 2}
        assert "Alice" not in (out / "report.html").read_text()
    assert (tmp_path / "1" / "changed.jsonl").read_bytes() == (tmp_path / "2" / "changed.jsonl").read_bytes()
    assert run(f"personal: {{names: {model}, action: drop}}", file, out=tmp_path / "dropped") == 0
    assert lines(tmp_path / "dropped" / "rows" / "in.jsonl") == [rows[1]]


def test_what_finds_no_names_is_refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "in.jsonl", [{"text": "one"}])
    assert run("personal: {names: none}", file, out=tmp_path / "out") == 2
    assert "holds no token-classification model" in capsys.readouterr().err
    other = json.loads((model / "config.json").read_text()) | {"id2label": {"0": "O", "1": "B-LOC"}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    assert run(f"personal: {{names: {tmp_path / 'other'}}}", file, out=tmp_path / "out") == 2
    assert "has no label for persons: LOC, O" in capsys.readouterr().err


def test_another_model_in_the_same_folder_is_another_curation(tmp_path: Path) -> None:
    job = Job(Settings(personal=Personal(names=str(tmp_path))), (), ())
    (tmp_path / "model.safetensors").write_text("one")
    before = job.key()
    (tmp_path / "model.safetensors").write_text("two")
    assert job.key() != before
