"""A teacher's log-probabilities are those of plain transformers, from a model or an endpoint, of the run's rows, whole after a kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import ROOT, arguments, environment, launch, stop_at_step, trace, wait_for
from conftest import save_tiny
from local_server import JsonRequests, LocalServer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from launcher.compose import compose
from launcher.config import run_config
from tools.command import Refused
from tools.logprobs.__main__ import _parser, measure
from tools.logprobs.shards import Failed
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data.prepare import Prepared, prepare
from trainers.objectives import TEACHER_IDS, TEACHER_LOGPS
from trainers.rundir.rows import read_rows, steps
from trainers.teacher import with_teacher

K = 5


@pytest.fixture(scope="module")
def chats(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer of them: a server takes a request a document."""
    path = tmp_path_factory.mktemp("few") / "chats.jsonl"
    path.write_text("".join(chats.read_text().splitlines(keepends=True)[:24]))
    return path


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model with the student's tokenizer, and logits that no token of it has, as checkpoints are padded."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = save_tiny(tmp_path_factory.mktemp("teacher") / "model", tied=False, seed=3, vocab_size=len(tokenizer) + 7, hidden_size=48)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a logit for each token, and no more."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = save_tiny(tmp_path_factory.mktemp("served") / "model", tied=False, seed=4, vocab_size=len(tokenizer), hidden_size=48)
    tokenizer.save_pretrained(folder)
    return folder


def settings(base: Path, chats: Path, folder: Path, *more: str) -> list[str]:
    return arguments(base, chats, folder / "run", f"data.prepared_dir={folder}", *more)[3:]


def written(options: list[str]) -> None:
    measure(_parser().parse_args([*options, "--top-k", str(K)]))


def opened(line: list[str], *more: str) -> tuple[RunConfig, Prepared]:
    config = run_config(compose([*line, "objective=distil", *more]))
    return config, with_teacher(config, prepare(config), verify=True)


def plain(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def test_they_are_those_of_plain_transformers(
    base: Path, chats: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each document by itself, unpadded; whatever the batch, the same. Ids that are no token go to the rest."""
    line = settings(base, chats, tmp_path)
    written(["--model", str(teacher), "--dtype", "float32", "--batch", "7", "--shard", "50", *line])
    said = capsys.readouterr().out
    assert said.startswith("written: ")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokens = len(AutoTokenizer.from_pretrained(base))
    data = opened(line)[1]
    assert data.eval is not None
    assert data.report["teacher"]["name"] == str(teacher)
    for table in (data.train, data.eval):
        for document in range(len(table.offsets) - 1):
            part = slice(table.offsets[document], table.offsets[document + 1])
            places = np.flatnonzero(table.supervised[part]) - 1
            logps = plain(model, table.tokens[part].tolist()).log_softmax(-1)[places]
            top = logps[:, :tokens].topk(K, -1)
            own = slice(*table.label_starts[document : document + 2])
            np.testing.assert_array_equal(table.signals[TEACHER_IDS][own], top.indices)
            rest = logps.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
            expected = torch.cat([top.values, rest], 1).numpy()
            np.testing.assert_allclose(table.signals[TEACHER_LOGPS][own], expected, atol=2e-6, rtol=1e-6)
    written(["--model", str(teacher), "--dtype", "float32", *line])
    assert capsys.readouterr().out == said.replace("written", "there already")
    assert not list(tmp_path.glob("*.partial"))


class Completions(JsonRequests):
    """/v1/completions as vLLM (`prompt_logprobs`) or as OpenAI's first servers (`echo`) have it, computed by a real model."""

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "teacher"}]})

    def do_POST(self) -> None:
        asked, server = json.loads(self.body()), self.server
        assert isinstance(server, Serving)
        server.asked.append(asked["prompt"])
        ids, field = asked["prompt"], "logprobs" if server.echoes else "prompt_logprobs"
        if field not in asked:
            return self.reply({"choices": [{"text": "", "logprobs": None}]})
        with server.turn:
            logps = plain(server.model, ids).log_softmax(-1)
        places: list[dict[str, Any] | None] = [None]
        for at, token in enumerate(ids[1:]):
            top = logps[at].topk(asked[field]).indices.tolist()
            numbers = {number: float(logps[at, number]) for number in dict.fromkeys([token, *top])}
            if server.echoes:
                names = {
                    number: f"token_id:{number}" if asked.get("return_tokens_as_token_ids") and server.names_ids else "cat"
                    for number in numbers
                }
                places.append({names[number]: value for number, value in numbers.items()})
            else:
                places.append({str(number): {"logprob": value, "rank": 1} for number, value in numbers.items()})
        choice = {"text": "", "logprobs": {"top_logprobs": [*places, {}]}} if server.echoes else {"text": "", "prompt_logprobs": places}
        if server.hold is not None and len(server.asked) > server.hold:
            server.held.set()
            server.released.wait(60)
        return self.reply({"choices": [choice]})


class Serving(LocalServer):
    requests = Completions

    def __init__(self, model: Path, echoes: bool = False, names_ids: bool = True, hold: int | None = None) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.echoes, self.names_ids, self.hold, self.asked = echoes, names_ids, hold, list[list[int]]()
        self.turn, self.held, self.released = threading.Lock(), threading.Event(), threading.Event()


@pytest.mark.slow
def test_an_endpoint_gives_what_the_model_gives(base: Path, chats: Path, served: Path, tmp_path: Path) -> None:
    """With either protocol: what is served here is computed by the same model. Another one under its name is noticed."""
    data = {}
    for name, source in (("model", None), ("vllm", Serving(served)), ("echo", Serving(served, echoes=True))):
        line = settings(base, chats, tmp_path / name)
        if source is None:
            written(["--model", str(served), "--dtype", "float32", *line])
        else:
            with source.serving():
                written(["--endpoint", f"{source.url}/v1", "--tokenizer", str(served), *line])
        data[name] = opened(line)[1]
    for name in ("vllm", "echo"):
        for ours, theirs in ((data[name].train, data["model"].train), (data[name].eval, data["model"].eval)):
            np.testing.assert_array_equal(ours.signals[TEACHER_IDS], theirs.signals[TEACHER_IDS])
            np.testing.assert_allclose(ours.signals[TEACHER_LOGPS], theirs.signals[TEACHER_LOGPS], atol=1e-5)
    other = Serving(base)
    with other.serving(), pytest.raises(Refused, match="another model has its name"):
        written(["--endpoint", f"{other.url}/v1", "--tokenizer", str(base), *settings(base, chats, tmp_path / "vllm")])


def test_endpoints_that_do_not_serve_are_named(base: Path, chats: Path, served: Path, tmp_path: Path) -> None:
    line = settings(base, chats, tmp_path)
    textual = Serving(served, echoes=True, names_ids=False)
    with textual.serving(), pytest.raises(Refused, match="names tokens by their text"):
        written(["--endpoint", f"{textual.url}/v1", "--tokenizer", str(served), *line])
    with pytest.raises(Failed, match="does not answer"):
        written(["--endpoint", f"{textual.url}/v1", "--endpoint-model", "x", "--tokenizer", str(served), "--attempts", "1", *line])
    with pytest.raises(Refused, match="--tokenizer"):
        written(["--endpoint", f"{textual.url}/v1", *line])
    with pytest.raises(Refused, match="one of the two"):
        written(line)


def test_another_vocabulary_is_refused(base: Path, chats: Path, teacher: Path, tmp_path: Path) -> None:
    """Of two tokens that have changed places, and of one more."""
    folder = shutil.copytree(teacher, tmp_path / "other")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["mat"] = vocabulary["mat"], vocabulary["cat"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"another vocabulary: 2 of \d+ ids.*'cat' in the run and 'mat' in the teacher"):
        written(["--model", str(folder), *settings(base, chats, tmp_path)])
    with pytest.raises(ConfigError, match=r"another vocabulary: 1 of"):
        written(["--model", str(teacher), *settings(base, chats, tmp_path, "model.add_tokens=[new]", "model.grow_vocabulary=true")])


def test_other_rows_and_damage_are_noticed(base: Path, chats: Path, teacher: Path, tmp_path: Path) -> None:
    line = settings(base, chats, tmp_path)
    with pytest.raises(ConfigError, match="has no teacher's log-probabilities of these rows"):
        opened(line)
    written(["--model", str(teacher), *line])
    folder = Path(opened(line)[1].report["teacher"]["folder"])
    with pytest.raises(ConfigError, match="is of other rows"):
        opened([*line, "data.seq_len=48"], f"objective.teacher={folder}")
    written(["--model", str(base), *line])
    with pytest.raises(ConfigError, match="those of several teachers"):
        opened(line)
    file = folder / "train" / "logps.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ConfigError, match=r"logps\.npy is not what was written"):
        opened(line, f"objective.teacher={folder}")
    file.write_bytes(whole[: len(whole) // 2])
    config = run_config(compose([*line, "objective=distil", f"objective.teacher={folder}"]))
    with pytest.raises(ConfigError, match="cannot be read"):
        with_teacher(config, prepare(config), verify=False)


@pytest.mark.parametrize("torn", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_command_continues(base: Path, chats: Path, served: Path, tmp_path: Path, torn: bool) -> None:
    """Asks for no document twice that a shard has, unless that shard was harmed since."""
    line, server = settings(base, chats, tmp_path), Serving(served, hold=15)
    with server.serving():
        options = [
            "--endpoint",
            f"{server.url}/v1",
            "--tokenizer",
            str(served),
            "--shard",
            "40",
            "--top-k",
            str(K),
            "--at-once",
            "2",
            *line,
        ]
        command = [sys.executable, "-m", "tools.logprobs", *options]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_for(lambda: server.held.is_set() or process.poll() is not None, 100)
            assert process.poll() is None, process.communicate()[1][-2000:]
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        server.hold = None
        server.released.set()
        (partial,) = tmp_path.glob("teacher-*.partial")
        assert len((partial / "train" / "done.jsonl").read_text().splitlines()) > 1
        if torn:
            with (partial / "train" / "logps.npy").open("r+b") as file:
                file.seek(200)
                file.write(b"\xff")
        first = len(server.asked)
        measure(_parser().parse_args(options))
    data = opened(line)[1]
    documents = len(data.train.offsets) + len(data.eval.offsets) - 2
    again = len(server.asked) - first
    assert again < documents - 3
    written(["--model", str(served), "--dtype", "float32", *settings(base, chats, tmp_path / "whole")])
    whole = opened(settings(base, chats, tmp_path / "whole"))[1]
    for ours, theirs in ((data.train, whole.train), (data.eval, whole.eval)):
        np.testing.assert_array_equal(ours.signals[TEACHER_IDS], theirs.signals[TEACHER_IDS])
        np.testing.assert_allclose(ours.signals[TEACHER_LOGPS], theirs.signals[TEACHER_LOGPS], atol=1e-5)


@pytest.mark.slow
def test_a_run_learns_from_its_teacher_and_continues_exactly(base: Path, chats: Path, teacher: Path, tmp_path: Path) -> None:
    """From the command line: plan, run, a run that was stopped, and one whose directory now has another teacher's numbers."""
    more = ["objective=distil", "objective.divergence=jsd", "objective.ce_weight=0.2", "checkpoint.every=2", "train.steps=10"]
    lines = {name: arguments(base, chats, tmp_path / name, f"data.prepared_dir={tmp_path}", *more) for name in ("whole", "cut", "other")}
    said = launch(tmp_path, lines["whole"], expect=2)
    assert "has no teacher's log-probabilities of these rows" in said
    assert "python -m tools.logprobs" in said
    options = ["--model", str(teacher), "--top-k", str(K), *settings(base, chats, tmp_path)]
    launch(tmp_path, [sys.executable, "-m", "tools.logprobs", *options])
    assert "log-probabilities" not in launch(tmp_path, [*lines["whole"], "mode=plan"])
    said = launch(tmp_path, lines["whole"])
    assert f"its {K} likeliest tokens at each label" in said
    rows = read_rows(tmp_path / "whole")
    trained = steps(rows)
    for row in trained:
        assert row["loss"] == pytest.approx(0.8 * row["divergence"] + 0.2 * row["cross_entropy"], rel=1e-5)
    held_out = [row["eval_divergence"] for row in rows if "eval_divergence" in row]
    assert held_out[-1] < 0.95 * held_out[0]
    stop_at_step(tmp_path, lines["cut"], tmp_path / "cut", 5)
    launch(tmp_path, lines["cut"])
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    (folder,) = (file.parent for file in tmp_path.glob("teacher-*/teacher.json"))
    with (folder / "train" / "logps.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"\x01\x02")
    assert "is not what was written" in launch(tmp_path, lines["other"], expect=2)
