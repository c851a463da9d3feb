"""Whatever ends a run, the same command continues as if nothing had: the trace of all its attempts is that of one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from command import ROOT, arguments, environment, launch, rank_processes, read_rows, stop_at_step, trace, wait_for, wait_for_step

COMMON = ("train.steps=24", "checkpoint.every=3", "train.microbatch=1", "train.eval_every=8", "data.packing=false")
CASES = [(engine, method) for engine in ("fsdp", "fsdp_offload", "zero3_offload") for method in ("none", "lora")]
SAMPLED = [("fsdp", "none"), ("zero3_offload", "lora")]


def kill_a_rank_at(line: list[str], cache: Path, run_dir: Path, step: int, rng: random.Random) -> None:
    """Start the run and kill -9 one of its ranks, somewhere within the step behind the one that is reported."""
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(run_dir, step, process)
        os.kill(rng.choice(rank_processes(run_dir)), signal.SIGKILL)
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
@pytest.mark.cpu_adam
@pytest.mark.parametrize(
    ("engine", "method"), [pytest.param(*case, marks=[] if case in SAMPLED else pytest.mark.soak, id="-".join(case)) for case in CASES]
)
def test_kills_leave_no_trace(base: Path, chats: Path, cache: Path, tmp_path: Path, engine: str, method: str) -> None:
    """kill -9 of one rank at random steps of both epochs, in the midst of accumulation: two microbatches of one row a rank and step."""
    more = (*COMMON, f"engine={engine}", f"peft={method}", *(() if method == "none" else ("peft.rank=4",)))
    launch(cache, arguments(base, chats, tmp_path / "whole", *more))
    rng = random.Random(f"{engine} {method}")
    line = arguments(base, chats, tmp_path / "parts", *more)
    for lowest in (4, 16):
        kill_a_rank_at(line, cache, tmp_path / "parts", lowest + rng.randrange(3), rng)
    assert "continuing from" in launch(cache, line)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    assert max(row["epoch"] for row in read_rows(tmp_path / "whole") if "epoch" in row) > 1
    name = "model.safetensors" if method == "none" else "adapter_model.safetensors"
    assert (tmp_path / "parts" / "export" / name).read_bytes() == (tmp_path / "whole" / "export" / name).read_bytes()
    assert len(list((tmp_path / "parts" / "logs").glob("attempt-*"))) == 3


@pytest.mark.slow
def test_fewer_ranks_take_the_same_stream(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Saved by three ranks, continued by two and by one: the same rows, losses within 1e-5."""
    more = ("train.steps=12", "train.global_batch=6", "checkpoint.every=2", "data.packing=false")
    launch(cache, arguments(base, chats, tmp_path / "whole", *more, "launch.processes=3"))
    for ranks in (3, 2):
        stop_at_step(
            cache, arguments(base, chats, tmp_path / "parts", *more, f"launch.processes={ranks}"), tmp_path / "parts", 12 - 3 * ranks
        )
    launch(cache, arguments(base, chats, tmp_path / "parts", *more, "launch.processes=1"))
    whole, parts = ([row for row in read_rows(tmp_path / name) if "loss" in row] for name in ("whole", "parts"))
    for key in ("step", "rows_hash", "tokens", "lr"):
        assert [row[key] for row in parts] == [row[key] for row in whole], key
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in parts] == pytest.approx([row[key] for row in whole], rel=1e-5), key


def test_files_in_the_run_directory_save_and_stop(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, "train.steps=400", "train.eval_every=null", "data.eval_fraction=0")
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(run_dir, 2, process)
        (run_dir / "save_now").touch()
        wait_for(lambda: list((run_dir / "checkpoints").glob("step-*")))
        assert process.poll() is None
        (run_dir / "stop").touch()
        assert process.wait(60) == 75
    finally:
        process.kill()
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (run_dir / "checkpoints" / f"step-{status['step']:06d}").is_dir()
    assert not (run_dir / "save_now").exists()
    assert not (run_dir / "stop").exists()


def beat_of(run_dir: Path, rank: int) -> str:
    file = run_dir / "ranks" / f"rank-{rank}.json"
    return file.read_text() if file.is_file() else ""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["loading", "saving", "evaluating", "exporting"])
def test_a_signal_to_one_rank_is_heeded_in_every_phase(base: Path, chats: Path, cache: Path, tmp_path: Path, phase: str) -> None:
    """SIGUSR2 to rank 1 alone; preparing and training are in test_run.py. The evaluation that was left is made up for."""
    run_dir = tmp_path / "run"
    many = tmp_path / "many.jsonl"
    many.write_text(chats.read_text() * 40)  # an evaluation of seconds, against steps of milliseconds
    settings = ("train.steps=4", "train.global_batch=2", "data.eval_fraction=0.5", "train.eval_every=null", "data.packing=false")
    big = ("model.id=null", "model.tokenizer=" + str(base), "+model.architecture={model_type: llama, hidden_size: 512, "
           f"intermediate_size: 2048, num_hidden_layers: {12 if phase == 'exporting' else 3}, num_attention_heads: 8}}")  # fmt: skip
    more = settings if phase == "evaluating" else (*settings[:2], "data.eval_fraction=0", "train.eval_every=null", *big)
    more = (*more, "checkpoint.every=1", "checkpoint.asynchronous=false") if phase == "saving" else more
    more = (*more, "train.steps=1", "optim.name=sgd") if phase == "exporting" else more  # its checkpoint would be three times the export
    line = arguments(base, many, run_dir, *more)
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        if phase == "exporting":
            wait_for(lambda: (run_dir / "export.attempt-1.tmp").is_dir(), 90)
        elif phase == "saving":
            wait_for(lambda: list(run_dir.glob("checkpoints/.step-*.tmp")), 90)
        elif phase == "loading":
            wait_for(lambda: '"phase": "loading"' in beat_of(run_dir, 1), 90)
        else:
            wait_for(lambda: (run_dir / "status.json").is_file() and "the model on each rank" in (process.stdout.readline() or ""), 90)
        os.kill(rank_processes(run_dir)[-1], signal.SIGUSR2)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert json.loads((run_dir / "status.json").read_text())["state"] == "preempted"
    assert not list(run_dir.glob("export*tmp"))
    assert not (run_dir / "export").exists()
    launch(cache, line)
    steps = [row["step"] for row in read_rows(run_dir) if "eval_loss" in row]
    assert steps == ([0, 4] if phase == "evaluating" else [])
