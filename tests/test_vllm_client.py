"""A vLLM server is asked, renewed and watched as it should be: by a small server that speaks its protocol, and is faulty on request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import ROOT, arguments, launch, wait_for
from local_server import VllmServer
from safetensors.torch import load_file, save_file

from trainers.config.errors import ConfigError
from trainers.config.schema import RlConfig, RunConfig
from trainers.generate import vllm as client
from trainers.generate.local import Broken, TooLarge
from trainers.generate.request import NO_ROOM, Answer, Request, Sampling
from trainers.generate.tied import FILE, HEAD, add_head
from trainers.generate.vllm import Vllm
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.rl.generators import Generators

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that the client looks at: what ends an answer, and a head that is tied."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True, "eos_token_id": 5}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    save_file({"model.embed_tokens.weight": torch.arange(6.0).view(3, 2)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("trainers.generate.endpoint.LOOK_S", 0.05)
    one = VllmServer()
    with one.serving():
        yield one
    one.released.set()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """What is started in the place of an environment's Python."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests" / "local_server.py"}" "$@"\n')
    file.chmod(0o755)
    return file


def answers(vllm: Vllm, lengths: tuple[int, ...] = (3, 2), most: int = 4) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    requests = [Request(key=key, seed=key, ids=[1] * length) for key, length in enumerate(lengths)]
    vllm.ask(requests, Sampling(max_new_tokens=most, top_k=3), lambda answer: found.__setitem__(answer.key, answer), stops=[0])
    return found


def test_ids_come_back_as_they_were_drawn_and_what_ends_an_answer_is_said(server: VllmServer, model: Path) -> None:
    with Vllm(model, url=f"{server.url}/v1") as vllm:
        found = answers(vllm, (3, 2, 14, 16))
    assert {key: (answer.ids, answer.finish) for key, answer in found.items() if not answer.failure} == {
        0: ([3, 4, 5], "stop"),
        1: ([3, 4, 5], "stop"),
        2: ([2, 3], "length"),  # the model's positions end there
    }
    assert (found[3].failure, found[3].ids) == (NO_ROOM, [])
    assert found[0].logps == [-0.5] * 3
    assert all(asked["stop_token_ids"] == [0, 5, 6] and asked["top_k"] == 3 and asked["repetition_penalty"] == 1 for asked in server.asked)


def test_other_weights_are_taken_in_order_and_a_tied_head_is_written(
    server: VllmServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Vllm(model, url=server.url) as vllm:
        before = answers(vllm)
        server.paths.clear()
        vllm.open(model)
        assert server.paths == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
        assert server.weights == [str(model)]
        assert answers(vllm)[0].ids != before[0].ids
    assert load_file(model / FILE)[HEAD].tolist() == [[0, 1], [2, 3], [4, 5]]
    names = list[str]()
    monkeypatch.setattr("trainers.generate.tied.save_file", lambda *of, **more: names.append(of[1].name) or save_file(*of, **more))
    add_head(model)
    add_head(model)
    assert len(set(names)) == 2, "machines whose processes have one number write at once"
    save_file({"model.embed_tokens.weight": torch.zeros(3, 2)}, model / "model.safetensors")
    add_head(model)  # of the weights that are there now
    assert not load_file(model / FILE)[HEAD].any()


def test_a_faulty_server_is_asked_again_or_named(server: VllmServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Vllm(model, url=server.url) as vllm:
        vllm.root = client.replace(vllm.root, backoff_s=0.01, attempts=2)
        server.faults["/v1/completions"] = 1
        assert sorted(answers(vllm)) == [0, 1]
        server.faults["/v1/completions"] = 99
        with pytest.raises(Broken, match=r"no answer to 2 of 2 requests: HTTP 500"):
            answers(vllm)
        server.faults, server.status = {"/collective_rpc": 1}, 404
        with pytest.raises(Broken, match="VLLM_SERVER_DEV_MODE=1"):
            vllm.open(model)
        server.hangs.add("/v1/completions")
        looks = iter([False, False, True])

        def stop() -> None:
            if next(looks):
                raise KeyboardInterrupt

        monkeypatch.setattr(vllm, "look", stop)
        with pytest.raises(KeyboardInterrupt):  # at once: nobody waits for the reply
            answers(vllm)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tools\.merge"):
        Vllm(model, url=server.url)


def group(leader: int) -> list[str]:
    """Return the processes of a group that are alive."""
    words = subprocess.run(["ps", "-e", "-o", "pgid=,pid=,stat="], capture_output=True, text=True, timeout=20, check=True).stdout
    rows = [line.split() for line in words.splitlines()]
    return [pid for of, pid, state in rows if of == str(leader) and not state.startswith("Z")]


@pytest.mark.for_real
def test_a_server_that_is_started_answers_and_is_named_where_it_ends(model: Path, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the environment's proxy, and with a key of its own, whatever the environment has."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("VLLM_API_KEY", "FULLTUNE_ENDPOINT_KEY"):
        monkeypatch.setenv(name, f"of {name}")
    with Vllm(model, python=str(program)) as vllm:
        assert sorted(answers(vllm)) == [0, 1]
        assert vllm.process is not None
        guard, child = vllm.process.pid, next(pid for pid in group(vllm.process.pid) if pid != str(vllm.process.pid))
        os.kill(int(child), signal.SIGKILL)
        with pytest.raises(Broken, match=r"(?s)the server has ended.*has ended with -9"):
            wait_for(lambda: answers(vllm) and None, 20)
    wait_for(lambda: not group(guard), 20)
    program.write_text("#!/bin/sh\necho no module named vllm >&2\nexit 3\n")
    with pytest.raises(Broken, match=r"(?s)no module named vllm.*has ended with 3"), Vllm(model, python=str(program)):
        pass


@pytest.mark.for_real
def test_a_generator_that_opens_is_progress(model: Path, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """limits.load_s bounds it: limits.sample_s does not end the run meanwhile."""
    beats, began = list[bool](), Vllm.__enter__
    world: Any = SimpleNamespace(gather=lambda value: [value], local_rank=0, rank=0, signalled=None, device=torch.device("cpu"))
    generators = Generators(RunConfig(rl=RlConfig(vllm=str(program), max_new_tokens=4)), world, model)

    def opens(vllm: Vllm) -> Vllm:
        beats.clear()
        opened = began(vllm)
        beats.append(True)
        return opened

    monkeypatch.setattr(Vllm, "__enter__", opens)
    monkeypatch.setattr(watch, "beat", lambda: beats.append(False))
    try:
        assert generators.ask([Request(key=0, seed=0, ids=[1, 1])]) is not None
    finally:
        generators.close()
    assert beats.index(True) > 0
    assert beats[-1], "answers are not: limits.sample_s ends a run without any"


def test_a_batch_that_is_too_large_is_named_and_not_asked_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(gather=lambda value: [value], local_rank=0, rank=0, signalled=None, device=torch.device("cpu"))
    opened = list[str]()

    class Small:
        def __init__(self, *_: object, setting: str, batch: int, **more: object) -> None:
            opened.append(f"{setting} = {batch}")

        def __enter__(self) -> None:
            raise TooLarge(opened[-1])

        def close(self) -> None:
            pass

    monkeypatch.setattr("trainers.rl.generators.Local", Small)
    with pytest.raises(TrainingFailed, match=r"rl\.batch = 5"):
        Generators(RunConfig(rl=RlConfig(batch=5)), world, model).ask([Request(key=0, seed=0, ids=[1])])
    assert len(opened) == 1


def test_servers_that_run_already_have_the_runs_weights_before_they_answer(server: VllmServer, model: Path) -> None:
    """Each of them is asked by a rank; where one loses its connection it opens the weights again."""
    config = RunConfig(rl=RlConfig(servers=[server.url], max_new_tokens=4))
    world: Any = SimpleNamespace(gather=lambda value: [value], local_rank=0, rank=0, size=1, signalled=None, device=torch.device("cpu"))
    generators = Generators(config, world, model)
    try:
        requests = [Request(key=key, seed=key, ids=[1, 1]) for key in range(3)]
        assert sorted(generators.ask(requests) or {}) == [0, 1, 2]
        assert server.weights == [str(model)]
        generators.renew()
        assert len(server.weights) == 2
        server.faults["/v1/completions"] = 2
        assert sorted(generators.ask(requests[:1]) or {}) == [0]
        assert len(server.weights) == 3
    finally:
        generators.close()
    with pytest.raises(ConfigError, match="are 2 servers, and each of 1 rank asks one at most"):
        Generators(RunConfig(rl=RlConfig(servers=[server.url, "http://b:1"])), world, model)


@pytest.mark.for_real
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_whatever_ends_who_has_started_a_server_ends_it(how: signal.Signals, model: Path, program: Path) -> None:
    line = "import pathlib, sys, time; from trainers.generate.vllm import Vllm; vllm = Vllm(pathlib.Path(sys.argv[1]), python=sys.argv[2])"
    line += "\nwith vllm:\n    print(vllm.process.pid, flush=True); time.sleep(60)"
    words = [sys.executable, "-c", line, str(model), str(program)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        guard = int(parent.stdout.readline())
        assert len(group(guard)) == 2
        parent.send_signal(how)
        parent.wait(20)
    wait_for(lambda: not group(guard), 20)


@pytest.mark.slow
def test_a_run_stops_where_its_server_is_not_the_policy(base: Path, program: Path, cache: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("cat", "two", "home", "mat") * 3))
    asked = ["objective=grpo", "reward.short.kind=length", "reward.short.max=4", "rl.group_size=2", "rl.max_new_tokens=8"]
    more = [*asked, f"rl.vllm={program}", "data.packing=false", "rl.redraws=0", "launch.processes=1", "data.eval_fraction=0"]
    line = arguments(base, prompts, tmp_path / "run", *more, "train.eval_every=null")
    assert "it has other weights than are trained" in launch(cache, line, expect=1)
