"""What is measured of a model is what plain transformers says of it, whatever the batch, the processes and what came in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import ROOT, SAMPLED, arguments, environment, launch, tool
from conftest import save_tiny

from tools.evaluate.__main__ import main as evaluate
from tools.evaluate.measure import answers, head_of, losses
from tools.evaluate.record import load
from trainers.config.schema import ModelConfig, RunConfig, plain, read, read_at
from trainers.generate.decode import Choice
from trainers.generate.subject import Subject


@pytest.fixture(scope="module")
def evaluated(finished: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, measured by the command a user types."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished, run)
    said = tool(cache, run, *SAMPLED)
    assert "held-out loss" in said
    return run


def figures(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "evaluation" / f"{name}.json").read_text())["figures"]


def test_held_out_losses_are_those_that_training_saw(evaluated: Path) -> None:
    summary = json.loads((evaluated / "summary.json").read_text())
    assert figures(evaluated, "base")["held_out_loss"]["value"] == pytest.approx(summary["eval_loss_before"], abs=1e-6)
    assert figures(evaluated, "run")["held_out_loss"]["value"] == pytest.approx(summary["eval_loss_after"], abs=1e-6)


def request_of(folder: Path, run: Path, batch: int, dtype: str = "float32", **evaluation: object) -> Path:
    """What tools.evaluate asks its workers for; figures are kept in `folder`."""
    config = read(run / "config.yaml")
    config.data.prepared_dir = str(folder)
    for name, value in evaluation.items():
        setattr(config.evaluation, name, value)
    subject = {"config": plain(config), "folder": str(run / "export")}
    file = folder / "request.json"
    file.write_text(json.dumps({"subjects": [subject], "batch": batch, "dtype": dtype, "device": "cpu", "tasks": [], "tasks_dir": None}))
    return file


def measured(
    folder: Path, run: Path, size: int, batch: int, capsys: pytest.CaptureFixture[str], **more: Any
) -> dict[str, list[dict[str, Any]]]:
    """What `size` workers with this batch leave, by part and document; one after another here, they share nothing but files."""
    from tools.evaluate.record import collect
    from tools.evaluate.worker import main

    folder.mkdir(exist_ok=True)
    file = request_of(folder, run, batch, **more)
    threads = torch.get_num_threads()
    for rank in range(size):
        assert main([str(file), str(rank), str(size)]) == 0
    torch.set_num_threads(threads)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    parts = next(word["parts"] for word in said if "parts" in word)
    return {name: collect(Path(part["folder"]), part["documents"]) for name, part in parts.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_figure_depends_on_ranks_or_batches(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    splits = [(1, 8), (2, 3), (3, 1), (1, 1), (3, 8)] if dtype == "float32" else [(1, 8), (3, 3)]
    found = []
    for number, (size, batch) in enumerate(splits):
        rows = measured(tmp_path / str(number), finished, size, batch, capsys, dtype=dtype, rows=6, max_new_tokens=12)
        held_out = rows["held_out"]
        loss = sum(row["nats"] for row in held_out) / sum(row["tokens"] for row in held_out)
        found.append((loss, [row["tokens"] for row in held_out], [(row["answer"], row["finished"]) for row in rows["answers"]]))
    for loss, tokens, texts in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6 if dtype == "float32" else 1e-12)
        assert (tokens, texts) == found[0][1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: would compare losses and answers with the CPU's")
def test_a_gpu_says_what_the_cpu_says(finished: Path, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "auto"):
        run = tmp_path / device
        shutil.copytree(finished, run)
        tool(tmp_path / f"cache-{device}", run, "--device", device, "--rows", "6", "--max-new-tokens", "12", "--no-base")
        rows = [json.loads(line) for line in (run / "evaluation" / "run.jsonl").read_text().splitlines()]
        found.append((figures(run, "run")["held_out_loss"]["value"], [row.get("answer") for row in rows]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][1] == found[1][1]


@pytest.fixture(scope="module")
def table(finished: Path, cache: Path) -> Any:
    from trainers.data.table import open_table

    return open_table(cache / "prepared" / json.loads((finished / "manifest.json").read_text())["prepared"] / "train")


@pytest.mark.parametrize(("batch", "in_chunks"), [(1, False), (3, True), (8, False)])
def test_losses_are_those_of_a_plain_loop(finished: Path, table: Any, batch: int, in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "export").eval()
    documents = np.arange(11)
    assert head_of(model, 4096) is None
    if in_chunks:
        monkeypatch.setattr("trainers.config.derived.LOGITS_BYTES", 16 * 4 * model.config.vocab_size)
    head = head_of(model, 4096)
    assert (head is not None and head.tokens == 16) is in_chunks
    found = {row["document"]: row for row in losses(model, table, documents, batch, 0, head)}
    for document in documents.tolist():
        start, end = table.offsets[document : document + 2]
        ids, marks = torch.tensor(table.tokens[start:end]).long(), torch.tensor(table.supervised[start:end]).bool()
        with torch.no_grad():
            plain_loss = model(input_ids=ids[None], labels=ids.where(marks, -100)[None]).loss
        tokens = int(marks[1:].sum())
        assert found[document]["tokens"] == tokens
        assert found[document]["nats"] == pytest.approx(float(plain_loss) * tokens, rel=1e-5)


def greedy(model: Any, prompt: list[int], room: int, stops: list[int]) -> list[int]:
    """The most likely token at every place, computed anew from all that is in front of it."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < room and not (len(ids) > len(prompt) and ids[-1] in stops):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_a_plain_greedy_loops(finished: Path, table: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(finished / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = {row["document"]: row for row in answers(model.eval(), tokenizer, table, np.arange(9), 4, 12, [2, 5], 0)}
    for document, row in rows.items():
        expected = greedy(model, table.prompt(document).tolist(), 12, [2, 5])
        assert row["ids"] == ([*expected[:-1]] if row["finished"] else expected)
        assert row["finished"] == (expected[-1] in (2, 5))


def test_answers_do_not_depend_on_batches_where_tokens_are_as_likely(finished: Path, table: Any, tmp_path: Path) -> None:
    """Each token has a twin of almost the same embedding, so that rounding decides at every place, unless the row alone does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    folder = save_tiny(tmp_path / "twins", tied=True, seed=3, vocab_size=len(tokenizer), initializer_range=0.4)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        half = len(weight) // 2
        weight[half : 2 * half] = weight[:half] * (1 + 1e-7 * torch.randn(half, 1, generator=torch.Generator().manual_seed(0)))
    asked = []
    whole = Choice._logits

    def counted(self: Choice, ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        return whole(self, ids)

    def ids_by_document(batch: int) -> dict[int, list[int]]:
        return {row["document"]: row["ids"] for row in answers(model, tokenizer, table, np.arange(24), batch, 12, [2, 5], 0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Choice, "_logits", counted)
        found = [ids_by_document(batch) for batch in (1, 3, 8, 24)]
        assert asked
        assert found[0] == found[1] == found[2] == found[3]
        patch.setattr("trainers.generate.decode.CLOSE", {torch.float32: 0.0})
        assert any(ids_by_document(batch) != found[0] for batch in (3, 8, 24))  # what it is for


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_answers_of_virtual_tokens_do_not_depend_on_batches(finished: Path, table: Any, method: str) -> None:
    """peft counts positions of prompt tuning from the front of the padding, so that rows are put together by length."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model, tokenizer = (kind.from_pretrained(finished / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    kind = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
    adapted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    found = [
        {row["document"]: row["ids"] for row in answers(adapted, tokenizer, table, np.arange(12), batch, 10, [99], 0)}
        for batch in (1, 3, 12)
    ]
    assert found[0] == found[1] == found[2]
    assert len({len(table.prompt(document)) for document in range(12)}) > 3


def test_a_prompt_without_room_is_answered_as_far_as_positions_go(finished: Path, table: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(finished / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    lengths = [len(table.prompt(document)) for document in range(8)]
    model.config.max_position_embeddings = limit = max(lengths) + 2
    rows = {row["document"]: row for row in answers(model.eval(), tokenizer, table, np.arange(8), 8, 6, [99], 0)}
    for document, length in enumerate(lengths):
        assert len(rows[document]["ids"]) == min(6, limit - length)
        assert not rows[document]["finished"]


def test_text_that_the_base_wrote_measures_how_far_a_model_has_gone_from_it(evaluated: Path, cache: Path) -> None:
    """Its loss less the base's, in the mean, is KL(base || model) a token: compared with the divergence of whole distributions there."""
    from transformers import AutoModelForCausalLM

    from trainers.data.table import open_table

    base = read(evaluated / "config.yaml").model.id
    models = [AutoModelForCausalLM.from_pretrained(place).eval() for place in (base, evaluated / "export")]
    folder = cache / "prepared" / json.loads((evaluated / "evaluation" / "run.json").read_text())["sets"]["general"]
    written = open_table(folder)
    divergences, tokens = 0.0, 0
    for start, end in zip(written.offsets[:-1], written.offsets[1:], strict=True):
        ids = torch.tensor(written.tokens[start:end]).long()[None]
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in models)
        divergences += float((ours.exp() * (ours - theirs)).sum())
        tokens += len(ours)
    apart = figures(evaluated, "run")["general_loss"]["value"] - figures(evaluated, "base")["general_loss"]["value"]
    assert divergences / tokens > 0.01
    assert apart == pytest.approx(divergences / tokens, rel=0.35)  # of a sample of this size


def test_what_is_measured_is_not_measured_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        from tools.evaluate.worker import main

        file = request_of(tmp_path, finished, 2, rows=4, max_new_tokens=6)
        assert main([str(file), "0", "2"]) == 0  # the other of two processes never came
        kept = {path: path.read_text() for path in tmp_path.glob("evaluation-*/*.jsonl")}
        assert kept
        for path, text in kept.items():  # and was killed in the midst of a line
            path.write_text(text[: -len(text.splitlines()[-1]) // 2])
        rows = measured(tmp_path, finished, 1, 2, capsys, rows=4, max_new_tokens=6)
        texts = [path.read_text() for path in tmp_path.glob("evaluation-*/*.jsonl")]
        lines = [line for text in texts for line in text.splitlines() if line.endswith("}")]
        assert len(lines) == sum(map(len, rows.values()))
        patch.setattr("trainers.generate.subject.Subject.open", lambda *_: pytest.fail("a model was opened for nothing"))
        again = measured(tmp_path, finished, 3, 1, capsys, rows=4, max_new_tokens=6)
        assert again == rows


@pytest.mark.slow
def test_adapters_are_measured_with_the_base_that_they_were_trained_beside(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """In 4 bits that base is another one than the files hold."""
    run = tmp_path / "qlora"
    launch(cache, arguments(base, chats, run, "peft=qlora", "peft.rank=8", "launch.processes=1"))
    said = tool(cache, run, "--rows", "0")
    assert "held-out loss" in said
    summary = json.loads((run / "summary.json").read_text())
    assert figures(run, "run")["held_out_loss"]["value"] == pytest.approx(summary["eval_loss_after"], abs=1e-5)
    rounded, whole = summary["eval_loss_before"], figures(run, "base")["held_out_loss"]["value"]
    assert whole != pytest.approx(rounded, abs=1e-5)
    assert load(run / "evaluation", "run") is not None


def test_a_base_whose_vocabulary_has_grown_has_the_rows_that_its_run_began_with(base: Path) -> None:
    """The files lack them: each is the mean of the others, as in training."""
    from transformers import AutoModelForCausalLM

    subject = Subject(config=RunConfig(model=ModelConfig(id=str(base), add_tokens=["<|tool|>", "<|call|>"])), folder=None)
    model = subject.open(torch.float32, torch.device("cpu"))
    rows = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    new = subject.tokenizer.convert_tokens_to_ids(["<|tool|>", "<|call|>"])
    found = model.get_input_embeddings().weight
    assert torch.equal(found[: len(rows)], rows)
    torch.testing.assert_close(found[new], rows.mean(0).expand(2, -1), rtol=1e-5, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_run_is_measured_on_its_own_rows_wherever_it_is(
    finished: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was, another run may stand by now."""
    from tools.evaluate.sets import held_out
    from trainers.data.tokenizer import load_tokenizer

    monkeypatch.setenv("FULLTUNE_CACHE", str(cache))
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    config = read_at(moved)
    own = json.loads((moved / "manifest.json").read_text())["prepared"]
    assert held_out(config, load_tokenizer(config)).key == own
    shutil.copytree(cache / "prepared" / own, cache / "prepared" / "data-of-another")
    manifest = json.loads((moved / "manifest.json").read_text()) | {"prepared": "data-of-another"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert held_out(config, load_tokenizer(config)).key == "data-of-another"
    shutil.rmtree(cache / "prepared" / "data-of-another")


def test_models_are_told_apart_wherever_they_differ(finished: Path, tmp_path: Path) -> None:
    from trainers.generate.identity import digest_of

    shutil.copytree(finished / "export", tmp_path / "export")
    assert digest_of(tmp_path / "export") == digest_of(finished / "export")
    file = tmp_path / "export" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    other = digest_of(tmp_path / "export")
    assert other != digest_of(finished / "export")
    config = tmp_path / "export" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    assert digest_of(tmp_path / "export") != other


def test_any_model_directory_can_be_measured(evaluated: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    tool(cache, evaluated / "export", "--like", evaluated, "--rows", "0", "--out", tmp_path / "like")
    same = json.loads((tmp_path / "like" / "model.json").read_text())["figures"]["held_out_loss"]["value"]
    assert same == figures(evaluated, "run")["held_out_loss"]["value"]
    said = tool(cache, evaluated / "export", "--path", chats, "--rows", "3", "--max-new-tokens", "4", "--out", tmp_path / "file")
    assert "rouge_l" in said
    assert json.loads((tmp_path / "file" / "model.json").read_text())["figures"]["held_out_loss"]["documents"] == 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no such directory"),
        (["EMPTY"], "is neither a run nor a folder of runs nor a model"),
        (["RUN", "--metrics", "rouge"], "`--metrics` = 'rouge': there is no such metric"),
        (["RUN", "--extract", "(a"], "is not a valid regular expression"),
        (["RUN", "--extract", "abc"], "has 0 groups"),
        (["RUN", "--rows", "-1"], "`--rows` = -1: must be greater than 0"),
        (["RUN", "--general", "gone.txt"], "no such file or directory"),
        (["RUN", "--batch", "0"], "`--batch` = 0: must be greater than 0"),
        (["RUN", "--judge", "http://127.0.0.1:1/v1"], "nothing says which model"),
        (["EXPORT"], "nothing says what to measure it on"),
        (["EXPORT", "--like", "EMPTY"], "is not a run directory"),
        (["STOPPED"], "there is no run that is done"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_opened(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(finished / "config.yaml", stopped)
    (stopped / "status.json").write_text('{"state": "preempted", "step": 3}')
    places = {"RUN": finished, "EXPORT": finished / "export", "EMPTY": tmp_path / "empty", "STOPPED": stopped}
    assert evaluate([str(places.get(word, word)) for word in words]) == 2
    assert said in capsys.readouterr().err


def test_what_only_the_workers_can_find_is_said_in_one_message(finished: Path, cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "export" / "model.safetensors").unlink()
    said = tool(cache, run, "--rows", "0", expect=2)
    assert "holds no safetensors file" in said
    assert "Traceback" not in said


def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(finished: Path, tmp_path: Path) -> None:
    run, kept = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(finished, run)
    line = [sys.executable, "-m", "tools.evaluate", str(run), "--rows", "6", "--max-new-tokens", "100", "--batch", "1"]
    child = subprocess.Popen(
        line, cwd=ROOT, env=environment(kept), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until = time.monotonic() + 60
        while not list(kept.glob("prepared/evaluation-*/*.jsonl")) and child.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGINT)
        said = child.communicate(timeout=30)[1]
    finally:
        child.kill()
    assert child.returncode == 130, said
    assert "the same command continues from there" in said
    left = subprocess.run(["pgrep", "-f", "tools.evaluate.worker"], capture_output=True, text=True, check=False, timeout=10).stdout.split()
    mine = [pid for pid in left if str(kept).encode() in _environ(pid)]
    assert not mine
    assert not (run / "evaluation").exists()


def _environ(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
