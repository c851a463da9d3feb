"""Results that are made once for a content hash, whatever number of processes ask, and kept whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainers.config.errors import ConfigError
from trainers.health.activity import watch
from trainers.processes import raise_exhausted
from trainers.rundir.files import sha256

POLL_S = 0.2
REMIND_S = 30.0
SEAL = "sha256.json"
"""Of each file of a result: a disk that returns other bytes later trains other tokens."""


def cache_root(prepared_dir: str | None) -> Path:
    """Return the folder of prepared data; it need not exist yet."""
    return Path(prepared_dir).expanduser() if prepared_dir else home() / "prepared"


def content_key(*parts: object) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def build_once(root: Path, name: str, build: Callable[[Path], None], what: str) -> tuple[Path, bool]:
    """Return folder `name`, and whether it was there before; if not, `build` fills a temporary folder that is renamed when complete.

    One process builds, under a lock that the kernel frees if it dies; the others say who they wait for. Raises ConfigError
    where `root` cannot be written.
    """
    from filelock import FileLock

    folder = root / name
    if folder.is_dir():
        return folder, True
    _require_writable(root)
    lock = FileLock(root / f"{name}.lock")
    _acquire(lock, root, name, what)
    try:
        if folder.is_dir():
            return folder, False  # another process has just made it
        _remove_stale(root, name)
        _build(root, name, build, what)
        return folder, False
    finally:
        lock.release()


def _build(root: Path, name: str, build: Callable[[Path], None], what: str) -> None:
    """Let `build` fill a temporary folder and rename it, with a file that tells those who wait which process this is."""
    holder, partial = root / f"{name}.holder", root / f"tmp-{name}-{socket.gethostname()}-{os.getpid()}"
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}")
    partial.mkdir()
    try:
        build(partial)
        (partial / SEAL).write_text(json.dumps(_digests(partial), indent=1))
        partial.rename(root / name)
    except OSError as error:
        raise_exhausted(error)
        raise ConfigError(
            "data.prepared_dir", str(root), f"{what} cannot be written: {error}", "free space, or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        holder.unlink(missing_ok=True)


def require_whole(folder: Path, what: str) -> None:
    """Raise ConfigError where a file of a result is not what was written; results of earlier versions have no hashes."""
    if (folder / SEAL).is_file() and (changed := changed_files(folder)):
        reason = f"{what} of {folder.name} has changed on its disk: {', '.join(changed[:3])}"
        raise ConfigError("data.prepared_dir", str(folder.parent), reason, f"rm -r {shlex.quote(str(folder))}, and the same command again")


def changed_files(folder: Path) -> list[str]:
    """Return the names of a result's files that are not what was written."""
    try:
        written = json.loads((folder / SEAL).read_text())
        found = _digests(folder)
        return sorted(name for name in {*written, *found} if written.get(name) != found.get(name))
    except (OSError, ValueError) as error:
        return [f"{SEAL} ({error})"]


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL):
        digests[str(path.relative_to(folder))] = sha256(path)
        watch.beat()
    return digests


def remembered(key: str, compute: Callable[[], str]) -> str:
    """Return `compute()`, kept in a file under the hash of `key` where the cache can be written."""
    file = home() / "digests" / content_key(key)
    try:
        return file.read_text()
    except OSError:
        value = compute()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}")
        partial.write_text(value)
        partial.rename(file)
    except OSError:
        pass
    return value


def home() -> Path:
    """Return the folder of all that is kept between runs, which FULLTUNE_CACHE names."""
    return Path(os.environ.get("FULLTUNE_CACHE") or "~/.cache/fulltune").expanduser()


def _require_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise_exhausted(error)
        remedy = "data.prepared_dir=DIR, or FULLTUNE_CACHE=DIR in the environment, on a disk that all ranks can write to"
        raise ConfigError("data.prepared_dir", str(root), f"cannot be written: {error.strerror}", remedy) from None


def _acquire(lock: object, root: Path, name: str, what: str) -> None:
    from filelock import FileLock, Timeout

    assert isinstance(lock, FileLock)
    said, holder, size = float("-inf"), root / f"{name}.holder", -1
    while True:
        if size != (size := _size_of(root, name)):
            watch.beat()  # whoever makes it, of this run or another, gets on
        try:
            lock.acquire(timeout=POLL_S)
            return
        except Timeout:
            quiet = os.environ.get("LOCAL_RANK", "0") != "0"  # one rank of a machine speaks for all
            if time.monotonic() - said >= REMIND_S and not quiet:
                print(f"waiting for {what}: {_named(holder)} is making it (lock {lock.lock_file})", file=sys.stderr, flush=True)
                said = time.monotonic()


def _size_of(root: Path, name: str) -> int:
    """Return the bytes of `name` that are there so far."""
    return sum(path.stat().st_size for path in root.glob(f"tmp-{name}-*/*.raw"))


def _named(holder: Path) -> str:
    try:
        return holder.read_text() or "another process"
    except OSError:  # not yet written, or just done
        return "another process"


def _remove_stale(root: Path, name: str) -> None:
    """Remove what killed processes left: anything of `name`, whose lock we hold, and of dead processes of this host."""
    for partial in root.glob("tmp-*"):
        host, _, pid = partial.name.removeprefix("tmp-").rpartition("-")
        dead = host.endswith(f"-{socket.gethostname()}") and pid.isdigit() and not Path(f"/proc/{pid}").exists()
        if dead or partial.name.startswith(f"tmp-{name}-"):
            shutil.rmtree(partial, ignore_errors=True)
