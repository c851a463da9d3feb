"""A fork of tests/forking.py is to its program, and to who starts it, what a started process is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forking
import pytest
from command import ROOT, wait_for

from trainers.processes import prepare_child

pytestmark = pytest.mark.skipif(forking.SWITCH not in os.environ, reason=f"{forking.SWITCH}=0: all starts are real")

SEEN = """
import gc, json, logging, multiprocessing, os, random, signal, sys, threading, warnings
import numpy, torch
def word(pid, name):
    return open(f"/proc/{pid}/{name}").read()
status = dict(line.split(":", 1) for line in word("self", "status").splitlines())
# signals 32 and 33 are the C library's own: a shell may hand them down ignored, and no program can ask for that
print(json.dumps({
    "argv": [sys.argv, sys.orig_argv], "path": sys.path, "cwd": os.getcwd(), "executable": sys.executable,
    "environment": sorted(item for item in os.environ.items()), "line": word("self", "cmdline"),
    "proc environment": sorted(word("self", "environ").split("\\0")), "exe": os.readlink("/proc/self/exe"), "name": status["Name"],
    "signals": [str(signal.getsignal(number)).split(" at ")[0] for number in sorted(signal.valid_signals())],
    "masks": [int(status[name], 16) & ~(3 << 31) for name in ("SigBlk", "SigIgn", "SigPnd")], "threads": status["Threads"],
    "files": sorted(fd for fd in os.listdir("/proc/self/fd") if int(fd) < 600), "read": sys.stdin.read(),
    "buffering": [(file.line_buffering, file.write_through, file.errors) for file in (sys.stdout, sys.stderr)],
    "parent": os.getppid() == int(os.environ["PARENT"]), "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "with parent": [os.getsid(0) == os.getsid(os.getppid()), os.getpgid(0) == os.getpgid(os.getppid())],
    "main": [__name__, sys.modules["__main__"].__dict__ is globals(), "SEEN" in globals()],
    "ours": [name for name in sys.modules if name.partition(".")[0] in ("launcher", "trainers", "tools")],
    "logging": [len(logging.getLogger().handlers), logging.getLogger().level],
    "site": [module for module in sys.modules if "sitecustom" in module],
    "torch": [torch.get_num_threads(), torch.is_grad_enabled()], "collected": gc.isenabled(),
    "bytecode": sys.dont_write_bytecode, "cores": sorted(os.sched_getaffinity(0)),
    "main thread": threading.current_thread() is threading.main_thread(), "mp": multiprocessing.parent_process() is None,
    "set": getattr(sys, "hooked", None),
    "initialised": [torch.cuda.is_initialized(), torch.distributed.is_initialized()],
}))
print([random.random(), numpy.random.rand(), torch.initial_seed()], file=sys.stderr)
"""


def seen(forked: bool, *more: str, folder: Path, **options: Any) -> tuple[dict[str, Any], list[float]]:
    variables = {name: value for name, value in os.environ.items() if name != forking.SWITCH} | {"PARENT": str(os.getpid())}
    variables |= {"PYTHONPATH": str(folder), "ONLY_HERE": "1"} | ({forking.SWITCH: "1"} if forked else {})
    line = [sys.executable, *more, "-c", SEEN, "a word", ""]
    done = subprocess.run(line, cwd=folder, env=variables, input="hello", capture_output=True, text=True, check=True, timeout=60, **options)
    found = json.loads(done.stdout)
    found["environment"] = [item for item in found["environment"] if item[0] != forking.SWITCH]
    found["proc environment"] = [item for item in found["proc environment"] if not item.startswith(forking.SWITCH)]
    return found, json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("how", ["plain", "of a new session", "unbuffered, and asked to end with us"])
def test_a_fork_finds_what_a_started_process_finds(tmp_path: Path, how: str) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.hooked = sorted(sys.argv)")
    options: dict[str, Any] = {"start_new_session": "session" in how}
    if "asked" in how:
        options["preexec_fn"] = prepare_child((signal.SIGUSR2,))
    ends = ["-B", "-u"] if "unbuffered" in how else []
    real, fork = (seen(forked, *ends, folder=tmp_path, **options) for forked in (False, True))
    assert fork[0] == real[0]
    another = seen(True, folder=tmp_path)[1]
    assert all(ours != theirs for ours, theirs in zip(fork[1], another, strict=True)), "each has random numbers of its own"


@pytest.mark.parametrize(
    "text", ["pass", "raise SystemExit(3)", "raise SystemExit('words')", "raise ValueError('words')", "import os; os.abort()"]
)
def test_a_fork_ends_as_a_started_process_does(text: str) -> None:
    line = [sys.executable, "-c", f"import atexit; atexit.register(print, 'last'); print('first')\n{text}"]
    environments = [os.environ, {name: value for name, value in os.environ.items() if name != forking.SWITCH}]
    fork, real = (subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=False) for env in environments)
    assert (fork.returncode, fork.stdout) == (real.returncode, real.stdout)
    assert fork.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:] or "abort" in text


def test_a_process_that_forks_start_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    """Also by kill -9, and its forker with it; what it starts is a fork too."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); print(flush=True); time.sleep(100)"
    text = f"from launcher import process; import os, sys; process.run([sys.executable, '-c', {child!r}], dict(os.environ), 5)"
    parent = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    grandchild = int((tmp_path / "pid").read_text())
    forkers = [
        int(pid) for pid in subprocess.run(["pgrep", "-P", f"{parent.pid},{grandchild}"], capture_output=True, timeout=10).stdout.split()
    ]
    assert len({*forkers, grandchild}) == 3
    parent.kill()
    parent.wait(20)
    wait_for(lambda: not any(map(is_running, (grandchild, *forkers))))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("words", "changed"),
    [(["-I", "-c", "pass"], {}), (["-m", "this"], {"OMP_NUM_THREADS": "2"}), (["-c", "pass"], {forking.SWITCH: None}), (["file.py"], {})],
    ids=str,
)
def test_what_a_fork_cannot_do_is_started(words: list[str], changed: dict[str, str | None]) -> None:
    forker = sys.modules["subprocess"]._fork_exec.__self__
    variables = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
    assert not forker.would_do_the_same([sys.executable, *words], {os.fsencode(k): os.fsencode(v) for k, v in variables.items()})
    assert forker.would_do_the_same([sys.executable, "-u", "-m", "this"], dict(os.environb))
