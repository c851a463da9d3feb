"""No process outlives its parent, whatever ends that one and however early."""

from __future__ import annotations

import ast
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, wait_for

from trainers.data import parallel, prepare
from trainers.data.sources import Row
from trainers.processes import LIBC, allocator_environment, die_with_parent, kill_left, raise_exhausted


class Never:
    """An encoder whose documents nobody waits for."""

    def encode(self, rows: list[Row]) -> None:
        time.sleep(60)


def ends_within(reader: int, seconds: float) -> bytes:
    """Return what comes through a pipe until all who hold its other end are gone; fails where some are left."""
    said, until = b"", time.monotonic() + seconds
    while select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
        data = os.read(reader, 100)
        if not data:
            return said
        said += data
    pytest.fail("a process is left")


def lose_the_race(writer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare data as a rank does, with workers that ask the kernel for its end only once it has ended; they write a byte each."""
    mine = os.getpid()

    def late(parent: int) -> None:
        os.write(writer, b"f")
        while os.getppid() == mine:
            time.sleep(0.005)
        die_with_parent(parent)
        os.write(writer, b"w")

    monkeypatch.setattr(parallel, "die_with_parent", late)
    rows = (Row(data="{}", file="x", line=number) for number in range(prepare.SMALL))
    list(prepare.encode_rows(Never(), rows, 2))  # type: ignore[arg-type]


def test_a_worker_forked_just_before_its_rank_was_killed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker asks the kernel for its parent's end only once that has ended: the race, lost every time."""
    reader, writer = os.pipe()
    rank = os.fork()
    if rank == 0:
        try:
            lose_the_race(writer, monkeypatch)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"f"
    finally:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    assert b"w" not in ends_within(reader, 20)
    os.close(reader)


def test_a_process_whose_parent_is_another_one_ends() -> None:
    child = os.fork()
    if child == 0:
        die_with_parent(os.getppid() + 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


ASK_THEMSELVES = {"trainers/engines/ops.py": "BUILD", "tools/doctor.py": "_answer"}
"""Programs that get the id of who starts them and ask the kernel, as their first act."""
CELL = "trainers/rewards/cell.py"
"""Runs without our modules, and asks the kernel after each fork; the answer's own program ends with its process namespace."""


def test_every_process_that_is_started_ends_with_who_started_it() -> None:
    alone = []
    for path in (path for room in ("launcher", "trainers", "tools") for path in (ROOT / room).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr in ("Popen", "fork", "Process", "ProcessPoolExecutor"):
                guards = {"preexec_fn", "initializer"} & {keyword.arg for keyword in call.keywords}
                alone += [] if guards else [str(path.relative_to(ROOT))]
    assert sorted(alone) == sorted([*ASK_THEMSELVES, CELL, CELL, CELL])
    assert (ROOT / CELL).read_text().count("LIBC.prctl(DEATHSIG, signal.SIGKILL, 0, 0, 0)") == 3
    for name, where in ASK_THEMSELVES.items():
        text = Path(ROOT / name).read_text()
        assert "die_with_parent(int(" in text.partition(where)[2]


def test_what_outlives_its_launcher_is_killed_and_nothing_else(tmp_path: Path) -> None:
    """A rank that is stopped while it imports torch has not asked the kernel to end with its agent, and cannot."""
    config = tmp_path / "config.yaml"
    line = [sys.executable, "-c", "import time; time.sleep(600)", str(config)]
    ours = subprocess.Popen(line, env=os.environ | {"FULLTUNE_LAUNCHER": "4194999"}, start_new_session=True)
    others = [
        subprocess.Popen(line, env=os.environ | {"FULLTUNE_LAUNCHER": "4194998"}),
        subprocess.Popen([*line[:-1], str(tmp_path / "other.yaml")], env=os.environ | {"FULLTUNE_LAUNCHER": "4194999"}),
    ]
    try:
        os.kill(ours.pid, signal.SIGSTOP)
        wait_for(lambda: b"4194999" in Path(f"/proc/{ours.pid}/environ").read_bytes())
        kill_left(config, 4194999)
        assert ours.wait(20) == -signal.SIGKILL
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in (ours, *others):
            process.kill()
            process.wait(20)


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_NOFILE])
def test_what_fails_where_nothing_is_left_is_not_taken_for_bad_input(limit: int) -> None:
    """A library's own error, which says nothing of memory: the process is asked instead."""
    lines = (
        "import pathlib, resource, sys",
        "from trainers.processes import raise_exhausted",
        "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()",
        f"low = used + (1 << 20) if {limit} == resource.RLIMIT_AS else 3",
        "if sys.argv[1] == 'little':",
        f"    resource.setrlimit({limit}, (low, resource.getrlimit({limit})[1]))",
        "try:",
        "    raise ValueError('Target modules not found')",
        "except ValueError as error:",
        "    raise_exhausted(error)",
        "print('bad input')",
    )
    for little, said in (("little", "Target modules not found"), ("enough", "bad input")):
        ended = subprocess.run([sys.executable, "-c", "\n".join(lines), little], capture_output=True, text=True, timeout=60, check=False)
        assert said in (ended.stderr if little == "little" else ended.stdout), ended


@pytest.mark.parametrize("cause", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't allocate memory: 8")])
def test_an_error_that_a_library_has_wrapped_is_seen(cause: Exception) -> None:
    wrapped = OSError("Can't load the tokenizer")
    wrapped.__cause__ = cause
    with pytest.raises(OSError, match="Can't load the tokenizer"):
        raise_exhausted(wrapped)
    raise_exhausted(OSError(errno.ENOENT, "No such file"))


HEAP_AFTER_STEPS = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype = Info
def aligned(size):
    place = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(place), 64, size) == 0
    return place
for step in range(4):
    live = []
    for block in range(64):
        live.append(aligned(1 << 20))
        temporary = aligned(3 << 20)
        small = [libc.malloc(64 + 8 * (block % 4)) for _ in range(8)]
        libc.free(temporary)
    for place in live:
        libc.free(place)
print(libc.mallinfo2().arena >> 20)
"""
"""Each step holds 64 blocks of 1 MiB, aligned as tensors are, with larger ones for a moment and small ones for good."""


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="not glibc 2.33 or later, which says how large its heap is")
def test_blocks_of_a_step_are_used_again_by_the_next_one() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    line = [sys.executable, "-I", "-c", HEAP_AFTER_STEPS]
    ended = subprocess.run(line, env=clean | allocator_environment({}), capture_output=True, text=True, timeout=60, check=True)
    assert 64 <= int(ended.stdout) < 96


def test_what_a_user_has_set_up_of_malloc_stays() -> None:
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"):
        assert allocator_environment({name: "1"}) == {}
