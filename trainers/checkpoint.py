"""Checkpoints: where they lie, when one is complete, which one a run continues from."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from trainers.config import CheckpointConfig
from trainers.engines.base import Engine
from trainers.metrics import write_json
from trainers.world import World

log = logging.getLogger("fulltune")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. Learning rate, data position and random state are functions of it."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    rows: int = 0
    """Rows consumed, over all ranks."""
    tokens: int = 0
    """Supervised tokens consumed, over all ranks."""
    input_tokens: int = 0
    """Tokens that went through the model, padding aside, over all ranks."""
    skipped: int = 0
    """Steps skipped for non-finite gradients or for want of a supervised token."""
    seconds: float = 0.0
    """Seconds spent on steps, over all attempts."""
    device_seconds: float = 0.0
    """The same times the ranks of each attempt."""


class NoCheckpoint(Exception):
    """A checkpoint could not be written, or none of those that are there can be read."""


class Checkpointer:
    """Saves and restores engine and progress in RUN_DIR/checkpoints/step-NNNNNN: complete or absent."""

    def __init__(self, config: CheckpointConfig, run_dir: Path, world: World) -> None:
        """Keep where and how many; nothing is touched yet."""
        self.config, self.folder, self.world = config, run_dir / "checkpoints", world

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is due after `step`."""
        return self.config.every is not None and step % self.config.every == 0

    def save(self, engine: Engine, progress: Progress) -> None:
        """Write into a staging folder, record sizes, rename; then delete this run's oldest. Collective."""
        staging, final = self.folder / f".step-{progress.step:06d}.tmp", self.folder / f"step-{progress.step:06d}"
        if self.world.from_first(self.world.rank == 0 and final.is_dir() and is_complete(final)):
            return
        self._agree(staging, lambda: self._begin(staging, final))
        self._agree(staging, lambda: engine.save(staging), everywhere=True)
        self._agree(staging, lambda: self._commit(staging, final, progress))
        self._agree(staging, self._rotate)
        log.info("step %d: checkpoint saved in %s", progress.step, final)

    def _agree(self, staging: Path, write: Callable[[], None], everywhere: bool = False) -> None:
        """Write on rank 0, or everywhere; raise NoCheckpoint on every rank if any could not, after removing what was written.

        Collective.
        """
        failed = ""
        try:
            if everywhere or self.world.rank == 0:
                write()
        except (OSError, CheckpointException) as error:
            failed = f"rank {self.world.rank}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
        failures = [text for text in self.world.gather(failed) if text]
        if not failures:
            return
        if self.world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        free = shutil.disk_usage(self.folder.parent).free
        raise NoCheckpoint(f"the checkpoint {staging} cannot be written ({failures[0]}); {free:,} bytes free there now")

    @staticmethod
    def _begin(staging: Path, final: Path) -> None:
        for leftover in (staging, final):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)

    @staticmethod
    def _commit(staging: Path, final: Path, progress: Progress) -> None:
        sizes = {str(path.relative_to(staging)): path.stat().st_size for path in sorted(staging.rglob("*")) if path.is_file()}
        for path in staging.rglob("*"):
            _flush(path)
        write_json(staging / "manifest.json", {"progress": dataclasses.asdict(progress), "sizes": sizes})
        _flush(staging / "manifest.json")
        _flush(staging)
        staging.rename(final)
        _flush(final.parent)

    def _rotate(self) -> None:
        """Delete the oldest complete checkpoints beyond keep_last, and staging folders of dead saves."""
        complete = [path for path in steps(self.folder) if is_complete(path)]
        for path in complete[: -self.config.keep_last]:
            path.rename(path.with_name(f".{path.name}.tmp"))  # complete or absent, also when killed while deleting
        for path in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(path)

    def restore(self, engine: Engine) -> Progress:
        """Load the newest checkpoint that is complete and can be read, or return step 0. Rank 0 names them; collective.

        Raises NoCheckpoint where there are some and none can be read: to start again would be to lose them.
        """
        complete = [path for path in reversed(steps(self.folder)) if is_complete(path)] if self.world.rank == 0 else []
        found = self.world.from_first(complete)
        for path in found:
            failed = ""
            try:
                engine.load(path)
            except (OSError, CheckpointException) as error:
                failed = (str(error).strip() or type(error).__name__).splitlines()[-1]
            failures = [text for text in self.world.gather(failed) if text]
            if not failures:
                progress = _progress(path)
                log.info("continuing from %s: step %d, %s tokens", path, progress.step, f"{progress.tokens:,}")
                return progress
            log.warning("skipping %s: it cannot be read (%s)", path, failures[0])
        if found:
            raise NoCheckpoint(f"none of the checkpoints in {self.folder} can be read; move them away to start from step 0")
        return Progress()


def why_incomplete(folder: Path) -> str:
    """Say what a checkpoint lacks: its manifest, or a file of it at its size; nothing where it is complete."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return "it has no manifest.json"
    try:
        sizes = json.loads(manifest.read_text())["sizes"]
    except (ValueError, KeyError, OSError) as error:
        return f"its manifest.json cannot be read ({error!r})"
    wrong = [name for name, size in sizes.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size]
    return f"{wrong[0]} is missing or has another size" if wrong else ""


def is_complete(folder: Path) -> bool:
    """Tell whether a checkpoint is complete; says why not in the log."""
    why = why_incomplete(folder)
    if why and folder.is_dir():
        log.warning("skipping %s: %s", folder, why)
    return not why


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder of them, complete or not, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _progress(folder: Path) -> Progress:
    return Progress(**json.loads((folder / "manifest.json").read_text())["progress"])


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
