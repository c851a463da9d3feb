"""The command a user types: how tests write it, start it, stop it and read what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainers.rundir.rows import read_rows

ROOT = Path(__file__).parents[1]
SOON_S = 60


def environment(cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FULLTUNE_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }


def arguments(base: Path, chats: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "launcher", "model=hf", f"model.id={base}", "data=files", f"data.path={chats}", "data.template=chatml"),
        *(
            f"run_dir={run_dir}",
            "data.seq_len=64",
            "data.eval_fraction=0.1",
            "train.steps=8",
            "train.global_batch=4",
            "train.precision=fp32",
        ),
        *("optim.lr=1e-2", "train.eval_every=4", "log.wandb=disabled", "launch.processes=2", *more),
    ]


def launch(cache: Path, line: list[str], expect: int = 0, timeout_s: float = 150) -> str:
    done = subprocess.run(line, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def trace(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions, bit for bit."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "epoch", "eval_loss", "rows_hash")
    return [tuple(row.get(key) for key in keys) for row in read_rows(run_dir)]


def wait_for(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 100) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and process.poll() is None:
        if any(row["step"] >= step for row in read_rows(run_dir)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def stop_at_step(cache: Path, line: list[str], run_dir: Path, step: int) -> None:
    process = subprocess.Popen(line, cwd=ROOT, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_for_step(run_dir, step, process)
        process.terminate()
        assert process.wait(60) == 75
    finally:
        process.kill()


def wait_until_gone(run_dir: Path, timeout_s: float = 60) -> None:
    """Wait until no process names the run directory; fail if one stays."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        found = subprocess.run(
            ["pgrep", "-f", f"trainers {run_dir}"], capture_output=True, text=True, check=False, timeout=10
        ).stdout.split()
        if not found:
            return
        time.sleep(0.1)
    raise AssertionError(f"processes left behind: {found}")


def rank_processes(run_dir: Path) -> list[int]:
    line = ["pgrep", "-f", f"m trainers {run_dir}"]
    return [int(pid) for pid in subprocess.run(line, capture_output=True, text=True, check=False, timeout=10).stdout.split()]


def damaged_bases(base: Path, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    import torch
    from safetensors.torch import load_file, save_file

    bases = {name: shutil.copytree(base, folder / name) for name in ("truncated", "missing", "misshapen")}
    weights = bases["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    tensors = load_file(base / "model.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(lost, bases["missing"] / "model.safetensors", metadata={"format": "pt"})
    wrong = tensors | {"model.norm.weight": torch.ones(7)}
    save_file(wrong, bases["misshapen"] / "model.safetensors", metadata={"format": "pt"})
    words = {"truncated": ["damaged or truncated"], "missing": ["lacks model.norm.weight"], "misshapen": ["model.norm.weight is [7]"]}
    return {name: (bases[name], words[name]) for name in bases}


def save_in_bf16(base: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    sampling = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}  # as Llama 2 was first published
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    return folder


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Read a .wandb file: 7 bytes of its own, then LevelDB's log format (blocks of 32 KiB; checksum, length, type, part)."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@contextmanager
def started(line: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(line, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        for pid in pids_of(Path(next(word for word in line if word.startswith("run_dir=")).removeprefix("run_dir="))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pids_of(run_dir: Path, rank: int | None = None) -> list[int]:
    """Processes of a run, the agent with them, or of one rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = folder.joinpath("cmdline").read_bytes().split(b"\0")
            variables = folder.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run_dir / "config.yaml").encode() in line and (rank is None or f"RANK={rank}".encode() in variables):
            found.append(int(folder.name))
    return found


def status_of(run_dir: Path) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return status


def finish(process: subprocess.Popen[str], run_dir: Path, expect: int = 1, soon_s: float = SOON_S) -> str:
    """Wait for the end, soon; everything is gone then."""
    began = time.monotonic()
    said = process.communicate(timeout=soon_s)[0]
    assert process.returncode == expect, said
    wait_until_gone(run_dir, max(0.5, SOON_S - (time.monotonic() - began)))
    print(f"gone after {time.monotonic() - began:.1f} s")
    return said


SAMPLED = ("--general", "sampled", "--general-rows", "12", "--rows", "5", "--max-new-tokens", "8")


def tool(cache: Path, *words: object, expect: int = 0, name: str = "evaluate") -> str:
    line = [sys.executable, "-m", f"tools.{name}", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
