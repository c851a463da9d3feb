"""A model's answers depend on no neighbour and follow its distribution, and what has arrived is never asked for again."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from command import ROOT, environment, tool, wait_for
from conftest import free_port
from local_server import JsonRequests, LocalServer

from tools import sample
from trainers.config.schema import RunConfig
from trainers.generate.decode import choose, decode, stops_of
from trainers.generate.local import Broken, Local
from trainers.generate.request import LENGTH, STOP, Request, Sampling
from trainers.generate.subject import kind_of

DRAWS = [
    Sampling(temperature=0.0, max_new_tokens=9),
    Sampling(temperature=0.8, max_new_tokens=9),
    Sampling(temperature=1.3, top_k=7, top_p=0.8, max_new_tokens=9),
]


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize("sampling", DRAWS, ids=["likeliest", "drawn", "limited"])
def test_an_answer_does_not_depend_on_its_neighbours(model: Any, base: Path, sampling: Sampling) -> None:
    """Ids are equal for any batch and order; log-probabilities are those of a plain forward, before temperature and limits."""
    from transformers import AutoTokenizer

    stops = stops_of(model, AutoTokenizer.from_pretrained(base))
    prompts = {number: [1, *range(6, 6 + number % 7)] for number in range(20)}
    seeds = {number: number // 2 for number in prompts}
    alone = dict(decode(model, prompts, 1, sampling, stops, 0, seeds))
    for batch, keys in ((3, prompts), (20, dict(reversed(prompts.items())))):
        found = dict(decode(model, {key: prompts[key] for key in keys}, batch, sampling, stops, 0, seeds))
        assert {key: answer.ids for key, answer in found.items()} == {key: answer.ids for key, answer in alone.items()}
    for key, answer in alone.items():
        whole = torch.tensor([prompts[key] + answer.ids])
        with torch.no_grad():
            logps = model(whole).logits[0, len(prompts[key]) - 1 : -1].log_softmax(-1)
        assert answer.logps == pytest.approx([float(logps[at, token]) for at, token in enumerate(answer.ids)], abs=1e-5)
        assert answer.finish == (STOP if answer.ids[-1] in stops else LENGTH)
        assert answer.finish == STOP or len(answer.ids) == 9
        assert not set(answer.ids[:-1]) & set(stops)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Against transformers' own warpers, by chi-square over 40,000 draws."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits, count = torch.randn(1, 12) * 1.5, 40_000
    noise = -torch.empty(count, 12).exponential_(generator=torch.Generator().manual_seed(1)).log()
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=6), Sampling(temperature=1.4, top_p=0.75), Sampling(top_k=8, top_p=0.9)):
        expected = TemperatureLogitsWarper(sampling.temperature)(None, logits) if sampling.temperature != 1 else logits
        expected = TopKLogitsWarper(sampling.top_k)(None, expected) if sampling.top_k else expected
        expected = TopPLogitsWarper(sampling.top_p)(None, expected) if sampling.top_p < 1 else expected
        shares = expected.softmax(-1)[0].double()
        tokens, _ = choose(logits.expand(count, -1).clone(), sampling, noise, 1e-6)
        drawn = torch.bincount(tokens, minlength=12).double()
        possible = shares > 0
        assert drawn[~possible].sum() == 0
        chi_square = ((drawn - count * shares)[possible] ** 2 / (count * shares)[possible]).sum()
        assert chi_square < 31.3  # 99.9 % at 11 degrees of freedom


def write_prompts(path: Path, count: int) -> Path:
    words = ["cat", "dogs", "hills", "mat", "home", "green"]
    rows: list[dict[str, Any]] = [
        {"question": "cat", "answer": "far"},
        {"messages": [{"role": "user", "content": " ".join(words)}], "mark": 7},
        {"prompt": "two dogs"},
    ]
    path.write_text("".join(json.dumps(rows[number % 3] | {"id": number}) + "\n" for number in range(count)))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_a_killed_command_continues_and_asks_nothing_twice(finished: Path, cache: Path, tmp_path: Path) -> None:
    """Of a run's export, also next to an uninterrupted command of another batch; no process outlives the kill."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    words = [str(finished), str(prompts), "--n", "3", "--max-new-tokens", "12", "--top-p", "0.9"]
    assert "36 answers of 12 prompts" in tool(cache, *words, "--out", tmp_path / "whole.jsonl", name="sample")
    whole = rows_of(tmp_path / "whole.jsonl")
    assert [(row["line"], row["sample"]) for row in whole] == [(line, number) for line in range(1, 13) for number in range(3)]
    assert whole[0]["prompt"] == [{"role": "user", "content": "cat"}]
    assert whole[0]["reference"] == "far"
    assert whole[3]["row"]["mark"] == 7
    assert all(len(row["ids"]) == len(row["logps"]) for row in whole)
    assert len({row["answer"] for row in whole}) > 20  # drawn, each by its own seed

    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    line = [sys.executable, "-m", "tools.sample", *words, "--out", str(out), "--batch", "1"]
    with subprocess.Popen(line, cwd=ROOT, env=environment(cache), start_new_session=True) as process:
        wait_for(lambda: part.exists() and len(part.read_bytes().splitlines()) > 3)
        process.kill()
        process.wait(20)
    before = part.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    part.write_bytes(kept + b'{"number": 35, "answ')
    assert not out.exists()
    tool(cache, *words, "--out", out, "--batch", "5", name="sample")
    found = rows_of(out)
    assert [row["ids"] for row in found] == [row["ids"] for row in whole]
    known = {row["number"]: row for row in map(json.loads, kept.splitlines()[1:])}
    assert 3 <= len(known) < 36
    assert all(found[number]["logps"] == row["logps"] for number, row in known.items())  # to the bit: not asked again
    assert not part.exists()
    about = json.loads(Path(f"{out}.json").read_text())
    assert (about["dtype"], about["device"]) == ("float32", kind_of("auto"))
    assert "there already" in tool(cache, *words, "--out", out, name="sample")
    assert "holds other answers" in tool(cache, *words, "--out", out, "--seed", "1", name="sample", expect=2)

    talk = subprocess.run(
        [sys.executable, "-m", "tools.chat", str(finished), "--max-new-tokens", "8", "--temperature", "1"],
        input=f"cat sat\n/undo\ndogs ran\n{'cat ' * 20000}\n/new\ncat sat\n",
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "leaves no room for an answer" in talk.stderr
    assert talk.stdout.splitlines() == [
        plain_answer(finished, said, turn) for said, turn in (("cat sat", 1), ("dogs ran", 2), ("cat sat", 4))
    ]
    assert any(talk.stdout.splitlines())


def test_what_a_models_own_code_prints_is_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    local = object.__new__(Local)
    local.said, local.room = queue.SimpleQueue(), threading.Semaphore(9)
    line = [sys.executable, "-c", "print('{ no JSON'); print('{\"done\": true}')"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as local.process:
        local._listen()
    assert [local.said.get(timeout=9), local.said.get(timeout=9)] == [{"done": True}, None]


def plain_answer(run: Path, said: str, seed: int) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(run / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, return_dict=False)
    sampling, stops = Sampling(max_new_tokens=8), stops_of(model, tokenizer)
    ((_, found),) = decode(model.eval(), {0: ids}, 1, sampling, stops, 0, {0: seed})
    return str(tokenizer.decode(found.ids, skip_special_tokens=True))


def test_a_prompt_is_what_training_renders(base: Path, tmp_path: Path) -> None:
    """An instruction goes with what it is about, and a BOS that is the EOS, and that the tokenizer does not add, opens nothing."""
    from transformers import AutoTokenizer

    from trainers.generate.prompts import read, rendered

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    row = {"instruction": "cat", "input": "two dogs"}
    for more in ({}, {"output": "far"}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row | more) + "\n")
        (prompt,) = read(str(tmp_path / "rows.jsonl"))
        assert prompt.messages == [{"role": "user", "content": "cat\ntwo dogs"}]
    assert rendered(prompt, tokenizer)[0] == tokenizer.bos_token_id
    tokenizer.bos_token = tokenizer.eos_token
    assert rendered(prompt, tokenizer) == tokenizer.encode("cat\ntwo dogs\n", add_special_tokens=False)


class Faulty(JsonRequests):
    """Speaks both protocols; every third first request fails, one prompt is refused."""

    asked: ClassVar[Counter[str]] = Counter()
    bodies: ClassVar[list[dict[str, Any]]] = []
    refused = "mat home"
    is_down = threading.Event()

    def do_GET(self) -> None:
        self.reply({"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.body())
        key = json.dumps([body.get("messages"), body.get("prompt"), body["seed"]])
        Faulty.asked[key] += 1
        Faulty.bodies.append(body)
        if Faulty.is_down.is_set() or (Faulty.asked[key] == 1 and len(Faulty.asked) % 3 == 0):
            self.send_error(503)
        elif body.get("messages", [{}])[-1].get("content") == self.refused:
            self.send_error(400)
        elif "prompt" in body:
            ids = [*body["prompt"][:2], 5]
            self.reply({"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-0.5, -1.0, -0.25]}, "finish_reason": "stop"}]})
        else:
            self.reply({"choices": [{"message": {"content": f"answer {body['seed']}"}, "finish_reason": "stop"}]})


class Server(LocalServer):
    requests = Faulty
    request_queue_size = 64


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Faulty.asked, Faulty.bodies, Faulty.is_down = Counter(), [], threading.Event()
    serves = Server()
    with serves.serving():
        yield serves


def test_a_faulty_server_is_asked_until_it_answers(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Down at first: nothing is written, and the same command asks for what is missing; what is refused is counted."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": text, "system": "Be brief."} for text in ("cat sat", Faulty.refused, "two dogs", "far home")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    url = server.url.replace("//", "//me:s3cret@")
    words = [url, str(prompts), "--model", "some/model", "--out", str(out), "--n", "4", "--temperature", "0.5", "--at-once", "2"]
    Faulty.is_down.set()
    assert sample.main([*words, "--attempts", "1"]) == 1
    assert "answers are missing" in capsys.readouterr().err
    assert not out.exists()
    Faulty.is_down.clear()
    assert sample.main(words) == 0
    assert "12 answers of 4 prompts" in (said := capsys.readouterr().out)
    assert "4 failed: HTTP 400" in said
    found = rows_of(out)
    assert [row["line"] for row in found] == [1] * 4 + [3] * 4 + [4] * 4
    assert [row["answer"] for row in found] == [f"answer {row['seed']}" for row in found]
    assert found[0]["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "cat sat"}]
    assert found[0]["ids"] is None
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in Faulty.bodies} == {(0.5, 256, "some/model")}
    assert json.loads(about := Path(f"{out}.json").read_text())["failures"] == {"HTTP 400": 4}
    assert "s3cret" not in out.read_text() + about
    assert found[0]["model"].startswith("some/model at http://***@127.0.0.1:")


def test_what_a_server_refuses_says_nothing_of_the_server(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More refusals in a row than a dead server gives; where all are refused there is no file, and the exit code tells."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    words = [server.url, str(prompts), "--model", "m", "--out", str(out), "--n", "16", "--at-once", "32"]
    prompts.write_text(json.dumps({"prompt": Faulty.refused}) + "\n")
    assert sample.main(words) == 1
    assert "all 16 answers have failed: HTTP 400 (16)" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["prompts.jsonl"]
    prompts.write_text(json.dumps({"prompt": Faulty.refused}) + "\n" + json.dumps({"prompt": "cat sat"}) + "\n")
    assert sample.main(words) == 0
    assert "16 answers of 2 prompts" in capsys.readouterr().out


def test_a_server_that_takes_ids_gives_ids_and_log_probabilities(server: Server, base: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    out = tmp_path / "out.jsonl"
    assert sample.main([server.url, str(prompts), "--model", "m", "--tokenizer", str(base), "--out", str(out)]) == 0
    found = rows_of(out)
    assert [row["logps"] for row in found] == [[-0.5, -1.0, -0.25]] * 3
    assert all(row["ids"][-1] == 5 and isinstance(row["answer"], str) for row in found)
    assert all(body["return_token_ids"] and body["prompt"] for body in Faulty.bodies)


def test_wrong_input_is_one_clear_message(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"completion": "y"}\n')
    out = str(tmp_path / "out.jsonl")
    url = f"http://127.0.0.1:{free_port()}/v1"
    cases = [
        ([str(base), str(bad)], "bad.jsonl:2 has no `messages`"),
        ([str(base), str(prompts), "--n", "0"], "--n"),
        ([str(base), str(prompts), "--top-p", "1.5"], "--top-p"),
        ([str(base), str(prompts), "--model", "x"], "are of a server"),
        ([url, str(prompts)], "--model NAME"),
        ([url, str(prompts), "--model", "x"], "unreachable"),
        ([str(tmp_path), str(prompts)], "neither a run nor a model"),
        (["runs/none", str(prompts)], "no such directory"),
    ]
    for words, expected in cases:
        assert sample.main([*words, "--out", out]) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        assert expected in said
    assert not [file for file in os.listdir(tmp_path) if file.startswith("out")]


@pytest.mark.parametrize(("then", "words"), [("exec sleep 60", "no answer for 0.3 s"), ("exit 3", r"has ended \(3\)")])
def test_a_process_that_reads_no_order_is_given_up(then: str, words: str) -> None:
    """It has opened its model, and the order is longer than its pipe takes. Whoever asks again is told again."""
    order = [Request(key=key, seed=0, ids=[12345] * 500) for key in range(64)]
    stub = ("sh", "-c", f"echo {{}}; {then}")
    with Local(RunConfig(), None, batch=1, dtype="float32", device="cpu", timeout_s=0.3, open_s=60, words=stub) as local:
        for _ in range(2):
            with pytest.raises(Broken, match=words):
                local.ask(order, Sampling(), lambda _: None)
