"""Programs that nobody has read, in a cell without network and files (`cell`); where none can be made, nothing is run."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.processes import prepare_child
from trainers.rewards.shapes import NoReward

CELL = Path(__file__).with_name("cell.py")
GRACE_S = 20.0
"""To build the cell and take it down, next to the program's own time."""
PATHS = ("/usr", "/bin", "/lib", "/lib64")
"""What a program sees, without writing, next to Python's own folder."""

MET = {"memory": ("MemoryError",), "files": ("[Errno 27]", "[Errno 28]"), "processes": ("[Errno 11]",)}
"""What Python says where the system refuses more."""

HARNESS = """\
import sys, types
def _run():
    word = sys.stdin.readline()
    module = sys.modules["answer"] = types.ModuleType("answer")
    names = module.__dict__
    exec(compile({answer!r}, "answer.py", "exec"), names)
    exec(compile({tests!r}, "tests.py", "exec"), names)
    sys.stdout.write("\\n" + word)
    sys.stdout.flush()
_run()
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use, with all that it starts."""

    time_s: float = 10.0
    memory_bytes: int = 512 << 20
    processes: int = 16
    disk_bytes: int = 16 << 20
    """Of all files, and of the largest."""
    files: int = 1000


@dataclass(frozen=True)
class Outcome:
    """How tests ended."""

    passed: bool
    stopped: str = ""
    """The limit that ended them: time, memory, processes or files; empty where they ended by themselves."""


def passes(answer: str, tests: str, limits: Limits) -> Outcome:
    """Run an answer's code and then its tests; raises ConfigError where they cannot be cut off, and NoReward where a cell fails."""
    word = secrets.token_hex(16)
    asked: dict[str, object] = {"program": HARNESS.format(answer=answer, tests=tests), "input": f"{word}\n", "limits": asdict(limits)}
    found = _asked(
        asked | {"python": os.path.realpath(sys.executable), "paths": [*PATHS, os.path.realpath(sys.base_prefix)]}, limits.time_s + GRACE_S
    )
    # an answer that leaves early has exit code 0, and has not said the word
    passed = found["code"] == 0 and str(found["said"]).rstrip("\n").endswith(word)
    return Outcome(passed, str(found["why"]) or ("" if passed else _limit_of(str(found["said"]))))


def _limit_of(said: str) -> str:
    """Return the limit that a program says it has met in its last line."""
    last = said.rstrip().rpartition("\n")[2]
    return next((name for name, words in MET.items() if any(word in last for word in words)), "")


def require_isolation() -> None:
    """Raise ConfigError where a cell cannot be made, or lets a program see a file or a network of this machine."""
    with tempfile.NamedTemporaryFile() as outside:
        tests = f"""
import os, socket
assert not os.path.exists({outside.name!r}) and not os.path.exists({os.path.expanduser("~")!r} + "/.bashrc")
assert socket.if_nameindex() in ([], [(1, "lo")])
try:
    os.mkdir("/usr/there")
except OSError:
    pass
else:
    raise AssertionError
"""
        try:
            outcome = passes("", tests, Limits())
        except NoReward as error:
            raise _refused(f"{error}. Nothing was run") from None
    if not outcome.passed:
        why = outcome.stopped or "a try of it sees files or networks"
        raise _refused(f"this machine does not cut programs off: {why}. Nothing was run")


def _refused(reason: str) -> ConfigError:
    return ConfigError("reward", "code", reason, "a machine with Linux 5.12 and user namespaces")


def _asked(asked: dict[str, object], timeout_s: float) -> dict[str, object]:
    if sys.platform != "linux":
        raise _refused("code is run on Linux alone, whose namespaces cut it off: nothing was run")
    line = [sys.executable, "-I", "-S", str(CELL)]
    try:
        done = subprocess.run(
            line,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            preexec_fn=prepare_child(last=signal.SIGKILL),
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise NoReward(f"its cell has not ended after {timeout_s:g} s") from None
    except ValueError:
        raise NoReward(f"its cell has ended without a word: {done.stderr.strip()[-200:]}") from None
    if "refused" in found:
        raise _refused(f"a program cannot be cut off from this machine, so nothing was run: {found['refused']}")
    return dict(found)
