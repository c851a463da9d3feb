"""The command a user types, end to end on real processes: what a run leaves behind, how it stops, continues and fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import (
    ROOT,
    arguments,
    damaged_bases,
    environment,
    launch,
    rank_processes,
    read_rows,
    save_in_bf16,
    stop_at_step,
    trace,
    wait_for,
    wait_for_step,
    wait_until_gone,
    wandb_records,
)


def test_the_run_directory_keeps_its_contract(finished: Path) -> None:
    assert {"config.yaml", "manifest.json", "status.json", "metrics.jsonl", "summary.json", "logs", "checkpoints", "export"} <= {
        path.name for path in finished.iterdir()
    }
    assert json.loads((finished / "status.json").read_text())["state"] == "done"
    steps = [row for row in read_rows(finished) if "loss" in row]
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "device_bytes_peak",
        "host_bytes_peak",
    }
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert all(keys <= row.keys() for row in steps)
    assert [row["step"] for row in read_rows(finished) if "eval_loss" in row] == [0, 4, 8]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert summary["tokens"] == steps[-1]["tokens"]
    assert summary["trainable_parameters"] == summary["parameters"]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {"fingerprint", "tokenizer_hash", "template_hash"} <= manifest["data"].keys()
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["step-000004", "step-000008"]
    assert {path.name for path in (finished / "logs" / "attempt-1").iterdir()} >= {"rank-0.log", "rank-1.log"}


OPEN_PLAINLY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
assert not [name for name in sys.modules if name.startswith(("trainers", "launcher"))]
stops = model.generation_config.eos_token_id
print(json.dumps({"logits": model(ids).logits[0].tolist(), "ids": ids[0].tolist(), "stops": stops, "dtype": str(model.dtype)}))
"""


@pytest.mark.for_real
def test_plain_transformers_opens_the_export_in_a_process_without_us(finished: Path, base: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", OPEN_PLAINLY, str(finished / "export")]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    said = subprocess.run(line, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=100, check=True).stdout
    opened = json.loads(said.splitlines()[-1])
    from trainers.config.checks import load
    from trainers.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(load(finished / "config.yaml"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in opened["stops"]
    assert opened["dtype"] == "torch.float32"
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    state = {"model": {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}}
    dcp.load(state, checkpoint_id=finished / "checkpoints" / "step-000008", no_dist=True)
    with torch.no_grad():
        expected = model(torch.tensor([opened["ids"]])).logits[0]
    torch.testing.assert_close(torch.tensor(opened["logits"]), expected, rtol=0, atol=1e-6)


def test_wandb_offline_has_one_run_with_each_step_once(finished: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    files = list((finished / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].stem.removeprefix("run-") == json.loads((finished / "manifest.json").read_text())["wandb_id"]
    steps, config, tags = [], {}, []
    for data in wandb_records(files[0].read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.history.item:
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "loss" in items:
                steps.append(items["step"])
        if record.run.run_id:
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            tags += list(record.run.tags)
    assert steps == list(range(1, 9))
    assert config["optim"]["lr"] == 1e-2
    assert {"full", "fsdp"} <= set(tags)


LONGER = ["train.steps=40", "checkpoint.every=3", "train.eval_every=20"]


@pytest.fixture(scope="module")
def whole(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launch(cache, arguments(base, chats, run_dir, *LONGER))
    return run_dir


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGKILL, marks=[pytest.mark.slow, pytest.mark.for_real]),
        *(pytest.param(how, marks=pytest.mark.soak) for how in (signal.SIGINT, signal.SIGUSR2)),
    ],
    ids=lambda how: how.name,
)
def test_a_stopped_run_continues_to_the_same_figures(
    base: Path, chats: Path, cache: Path, tmp_path: Path, whole: Path, how: signal.Signals
) -> None:
    line = arguments(base, chats, tmp_path / "parts", *LONGER)
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for_step(tmp_path / "parts", 10, process)
        process.send_signal(how)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    expected = {signal.SIGTERM: 75, signal.SIGUSR2: 75, signal.SIGINT: 130, signal.SIGKILL: -9}[how]
    assert process.returncode == expected, said
    if how is not signal.SIGKILL:
        status = json.loads((tmp_path / "parts" / "status.json").read_text())
        assert status["state"] == "preempted"
        assert (tmp_path / "parts" / "checkpoints" / f"step-{status['step']:06d}").is_dir()
    wait_until_gone(tmp_path / "parts")
    launch(cache, line)
    assert trace(tmp_path / "parts") == trace(whole)
    assert (tmp_path / "parts" / "logs" / "attempt-2").is_dir()


@pytest.mark.parametrize("damage", ["truncated", *(pytest.param(what, marks=pytest.mark.slow) for what in ("missing", "misshapen"))])
def test_damaged_weights_are_named_and_every_rank_is_gone(base: Path, chats: Path, cache: Path, tmp_path: Path, damage: str) -> None:
    folder, words = damaged_bases(base, tmp_path)[damage]
    said = launch(cache, arguments(folder, chats, tmp_path / "run"), expect=2, timeout_s=60)
    assert all(word in said for word in [*words, "model.id"]), said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    wait_until_gone(tmp_path / "run", 10)


@pytest.mark.slow
def test_a_sharded_bf16_base_is_exported_in_bf16_with_its_generation_settings(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = save_in_bf16(base, tmp_path / "bf16")
    assert len(list(folder.glob("*.safetensors"))) > 1
    launch(cache, arguments(folder, chats, tmp_path / "run", "train.precision=bf16"))
    export = tmp_path / "run" / "export"
    with safe_open(export / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((export / "config.json").read_text())["dtype"] == "bfloat16"
    generation = json.loads((export / "generation_config.json").read_text())
    assert (generation["do_sample"], generation["top_p"]) == (True, 0.6)
    assert 2 in generation["eos_token_id"]
    assert len(generation["eos_token_id"]) == 2


@pytest.mark.slow
def test_changed_data_does_not_continue_a_run(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    rows = chats.read_text().splitlines(keepends=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    line = arguments(base, data, tmp_path / "run", "train.steps=4000", "checkpoint.every=2", "launch.processes=1")
    stop_at_step(cache, line, tmp_path / "run", 4)
    data.write_text("".join(rows[::-1]))
    said = launch(cache, line, expect=2)
    assert "the data has changed since this run began" in said
    assert "Traceback" not in said
    data.write_text("".join(rows))
    stop_at_step(cache, line, tmp_path / "run", read_rows(tmp_path / "run")[-1]["step"] + 4)


def test_a_killed_rank_is_named(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    line = arguments(base, chats, tmp_path / "run", "train.steps=4000")
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for_step(tmp_path / "run", 2, process)
        for rank in rank_processes(tmp_path / "run"):
            if b"RANK=1" in Path(f"/proc/{rank}/environ").read_bytes().split(b"\0"):
                os.kill(rank, signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert "rank 1 was killed by SIGKILL" in said.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["error"]["rank"] == 1
    wait_until_gone(tmp_path / "run")


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda how: how.name)
def test_interrupting_preparation_leaves_nothing_behind(base: Path, chats: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C on the launcher ends it soon; kill -9 of a rank takes the processes that tokenise with it; the next start works."""
    many = tmp_path / "many.jsonl"
    many.write_text(chats.read_text() * 3000)
    line = arguments(base, many, tmp_path / "run", "launch.processes=1", "data.eval_fraction=0", "train.eval_every=null")
    cache = tmp_path / "cache"
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: list(cache.rglob("tmp-data-*/train.tokens.raw")))
        if how is signal.SIGINT:
            process.send_signal(how)
        else:
            for rank in rank_processes(tmp_path / "run")[:1]:
                os.kill(rank, how)
        said = process.communicate(timeout=45)[0]
    finally:
        process.kill()
    assert process.returncode == (130 if how is signal.SIGINT else 1), said
    assert "Traceback" not in said
    wait_until_gone(tmp_path / "run", 10)
    assert not list(cache.rglob("data-*/report.json"))
    line = [word.replace(str(many), str(chats)) for word in line]
    launch(cache, line if how is signal.SIGKILL else [*line, f"run_dir={tmp_path / 'other'}"], expect=0)


def test_a_full_disk_is_named_with_what_it_needs(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)], capture_output=True, check=False, timeout=10)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        said = launch(cache, arguments(base, chats, small / "run", "launch.processes=1", "checkpoint.every=2"), expect=1)
        assert "there is no older one" in said
        assert "bytes, and" in said
        assert str(small) in said
        assert "Traceback" not in said
        assert not list((small / "run" / "checkpoints").glob(".step*"))
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=10)


def test_documents_longer_than_learned_positions_are_refused(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    said = launch(cache, arguments(tmp_path / "gpt2", chats, tmp_path / "run", "launch.processes=1"), expect=2)
    assert "made for 16 positions" in said
    assert "data.seq_len=16" in said
    assert "command line: data.seq_len=64" in said


@pytest.mark.slow
def test_an_unreadable_checkpoint_is_passed_over_for_an_older_one(
    base: Path, chats: Path, cache: Path, tmp_path: Path, whole: Path
) -> None:
    line = arguments(base, chats, tmp_path / "parts", *LONGER, "checkpoint.keep_last=20")
    stop_at_step(cache, line, tmp_path / "parts", 10)
    newest, older = sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[:-3:-1]
    for file in newest.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))  # as large as its manifest says, and worthless
    said = launch(cache, line)
    assert f"skipping {newest}" in said
    assert f"continuing from {older}" in said
    assert trace(tmp_path / "parts") == trace(whole)


def test_one_rank_alone_equals_two(base: Path, chats: Path, cache: Path, finished: Path, tmp_path: Path) -> None:
    launch(cache, arguments(base, chats, tmp_path / "run", "launch.processes=1", "train.microbatch=2"))
    for one, two in zip(read_rows(tmp_path / "run"), read_rows(finished), strict=True):
        assert (one["step"], one["tokens"]) == (two["step"], two["tokens"])
        assert one.get("lr") == two.get("lr")
        for key in ("loss", "eval_loss", "grad_norm"):
            assert one.get(key) == (two.get(key) if two.get(key) is None else pytest.approx(two[key], rel=1e-4))


def test_the_same_command_of_a_finished_run_starts_nothing(base: Path, chats: Path, cache: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    said = launch(cache, arguments(base, chats, finished, "log.wandb=offline", "checkpoint.every=4"))
    assert "done already" in said
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_too_many_non_finite_steps_end_the_run(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    said = launch(cache, arguments(base, chats, tmp_path / "run", "optim.lr=1e30", "optim.clip=null", "train.max_skipped=2"), expect=1)
    assert "2 steps in a row were skipped" in said
    assert "Traceback" not in said
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    assert not (tmp_path / "run" / "export").exists()
    assert rows[-1]["grad_norm"] is None


@pytest.mark.slow
def test_early_stopping_ends_a_run_that_does_not_improve(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    more = ["train.steps=40", "optim.lr=1e-12", "train.eval_every=2", "train.patience=2", "train.min_improvement=0.01"]
    launch(cache, arguments(base, chats, tmp_path / "run", *more))
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["step"] == 4
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: would train in bf16 with nccl and read MFU and device peak")
def test_a_gpu_run_reports_mfu_and_device_memory(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    launch(cache, arguments(base, chats, tmp_path / "run", "train.precision=bf16", "launch.processes=1"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["device_bytes_peak"] > 0
    assert summary["mfu"] is not None
