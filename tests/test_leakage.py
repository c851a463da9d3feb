"""A glance at rows where they are prepared: planted copies, openings and long texts are counted, and so is what held-out rows share."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import TOKENIZER, prepared, settings, write
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trainers.config.schema import DataConfig, SourceConfig
from trainers.data.encode import special_tokens
from trainers.data.glance import Glance, opening_of, runs, sketches
from trainers.data.prepare import prepare
from trainers.data.report import summary, warnings

LETTERS = random.Random(0)
SPREAD = {"<pad>": 0, "a": 7, "b": 3000}
WORDS = ["".join(LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(4000)]


def row(draw: random.Random, question: str = "", answer: str = "") -> dict[str, Any]:
    asked, said = (" ".join(draw.choices(WORDS, k=count)) for count in (12, 60))
    return {"messages": [{"role": "user", "content": question or asked}, {"role": "assistant", "content": answer or said}]}


def answer_of(one: dict[str, Any]) -> str:
    return str(one["messages"][1]["content"])


def question_of(one: dict[str, Any]) -> str:
    return str(one["messages"][0]["content"])


def changed(text: str, places: int) -> str:
    """Return a text with some words in its middle replaced, next to each other, so that few runs change."""
    words = text.split()
    return " ".join(words[:30] + ["zuzu"] * places + words[30 + places :])


def jaccard(one: list[int], other: list[int]) -> float:
    """Return the similarity of two documents by plain sets of runs of five tokens without marks of turns."""
    special = set(TOKENIZER.get_added_vocab().values())
    sets = [{run for at in range(len(ids) - 4) if not special & set(run := tuple(ids[at : at + 5]))} for ids in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def ids_of(one: dict[str, Any]) -> list[int]:
    return list(TOKENIZER(TOKENIZER.apply_chat_template(one["messages"], tokenize=False))["input_ids"])


def test_what_held_out_rows_share_is_found_and_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(1)
    trained, held_out = [row(draw) for _ in range(300)], [row(draw) for _ in range(60)]
    held_out[0] = row(draw, question_of(trained[5]).upper(), answer_of(trained[5]).replace(" ", "  "))  # the same text but for case
    for number in (1, 2, 3):
        held_out[number] = row(draw, question_of(trained[number]) + " zu", changed(answer_of(trained[number]), 1))
    held_out[4] = row(draw, question_of(trained[40]).title())
    held_out[5] = row(draw, question_of(trained[50]) + " zu", changed(answer_of(trained[50]), 30))  # too different
    similar = [jaccard(ids_of(held_out[number]), ids_of(trained[number])) for number in (1, 2, 3)]
    assert min(similar) > 0.8 > jaccard(ids_of(held_out[5]), ids_of(trained[50])) > 0.2
    data = prepared(write(tmp_path / "t.jsonl", trained), seq_len=1024, eval_path=str(write(tmp_path / "e.jsonl", held_out)))
    found = data.report["leakage"]
    assert {key: found[key] for key in ("documents", "text", "near", "prompt", "any", "not_compared")} == {
        "documents": 60,
        "text": 1,
        "near": 3,
        "prompt": 2,
        "any": 5,
        "not_compared": 0,
    }
    pairs = {held: (other, similarity) for held, other, similarity in found["pairs"]}
    # runs that every row has, such as a role and its line end, do not count
    assert pairs == {number: (number, pytest.approx(similar[number - 1], abs=0.003)) for number in (1, 2, 3)}
    assert "of 60 held-out documents 1 have the text of a trained one, 3 nearly" in summary(data.report)
    assert any("leakage" in line and "--" not in line and "tools.curate" in line for line in warnings(data.report))


def test_a_long_system_prompt_makes_no_two_rows_alike(tmp_path: Path) -> None:
    draw = random.Random(2)
    system = {"role": "system", "content": " ".join(draw.choices(WORDS, k=200))}
    rows = [{"messages": [system, *row(draw, answer=" ".join(draw.choices(WORDS, k=12)))["messages"]]} for _ in range(120)]
    assert jaccard(ids_of(rows[0]), ids_of(rows[1])) > 0.8
    found = prepared(write(tmp_path / "t.jsonl", rows), seq_len=2048, eval_fraction=0.2).report["leakage"]
    assert found["documents"] == 24
    assert found["any"] == 0


def test_copies_openings_and_long_texts_are_counted_and_warned_of(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [row(draw, answer=f"As an AI {draw.random()}" if number < 40 else "") for number in range(100)]
    rows += [row(draw, question_of(rows[50]), answer_of(rows[50])) for _ in range(8)] + [row(draw, question_of(rows[60])) for _ in range(2)]
    data = prepared(write(tmp_path / "t.jsonl", rows), seq_len=300, max_lost_fraction=0.9)
    seen = data.report["glance"]
    long = sum(len(ids_of(one)) > 300 for one in rows)
    assert 0.4 * 110 < long < 110
    assert {key: seen[key] for key in ("documents", "copies", "same_prompt", "texts", "long", "answers")} == {
        "documents": 110,
        "copies": 8,
        "same_prompt": 10,
        "texts": 110,
        "long": long,
        "answers": 110,
    }
    assert seen["openings"][0] == {"text": "as an ai", "answers": 40}
    assert [line.split(" ")[0] for line in warnings(data.report)] == ["7.3%", "36.4%", f"{long / 110:.1%}"]
    assert "leakage" not in data.report
    clean = prepared(write(tmp_path / "clean.jsonl", [row(draw) for _ in range(50)]), seq_len=1024, eval_fraction=0.1).report
    assert warnings(clean) == []


def test_pieces_of_a_text_and_texts_without_answers_are_not_taken_for_copies(tmp_path: Path) -> None:
    draw = random.Random(4)
    texts = [{"text": " ".join(draw.choices(WORDS, k=800))} for _ in range(3)]
    report = prepared(write(tmp_path / "t.jsonl", texts), objective="cpt", too_long="split", seq_len=64, eval_fraction=0.1).report
    assert report["glance"]["documents"] > 30
    assert (report["glance"]["copies"], report["glance"]["answers"], report["leakage"]["any"]) == (0, 0, 0)


def test_a_mixture_says_what_one_source_trains_of_what_another_holds_out(tmp_path: Path) -> None:
    draw = random.Random(5)
    one, other = [row(draw) for _ in range(40)], [row(draw) for _ in range(40)]
    files = [write(tmp_path / "one.jsonl", one), write(tmp_path / "other.jsonl", [*other, *one[:30]])]
    config = settings(files[0], eval_fraction=0.2, seq_len=1024)
    mix = {name: SourceConfig(path=str(file)) for name, file in zip(("one", "other"), files, strict=True)}
    data = DataConfig(mix=mix, prepared_dir=config.data.prepared_dir, eval_fraction=0.2, seq_len=1024, processes=1, packing=False)
    report = prepare(replace(config, data=data), tokenizer=TOKENIZER).report
    alone = [part["leakage"]["any"] for part in report["sources"].values()]
    assert alone == [0, 0]
    assert report["leakage"]["text"] == report["leakage"]["any"] == report["leakage"]["prompt"]
    splits = {
        name: prepare(settings(file, eval_fraction=0.2, seq_len=1024), tokenizer=TOKENIZER) for name, file in zip(mix, files, strict=True)
    }
    texts = {(name, split): documents(getattr(part, split)) for name, part in splits.items() for split in ("train", "eval")}
    expected = sum(text in texts["one", "train"] | texts["other", "train"] for name in mix for text in texts[name, "eval"].elements())
    assert report["leakage"]["text"] == expected > 0


def documents(table: Any) -> Counter[tuple[int, ...]]:
    return Counter(tuple(table.tokens[start:end].tolist()) for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True))


def test_a_sketch_is_the_least_key_of_each_bin_and_estimates_the_similarity() -> None:
    rng = np.random.default_rng(0)
    special = np.zeros(1000, bool)
    special[7] = True
    tokens = rng.integers(8, 1000, 900).astype(np.int32)
    tokens[100] = 7
    lengths = np.array([400, 3, 0, 497])
    keys, document = runs(tokens, lengths, special)
    assert Counter(document.tolist()) == {0: 400 - 4 - 5, 3: 497 - 4}
    whole = sketches(tokens, lengths, special)
    for number in range(4):
        mine = keys[document == number]
        for place, least in enumerate(whole[number].tolist()):
            found = [key & 0xFFFFFFFF for key in mine.tolist() if key >> 32 == place]
            assert least == min(found, default=0xFFFFFFFF)


def test_rare_openings_are_forgotten_and_frequent_ones_are_not() -> None:
    whole = Glance()
    for part in range(20):
        whole.update(Glance(1000, 0, 1000, Counter({f"rare {part} {number}": 1 for number in range(990)} | {"often": 10})))
    assert whole.openings["often"] == 200
    assert len(whole.openings) <= 4000
    assert opening_of("  As an   AI\nmodel, I") == "as an ai"
    assert opening_of("Yes.<|im_end|>\n") == "yes."


def test_ids_may_have_gaps() -> None:
    backend = Tokenizer(models.WordLevel(SPREAD, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    assert np.flatnonzero(special_tokens(tokenizer)).tolist() == [0]
    assert len(special_tokens(tokenizer)) == 3001
