"""Start `python -m NAME` and `python -c TEXT` in milliseconds, as forks of a process that has imported torch and transformers.

Importing them is four fifths of a short run. Here every process has a child of its own, its forker, that has imported them and done
nothing else. To start Python, a process asks its forker, whose fork becomes a child of the process that asked (the fork's parent
exits, and PR_SET_CHILD_SUBREAPER hands it over). The fork has what a started program has: its own signals, environment, working
directory, open files, /proc entries, and a forker. It imports our code anew, from its own PYTHONPATH.

Two things differ from a real start: all forks share the seed of hash() and the pages of imported modules. Python is started for real
where FULLTUNE_FORK is not in the environment, where a variable that imports read differs, or where another program starts it.
"""

from __future__ import annotations

import _posixsubprocess
import array
import ast
import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import itertools
import mmap
import os
import pickle
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

SWITCH = "FULLTUNE_FORK"
ROOT = Path(__file__).parents[1]
OURS = ("launcher", "trainers", "tools")
NOT_BEFOREHAND = {"deepspeed", "wandb", "wandb_workspaces", "lm_eval", "datasets", "pyarrow", "hydra_plugins", "submitit", "trl", *OURS}
"""What starts threads or changes state as it is imported."""
ALSO = ("transformers.models.llama.modeling_llama",)
READ_BY_IMPORTS = ("PYTHON", "LD_", "LC_", "LANG", "HF_", "TRANSFORMERS_", "OMP_", "MKL_", "HOME", "XDG_", "CUDA_HOME", "USE_")
OF_EACH_PROCESS = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONSAFEPATH"}
PR_SET_PDEATHSIG, PR_SET_MM, PR_SET_MM_MAP, PR_SET_CHILD_SUBREAPER = 1, 35, 14, 36
FAR_FD = 600
"""Our own sockets are moved beyond the numbers that a process hands to its children."""

LIBC = ctypes.CDLL(None, use_errno=True)
start_for_real = _posixsubprocess.fork_exec


class Forker:
    """The forker of this process, seen from this process."""

    def __init__(self, connection: socket.socket, environment: dict[bytes, bytes]) -> None:
        self.connection, self.environment, self.owner, self.lock = connection, environment, os.getpid(), threading.Lock()

    def start(self, *arguments: Any) -> int:
        """Do what _posixsubprocess.fork_exec does, by a fork where that amounts to the same; return the child's pid."""
        request, files = self.as_request(*arguments)
        if request is None:
            return start_for_real(*arguments)
        with self.lock:
            LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # while the fork is handed over to us
            try:
                send(self.connection, pickle.dumps(request), files)
                answer, _ = receive(self.connection)
            except BaseException:  # a signal's handler has raised, say: the answer would be taken for that to the next request
                self.owner = 0
                raise
            finally:
                LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not answer.isdigit():
            raise RuntimeError(answer.decode())
        return int(answer)

    def as_request(self, *arguments: Any) -> tuple[dict[str, Any] | None, list[int]]:
        """Return what the forker has to know, and the files that it gets; None where only a real start will do."""
        args, _, _, keep, cwd, environment, p2cread, _, _, c2pwrite, _, errwrite, _, errpipe_write, _, new_session = arguments[:16]
        group, gid, groups, uid, umask, preexec = arguments[16:22]
        variables = dict(os.environb) if environment is None else dict(item.split(b"=", 1) for item in environment)
        words = [os.fsdecode(word) for word in args]
        special = (group, gid, groups, uid, umask) != (-1, None, None, None, -1) or not os.path.isdir(cwd or ".")
        if os.getpid() != self.owner or special or not self.would_do_the_same(words, variables):
            return None, []
        given = {0: p2cread, 1: c2pwrite, 2: errwrite}
        files = {number: fd if fd != -1 else number for number, fd in given.items()} | {fd: fd for fd in keep if fd != errpipe_write}
        files = {number: fd for number, fd in files.items() if is_open(fd)}
        request = {
            "words": words,
            "environment": variables,
            "cwd": os.path.abspath(cwd or "."),
            "files": list(files),
            "new_session": bool(new_session),
            "preexec": pickle.dumps(preexec),
            "path": sys.path,
            "parent": os.getpid(),
            "ignored": [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN],
            "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "affinity": os.sched_getaffinity(0),
        }
        return request, list(files.values())

    def would_do_the_same(self, words: list[str], variables: dict[bytes, bytes]) -> bool:
        """Tell whether a fork does what the command would: it runs Python, whose imports find the environment that ours found."""
        if words[:1] != [sys.executable] or as_program(words)[1] not in ("-m", "-c") or os.fsencode(SWITCH) not in variables:
            return False
        changed = {os.fsdecode(name) for name in {*variables, *self.environment} if variables.get(name) != self.environment.get(name)}
        return not any(name.startswith(READ_BY_IMPORTS) for name in changed - OF_EACH_PROCESS)


def as_program(words: list[str]) -> tuple[set[str], str, str, list[str]]:
    """Return the options that we know, then -m or -c, what to run, and its arguments."""
    known = list(itertools.takewhile(lambda word: word in ("-u", "-B"), words[1:]))
    option, what, *rest = [*words[1 + len(known) :], "", ""][: max(2, len(words) - 1 - len(known))]
    return {*known}, option, what, rest


def is_open(fd: int) -> bool:
    with suppress(OSError):
        os.fstat(fd)
        return True
    return False


def send(connection: socket.socket, content: bytes, files: list[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    connection.sendmsg([struct.pack("<Q", len(content))], rights)
    connection.sendall(content)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return one message and the files that came with it. Raises EOFError once the other end is closed."""
    head, rights, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(64 * 4), socket.MSG_CMSG_CLOEXEC)
    files = array.array("i")
    for _, _, data in rights:
        files.frombytes(data)
    content, length = bytearray(), struct.unpack("<Q", head)[0] if head else 1
    while len(content) < length:
        part = connection.recv(1 << 20) if head else b""
        if not part:
            raise EOFError
        content += part
    return bytes(content), list(files)


def begin() -> None:
    """Let this process, and all that it starts, start Python by forks, and be their first forker's parent."""
    ours, theirs = socket.socketpair()
    text = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forking; forking.serve()"
    plain = {name: value for name, value in os.environ.items() if name not in OF_EACH_PROCESS}
    subprocess.Popen([sys.executable, "-c", text, str(theirs.fileno())], env=plain, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    os.environ[SWITCH] = "1"
    start_through(Forker(ours, dict(os.environb)))


def start_through(forker: Forker) -> None:
    _posixsubprocess.fork_exec = subprocess._fork_exec = forker.start  # type: ignore[attr-defined]


def serve() -> None:
    """Import, then fork on request until the process that started us has ended; each fork runs its program from here."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    connection, path = far(socket.socket(fileno=int(sys.argv[1]))), sys.path[2:]
    import_all()
    for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM}:
        signal.signal(number, signal.SIG_IGN)  # what is sent to a whole group is for its programs
    while True:
        request, files = wait_for_request(connection)  # returns in a new process each time
        ours, theirs = map(far, socket.socketpair())
        if os.fork() != 0:
            theirs.close()
            break
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # from here on: the forker of that process
        ours.close()
        connection.close()
        connection = theirs
        close(files)
    start_through(Forker(ours, dict(os.environb)))
    try:
        option, what = become(request, files, path)
        answer = str(os.getpid())
    except BaseException:
        answer = traceback.format_exc()
    send(connection, answer.encode(), [])
    connection.close()
    if not answer.isdecimal():
        os._exit(1)
    run_to_the_end(option, what)


def far(connection: socket.socket) -> socket.socket:
    fd = fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, FAR_FD)
    connection.close()
    return socket.socket(fileno=fd)


def close(files: list[int]) -> None:
    for fd in files:
        os.close(fd)


def import_all() -> None:
    """Import what our code, anywhere in it, imports of other projects."""
    for file in sorted(file for package in OURS for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {(node.module or "").partition(".")[0]}
            else:
                continue
            if not names & NOT_BEFOREHAND:
                with suppress(ImportError, AttributeError):  # optional ones
                    exec(compile(ast.Module([node], []), str(file), "exec"), {})
    for name in ALSO:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("forking.py: an import has started a thread, which forks would lack; add its package to NOT_BEFOREHAND")
    gc.collect()
    gc.freeze()


def wait_for_request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Serve requests; return in each new process, once it is a child of the process that asked."""
    while True:
        try:
            content, files = receive(connection)
        except (EOFError, ConnectionError):
            os._exit(0)
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if os.fork() != 0:
                os._exit(0)
            while os.getppid() == between:
                os.sched_yield()
            request = pickle.loads(content)
            if os.getppid() != request["parent"]:  # died meanwhile
                os._exit(1)
            return request, files
        os.waitpid(between, 0)
        close(files)


def become(request: dict[str, Any], files: list[int], path: list[str]) -> tuple[str, str]:
    """Take over all that a program gets from the process that starts it; return -m or -c, and the module or the text."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FAR_FD) for fd in files]
    close(files)
    for number, fd in zip(request["files"], moved, strict=True):
        os.dup2(fd, number, inheritable=True)
    close(moved)
    for number in {0, 1, 2} - {*request["files"]}:
        os.close(number)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        ignored = number in (*request["ignored"], signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores the last two
        signal.signal(number, signal.SIG_IGN if ignored else signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.sched_setaffinity(0, request["affinity"])
    os.chdir(request["cwd"])
    if request["new_session"]:
        os.setsid()
    for name in {*os.environb} - {*request["environment"]}:
        del os.environb[name]
    os.environb.update(request["environment"])
    show(request["words"], request["environment"])
    sys.orig_argv = request["words"]
    known, option, what, rest = as_program(sys.orig_argv)
    sys.argv = [option, *rest]
    sys.dont_write_bytecode |= "-B" in known
    sys.path[:] = request["path"]  # of the process that asked, for what it wants to be called
    importlib.invalidate_caches()
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    open_standard_files(unbuffered="-u" in known or "PYTHONUNBUFFERED" in os.environ)
    before = pickle.loads(request["preexec"])
    if before is not None:
        before()
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    for name in [name for name in sys.modules if name.partition(".")[0] in (*OURS, "sitecustomize")]:
        del sys.modules[name]
    with suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")
    return option, what


def show(words: list[str], variables: dict[bytes, bytes]) -> None:
    """Let /proc/PID/cmdline and /proc/PID/environ, by which processes are found, read as those of a started program."""
    line = b"".join(os.fsencode(word) + b"\0" for word in words)
    content = line + b"".join(name + b"=" + value + b"\0" for name, value in variables.items())
    shown.append(mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    shown[-1].write(content)
    start = ctypes.addressof(ctypes.c_char.from_buffer(shown[-1]))
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    code, end_code, stack, data, end_data, heap = (int(stat[number - 3]) for number in (26, 27, 28, 45, 46, 47))
    LIBC.sbrk.restype = ctypes.c_void_p
    places = (code, end_code, data, end_data, heap, LIBC.sbrk(0), stack)
    table = struct.pack("<12QIi", *places, start, start + len(line), start + len(line), start + len(content), 0, 0, -1)
    if LIBC.prctl(PR_SET_MM, PR_SET_MM_MAP, table, len(table), 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_MM_MAP)")


shown: list[mmap.mmap] = []


def open_standard_files(unbuffered: bool) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file, before = None, getattr(sys, f"__{name}__")
        if is_open(number):
            inner = open(number, "wb" if number else "rb", -1 if not number or not unbuffered else 0, closefd=False)  # noqa: SIM115
            lines = not unbuffered and (name == "stderr" or inner.isatty())
            file = io.TextIOWrapper(inner, before.encoding, before.errors, line_buffering=lines, write_through=unbuffered)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def run_to_the_end(option: str, what: str) -> None:
    """Run, and end, as Python does; only its last act is left out: to take modules apart takes a quarter of a second."""
    code: Any = 0
    try:
        run(option, what)
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


def run(option: str, what: str) -> None:
    if "PYTHONSAFEPATH" not in os.environ:
        sys.path.insert(0, os.getcwd() if option == "-m" else "")
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if option == "-m":
        runpy._run_module_as_main(what)  # type: ignore[attr-defined]
    else:
        exec(compile(what, "<string>", "exec"), main.__dict__)
