"""The remedy that a refusal prints works: pasted after the same command, in the same run directory."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, arguments, environment, status_of

from launcher.compose import compose

OVERRIDE = re.compile(r"[+~]?[a-z_]+(?:\.[a-z_0-9]+)*=\S+")


def remedy_of(said: str) -> list[str]:
    """Return the overrides of the first way that a message offers which has any."""
    line = next((line for line in said.splitlines() if re.match(r"\s*(try|remedy:)\s", line)), "")
    assert line, f"no remedy: {said}"
    ways = re.split(r", or | or (?=[a-z_.]+=)|: ", re.sub(r"^\s*(try|remedy:)\s+", "", line))
    found = [[word.rstrip(",") for word in shlex.split(way) if OVERRIDE.fullmatch(word)] for way in ways]
    assert any(found), f"nothing to paste in {line!r}"
    return next(filter(None, found))


def pasted(overrides: list[str], remedy: list[str]) -> list[str]:
    """Return a command line with a remedy in the place of what it replaces."""
    keys = {text.partition("=")[0].lstrip("+") for text in remedy}
    return [text for text in overrides if text.partition("=")[0].lstrip("+") not in keys] + remedy


BASE = ["+exp=quickstart_base", "train.microbatch=2", "launch.processes=1"]
ANSWERS = ["objective=grpo", "reward.right=exact", "data.packing=false", "data.too_long=truncate", "rl.max_new_tokens=64"]
NODES = ["launch=slurm", "launch.gpus_per_node=0"]
AT_ONCE = [
    ["launch=slurm", "launch.gpus_per_node=null"],
    ["peft.method=lora"],
    ["exp=quickstart_base"],
    ["train.global_batch=7"],
    ["train.eval_every=2", "data.eval_fraction=0"],
    ["launch.nodes=2"],
    ["launch=torchrun", "launch.rdzv_endpoint=node"],
    ["engine.replicate=3"],
    ["engine.shard=3"],
    ["engine.offload_param=nvme", "engine.offload_optimizer=cpu"],
    ["peft=prefix", "data.packing=false", "train.activations=block"],
    ["peft=adalora", "peft.tinit=300"],
    ["peft=lora", "optim=sgd"],
    ["launch.generators=1"],
    ["launch.generators=-1"],
    [*ANSWERS, "launch.generators=1"],
    [*ANSWERS, *NODES, "launch.generators=2"],
    [*ANSWERS, *NODES, "launch.processes=2", "launch.generators=2"],
    [*ANSWERS, *NODES, "launch.generators=1", "launch.container=image"],
    [*ANSWERS, *NODES, "launch.generators=1", "rl.servers=[http://a:1]"],
]
"""What test_remedies_at_once.py cannot see: the launcher's own settings, and how a message is printed."""


QUICK = 3


@pytest.mark.parametrize(
    "wrong", [*AT_ONCE[:QUICK], *(pytest.param(words, marks=pytest.mark.slow) for words in AT_ONCE[QUICK:])], ids=" ".join
)
def test_the_remedy_of_a_refused_command_is_accepted(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Or refused for something else that it needs, whose own remedy is accepted."""
    overrides, said = [*BASE, *wrong] if wrong != ["exp=quickstart_base"] else wrong, []
    for _ in range(3):
        try:
            compose(overrides)
        except SystemExit:
            said.append(capsys.readouterr().err)
            assert len(said) == len({text.splitlines()[0] for text in said}), said
            overrides = pasted(overrides, remedy_of(said[-1]))
        else:
            break
    else:
        raise AssertionError(said)
    assert said


# What only ranks can find.


def long_rows(folder: Path) -> list[str]:
    """Documents longer than GPT-2's 32 learned positions."""
    row = {"messages": [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "on a mat " * 20}]}
    (folder / "long.jsonl").write_text((json.dumps(row) + "\n") * 40)
    return [f"data.path={folder}/long.jsonl", "data.seq_len=64"]


def gpt2(base: Path, folder: Path) -> list[str]:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return [f"model.id={folder / 'gpt2'}", "data.packing=false", "data.max_lost_fraction=1"]


def bad_rows(folder: Path) -> list[str]:
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}
    (folder / "bad.jsonl").write_text((json.dumps(row) + "\n") * 40 + '{"messages": 3}\n')
    return [f"data.path={folder}/bad.jsonl"]


LATE: dict[str, Callable[[Path, Path], list[str]]] = {
    "learned positions": lambda base, folder: [*gpt2(base, folder), *long_rows(folder)],
    "a row that is none": lambda base, folder: bad_rows(folder),
    "a rank that does not fit": lambda base, folder: ["peft=lora", "peft.rank=64", "data.packing=false"],
    "warm-up of epochs": lambda base, folder: ["train.steps=null", "train.epochs=1", "optim.warmup_steps=500"],
    "pruning of epochs": lambda base, folder: ["train.steps=null", "train.epochs=1", "peft=adalora", "peft.rank=4", "peft.target_rank=2"],
    "blocks that are not there": lambda base, folder: ["peft=freeze", "peft.last_blocks=9"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LATE)
def test_the_remedy_of_what_ranks_refuse_works_in_the_same_run_directory(
    case: str, base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    """Without --force, without deleting anything: nothing had been trained."""
    fixed = ("launch.processes=1", "train.steps=1", "train.eval_every=null", "data.eval_fraction=0", "train.sample_tokens=0")
    words = arguments(base, chats, tmp_path / "run", *fixed)
    command, given = words[:3], pasted(words[3:], LATE[case](base, tmp_path))
    said = typed([*command, *given], cache, expect=2)
    for _ in range(3):
        given = pasted(given, remedy_of(said))
        said = typed([*command, *given], cache)
        if status_of(tmp_path / "run")["state"] == "done":
            return
    raise AssertionError(said)


def typed(line: list[str], cache: Path, expect: int | None = None) -> str:
    done: Any = subprocess.run(line, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in ((0, 2) if expect is None else (expect,)), done.stdout[-2000:] + done.stderr[-3000:]
    return str(done.stderr)
