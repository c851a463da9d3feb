"""An answer of several turns: tokens stay as they were sampled, an environment that fails or hangs gives no reward, resume is exact."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from chat_tokenizers import tokenizer_of
from command import ROOT, arguments, environment, launch, started, trace, wait_for_step, wait_until_gone

from trainers.config.choices import ObjectiveName, RewardKind
from trainers.config.errors import ConfigError
from trainers.config.schema import DataConfig, ObjectiveConfig, RewardConfig, RlConfig, RunConfig, TrainConfig
from trainers.data.loader import make_batch
from trainers.data.table import open_table
from trainers.data.template import CHATML
from trainers.generate.request import LENGTH, STOP, Answer, Request
from trainers.health.spikes import TrainingFailed
from trainers.rewards.score import Found, Rewards
from trainers.rl.conversations import Conversations, with_environment
from trainers.rl.environment import LOST, Environments
from trainers.rl.environments import AGAIN, TryAgain
from trainers.rl.groups import Group, figures_of, save_groups
from trainers.rl.sampler import Sampler
from trainers.rl.turns import Talk, Turns
from trainers.run import _prompts
from trainers.rundir.rows import evaluations, steps
from trainers.rundir.rows import read_rows as rows_of
from trainers.world import World

CLASSES = """
import os, time

class Counts:
    def reset(self, row, seed):
        print("what a class prints is no reply")
        self.turns = 0
        return row.get("begin")

    def step(self, messages):
        self.turns += 1
        said = messages[-1]["content"]
        if said == "raise":
            raise RuntimeError("no such move")
        if said == "hang":
            time.sleep(60)
        if said == "stubborn":
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
        if said == "exit":
            os._exit(3)
        if said == "nan":
            return [], float("nan"), True
        if said == "nothing":
            return [], 0.0, False
        if said == "assistant":
            return [{"role": "assistant", "content": "x"}], 0.0, False
        if said == "set":
            return [{"role": "tool", "content": "x", "state": {1, 2}}], 0.0, False
        return [{"role": "user", "content": "again a"}], len(said) / 100, self.turns == 3

class Short:
    def reset(self, row, seed):
        self.turns = 0
        return [*row["prompt"], {"role": "assistant", "content": "home"}, {"role": "user", "content": "mat"}]

    def step(self, messages):
        self.turns += 1
        if messages[0]["content"].startswith("green") and self.turns == 2:
            raise ValueError("green")
        return [{"role": "user", "content": "far over"}], max(0.0, 1 - len(messages[-1]["content"]) / 60), False

class Broken:
    def reset(self, row, seed):
        raise KeyError("board")

    def step(self, messages):
        return [], 0.0, True

class Half:
    def reset(self, row, seed):
        return None
"""


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own_environments.py").write_text(CLASSES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder


@pytest.fixture
def counts(classes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environments]:
    monkeypatch.setattr("trainers.rl.environment.GRACE_S", 0.5)
    found = Environments("own_environments:Counts", 1.0, 2)
    yield found
    found.close()


def nothing() -> None:
    pass


def said(key: int, text: str) -> dict[str, Any]:
    return {"key": key, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}


def test_what_fails_or_hangs_is_told_and_the_others_continue(counts: Environments) -> None:
    """Each conversation has an object of its own; a process that ends takes what it had open with it, and another is started."""
    begun = counts.ask(
        [{"key": key, "row": {"begin": [{"role": "user", "content": "b"}] if key else None}, "seed": 1} for key in range(8)], nothing
    )
    assert [reply["messages"] for reply in begun[:2]] == [None, [{"role": "user", "content": "b"}]]
    words = ["ok", "raise", "hang", "nan", "nothing", "assistant", "set"]
    replies = counts.ask([said(key, text) for key, text in enumerate(words)], nothing)
    assert replies[0] == {"messages": [{"role": "user", "content": "again a"}], "reward": 0.02, "done": False}
    faults = [str(reply.get("failure")) for reply in replies[1:]]
    assert faults[0] == "raises RuntimeError: no such move"
    assert faults[1] == "takes longer than 1 s"
    assert faults[2] == "gives a reward that is not a finite number"
    assert faults[3] == "gives no turn, and is not done"
    assert faults[4].startswith("raises ValueError: a message has a role of user, tool")
    assert faults[5].startswith("raises TypeError: Object of type set is not JSON")
    assert [counts.ask([said(0, "ok")], nothing)[0]["done"] for _ in range(2)] == [False, True]
    ended = counts.ask([said(1, "exit"), said(3, "ok"), said(6, "stubborn"), said(0, "ok")], nothing)
    assert [reply.get("failure") for reply in ended] == ["has ended its process", LOST, "takes longer than 1 s", LOST]
    assert counts.ask([said(7, "ok"), {"key": 2, "row": {}, "seed": 1}, said(2, "ok")], nothing)[0] == {"failure": LOST}
    assert counts.ask([said(2, "ok"), {"key": 2}], nothing)[1] == {}


def test_a_class_of_this_folder_is_found_where_a_run_leaves_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher starts ranks: PYTHONSAFEPATH keeps the folder off the path of `python -m`."""
    (tmp_path / "of_this_folder.py").write_text(CLASSES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.chdir(tmp_path)
    Environments("of_this_folder:Counts", 1.0, 1).close()


def test_a_class_that_cannot_be_had_is_refused_and_a_signal_ends_waiting(classes: Path, counts: Environments) -> None:
    for path, words in (
        ("own_environments:Nobody", "has no attribute"),
        ("own_environments:Half", "Half has no step"),
        ("own_environments:__name__", "__name__ is not a class"),
        ("nowhere_at_all:One", "No module named"),
    ):
        with pytest.raises(ConfigError, match=f"could not be imported: .*{words}"):
            Environments(path, 1.0, 1)

    def stop() -> None:
        raise InterruptedError

    counts.ask([{"key": 0, "row": {}, "seed": 1}], nothing)
    with pytest.raises(InterruptedError):
        counts.ask([said(0, "hang")], stop)
    assert all(process.process is None for process in counts.processes)


def test_a_module_that_fails_is_refused_before_prompts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the rank that would use it, and before a model is: the others only read prompts."""
    (tmp_path / "fails_at_once.py").write_text("import nowhere_at_all\nclass One: ...\ndef score(row): ...\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainers.rl.prompts.prepare_prompts", lambda *_: "read")
    configs = {
        "rl.environment": RunConfig(rl=RlConfig(environment="fails_at_once:One")),
        "reward.own.path": RunConfig(reward={"own": RewardConfig(kind=RewardKind.function, path="fails_at_once:score")}),
    }
    for field, config in configs.items():
        with pytest.raises(ConfigError, match="could not be imported: ModuleNotFoundError: No module named 'nowhere_at_all'") as refused:
            _prompts(config, True, cast(Any, None))
        assert refused.value.path == field
        assert cast(Any, _prompts(config, False, cast(Any, None))) == "read"


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "phi3", "zephyr", "marked"])
def test_turns_are_joined_as_the_template_writes_them(name: str) -> None:
    """The ids of a whole conversation, where the model has sampled what the tokenizer would make of its turns."""
    tokenizer = tokenizer_of(name)
    turns = Turns(tokenizer, "x:Y")
    messages = [{"role": "user", "content": "3,8?"}]
    talk = Talk(0, (), turns.begin(messages), [False] * len(turns.begin(messages)), messages)
    for text in ("8", "no, 3"):
        [end] = turns.stops[-1:] if name != "gemma" else [tokenizer.convert_tokens_to_ids("</turn>")]
        ids = [*tokenizer.encode(text, add_special_tokens=False), end]
        talk.take(Answer(key=0, ids=ids, logps=[-0.5] * len(ids), finish=STOP), turns.words(Answer(key=0, ids=ids, finish=STOP)))
        heard = [{"role": "user", "content": f"{text}? Again."}]
        talk.hear(heard, turns.between(heard))
    whole = tokenizer.apply_chat_template(talk.messages, tokenize=False, add_generation_prompt=True)
    assert talk.ids == tokenizer.encode(whole, add_special_tokens=False)
    assert tokenizer.decode([one for one, is_sampled in zip(talk.ids, talk.sampled, strict=True) if is_sampled]).startswith("8")
    found = talk.whole()
    assert (len(found.ids or ()), len(found.logps or ())) == (sum(found.sampled), sum(found.sampled))
    assert found.sampled[-1], "what the environment says last is asked of nobody"
    assert (found.text, found.turns, found.last, found.finish) == ("no, 3", 2, 3, LENGTH)


def test_a_template_without_an_end_of_turns_is_refused() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="ends a turn with no token of its own"):
        Turns(tokenizer, "x:Y")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        Turns(tokenizer, "x:Y")
    spaced = tokenizer_of("inst")  # which writes a space before the end
    assert spaced.decode(Turns(spaced, "x:Y").between([{"role": "user", "content": "3"}])).strip().startswith("[INST] 3")


def talk_of(turns: list[list[int]], reward: float, ended: str = "done", fault: str = "") -> Talk:
    talk = Talk(0, (), [1, 2], [False, False], [{"role": "user", "content": "?"}], reward=reward)
    for ids in turns:
        talk.take(Answer(key=0, ids=ids, logps=[-float(one) for one in ids], finish=STOP), "x")
        talk.hear([{"role": "user", "content": "y"}], [90, 91])
    talk.ended, talk.fault = ended, fault
    return talk


def test_a_rollout_has_labels_where_the_model_has_written(tmp_path: Path) -> None:
    talks = [
        talk_of([[5, 6], [7]], 1.0),
        talk_of([[8]], 0.0),
        talk_of([[9]], 0.5, "failed", "raises X"),
        talk_of([], 0.0, "failed", "late"),
    ]
    answers = [talk.whole() for talk in talks]
    scored = with_environment(Found({}, {}, np.zeros(4)), answers)
    assert scored.failures["environment"] == {"raises X": 1, "late": 1}
    np.testing.assert_array_equal(scored.total, [1.0, 0.0, np.nan, np.nan])
    with pytest.raises(TrainingFailed, match=r"failed in all of 2 conversations: it raises X"):
        with_environment(Found({}, {}, np.zeros(2)), [answers[2]] * 2)
    more: dict[str, Any] = {"parts": scored.parts, "reasons": scored.reasons, "rewards": scored.total}
    group = Group(position=0, number=0, ids=[1, 2], answers=list(answers), texts=["x"] * 4, **more)
    config = RunConfig(
        data=DataConfig(path="rows.jsonl", seq_len=64, packing=False),
        train=TrainConfig(global_batch=4),
        objective=ObjectiveConfig(name=ObjectiveName.grpo),
        rl=RlConfig(group_size=4, max_new_tokens=8),
    )
    save_groups([group], config, tmp_path)
    batch = make_batch(open_table(tmp_path), np.arange(4), 4, 0)
    assert batch.input_ids[0, :7].tolist() == [1, 2, 5, 6, 90, 91, 7]
    assert batch.labels[0, :7].tolist() == [-100, 5, 6, -100, -100, 7, -100]
    assert batch.signals["sampled_logps"][0, :7, 0].tolist() == [0, -5, -6, 0, 0, -7, 0]
    assert (batch.labels[2:] == -100).all(), "what failed is not trained on"
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["ended"] for row in rows] == ["done", "done", "failed", "failed"]
    assert rows[2]["why"] == {"environment": "raises X"}
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert figures_of([group], 1.0)["turns"] == 1.0


def test_a_reward_counts_the_tokens_of_the_last_turn(tmp_path: Path) -> None:
    none: Any = None
    short = {"short": RewardConfig(kind=RewardKind.length, max=1, soft=4)}
    with Rewards(short, tmp_path) as rewards:
        sampler = Sampler(
            **dict.fromkeys(("config", "world", "attempt", "engine", "blueprint"), none),
            tokenizer=tokenizer_of("chatml"),
            generators=cast(Any, SimpleNamespace(look=nothing)),
            rewards=rewards,
            conversations=cast(Any, "any"),
        )
        answers: dict[int, Answer] = {key: talk_of(turns, 2.0).whole() for key, turns in enumerate([[[5, 6, 7], [8]], [[5], [6, 7, 8]]])}
        [group] = sampler.score([(0, 0, [1, 2])], [{"prompt": []}], answers, 2) or []
    np.testing.assert_array_equal(group.parts["short"], [1.0, 0.5])
    np.testing.assert_array_equal(group.rewards, [3.0, 2.5])


def test_what_begins_has_the_rows_tools_and_a_turn_without_an_answer_ends_the_run() -> None:
    tokenizer, asked = tokenizer_of("chatml"), list[Request]()
    tokenizer.chat_template = CHATML
    messages, tools = [{"role": "user", "content": "Weather?"}], [{"type": "function", "function": {"name": "weather"}}]
    failures = iter(["", "the server is gone"])

    class Own:
        """Of this process."""

        def ask(self, orders: list[dict[str, Any]], look: Any) -> list[dict[str, Any]]:
            reply = {"messages": [{"role": "tool", "content": "rain"}], "reward": 0.0, "done": False}
            return [{"messages": messages} if "row" in order else reply for order in orders]

    def ask(requests: list[Request], sampling: Any) -> dict[int, Answer]:
        asked.extend(requests)
        failure, ids = next(failures), tokenizer.encode("no<|im_end|>")
        return {request.key: Answer(key=request.key, ids=ids, logps=[0.0] * len(ids), finish=STOP, failure=failure) for request in requests}

    config = RunConfig(data=DataConfig(seq_len=512), rl=RlConfig(max_turns=3, max_new_tokens=8))
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    held = Conversations(config, world, Turns(tokenizer, "x:Y"), cast(Any, Own()))
    generators: Any = SimpleNamespace(ask=ask, look=nothing)
    with pytest.raises(TrainingFailed, match="a prompt got no answer: the server is gone"):
        held.hold([((0, 0), 0, [1])], [{"prompt": [], "tools": tools}], lambda *place: 0, generators, None)
    turns = [*messages, {"role": "assistant", "content": "no"}, {"role": "tool", "content": "rain"}]
    whole = [tokenizer.apply_chat_template(begun, tools=tools, tokenize=False, add_generation_prompt=True) for begun in (messages, turns)]
    assert [request.ids for request in asked] == [tokenizer.encode(text, add_special_tokens=False) for text in whole]


def test_a_second_try_is_worth_half() -> None:
    one = TryAgain()
    one.reset({"prompt": [], "reference": "8", "row": {}}, 0)
    said = [one.step([{"role": "assistant", "content": text}]) for text in ("3", "8")]
    assert said == [([{"role": "user", "content": AGAIN}], 0.0, False), ([], 0.5, True)]


def line(base: Path, prompts: Path, run_dir: Path, *more: str) -> list[str]:
    asked = ("objective=grpo", "rl.environment=own_environments:Short", "rl.max_turns=2", "data.packing=false", "peft=lora")
    asked += ("reward.cat.kind=format", "reward.cat.pattern=.*cat.*", "reward.cat.weight=0.1", "rl.eval_samples=2", "rl.temperature=0.9")
    batch = ("train.global_batch=8", "train.microbatch=2", "rl.group_size=4", "rl.max_new_tokens=8", "checkpoint.every=2", "rl.batch=6")
    return arguments(base, prompts, run_dir, *asked, *batch, "train.steps=5", "train.eval_every=5", "optim.lr=1e-2", *more)


@pytest.mark.slow
def test_conversations_are_trained_on_and_continued_exactly(base: Path, cache: Path, classes: Path, tmp_path: Path) -> None:
    """Two turns, an adapter, a launcher that is killed; each sampled token has the log-probability that the trainer gives it there."""
    words = ["cat", "two dogs", "hills home", "green", "far over", "sat on"] * 3
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": each, "answer": each[:3]}) + "\n" for each in words))
    launch(cache, line(base, prompts, tmp_path / "whole"))
    found = steps(rows_of(tmp_path / "whole"))
    assert len(found) == 5
    assert all(row["mismatch"] < 1e-4 and 1 < row["turns"] <= 2 for row in found)
    assert all(row["eval_pass@1"] <= row["eval_pass@2"] for row in evaluations(rows_of(tmp_path / "whole")))
    told = answers_of(tmp_path / "whole")
    assert {row["ended"] for row in told} >= {"turns"}
    assert any("environment" in row.get("why", {}) and row["reward"] is None for row in told)
    assert told[0]["messages"][1:3] == [{"role": "assistant", "content": "home"}, {"role": "user", "content": "mat"}]
    cut = tmp_path / "cut"
    with started(line(base, prompts, cut), environment(cache)) as process:
        wait_for_step(cut, 3, process)
        process.kill()
        process.wait(20)
        wait_until_gone(cut)
    launch(cache, line(base, prompts, cut))
    assert trace(cut) == trace(tmp_path / "whole")
    assert answers_of(cut) == told
    said = launch(cache, line(base, prompts, tmp_path / "broken", "rl.environment=own_environments:Broken"), expect=1)
    assert "the environment has failed in all of" in said
    assert "it raises KeyError: 'board'" in said


def answers_of(run_dir: Path) -> list[dict[str, Any]]:
    folders = sorted((run_dir / "rollouts").glob("step-*"))
    return [json.loads(row) for folder in folders for row in (folder / "answers.jsonl").read_text().splitlines()]
