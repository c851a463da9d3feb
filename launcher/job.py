"""A job and its run directory: made once, frozen once, joined by every later start of the same command."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import yaml

from launcher.config import JobConfig, LaunchConfig, run_config
from launcher.process import KILL_AFTER_S
from trainers.config.derived import peak_lr
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig, escaped, plain, read
from trainers.plan.request import HardwareConfig, PlanConfig
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt, newest_attempt, read_state, read_status
from trainers.rundir.ending import State, with_state
from trainers.rundir.files import write_json

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
CHANGEABLE = ("train.step_timeout_s:", "limits.", "evaluation.")
OURS = {
    *(paths.CONFIG, paths.PLAN, paths.PLAN_PICTURE, paths.MANIFEST, paths.DIFF),
    *(paths.STATUS, paths.SLURM_RECORD, paths.SLURM, paths.CODE),
}
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "HEAD")
"""Changes as `git apply` takes them, whatever the user has configured."""
HEADER = "# The frozen settings of this run: the only input of a rank. Start the same command again to continue; edit nothing here.\n"


@dataclass(frozen=True)
class Job:
    """A run, how to start it, and where it lives."""

    run: RunConfig
    launch: LaunchConfig
    run_dir: Path
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def config_path(self) -> Path:
        """The frozen config, the only argument of a rank."""
        return self.run_dir / paths.CONFIG


def make_job(config: JobConfig) -> Job:
    """Split a composed config into a job; `run_dir` becomes absolute, so that ranks find it from any directory."""
    run_dir = Path(os.path.abspath(Path(config.run_dir).expanduser()))
    return Job(dataclasses.replace(run_config(config), run_dir=str(run_dir)), config.launch, run_dir, config.hardware, config.plan)


def frozen_text(run: RunConfig) -> str:
    """Return a run as config.yaml holds it, with the learning rate that follows from it as a comment."""
    text = str(yaml.safe_dump(escaped(plain(run)), sort_keys=False, allow_unicode=True, width=120))
    return HEADER + text.replace("\noptim:\n", f"\noptim: # peak learning rate {peak_lr(run.optim, run.peft)}\n", 1)


def freeze(job: Job) -> None:
    """Make the run directory and its config.yaml, or join the run that is there.

    Raises ConfigError where the directory cannot be written, holds other files, or is a run with other settings.
    Any number of machines may call this at once: the first config.yaml wins, the others compare.
    """
    try:
        _freeze(job)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error} ({error.filename or job.run_dir})"
        raise ConfigError("run_dir", str(job.run_dir), reason, "run_dir=DIR that you may write") from error


def require_joinable(job: Job) -> None:
    """Raise ConfigError where `freeze` would: the directory holds other files, or a run with other settings. Writes nothing."""
    try:
        if job.run_dir.exists():
            _refuse_other_files(job.run_dir)
        if job.config_path.exists() and not _never_began(job.run_dir):
            changed = _kept(_differing(job))
            if changed:
                raise _other_settings(job, changed)
    except OSError as error:
        raise ConfigError(
            "run_dir", str(job.run_dir), f"cannot be read: {error.strerror or error}", "run_dir=DIR that you may write"
        ) from error


def _freeze(job: Job) -> None:
    job.run_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        job.run_dir.mkdir()
    except FileExistsError:
        _refuse_other_files(job.run_dir)
    if _never_began(job.run_dir):
        job.config_path.unlink()
    if job.config_path.exists() or not publish(job.config_path, frozen_text(job.run)):
        _refuse_other_settings(job)
    if not (job.run_dir / paths.MANIFEST).exists():
        version, diff = code_version()
        if diff:
            publish(job.run_dir / paths.DIFF, diff)
        publish(job.run_dir / paths.MANIFEST, json.dumps(manifest(version), indent=2) + "\n")
    publish(job.run_dir / paths.STATUS, json.dumps({"state": State.submitted, "step": 0, "attempt": 0}) + "\n")


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


def _refuse_other_files(run_dir: Path) -> None:
    if (run_dir / paths.CONFIG).exists():
        return
    others = sorted(path.name for path in run_dir.iterdir() if path.name not in OURS and not path.name.startswith("."))
    if others:
        reason = f"exists and is not a run directory: it holds {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
        raise ConfigError("run_dir", str(run_dir), reason, "run_dir=DIR that is new or empty")


def _never_began(run_dir: Path) -> bool:
    """Tell a run whose ranks refused their input before the first attempt: its settings may be corrected."""
    return (run_dir / paths.CONFIG).exists() and read_state(run_dir) == State.failed and not (run_dir / paths.LOGS).exists()


def _refuse_other_settings(job: Job) -> None:
    """Take a continued run's new limits and evaluation, which change nothing of what is trained; raise ConfigError for other changes."""
    found = _differing(job)
    changed = _kept(found)
    if found and not changed:
        temporary = job.run_dir / f".config.yaml.{socket.gethostname()}.{os.getpid()}"
        temporary.write_text(frozen_text(job.run), encoding="utf-8")
        temporary.replace(job.config_path)
    if changed:
        raise _other_settings(job, changed)


def _kept(changed: list[str]) -> list[str]:
    """Return those of changed settings that a continued run must keep."""
    return [line for line in changed if not line.startswith(CHANGEABLE)]


def _differing(job: Job) -> list[str]:
    """Return the settings that differ from those of the run in the directory; of learning rates the one that is used."""
    return differences(_at_one_rate(frozen_run(job)), _at_one_rate(job.run))


def _at_one_rate(run: RunConfig) -> dict[str, Any]:
    """Return settings with the rate that is used as `optim.lr`, wherever it comes from: a run may have begun before its preset had one."""
    rate = peak_lr(run.optim, run.peft).rate
    optim, peft = dataclasses.replace(run.optim, lr=rate, full_lr=0.0), dataclasses.replace(run.peft, lr=None)
    return dict(plain(dataclasses.replace(run, optim=optim, peft=peft)))


def _other_settings(job: Job, changed: list[str]) -> ConfigError:
    reason = "is a run with other settings\n" + "\n".join(f"    {line}" for line in changed)
    return ConfigError("run_dir", str(job.run_dir), reason, "run_dir=DIR that is new, or the settings of this run")


def frozen_run(job: Job) -> RunConfig:
    """Return the run in the run directory, fields that are newer than its config.yaml at their defaults."""
    try:
        return read(job.config_path)
    except ConfigError as error:
        reason = f"its config.yaml does not fit this version: {error.path} {error.reason}"
        raise ConfigError("run_dir", str(job.run_dir), reason, "run_dir=DIR that is new") from error


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `field: old -> new` for each field that differs; `run_dir` itself may be named in another way."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        path, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, path + ".")
        elif before != after and path != "run_dir":
            lines.append(f"{path}: {_yaml(before)} -> {_yaml(after)}")
    return lines


def _yaml(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)


def manifest(code: dict[str, Any]) -> dict[str, Any]:
    """Return where a run comes from: command, version of the code, packages, machine, scheduler, and the W&B id of all its attempts."""
    return {
        "command": [sys.executable, "-m", "launcher", *sys.argv[1:]],
        "directory": os.getcwd(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "user": _user(),
        "code": code,
        "python": platform.python_version(),
        "packages": _versions(),
        "scheduler": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SLURM_") and "JOB" in name},
        "wandb_id": secrets.token_hex(4),
    }


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
    return version, diff or b""


def _git(*arguments: str) -> bytes | None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=20, check=False)
        if done.returncode == 0 and (ROOT / ".git").exists():
            return done.stdout
    return None


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
    path = job.run_dir / f".launcher-{socket.gethostname()}.lock"
    began, said = time.monotonic(), False
    with path.open("a+") as lock:
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


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
