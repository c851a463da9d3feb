"""A real vLLM answers with the weights that it was given, also after others: `make test-vllm` makes its environment, and runs these."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import tokenizer_of
from command import ROOT, arguments, environment
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tools.sample import main
from trainers.generate.endpoint import once
from trainers.generate.request import Answer, Request, Sampling
from trainers.generate.vllm import RENEW, Vllm
from trainers.rl.generators import TEMPERED
from trainers.rundir.rows import read_rows, steps

PYTHON = os.environ.get("FULLTUNE_VLLM", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.soak,
    pytest.mark.timeout(600),
    pytest.mark.for_real,
    pytest.mark.skipif(not PYTHON, reason="FULLTUNE_VLLM names no Python: make test-vllm"),
]
BOUND = 1e-3
"""Nats between a token's log-probabilities of generator and trainer."""


def save(folder: Path, tied: bool, seed: int) -> PreTrainedModel:
    """Write a model with heads that vLLM has on a CPU, and return it."""
    tokenizer = tokenizer_of("chatml")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, max_position_embeddings=256, **shape)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def asked(vllm: Vllm) -> list[tuple[Request, Answer]]:
    requests = [Request(key=number, seed=number, ids=[5 + number, 6, 7]) for number in range(6)]
    found: dict[int, Answer] = {}
    vllm.ask(requests, Sampling(max_new_tokens=24, temperature=0.8, top_k=50), lambda answer: found.__setitem__(answer.key, answer))
    return [(request, found[request.key]) for request in requests]


@torch.no_grad()
def apart(model: Any, answers: list[tuple[Request, Answer]]) -> float:
    """Return the largest difference of a token's log-probability, and require that all are of the model before temperature and limits."""
    gaps = []
    for request, answer in answers:
        assert answer.ids
        logps = model(torch.tensor([request.ids + answer.ids])).logits[0].log_softmax(-1)[len(request.ids) - 1 : -1]
        gaps.append((logps.gather(1, torch.tensor(answer.ids)[:, None])[:, 0] - torch.tensor(answer.logps)).abs().max())
    return float(torch.stack(gaps).max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_generator_and_trainer_agree_after_every_sync(tied: bool, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    models = [save(folder, tied, number) for number, folder in enumerate(folders)]
    with Vllm(folders[0], python=PYTHON, device="cpu") as vllm:
        first = asked(vllm)
        assert apart(models[0], first) < BOUND < apart(models[1], first)
        assert [answer.ids for _, answer in asked(vllm)] == [answer.ids for _, answer in first]
        for number in (1, 2, 1):
            vllm.open(folders[number])
            assert apart(models[number], asked(vllm)) < BOUND
        if tied:  # what happens without the head, and a run would notice: rl.mismatch
            (folders[2] / "head.safetensors").unlink()
            for path, body in RENEW:
                more = {"kwargs": {"weights_path": str(folders[2])}} if path == "collective_rpc" else {}
                assert not once(vllm.root, path, body | more)[1]
            assert apart(models[2], asked(vllm)) > 10 * BOUND


def test_a_command_lets_it_answer(tmp_path: Path) -> None:
    model = save(tmp_path / "model", True, 0)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {number}?"}) + "\n" for number in range(4)))
    line = [str(tmp_path / "model"), str(prompts), "--out", str(out), "--n", "2", "--max-new-tokens", "12", "--device", "cpu"]
    assert main([*line, "--vllm", PYTHON]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 8
    assert len({tuple(row["ids"]) for row in rows}) > 4
    assert all(len(row["ids"]) == len(row["logps"]) for row in rows)
    assert model.config.vocab_size > max(max(row["ids"]) for row in rows)


def run_of(cache: Path, folder: Path, expect: int, *more: str, tied: bool = True, path: Path | None = None, key: str = "") -> str:
    """Train a small model, in `folder`/base, on its own answers, as vLLM writes them, in `folder`/run; return what is said."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"What is {number}?", "answer": f"{number}"}) + "\n" for number in range(16)))
    if not (folder / "base").exists():
        save(folder / "base", tied, 0)
    asked = ["objective=grpo", "reward.short.kind=length", "reward.short.max=4", "reward.short.soft=20", "rl.group_size=4"]
    asked += ["rl.max_new_tokens=16", "data.packing=false", "train.global_batch=16", "data.eval_fraction=0", "train.eval_every=null"]
    line = arguments(folder / "base", prompts, folder / "run", *asked, "train.steps=3", *more)
    variables = environment(cache) | ({"FULLTUNE_ENDPOINT_KEY": key, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} if key else {})
    if path is not None:
        variables["PYTHONPATH"] += os.pathsep + str(path)
    done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def require_policy(run_dir: Path) -> list[dict[str, Any]]:
    """Require that answers were the policy's at each of three steps, and that it has learned; return the rows of metrics."""
    rows = steps(read_rows(run_dir))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["mismatch"] < BOUND and row["mismatch_largest"] < BOUND and row["grad_norm"] > 0 for row in rows)
    return rows


@pytest.mark.parametrize(("tied", "more"), [(True, ()), (False, ("rl.temperature=0.7",))], ids=["tied", "untied at a temperature"])
def test_a_run_learns_from_its_answers(tied: bool, more: tuple[str, ...], cache: Path, tmp_path: Path) -> None:
    run_of(cache, tmp_path, 0, f"rl.vllm={PYTHON}", *more, tied=tied)
    require_policy(tmp_path / "run")


def test_a_run_learns_from_conversations(cache: Path, tmp_path: Path) -> None:
    """Two turns, where the first was not cut: what the environment says between them is in the prompt of the second."""
    more = ("rl.environment=trainers.rl.environments:TryAgain", "rl.max_turns=2", "data.seq_len=256", "rl.max_new_tokens=80")
    run_of(cache, tmp_path, 0, *more, f"rl.vllm={PYTHON}")
    assert max(row["turns"] for row in require_policy(tmp_path / "run")) > 1


def test_a_server_that_runs_already_writes_the_answers_and_stays(cache: Path, tmp_path: Path) -> None:
    """It begins with other weights than the run's, has a key, and divides logits by the temperature."""
    save(tmp_path / "other", True, 1)
    save(tmp_path / "base", True, 0)
    with Vllm(tmp_path / "other", python=PYTHON, device="cpu", words=TEMPERED) as server:
        run_of(cache, tmp_path, 0, f"rl.servers=[{server.root.url}]", "rl.temperature=1.3", key=server.root.own_key)
        require_policy(tmp_path / "run")
        assert all(answer.ids for _, answer in asked(server))
        assert "HTTP 401" in run_of(cache, tmp_path, 1, f"rl.servers=[{server.root.url}]", f"run_dir={tmp_path / 'locked'}", key="another")


def test_a_run_stops_without_the_tied_head(cache: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    patch = (
        "import sys\nif 'trainers' in sys.orig_argv:\n    import trainers.generate.tied as tied\n    tied.add_head = lambda folder: None\n"
    )
    (hidden / "sitecustomize.py").write_text(patch)
    assert "it has other weights than are trained" in run_of(cache, tmp_path, 1, f"rl.vllm={PYTHON}", path=hidden)
