"""An environment of its own for each peer, with the versions of pins.toml."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainers.cache import home
from trainers.processes import prepare_child

PINS = tomllib.loads((Path(__file__).parent / "pins.toml").read_text())
NAMES = {peer: str(pins["name"]) for peer, pins in PINS.items() if peer != "all"}
"""Of the peers, by what the command calls them."""
STAMP = "pins.json"
"""In an environment that is whole: what was asked of pip."""
LOOK_S = 0.5


class NotInstalled(Exception):
    """A peer's environment could not be made: says why."""


@dataclass(frozen=True)
class Environment:
    """A peer's Python."""

    folder: Path

    @property
    def python(self) -> Path:
        """Return its interpreter."""
        return self.folder / "bin" / "python"

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that are pinned, and of torch, as they were installed."""
        read = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
        names = [package.split("==")[0] for package in json.loads((self.folder / STAMP).read_text())]
        done = subprocess.run([str(self.python), "-c", read, *names], capture_output=True, text=True, check=True, timeout=60)
        return dict(json.loads(done.stdout))


def packages_of(peer: str) -> list[str]:
    """Return what is installed for a peer."""
    return [*PINS["all"]["packages"], *PINS[peer]["packages"]]


def default_folder() -> Path:
    """Return where environments are kept."""
    return home() / "peers"


def environment(peer: str, folder: Path, limit_s: float, show: Callable[[str], None]) -> Environment:
    """Return a peer's environment, made once; raises NotInstalled. `show` is told again and again what happens."""
    from filelock import FileLock

    packages = packages_of(peer)
    key = hashlib.sha256(json.dumps([sys.version_info[:2], packages]).encode()).hexdigest()[:8]
    made = folder / f"{peer}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{made.name}.lock"):
        if not (made / STAMP).exists():
            shutil.rmtree(made, ignore_errors=True)  # an installation that was stopped
            _make(peer, made, packages, limit_s, show)
    return Environment(made)


def _make(peer: str, folder: Path, packages: list[str], limit_s: float, show: Callable[[str], None]) -> None:
    log, until = folder.with_suffix(".log"), time.monotonic() + limit_s
    log.write_bytes(b"")
    python = str(folder / "bin" / "python")
    unneeded = ["import torch, subprocess, sys; torch.version.cuda or subprocess.check_call([sys.executable, '-m', 'pip', *sys.argv[1:]])"]
    unneeded += ["uninstall", "-y", *PINS[peer].get("not_on_cpu", [])]
    for line in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "--disable-pip-version-check", *packages],
        *([[python, "-c", *unneeded]] if "not_on_cpu" in PINS[peer] else []),
    ):
        with log.open("ab") as file:
            child = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=prepare_child())
        try:
            while child.poll() is None and time.monotonic() < until:
                show(f"{NAMES[peer]}: installing, {_last_line(log)}")
                time.sleep(LOOK_S)
        finally:
            is_late = child.poll() is None
            child.kill()
            child.wait()
        if is_late or child.returncode:
            reason = f"the installation took longer than {limit_s:.0f} s" if is_late else _error(log)
            raise NotInstalled(f"not installed: {reason}")
    (folder / STAMP).write_text(json.dumps(packages))


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:100]


def _error(log: Path) -> str:
    """Return pip's last error, else its last line."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("ERROR:")]
    return (lines[-1].removeprefix("ERROR: ") if lines else _last_line(log))[:300]
