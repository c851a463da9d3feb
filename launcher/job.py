"""A job and its run directory: what is written there of the run as a whole and of each attempt, and who may start it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import getpass
import hashlib
import importlib.metadata
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from launcher.config import JobConfig, LaunchConfig, run_config
from launcher.process import KILL_AFTER_S
from trainers.config.derived import peak_lr
from trainers.config.errors import ConfigError
from trainers.config.numerics import NUMERICS
from trainers.config.schema import LogConfig, RunConfig, escaped, plain
from trainers.config.secrets import mask, mask_diff
from trainers.plan.request import HardwareConfig, PlanConfig
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt, newest_attempt, read_status
from trainers.rundir.ending import State, with_state
from trainers.rundir.files import try_json, write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "deepspeed",
    "peft",
    "accelerate",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # file systems without hard links
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "HEAD")
"""Changes as `git apply` takes them, whatever the user has configured."""
OF_WANDB = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP"}
PROJECT = "fulltune"
HEADER = "# The frozen settings of this run: the only input of a rank. Start the same command again to continue; edit nothing here.\n"


@dataclass(frozen=True)
class Job:
    """A run, how to start it, and where it lives."""

    run: RunConfig
    launch: LaunchConfig
    run_dir: Path
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    mesh: str = ""
    """Why the run has its mesh, where engine.mesh=auto has chosen it."""

    @property
    def config_path(self) -> Path:
        """The frozen config, the only argument of a rank."""
        return self.run_dir / paths.CONFIG


def make_job(config: JobConfig) -> Job:
    """Split a composed config into a job; `run_dir` becomes absolute, so that ranks find it from any directory."""
    run_dir = Path(os.path.abspath(Path(config.run_dir).expanduser()))
    run = run_config(config)
    run = dataclasses.replace(run, log=with_environment(run.log, os.environ))
    run = dataclasses.replace(without_secrets(run), run_dir=str(run_dir))
    return Job(run, config.launch, run_dir, config.hardware, config.plan)


def without_secrets(run: RunConfig) -> RunConfig:
    """Return settings in which secrets are masked, as they are kept and sent; says in which."""
    kept: RunConfig = mask(run)
    for path, value in _leaves(plain(run)).items():
        if value != _leaves(plain(kept))[path]:
            print(f"warning: {path} holds what looks like a secret, which is masked: give it by a variable", file=sys.stderr, flush=True)
    return kept


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by their dotted paths."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def with_environment(log: LogConfig, environment: Mapping[str, str]) -> LogConfig:
    """Return where W&B keeps a run, what is not set by W&B's own variables: they are those of the launcher, on every rank."""
    given = {name: environment.get(variable) or None for name, variable in OF_WANDB.items()}
    tags = [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return dataclasses.replace(
        log,
        project=log.project or given["project"] or PROJECT,
        entity=log.entity or given["entity"],
        group=log.group or given["group"],
        tags=log.tags or tags,
    )


def frozen_text(run: RunConfig) -> str:
    """Return a run as config.yaml holds it, with the learning rate that follows from it as a comment."""
    text = str(yaml.safe_dump(escaped(plain(run)), sort_keys=False, allow_unicode=True, width=120))
    return HEADER + text.replace("\noptim:\n", f"\noptim: # peak learning rate {peak_lr(run.optim, run.peft)}\n", 1)


def publish(path: Path, content: str | bytes) -> bool:
    """Write a file that appears complete or not at all; False where one was there, which stays as it is."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike rename, refuses to replace
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS or path.exists():
            raise
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def manifest(code: dict[str, Any]) -> dict[str, Any]:
    """Return where a run comes from: command, version of the code, packages, machine, scheduler, and the W&B id of all its attempts."""
    return {
        "command": command_line(),
        "directory": os.getcwd(),
        "time": _now(),
        "host": socket.gethostname(),
        "user": _user(),
        "code": code,
        "numerics": NUMERICS,
        "python": platform.python_version(),
        "packages": _versions(),
        "scheduler": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SLURM_") and "JOB" in name},
        "wandb_id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
    }


def command_line() -> list[str]:
    """Return the command that this process was started with."""
    return [sys.executable, "-m", "launcher", *mask(sys.argv[1:])]


def note_attempt(job: Job) -> None:
    """Add to manifest.json with which code and packages an attempt starts, and say where they are not those of the attempt before.

    Its uncommitted changes are kept where they are not the ones that code.diff has.
    """
    known, number = try_json(job.run_dir / paths.MANIFEST), newest_attempt(job.run_dir) + 1
    version, diff = code_version()
    before = [entry for entry in known.get("attempts", []) if entry["number"] < number]
    entry: dict[str, Any] = {"number": number, "time": _now(), "host": socket.gethostname(), "code": version, "packages": _versions()}
    last = before[-1] if before else {"number": 1, **{key: known.get(key) or {} for key in ("code", "packages")}}
    if diff and version["diff_sha256"] != known.get("code", {}).get("diff_sha256"):
        entry["diff"] = f"code.attempt-{number}.diff"
        (job.run_dir / entry["diff"]).unlink(missing_ok=True)
        publish(job.run_dir / entry["diff"], diff)
    for line in _what_changed(last, entry):
        print(f"warning: since attempt {last['number']} {line}", file=sys.stderr, flush=True)
    write_json(job.run_dir / paths.MANIFEST, known | {"attempts": [*before, entry]})


def _what_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for what differs of code and packages between two attempts."""
    old, new = before["code"], now["code"]
    lines = []
    if old.get("git_sha") != new["git_sha"]:
        lines.append(f"the code has changed: commit {old.get('git_sha')} -> {new['git_sha']}")
    elif old.get("diff_sha256") != new["diff_sha256"]:
        lines.append(f"the code has changed: other uncommitted changes on commit {new['git_sha']}, in {now.get('diff', paths.DIFF)}")
    packages = [(name, before["packages"].get(name), now["packages"].get(name)) for name in PACKAGES]
    return lines + [f"{name} has changed: {old} -> {new}" for name, old, new in packages if before["packages"] and old != new]


def code_version() -> tuple[dict[str, Any], bytes]:
    """Return the code's git commit, the sha256 of its uncommitted changes, the names of files that git does not know, and the changes.

    All are None or empty outside a checkout; `git apply` on that commit takes the changes.
    """
    sha, diff, others = _git("rev-parse", "HEAD"), _git(*DIFF), _git("ls-files", "--others", "--exclude-standard", "--directory")
    version = {
        "git_sha": sha.decode().strip() if sha is not None else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
        "untracked": (others or b"").decode(errors="replace").splitlines(),
    }
    return version, mask_diff(diff or b"")


def _git(*arguments: str) -> bytes | None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=20, check=False)
        if done.returncode == 0 and (ROOT / ".git").exists():
            return done.stdout
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user id
        return str(os.getuid())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def mark_submitted(job: Job) -> None:
    """Forget how the last attempt ended, so that this one's end is not mistaken for it; step and attempt stay."""
    write_json(job.run_dir / paths.STATUS, with_state(read_status(job.run_dir), None, State.submitted, time=time.time()))


def next_attempt(job: Job) -> Attempt:
    """Return the attempt that ranks will be which are started now: what a launcher says of it must not be said of a newer one."""
    return Attempt(job.run_dir, newest_attempt(job.run_dir) + 1)


def mark_failed(attempt: Attempt, **error: object) -> None:
    """Record a failure that no rank could, with a `message`: they were killed, or are stopped. Not once a newer attempt has started."""
    attempt.record_failure(dict(error), time.time())


@contextlib.contextmanager
def only_launcher(job: Job, wait_s: float = 2.0) -> Iterator[int]:
    """Hold this machine's lock on the run directory; yields its descriptor, for children to hold it too.

    Raises ConfigError where another launcher still holds it. Ranks that a killed one left running are saving, or are killed after
    launch.shutdown_s: their end is awaited.
    """
    began, said = time.monotonic(), False
    with _lock_file(job).open("a+") as lock:
        while not _locked(lock):
            lock.seek(0)
            holder = lock.read().strip()
            orphaned = holder.isdigit() and not _is_alive(int(holder))
            if time.monotonic() > began + wait_s + (job.launch.shutdown_s + KILL_AFTER_S if orphaned else 0):
                reason = f"this run is still running on this machine (launcher's process {holder})"
                raise ConfigError("run_dir", str(job.run_dir), reason, "wait for its end, or stop it")
            if orphaned and not said:
                said = True
                print(f"waiting for the ranks of launcher {holder}, which was killed, to save and end", file=sys.stderr, flush=True)
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield lock.fileno()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def holder(job: Job) -> int | None:
    """Return the process id of the launcher of this machine that runs a run, or was killed and its ranks still live; None without one."""
    with contextlib.suppress(FileNotFoundError), _lock_file(job).open("r+") as lock:
        if not _locked(lock):
            return int(lock.read().strip() or 0)
    return None


def _lock_file(job: Job) -> Path:
    return job.run_dir / f".launcher-{socket.gethostname()}.lock"


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
