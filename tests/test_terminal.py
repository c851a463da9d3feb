"""Saying a thing never fails what was done: terminals without Unicode, closed pipes, full disks, terminals without colours."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command import ROOT, environment

KOREAN = "안녕하세요"
SAY = "from trainers.processes import never_fail; never_fail(); import sys; "
ASCII = {"PYTHONIOENCODING": "ascii"}
NO_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.for_real
def test_unbuffered_output_is_not_held_back() -> None:
    env = os.environ | ASCII | {"PYTHONUNBUFFERED": "1"}
    done = python(SAY + f"import os; sys.stdout.write('{KOREAN}'); os._exit(7)", capture_output=True, env=env)
    assert (done.returncode, done.stdout) == (7, b"?????")


def python(text: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


def test_what_an_encoding_does_not_have_is_replaced() -> None:
    done = python(SAY + f"print('{KOREAN}', 1); print('{KOREAN}', 2, file=sys.stderr)", capture_output=True, env=os.environ | ASCII)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"????? 1\n", b"????? 2\n")


def test_a_reader_that_is_gone_does_not_end_the_work() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    text = SAY + "print('a' * 100000, flush=True); print('b', file=sys.stderr); sys.exit(7)"
    done = python(text, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 7


def test_a_full_disk_does_not_end_the_work() -> None:
    with Path("/dev/full").open("wb") as full:
        done = python(SAY + "print('a', flush=True); print('b', file=sys.stderr); print('c'); sys.exit(7)", stdout=full, stderr=full)
    assert done.returncode == 7


@pytest.mark.for_real
def test_what_is_closed_stays_closed_and_all_else_is_written() -> None:
    assert python(SAY + "print(1); sys.exit(7 if sys.stdout is None else 1)", preexec_fn=partial(os.close, 1)).returncode == 7
    done = python(SAY + "print('out', end=''); print('error', end='', file=sys.stderr); sys.stdout.flush()", capture_output=True)
    assert (done.stdout, done.stderr) == (b"out", b"error")


def test_output_is_still_a_terminal_s(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    done = python(SAY + "sys.exit(7 if sys.stdout.isatty() and sys.stdout.encoding == 'utf-8' else 1)", stdout=terminal)
    os.close(terminal)
    os.close(master)
    assert done.returncode == 7


def korean_chats(folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{KOREAN} {number}"}, {"role": "assistant", "content": f"{KOREAN}! {number}"}]}
        for number in range(24)
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


SCRATCH = (
    *("model=scratch", "model.train_tokenizer=300", "model.architecture.hidden_size=32", "model.architecture.intermediate_size=64"),
    *("model.architecture.num_hidden_layers=2", "model.architecture.num_attention_heads=2", "model.architecture.num_key_value_heads=2"),
    *("data=files", "data.seq_len=256", "train.precision=fp32"),
)
"""A model whose tokenizer has every byte."""
WORLDS = {"an ASCII terminal": ASCII, "no locale": NO_LOCALE, "a dumb terminal": {"TERM": "dumb"}}
STARTED_FOR_REAL = [pytest.param(name, marks=pytest.mark.slow) for name in ("an ASCII terminal", "no locale", "a dumb terminal")]


@pytest.mark.parametrize("case", ["a pipe that nobody reads", "a full disk", *STARTED_FOR_REAL])
def test_a_run_ends_as_it_does_with_any_terminal(cache: Path, tmp_path: Path, case: str) -> None:
    run_dir = tmp_path / "run"
    settings = ("launch.processes=1", "train.steps=2", "train.global_batch=4", "train.microbatch=2", "data.eval_fraction=0")
    words = [f"data.path={korean_chats(tmp_path)}", "train.sample_tokens=8", "optim.lr=1e-2", "log.wandb=disabled", f"run_dir={run_dir}"]
    line = [sys.executable, "-m", "launcher", *SCRATCH, *settings, *words]
    reader, writer = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("wb") as full:
        to = {"a pipe that nobody reads": writer, "a full disk": full.fileno()}.get(case, subprocess.PIPE)
        env = environment(cache) | WORLDS.get(case, {})
        done = subprocess.run(line, cwd=ROOT, env=env, stdout=to, stderr=to, timeout=100, check=False)
        again = subprocess.run(line, cwd=ROOT, env=env, stdout=to, stderr=to, timeout=100, check=False)
    os.close(writer)
    assert (done.returncode, again.returncode) == (0, 0), (done.stdout or b"") + (done.stderr or b"")
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert KOREAN in json.loads((run_dir / "summary.json").read_text())["sample"]["prompt"]


def test_show_batch_marks_what_is_trained_without_colours(cache: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "tools.show_batch", *SCRATCH, f"data.path={korean_chats(tmp_path)}", "--rows", "1"]
    said = subprocess.run(line, cwd=ROOT, env=environment(cache), capture_output=True, timeout=100, check=True).stdout.decode()
    assert f"[[{KOREAN}!" in said
    assert "\x1b" not in said
    master, terminal = pty.openpty()
    subprocess.run(line, cwd=ROOT, env=environment(cache) | {"TERM": "dumb"}, stdout=terminal, timeout=100, check=True)
    os.close(terminal)
    assert f"[[{KOREAN}!".encode() in os.read(master, 1 << 16)
    os.close(master)
