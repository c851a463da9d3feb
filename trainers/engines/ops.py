"""DeepSpeed's compiled ops: built once on a node, in a process of their own with a time limit, and refused with a remedy.

Left alone, DeepSpeed compiles an op when it is first used, without a limit, and waits forever for a lock that a killed run left.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import host
from trainers.config.errors import ConfigError

log = logging.getLogger("fulltune")
BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "async_io": "AsyncIOBuilder",
    "pin_memory": "PinMemoryBuilder",
}
"""The builder of deepspeed.ops.op_builder that makes each op."""
NEEDS = {"async_io": ("pin_memory",)}
"""Ops that an op loads before itself."""
LIMIT_S = 1200.0
"""Longest build, and longest wait for somebody else's: on two cores cpu_adam takes 41 s, async_io 2.6 min, on busy ones 6.7."""
QUIET_S = 120.0
"""Seconds in which a live builder, perhaps on another node, is sure to have written something into its folder."""
POLL_S, REMIND_S, CHECK_S, GRACE_S = 0.2, 30.0, 30.0, 3.0
BUILD = """
import os, signal, sys
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # ninja passes it on to its compilers, each in a process group of its own
    os._exit(1)
signal.signal(signal.SIGTERM, end)
sys.path.append(sys.argv[3])
from trainers.processes import die_with_parent
die_with_parent(int(sys.argv[2]), signal.SIGTERM)  # end with who asked, the compilers too
from deepspeed.ops import op_builder
getattr(op_builder, sys.argv[1])().load(verbose=True)
"""
AIO_PROGRAM = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
INSTRUCTIONS = re.compile(r"sse|ssse|avx|fma|f16c|bmi|abm|adx|amx|aes|gfni|sha|pclmul|movbe|asimd|sve")


@dataclass(frozen=True)
class Missing:
    """Something without which an op cannot be built, and how to get it."""

    reason: str
    remedy: str


def import_deepspeed() -> Any:
    """Import DeepSpeed without its chatter, for the CPU where there is no GPU; half a second once torch is there.

    Between CPU ranks everything goes over gloo: DeepSpeed would otherwise compile an op of its own for that at start, so that
    even a run that offloads nothing needed a compiler. It also wraps the functions of Muon, an optimizer of which no run here knows,
    in torch.compile as each ZeRO-3 engine is built: importing what that needs took 1.3 s of every rank.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.ops import op_builder  # noqa: F401
        from deepspeed.runtime import compiler
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    compiler.compile = lambda: lambda function: function
    return deepspeed


def require_op(name: str, path: str = "engine.name", value: object = "zero3", limit_s: float = LIMIT_S) -> None:
    """Have op `name` built and loaded into this process, before a run needs it; not collective, every rank calls it.

    An op that was built before takes milliseconds and needs no compiler. Else one process of those that see the build folder
    builds and the others wait. Raises ConfigError about setting `path` when the op could not be built, with the compiler's own words.
    """
    try:
        for op in (*NEEDS.get(name, ()), name):
            _require(op, limit_s)
    except Unbuildable as error:
        raise ConfigError(path, value, f"DeepSpeed's {name}: {error.missing.reason}", error.missing.remedy) from None


def missing_for(name: str) -> Missing | None:
    """Return what prevents a build of op `name` on this machine; None where nothing is known to. Under a second."""
    checks = [_compiler_problem, _headers_problem, _ninja_problem]
    checks += [_libaio_problem, _cuda_problem] if name == "async_io" else []
    return next((missing for check in checks if (missing := check()) is not None), None)


def is_built(name: str) -> bool:
    """Tell whether op `name` can be loaded without compiling; what only DeepSpeed built itself counts as not built."""
    return all(_stamp_fits(op) for op in (*NEEDS.get(name, ()), name))


def left_lock(name: str) -> Path | None:
    """Return torch's lock of op `name` where no process of this node holds it, as a killed build leaves it."""
    locks = [folder_of(op) / "lock" for op in (*NEEDS.get(name, ()), name)]
    return next((lock for lock in locks if lock.exists() and _holder(lock) is None), None)


class Unbuildable(Exception):
    """An op cannot be built or loaded."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Keep reason and remedy together."""
        self.missing = Missing(reason, remedy)
        super().__init__(reason)


def _require(op: str, limit_s: float) -> None:
    if _load(op):
        return
    _make_root()
    deadline = time.monotonic() + limit_s
    with _guard(op, deadline) as died_here:
        if _load(op):
            return
        missing = missing_for(op)
        if missing is not None:
            raise Unbuildable(missing.reason, missing.remedy)
        _clear_lock(op, died_here, deadline)
        _build(op, limit_s)
    if not _load(op):
        raise Unbuildable(f"was built in {folder_of(op)}, but does not load", f"remove {folder_of(op)}, and start again")


def _load(op: str) -> bool:
    """Put a built op where DeepSpeed's own load() looks first, so that a run needs neither ninja nor a lock.

    Returns False where there is nothing to load; raises Unbuildable for an op made for another processor, which would crash.
    """
    import_deepspeed()
    from deepspeed.ops.op_builder.builder import OpBuilder

    builder = _builder(op)
    if builder.name in OpBuilder._loaded_ops:
        return True
    if not _stamp_fits(op):
        return False
    lacking = set(_read_stamp(op)["instructions"]) - set(_instructions())
    if lacking:
        reason = f"{folder_of(op)} was built on a processor with {', '.join(sorted(lacking)[:4])}, which this one lacks"
        raise Unbuildable(reason, "TORCH_EXTENSIONS_DIR=DIR in the environment, a folder for each kind of node")
    spec = importlib.util.spec_from_file_location(builder.name, _library(op))
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        log.warning("%s does not load (%s): built again", _library(op), error)
        _stamp_file(op).unlink(missing_ok=True)
        return False
    OpBuilder._loaded_ops[builder.name] = module
    with contextlib.redirect_stdout(io.StringIO()):
        builder.load(verbose=False)  # from the line above; pin_memory also shares its symbols with async_io here
    return True


def _build(op: str, limit_s: float) -> None:
    """Compile op in a session of its own, of which nothing is left whatever happens; raises Unbuildable."""
    folder = folder_of(op)
    report = folder / "fulltune-build.log"
    was_there = _library(op).exists()
    if _stamp_file(op).exists():  # of another torch, another compiler or a file that changed since: its objects are too
        shutil.rmtree(folder)
        was_there = False
    folder.mkdir(parents=True, exist_ok=True)
    log.info("building DeepSpeed's %s, once on this machine: a minute or more (log %s)", op, report)
    start, ended = time.monotonic(), False
    with report.open("w") as output:
        line = [sys.executable, "-P", "-c", BUILD, BUILDERS[op], str(os.getpid()), str(Path(__file__).parents[2])]
        process = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_build_environment(), start_new_session=True
        )
        try:
            code = process.wait(timeout=limit_s)
            ended = True
        except subprocess.TimeoutExpired:
            raise Unbuildable(f"was not built in {limit_s:.0f} s", f"see {report}; a machine this busy may need another try") from None
        finally:
            _end_session(process)
            (folder / "lock").unlink(missing_ok=True)
            if not ended and not was_there:
                _discard_objects(folder)
    if code != 0 or not _library(op).exists():
        raise Unbuildable(f"does not build: {_compiler_words(report)}", f"the whole log is {report}")
    _write_stamp(op)
    log.info("built DeepSpeed's %s in %.0f s", op, time.monotonic() - start)


def _end_session(leader: subprocess.Popen[bytes]) -> None:
    """End a process and its whole session: ninja's compilers are in process groups of their own, so killing one is not enough."""
    leader.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        leader.wait(GRACE_S)
    deadline = time.monotonic() + GRACE_S
    while left := _session_members(leader.pid):
        for pid in left if time.monotonic() > deadline else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    leader.kill()
    leader.wait()


def _session_members(session: int) -> list[int]:
    """Return the processes of a session that still run; a zombie waits for its parent alone."""
    members = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        words = host.read_text(file).rpartition(")")[2].split()  # state, parent, process group, session: proc(5)
        if len(words) > 3 and words[0] not in "ZX" and int(words[3]) == session:
            members.append(int(file.parent.name))
    return members


def _discard_objects(folder: Path) -> None:
    """Remove what a killed compiler may have left half-written; the log stays."""
    for file in folder.iterdir():
        if file.suffix != ".log":
            file.unlink()


def _compiler_words(report: Path) -> str:
    """Return the first lines that the compiler wrote about its first failure, or the log's last lines."""
    lines = [line.strip()[:300] for line in report.read_text("utf-8", "replace").splitlines() if line.strip()]
    failed = next((number for number, line in enumerate(lines) if line.startswith("FAILED:")), None)
    if failed is None:
        return "\n    ".join(["", *lines[-4:]]) or "it said nothing"
    words = lines[failed + 2 :]  # after `FAILED: object` comes the command line
    end = next((number for number, line in enumerate(words) if line.startswith(("ninja: ", "[")) or "FAILED:" in line), len(words))
    return "\n    ".join(["", *words[: min(end, 6)]]) if end else "the compiler said nothing"


@contextlib.contextmanager
def _guard(op: str, deadline: float) -> Iterator[bool]:
    """Be the only one that builds in this folder; yields whether the last one was killed, on this node, while it did.

    The kernel frees the guard with the process that holds it, unlike torch's lock file; only the mark is left then.
    """
    from filelock import FileLock

    root = folder_of(op).parent
    mark, lock = root / "fulltune.building", FileLock(root / "fulltune.lock")
    _acquire(lock, mark, op, deadline)
    try:
        died_here = host.read_text(mark).startswith(f"{socket.gethostname()} ")
        mark.write_text(f"{socket.gethostname()} process {os.getpid()}")
        yield died_here
    finally:
        mark.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: Any, mark: Path, op: str, deadline: float) -> None:
    from filelock import Timeout

    said = float("-inf")
    while True:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=POLL_S)
            return
        if time.monotonic() > deadline:
            raise Unbuildable(
                f"another process is still building ({host.read_text(mark)})", f"wait for it or end it; its lock is {lock.lock_file}"
            )
        said = _remind(said, f"waiting for DeepSpeed's {op}: {host.read_text(mark)} is building")


def _clear_lock(op: str, died_here: bool, deadline: float) -> None:
    """Remove torch's lock where nobody holds it, wait where somebody does: torch itself would wait forever for either.

    A live builder has the file open, so that one on this node shows in /proc. One on another node, which shares the folder
    but not our guard, shows by what it writes.
    """
    lock, said = folder_of(op) / "lock", float("-inf")
    while lock.exists():
        holder = _holder(lock)
        if holder is None and (died_here or _quiet_s(lock.parent) > QUIET_S):
            log.warning("removed %s: a build that was killed had left it", lock)
            lock.unlink(missing_ok=True)
            return
        who = f"process {holder}" if holder else "another node, perhaps,"
        if time.monotonic() > deadline:
            raise Unbuildable(f"{who} still holds {lock}", f"wait for it or end it; if nobody builds, remove {lock}")
        said = _remind(said, f"waiting for DeepSpeed's {op}: {who} is building (lock {lock})")
        time.sleep(POLL_S)


def _remind(said: float, message: str) -> float:
    """Log `message` at most every REMIND_S seconds, by one rank of a machine; returns when it was said last."""
    if time.monotonic() - said < REMIND_S:
        return said
    log.log(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.DEBUG, message)
    return time.monotonic()


def _holder(file: Path) -> int | None:
    """Return a process of this node that has `file` open."""
    target = os.path.realpath(file)
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry) == target:
                return int(entry.parts[2])
    return None


def _quiet_s(folder: Path) -> float:
    """Return seconds since anything in `folder` was written."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return time.time() - max(times)


def _compiler() -> list[str]:
    """Return the C++ compiler's command: $CXX, or c++ as torch takes it, or g++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in ("c++", "g++") if shutil.which(name)), "g++")]


def _build_environment() -> dict[str, str]:
    """Return the environment of a build: this Python's own ninja comes first, as another's log would start it over, and one job a core."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {"MAX_JOBS": str(host.cores()), "CXX": shlex.join(_compiler())} | os.environ | {"PATH": path}


def _compiler_problem() -> Missing | None:
    command = _compiler()
    remedy = "apt-get install g++ (or module load gcc, or conda install gxx_linux-64); CXX=PROGRAM names another"
    if shutil.which(command[0]) is None:
        return Missing(f"there is no C++ compiler to build it with (`{shlex.join(command)}`)", remedy)
    words = _failure([*command, "--version"])
    return None if words is None else Missing(f"the C++ compiler `{shlex.join(command)}` does not run: {words}", remedy)


def _headers_problem() -> Missing | None:
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    remedy = f"apt-get install python{version}-dev, or a Python that brings its headers"
    return None if headers.is_file() else Missing(f"Python's C headers are missing ({headers})", remedy)


def _ninja_problem() -> Missing | None:
    path = _build_environment()["PATH"]
    if shutil.which("ninja", path=path) is None:
        return Missing("ninja is missing, which builds it", "pip install ninja, or apt-get install ninja-build")
    words = _failure(["ninja", "--version"])
    return None if words is None else Missing(f"ninja does not run: {words}", "pip install --force-reinstall ninja")


def _libaio_problem() -> Missing | None:
    with tempfile.TemporaryDirectory() as folder:
        words = _failure([*_compiler(), "-x", "c++", "-", "-o", f"{folder}/probe", "-laio"], AIO_PROGRAM)
    if words is None:
        return None
    remedy = (
        "apt-get install libaio-dev (or yum install libaio-devel); with conda: conda install libaio, "
        "then CPATH=$CONDA_PREFIX/include and LIBRARY_PATH=LD_LIBRARY_PATH=$CONDA_PREFIX/lib"
    )
    return Missing(f"libaio, through which NVMe is read and written, is missing: {words}", remedy)


def _cuda_problem() -> Missing | None:
    """Name a missing CUDA toolkit, which a machine with a GPU needs to build against."""
    import torch

    if not torch.cuda.is_available():
        return None
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is not None and (Path(CUDA_HOME) / "include" / "cuda.h").is_file():
        return None
    wanted = f"CUDA toolkit {torch.version.cuda}"
    return Missing(f"the {wanted} is missing (CUDA_HOME = {CUDA_HOME})", f"install the {wanted}, or CUDA_HOME=DIR where it is")


def _failure(command: list[str], text: str = "") -> str | None:
    """Run a short command; returns None if it went well, else its first words."""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=CHECK_S, check=False, env=_build_environment(), errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {CHECK_S:.0f} s"
    except OSError as error:
        return str(error.strerror)
    lines = (done.stderr + done.stdout).strip().splitlines()
    return None if done.returncode == 0 else (lines[0][:300] if lines else f"exit code {done.returncode}")


def _make_root() -> None:
    root = _extensions_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        reason = f"the build folder {root} cannot be written ({error.strerror})"
        raise Unbuildable(reason, "TORCH_EXTENSIONS_DIR=DIR in the environment, on a disk with space") from None


def _extensions_root() -> Path:
    """Return torch's folder of built extensions, as torch.utils.cpp_extension.load finds it."""
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    if torch.version.hip:
        device = f"rocm{torch.version.hip.replace('.', '')}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(get_default_build_root()) / f"{python}_{device}"


def _builder(op: str) -> Any:
    import_deepspeed()
    from deepspeed.ops import op_builder

    return getattr(op_builder, BUILDERS[op])()


def folder_of(op: str) -> Path:
    """Return the folder that holds a built op, and its lock while it is built."""
    return _extensions_root() / str(_builder(op).name)


def _library(op: str) -> Path:
    return folder_of(op) / f"{_builder(op).name}.so"


def _stamp_file(op: str) -> Path:
    return folder_of(op) / "fulltune.json"


def _identity(op: str) -> dict[str, Any]:
    """Return what a built op is valid for, and which file it is: other environments share the folder, and build there too."""
    import torch

    file = _library(op).stat()
    versions = {"torch": torch.__version__, "deepspeed": import_deepspeed().__version__, "python": sys.version.split()[0]}
    return versions | {"compiler": os.environ.get("CXX", ""), "size": file.st_size, "modified": file.st_mtime_ns}


def _stamp_fits(op: str) -> bool:
    try:
        known = _read_stamp(op)
        return all(known.get(key) == value for key, value in _identity(op).items())
    except (OSError, ValueError):
        return False


def _read_stamp(op: str) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(_stamp_file(op).read_text())
    return known


def _write_stamp(op: str) -> None:
    """Note what was built; written last and renamed, so that it never vouches for half an op."""
    partial = _stamp_file(op).with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(_identity(op) | {"instructions": _instructions()}))
    partial.rename(_stamp_file(op))


@functools.cache
def _instructions() -> list[str]:
    """Return this processor's instruction sets, as far as -march=native may use them."""
    lines = host.read_text(Path("/proc/cpuinfo")).splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in flags if INSTRUCTIONS.match(flag))
