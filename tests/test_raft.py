"""A model that is trained among distractors answers where they are shown, and one that is trained without them does not.

The rows are those of `tools.synthesise raft`, trained on by the launcher and measured by `tools.evaluate`, as docs/synthesis.md and
docs/evaluation.md have it. Facts are drawn anew for each corpus, so that what a model knows of one does not answer another.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, environment, launch
from conftest import save_tiny
from local_server import LocalServer
from synthesising import Scripted, synthesise, write_rows

from trainers.rundir.rows import read_rows, steps

FIRST = ("Ba", "Do", "Fi", "Ga", "Ke", "Lu", "Ma", "Ni", "Po", "Ra", "Se", "Tu")
SECOND = ("na", "ro", "si", "mu", "le", "ti", "va", "po", "da", "ge", "ki", "lo", "ne", "ra", "su", "to")
NAMES = tuple(first + second for first in FIRST for second in SECOND)
CODES = tuple(first + middle + last for first in "bdfgklmn" for middle in "aeiou" for last in "xz")
LENGTH = 5
"""Words of a code. A model learns to find a passage from each of them that it copies."""
CORPORA, HELD_OUT, DISTRACTORS, STEPS = 60, 1, 2, 3000
FACT = re.compile(r"Code of (\w+) ((?:\w+ ?)+)\.")


class Facts(Scripted):
    """A teacher that knows only the passage that it is shown."""

    def said(self, text: str, seed: int) -> str:
        passage = text.split("Passage:\n")[1].split("\n\n")[0]
        found = FACT.fullmatch(passage)
        assert found is not None, passage
        name, code = found.groups()
        answer = code.split()[0]
        if "Reasoning: what follows" in text:
            return f'Quote: "{passage}"\nReasoning: It is there.\nAnswer: {answer}'
        return f"Question: What is the code of {name}?\nQuote: {passage}\nAnswer: {answer}"


class FactsServer(LocalServer):
    requests = Facts
    request_queue_size = 64


def corpus(folder: Path, number: int) -> Path:
    """Facts in an order of their own: of passages that are as near to a question BM25 takes the first."""
    draw = random.Random(number)
    names = draw.sample(NAMES, len(NAMES))
    rows = [{"text": f"Code of {name} {' '.join(draw.sample(CODES, LENGTH))}."} for name in names]
    return write_rows(folder / f"corpus-{number}.jsonl", rows)


def save_words(folder: Path) -> Path:
    """A Llama of random weights, each of whose tokens is a word, a digit or a mark."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [(ROOT / "tools" / "synthesise" / "prompts" / "en" / f"{name}.txt").read_text() for name in ("raft", "raft_answer")]
    texts += [*NAMES, *CODES, "Document 1 2 3 4 : What is the code of ? Code . It there"]
    pattern = r"\w+|[^\w\s]|\n"
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "\n"]
    words = dict.fromkeys([*special, *(word for text in texts for word in re.findall(pattern, text))])
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_key_value_heads": 4}
    save_tiny(folder, tied=True, vocab_size=len(fast), max_position_embeddings=256, initializer_range=0.05, **sizes)
    fast.save_pretrained(folder)
    return folder


def require_raft(rows: list[dict[str, Any]], count: int) -> None:
    """Each row shows its golden document among others that have another name; the answer quotes it by its number."""
    for row in rows:
        prompt, answer = (turn["content"] for turn in row["messages"])
        shown = FACT.findall(prompt)
        name = re.search(r"What is the code of (\w+)\?", prompt)
        assert name is not None
        assert [other for other, _ in shown].count(name[1]) == 1
        assert len(dict(shown)) == len(shown) == count + 1
        at = [other for other, _ in shown].index(name[1])
        assert answer.startswith(f'Document {at + 1} says: "Code of {name[1]} {shown[at][1]}."')
        assert answer.endswith(f"Answer: {shown[at][1].split()[0]}")


@pytest.mark.soak
@pytest.mark.timeout(5400)  # half an hour on two idle cores
def test_a_model_trained_among_distractors_beats_one_trained_without(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data: dict[str, list[dict[str, Any]]] = {"among": [], "alone": [], "levels": []}
    server = FactsServer()
    with server.serving():
        teacher = [f"model.path={server.url}/v1", "model.name=m", "raft.questions=1", "raft.without=0", "filters.similar=1"]
        for number in range(CORPORA + HELD_OUT):
            words = [*teacher, f"source={corpus(tmp_path, number)}"]
            kinds = {"among": [f"raft.distractors={DISTRACTORS}", "raft.levels=true"], "alone": ["raft.distractors=0"]}
            if number >= CORPORA:
                kinds = {"levels": [f"raft.distractors={DISTRACTORS}", "raft.levels=true"]}
            for kind, more in kinds.items():
                data[kind] += synthesise("raft", tmp_path / f"{kind}-{number}.jsonl", *words, *more)
    require_raft(data["alone"], 0)
    for level in range(DISTRACTORS + 1):
        for kind in ("among", "levels"):
            require_raft(data[kind][level :: DISTRACTORS + 1], level)
    assert len(data["among"]) == (DISTRACTORS + 1) * len(data["alone"]) == (DISTRACTORS + 1) * CORPORA * len(NAMES)
    files = {kind: write_rows(tmp_path / f"{kind}.jsonl", rows) for kind, rows in data.items()}

    base, found = save_words(tmp_path / "base"), {}
    for kind in ("among", "alone"):
        train(cache, tmp_path / kind, base, files[kind], f"train.steps={STEPS}", f"train.eval_every={STEPS}", "optim.lr=1.5e-3")
        figures = evaluate(cache, tmp_path / kind, files["levels"], len(data["levels"]))
        found[kind] = {row["count"]: row for row in figures}
        assert found[kind].keys() == {*range(1, DISTRACTORS + 2)}
    print(json.dumps(found, indent=1))
    assert found["alone"][1]["value"] > 0.9  # it has learned to answer by one document
    for count in range(2, DISTRACTORS + 2):
        assert found["among"][count]["low"] > found["alone"][count]["high"], count


def train(cache: Path, run_dir: Path, base: Path, rows: Path, *more: str) -> None:
    line = [sys.executable, "-m", "launcher", "model=hf", f"model.id={base}", "data=files", f"data.path={rows}", f"run_dir={run_dir}"]
    line += ["data.template=chatml", "data.seq_len=144", "data.packing=false", "data.eval_fraction=0.02", "train.global_batch=32"]
    line += ["train.microbatch=32", "train.precision=fp32", "optim.schedule=constant", "optim.warmup_steps=50", "log.wandb=disabled"]
    launch(cache, [*line, "launch.processes=1", *more], timeout_s=2400)


def evaluate(cache: Path, run_dir: Path, rows: Path, count: int) -> list[dict[str, Any]]:
    """Return the accuracy of a run's answers by how many documents a prompt has."""
    asked = [sys.executable, "-m", "tools.evaluate", str(run_dir), "--path", str(rows), "--rows", str(count), "--no-base"]
    asked += ["--metrics", "exact_match", "--max-new-tokens", "48", "--extract", r"Answer ?: ?(\w+)"]
    asked += ["--count-in-prompt", r"Document ?[0-9] ?:"]
    done = subprocess.run(asked, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads((run_dir / "evaluation" / "run.json").read_text())["figures"]
    by_count: list[dict[str, Any]] = figures["exact_match_by_count"]
    return by_count


@pytest.mark.soak
def test_an_adapter_trains_on_rows_with_distractors(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = FactsServer()
    with server.serving():
        words = [f"model.path={server.url}/v1", "model.name=m", "raft.questions=1", "raft.without=0", "filters.similar=1", "rows=192"]
        asked = [f"source={corpus(tmp_path, 0)}", f"raft.distractors={DISTRACTORS}", "raft.levels=true"]
        rows = synthesise("raft", tmp_path / "rows.jsonl", *words, *asked)
    adapter = ("peft=lora", "peft.rank=8", "train.steps=60", "optim.lr=2e-2")
    train(cache, tmp_path / "run", save_words(tmp_path / "base"), tmp_path / "rows.jsonl", *adapter)
    losses = [row["loss"] for row in steps(read_rows(tmp_path / "run"))]
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "run" / "export" / "adapter_config.json").is_file()
    found = evaluate(cache, tmp_path / "run", tmp_path / "rows.jsonl", len(rows))
    assert {row["count"]: row["documents"] for row in found} == dict.fromkeys(range(1, DISTRACTORS + 2), len(rows) // (DISTRACTORS + 1))
