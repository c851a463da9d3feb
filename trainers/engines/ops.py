"""DeepSpeed's compiled ops: built once on a node, in a process of their own with a time limit, and refused with a remedy.

Left alone, DeepSpeed compiles an op when it is first used, without a limit, and waits forever for a lock that a killed run left. Here
each build has a folder of its own, where torch's lock blocks no other build. The folder is renamed into place once it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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
INSTRUCTIONS_FILE = "instructions.json"
"""What a built op may use of its processor."""
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
    """Tell whether op `name` can be loaded without compiling; what DeepSpeed built itself does not count."""
    return all(_library(op).is_file() for op in (*NEEDS.get(name, ()), name))


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
    with _guard(op, limit_s):
        if _load(op):
            return
        missing = missing_for(op)
        if missing is not None:
            raise Unbuildable(missing.reason, missing.remedy)
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
    if not is_built(op):
        return False
    lacking = set(json.loads((folder_of(op) / INSTRUCTIONS_FILE).read_text())) - set(_instructions())
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
        shutil.rmtree(folder_of(op), ignore_errors=True)
        return False
    OpBuilder._loaded_ops[builder.name] = module
    with contextlib.redirect_stdout(io.StringIO()):
        builder.load(verbose=False)  # from the line above; pin_memory also shares its symbols with async_io here
    return True


def _build(op: str, limit_s: float) -> None:
    """Compile op in a folder and a session of its own, of which nothing but a log is left whatever happens; raises Unbuildable."""
    folder, name = folder_of(op), str(_builder(op).name)
    report, partial = folder.with_suffix(".log"), folder.with_suffix(f".{socket.gethostname()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir()
    log.info("building DeepSpeed's %s, once on this machine: a minute or more (log %s)", op, report)
    start = time.monotonic()
    try:
        with report.open("w") as output:
            line = [sys.executable, "-P", "-c", BUILD, BUILDERS[op], str(os.getpid()), str(Path(__file__).parents[2])]
            environment = _build_environment() | {"TORCH_EXTENSIONS_DIR": str(partial)}
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise Unbuildable(f"was not built in {limit_s:.0f} s", f"see {report}; a machine this busy may need another try") from None
            finally:
                _end_session(process)
        if code != 0 or not (partial / name / f"{name}.so").is_file():
            raise Unbuildable(f"does not build: {_compiler_words(report)}", f"the whole log is {report}")
        (partial / name / INSTRUCTIONS_FILE).write_text(json.dumps(_instructions()))
        with contextlib.suppress(OSError):  # another node was first
            (partial / name).rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
def _guard(op: str, limit_s: float) -> Iterator[None]:
    """Be the only one that builds this op; the kernel frees the lock with the process that holds it, unlike torch's lock file."""
    from filelock import FileLock, Timeout

    lock, mark = FileLock(folder_of(op).with_suffix(".lock")), folder_of(op).with_suffix(".building")
    deadline, patience_s = time.monotonic() + limit_s, POLL_S
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience_s)
        except Timeout:
            who, patience_s = host.read_text(mark), min(REMIND_S, max(POLL_S, deadline - time.monotonic()))
            level = logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.DEBUG
            log.log(level, "waiting for DeepSpeed's %s: %s is building", op, who)
            if time.monotonic() > deadline:
                raise Unbuildable(
                    f"another process is still building ({who})", f"wait for it or end it; its lock is {lock.lock_file}"
                ) from None
    try:
        mark.write_text(f"{socket.gethostname()} process {os.getpid()}")
        yield
    finally:
        mark.unlink(missing_ok=True)
        lock.release()


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
    """Return the folder of a built op, named by what it is valid for; the processor is compared as it is loaded."""
    import torch

    versions = (torch.__version__, import_deepspeed().__version__, sys.version.split()[0], os.environ.get("CXX", ""))
    return _extensions_root() / f"fulltune-{op}-{hashlib.sha256(repr(versions).encode()).hexdigest()[:12]}"


def _library(op: str) -> Path:
    return folder_of(op) / f"{_builder(op).name}.so"


@functools.cache
def _instructions() -> list[str]:
    """Return this processor's instruction sets, as far as -march=native may use them."""
    lines = host.read_text(Path("/proc/cpuinfo")).splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted(flag for flag in flags if INSTRUCTIONS.match(flag))
