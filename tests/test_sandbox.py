"""Code that nobody has read is stopped at each limit, sees nothing of this machine, leaves nothing, and is not run where it could."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import ROOT, wait_for

from trainers.config.errors import ConfigError
from trainers.config.schema import reward_of
from trainers.rewards import cell, sandbox
from trainers.rewards.sandbox import Limits, Outcome, passes, require_isolation
from trainers.rewards.score import Rewards
from trainers.rewards.shapes import code_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cells are made of Linux namespaces")
SMALL = Limits(time_s=3, memory_bytes=256 << 20, processes=8, disk_bytes=4 << 20, files=50)


@pytest.fixture(scope="module", autouse=True)
def cells() -> None:
    try:
        require_isolation()
    except ConfigError as error:
        pytest.skip(str(error))


def programs() -> list[str]:
    """Return the processes of cells."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found += [name] if b"/cell/program.py" in Path(f"/proc/{name}/cmdline").read_bytes() else []
    return found


def mounts() -> list[str]:
    """Return the mounts of this machine where a cell has its own."""
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1].startswith((cell.ROOT, cell.WORK))]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process of a cell and no mount where a cell has its own is there afterwards that was not before."""
    before = programs(), mounts()
    yield
    assert (programs(), mounts()) == before


HOSTILE = {
    "a fork bomb": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", "time"),
    "one that asks for processes": ("import os\nwhile True:\n    os.fork()", "processes"),
    "an endless loop": ("while True:\n    pass", "time"),
    "one that sleeps in a session of its own": ("import os, time\nos.fork() or os.setsid()\ntime.sleep(60)", "time"),
    "memory": ("x = []\nwhile True:\n    x.append(bytearray(64 << 20))", "memory"),
    "memory of many": (
        "import os\nx = b'x' * (100 << 20)\nfor _ in range(4):\n    os.fork()\nwhile True:\n    x = x[:-1] + b'y'",
        "memory",
    ),
    "memory in files of no folder": (
        "import os, time\nos.fork()\nfor n in range(50):\n    os.write(os.memfd_create(str(n)), b'x' * (4 << 20))\ntime.sleep(60)",
        "memory",
    ),
    "memory of System V": (
        "import ctypes, time\nlibc, size = ctypes.CDLL(None), 10 << 20\nlibc.shmat.restype = ctypes.c_void_p\n"
        "for n in range(40):\n    at = ctypes.c_void_p(libc.shmat(libc.shmget(0, size, 0o1600), None, 0))\n"
        "    ctypes.memset(at, 1, size)\n    libc.shmdt(at)\ntime.sleep(60)",
        "memory",
    ),
    "a large file": ("with open('big', 'wb') as f:\n    while True:\n        f.write(b'x' * 65536)", "files"),
    "many files": ("for n in range(1000):\n    open(f'f{n}', 'w').close()", "files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_limits_end_what_exceeds_them(name: str, nothing_left: None) -> None:
    program, limit = HOSTILE[name]
    found = passes(program, "", SMALL)
    assert not found.passed
    assert found.stopped == limit or (name.startswith(("a fork", "one that asks", "memory of many")) and found.stopped)


def test_nothing_of_this_machine_is_seen_or_changed(tmp_path: Path, nothing_left: None) -> None:
    (tmp_path / "secret").write_text("words")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert socket.create_connection(("127.0.0.1", port), 5).close() is None  # it is there, for this process
        tries = [
            f"open({str(tmp_path / 'secret')!r}).read()",
            "open('/etc/passwd').read()",
            f"open('/proc/1/root{tmp_path / 'secret'}').read()",
            f"import os; os.kill({os.getpid()}, 0)",
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            "open('/usr/there', 'w')",
            "open('/there', 'w')",
            "import os; os.setuid(0); os.mkdir('/usr/there')",
            "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000 | 0x20000) == 0",
            "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/cell', b'tmpfs', 0, None) == 0",
        ]
        program = "worked = []\n" + "".join(
            f"try:\n    {line}\n    worked.append({line!r})\nexcept BaseException:\n    pass\n" for line in tries
        )
        found = passes(program, "assert not worked, worked", Limits())
    assert found == Outcome(passed=True)
    assert (tmp_path / "secret").read_text() == "words"


TYPED = """\
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
@dataclass
class Point:
    x: int
    zero: ClassVar[int] = 0
"""


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        (TYPED, "from answer import Point\nassert Point(2).x == 2"),
        ("import contextlib, os, signal\nwith contextlib.suppress(PermissionError):\n    os.kill(1, signal.SIGINT)", "open('/dev/null')"),
    ],
    ids=["a module's names", "who interrupts the first process"],
)
def test_what_an_answer_may_do(answer: str, tests: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Python's folder is a link, and with a mask that hides new folders from others."""
    (tmp_path / "python").symlink_to(sys.base_prefix)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "python"))
    before = os.umask(0o077)
    try:
        assert passes(answer, tests, Limits()) == Outcome(passed=True)
    finally:
        os.umask(before)


def test_a_program_that_narrows_its_watchers_limits_has_not_passed() -> None:
    """It may where it has the same user, so not as root; it ends its cell, and not the command."""
    answer = "import resource\ntry:\n    resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))\nexcept PermissionError:\n    pass\n"
    assert passes(answer, "import time\ntime.sleep(0.3)", Limits()).passed == (os.geteuid() == 0)


@pytest.mark.for_real
def test_a_killed_parent_takes_its_program_with_it(nothing_left: None) -> None:
    line = "from trainers.rewards.sandbox import Limits, passes; passes('while True: pass', '', Limits(time_s=60))"
    with subprocess.Popen([sys.executable, "-c", line], cwd=ROOT) as parent:
        wait_for(programs, 30)
        parent.kill()
    wait_for(lambda: not programs(), 10)


def test_an_answer_passes_by_its_tests_alone(tmp_path: Path) -> None:
    add = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert code_of(add) == "def add(a, b):\n    return a + b\n"
    row = {"row": {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}}
    answers = [add, add.replace("+", "-"), "import os\nos._exit(0)", "print('passed')\nraise SystemExit", "while True:\n    pass"]
    rows = [row | {"answer": text} for text in answers] + [{"row": {}, "answer": add}]
    with Rewards({"code": reward_of("code", {"kind": "code", "timeout_s": 3})}, tmp_path) as rewards:
        found = rewards.score(rows)
    assert found.total[:-1].tolist() == [1, 0, 0, 0, 0]
    assert found.total[-1] != found.total[-1]
    assert found.failures["code"] == {"the row has no `tests`": 1, "worth 0: stopped by its limit of time": 1}


def test_nothing_is_run_where_it_cannot_be_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell without namespaces, as where the system forbids them."""
    broken = tmp_path / "cell.py"
    broken.write_text(sandbox.CELL.read_text().replace("check(LIBC.unshare(NEW)", "check(LIBC.unshare(-1)"))
    monkeypatch.setattr(sandbox, "CELL", broken)
    ran = tmp_path / "ran"
    rows = [{"row": {"tests": "pass"}, "answer": f"open({str(ran)!r}, 'w')"}]
    with pytest.raises(ConfigError, match=r"cannot be cut off.*namespaces"):
        Rewards({"code": reward_of("code", "code")}, tmp_path).score(rows)
    assert not ran.exists()
