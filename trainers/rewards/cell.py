"""A cell for a program that nobody has read: its own users, files, processes and network, with limits. `sandbox` starts it by its path.

It reads a JSON object from stdin and answers with one: {"code", "why", "said"}, or {"refused"} where something could not be cut off.
Standard library only, and Linux: namespaces, mount_setattr (5.12) and pivot_root, by their system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import time
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NEW = 0x20000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
BIND, RECURSIVE, PRIVATE, NOSUID, NODEV = 0x1000, 0x4000, 0x40000, 2, 4
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, AT_RECURSIVE, READ_ONLY, DETACH = 442, 0x8000, 1, 2
DEATHSIG, NO_NEW_PRIVS, DROP_BOUND = 1, 38, 24
ROOT, WORK = "/sys", "/cell"
"""Where the new root is made: a folder that every system has, hidden for this process alone."""
NOBODY = 65534
LOOK_S = 0.02
SAID = 4096
"""Last bytes of what the program says."""


def check(done: int, what: str) -> None:
    """Raise OSError where a system call has failed."""
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """Run the program of stdin, and say how it ended."""
    LIBC.prctl(DEATHSIG, signal.SIGKILL, 0, 0, 0)
    asked = json.loads(sys.stdin.read())
    ready, mapped, told = os.pipe(), os.pipe(), os.pipe()
    outer = os.fork()
    if outer == 0:
        _guarded(told[1], lambda: _apart(asked, ready, mapped, told[1]))
    for end in (ready[1], mapped[0], told[1]):
        os.close(end)
    if os.read(ready[0], 1):
        with contextlib.suppress(OSError):  # the cell then finds that it is nobody, and says so
            _map(outer)
        os.write(mapped[1], b"x")
    answer = b""
    while part := os.read(told[0], 65536):
        answer += part
    os.waitpid(outer, 0)
    said = {"code": None, "why": "", "said": ""} if answer else {"refused": "the cell has ended without a word"}
    print(answer.decode().strip() or json.dumps(said))


def _guarded(told: int, work: Any) -> NoReturn:
    try:
        work()
    except BaseException as error:  # a fork of main: nothing may return into it
        os.write(told, json.dumps({"refused": str(error)}).encode())
    os._exit(0)


def _map(process: int) -> None:
    """Let user 0 in the cell be this user; and where this is root, user 1 be nobody."""
    as_root = os.geteuid() == 0
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if kind == "gid" and not as_root:
            with open(f"/proc/{process}/setgroups", "w") as file:
                file.write("deny")
        with open(f"/proc/{process}/{kind}_map", "w") as file:
            file.write(f"0 {own} 1\n" + (f"1 {NOBODY} 1\n" if as_root else ""))


def _apart(asked: dict[str, Any], ready: tuple[int, int], mapped: tuple[int, int], told: int) -> None:
    check(LIBC.unshare(NEW), "namespaces")
    LIBC.prctl(DEATHSIG, signal.SIGKILL, 0, 0, 0)  # unshare takes it back
    os.write(ready[1], b"x")
    os.read(mapped[0], 1)
    inner = os.fork()
    if inner == 0:
        LIBC.prctl(DEATHSIG, signal.SIGKILL, 0, 0, 0)
        _guarded(told, lambda: _first(asked, told))
    os.close(told)
    os.waitpid(inner, 0)


def _first(asked: dict[str, Any], told: int) -> None:
    """Be the first process of the cell: build its files, start the program, watch it, and end with all that it has started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the first process does not get; a program of the same user could send it
    with open("/proc/self/uid_map") as file:
        is_root = len(file.read().splitlines()) == 2
    _files(asked)
    out = os.pipe()
    program = os.fork()
    if program == 0:
        _guarded(out[1], lambda: _program(asked, out[1], is_root))
    os.close(out[1])
    os.set_blocking(out[0], False)
    os.write(told, b" ")  # from here on, whatever ends this process is the program's doing: where they share a user, by its limits
    try:
        os.write(told, json.dumps(_watched(program, out[0], asked["limits"])).encode())
    except BaseException:
        os._exit(1)  # and the system ends all others of the cell


def _files(asked: dict[str, Any]) -> None:
    limits = asked["limits"]
    os.umask(0o022)
    _mount("none", "/", "", RECURSIVE | PRIVATE)
    _mount("tmpfs", ROOT, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for path in asked["paths"]:
        if os.path.islink(path):
            os.symlink(os.readlink(path), ROOT + path)
        elif os.path.isdir(path):
            os.makedirs(ROOT + path, exist_ok=True)
            _mount(path, ROOT + path, "", BIND | RECURSIVE)
            _read_only(ROOT + path, AT_RECURSIVE)
    os.mkdir(f"{ROOT}/dev")
    for name in ("null", "zero", "urandom"):
        os.close(os.open(f"{ROOT}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(f"/dev/{name}", f"{ROOT}/dev/{name}", "", BIND)
    os.mkdir(f"{ROOT}/proc")
    _mount("proc", f"{ROOT}/proc", "proc", NOSUID | NODEV)
    with contextlib.suppress(OSError), open(f"{ROOT}/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.mkdir(ROOT + WORK)
    _mount("tmpfs", ROOT + WORK, "tmpfs", NOSUID | NODEV, f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=777")
    with open(f"{ROOT}{WORK}/program.py", "w", encoding="utf-8") as file:
        file.write(asked["program"])
    os.chmod(f"{ROOT}{WORK}/program.py", 0o644)
    _read_only(ROOT, 0)
    os.chdir(ROOT)
    check(LIBC.syscall(PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", DETACH), "the old root")
    os.chdir(WORK)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    given = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None)
    check(LIBC.mount(*given), f"mount of {source} at {target}")


def _read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NOSUID | NODEV, 0, 0, 0)
    check(LIBC.syscall(MOUNT_SETATTR, -100, path.encode(), flags, attributes, ctypes.sizeof(attributes)), f"{path} without writing")


def _program(asked: dict[str, Any], out: int, is_root: bool) -> None:
    limits = asked["limits"]
    if is_root:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)  # drops all capabilities
    else:
        for number in range(64):
            LIBC.prctl(DROP_BOUND, number, 0, 0, 0)
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        check(LIBC.capset(header, none), "capabilities")
    check(LIBC.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    most = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_CPU: int(limits["time_s"]) + 1,
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    read, write = os.pipe()
    os.write(write, asked["input"].encode())
    os.close(write)
    for source, target in ((read, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.closerange(3, 1024)
    os.setsid()
    for kind, value in most.items():
        resource.setrlimit(kind, (value, value))
    environment = {"PATH": "/usr/bin:/bin", "HOME": WORK, "TMPDIR": WORK, "OMP_NUM_THREADS": "1"}
    os.execve(asked["python"], [asked["python"], "-I", "-S", "-B", f"{WORK}/program.py"], environment)


def _watched(program: int, out: int, limits: dict[str, Any]) -> dict[str, Any]:
    """Return how the program ended; it and all that it has started are gone then."""
    said, why, end, code = b"", "", time.monotonic() + limits["time_s"], None
    while code is None:
        time.sleep(LOOK_S)
        said = _more(out, said)
        done, status = os.waitpid(program, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            why = "time"
        else:
            why = _excess(limits)
        if why:
            break
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all but this one, the first
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return {"code": code, "why": why, "said": _more(out, said).decode(errors="replace")}


def _more(out: int, said: bytes) -> bytes:
    with contextlib.suppress(BlockingIOError):
        while part := os.read(out, 65536):
            said = (said + part)[-SAID:]
    return said


def _excess(limits: dict[str, Any]) -> str:
    """Return which limit all processes together exceed; empty for none."""
    numbers = [name for name in os.listdir("/proc") if name.isdecimal() and name != "1"]
    if len(numbers) > limits["processes"]:
        return "processes"
    pages = 0
    for number in numbers:
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{number}/statm") as file:
            pages += int(file.read().split()[1])
    return "memory" if pages * resource.getpagesize() + _unmapped(numbers) > limits["memory_bytes"] else ""


def _unmapped(numbers: list[str]) -> int:
    """Return the bytes of open memfds and of System V's shared memory, which need no mapping."""
    files: dict[tuple[int, int], int] = {}
    for number in numbers:
        with contextlib.suppress(OSError):  # a process that has ended
            for name in os.listdir(f"/proc/{number}/fd"):
                link = f"/proc/{number}/fd/{name}"
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith("/memfd:"):
                        found = os.stat(link)
                        files[found.st_dev, found.st_ino] = found.st_blocks * 512
    segments = 0
    with contextlib.suppress(OSError), open("/proc/sysvipc/shm") as file:
        lines = [line.split() for line in file]
        segments = sum(int(line[lines[0].index("rss")]) for line in lines[1:])
    return sum(files.values()) + segments


if __name__ == "__main__":
    main()
