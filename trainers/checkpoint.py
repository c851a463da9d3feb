"""Checkpoints: when one is due, where it lies, when it is complete, which are kept, which one a run continues from.

A save is staged in host memory, which is all that the loop waits for; a thread of each rank then writes, hashes and commits it on a
process group of its own. A checkpoint is complete or absent: it is written into a folder with a hidden name, flushed, described by a
manifest with every file's size and SHA-256, and renamed once all ranks have said that theirs is written.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trainers.config.schema import CheckpointConfig
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.checkpoints import (
    best_first,
    is_lowest,
    is_of_newer,
    kept,
    name_of,
    number_of,
    read_manifest,
    steps,
    why_damaged,
    why_incomplete,
    why_not_of,
)
from trainers.rundir.files import read_json, sha256, write_json
from trainers.rundir.paths import CHECKPOINTS, MANIFEST, SAVE_NOW, STOP
from trainers.rundir.rows import finite
from trainers.staging import HostCopy, bytes_of
from trainers.world import World

if TYPE_CHECKING:

    class Saved(Protocol):
        """What a checkpoint is of: an engine, or several. Both methods are collective."""

        def state(self) -> dict[str, Any]:
            """Return what is saved, as torch.distributed.checkpoint writes it."""
            ...

        def load(self, folder: Path) -> None:
            """Restore `state` from a checkpoint's folder."""
            ...


log = logging.getLogger("fulltune")
RETRY_AFTER_S = 60.0
"""Seconds after a failed save until the next try."""
SPARE = 1.02
"""Bytes on disk over bytes of tensors: headers, metadata and the manifest."""


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
    """Steps skipped for non-finite gradients, a spike, or for want of a supervised token."""
    overflows: int = 0
    """Steps not taken because their gradients overflowed float16; they are not among the skipped ones."""
    ahead: int = 0
    """Steps' worth of rows that were left out by rollbacks: the stream is so much further."""
    seconds: float = 0.0
    """Seconds spent on steps, over all attempts."""
    device_seconds: float = 0.0
    """The same times the ranks of each attempt."""

    @property
    def updates(self) -> int:
        """Steps that updated the weights."""
        return self.step - self.skipped - self.overflows


class NoCheckpoint(Exception):
    """A checkpoint could not be written, or none of those that are there can be read."""


@dataclass(kw_only=True)
class Save:
    """One checkpoint on its way to the disk."""

    progress: Progress
    eval_loss: float | None
    num_bytes: int
    """Bytes of tensors, over all ranks."""
    started: float
    state: dict[str, Any] | None
    """What is written; given up as soon as it is."""
    failure: str = ""
    """Why there is no such checkpoint now, the same on every rank."""
    error: BaseException | None = None
    """What is not a failure to write, and ends the run."""
    seconds: float = 0.0
    """From its beginning to the end of its commit."""


class Checkpointer:
    """Saves and restores engine and progress in RUN_DIR/checkpoints/step-NNNNNN. Every method is collective unless it says otherwise."""

    def __init__(self, config: CheckpointConfig, attempt: Attempt, world: World) -> None:
        """Keep where, how many, and a world for the thread; no file is touched yet."""
        self.config, self.attempt, self.world = config, attempt, world
        self.run_dir, self.folder = attempt.run_dir, attempt.run_dir / CHECKPOINTS
        self.run = str(read_json(self.run_dir / MANIFEST).get("wandb_id", ""))  # what tells this run's checkpoints from another's
        self.beside = world.beside()
        self.copy = HostCopy(world)
        self.in_flight: Save | None = None
        self.thread: threading.Thread | None = None
        self.saved_at, self.failed_at = time.monotonic(), 0.0
        self.damaged: dict[Path, str] = {}
        self.failures, self.stall_seconds = 0, 0.0
        self.warned_of_grace = False
        self.saved_step, self.all_failures = 0, 0

    def requests(self) -> tuple[bool, bool]:
        """Tell whether a stop and a save are asked for, by a file in the run directory or by the clock. Not collective: rank 0 looks."""
        if self.world.rank != 0:
            return False, False
        minutes = self.config.every_minutes
        by_clock = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        again = self.failures > 0 and self.in_flight is None and time.monotonic() - self.failed_at > RETRY_AFTER_S
        return _taken(self.run_dir / STOP), _taken(self.run_dir / SAVE_NOW) or by_clock or again

    def due(self, step: int) -> bool:
        """Tell whether a checkpoint is due after `step`, by its number. Not collective."""
        return self.config.every is not None and step % self.config.every == 0

    def is_best(self, losses: list[float]) -> bool:
        """Tell whether the newest held-out loss is the lowest since the first step, and such checkpoints are kept. Not collective."""
        return self.config.keep_best > 0 and len(losses) > 1 and is_lowest(losses[1:])

    def save(self, engine: Saved, progress: Progress, eval_loss: float | None = None, wait: bool = False) -> None:
        """Begin a checkpoint, or make it at once with `wait`; the state is the engine's of now whatever comes next.

        Waits for the save in flight. Raises NoCheckpoint where a save fails and there is no older one, or `checkpoint.strict` is set.
        """
        began = time.perf_counter()
        self.finish()
        final = self.folder / name_of(progress.step)
        if self.world.from_first(self.world.rank == 0 and not self._why_not_ours(final)):
            self.saved_step = progress.step
            return
        state = engine.state()
        num_bytes = int(self.world.sum([float(bytes_of(state))])[0])
        wait = wait or not self.config.asynchronous or self.copy.has_no_room(bytes_of(state))
        staged = state if wait else self.copy.of(state)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        save = Save(progress=progress, eval_loss=eval_loss, num_bytes=num_bytes, started=began, state=staged)
        self.saved_at, self.in_flight = time.monotonic(), save
        if wait:
            self._write(save, self.world)
            self.finish()
        else:
            self.thread = threading.Thread(target=self._write, args=(save, self.beside), name="checkpoint", daemon=True)
            self.thread.start()
        self.stall_seconds = time.perf_counter() - began
        log.debug("step %d: the loop waited %.3f s for a checkpoint of %s bytes", progress.step, self.stall_seconds, f"{num_bytes:,}")

    def is_writing(self) -> bool:
        """Tell whether this rank's part of a save is on its way. Not collective."""
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> None:
        """Wait for the save in flight and take its outcome; all ranks have the same. Raises as `save` does."""
        save, self.in_flight = self.in_flight, None
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if save is None:
            return
        if save.error is not None:
            raise save.error
        if not save.failure:
            log.info("step %d: checkpoint saved in %.1f s, %s bytes", save.progress.step, save.seconds, f"{save.num_bytes:,}")
            self.failures, self.saved_step = 0, save.progress.step
            self._warn_of_grace(save.seconds)
            return
        if not self.world.from_first(self.attempt.is_current(at_once=True)):
            raise Superseded(save.failure)
        self.failures, self.failed_at = self.failures + 1, time.monotonic()
        self.all_failures += 1
        older = self.world.from_first(self.world.rank == 0 and bool(self._complete()))
        if self.config.strict or not older:
            why = "checkpoint.strict is set" if older else "there is no older one"
            raise NoCheckpoint(f"no checkpoint of step {save.progress.step}, and {why}: {save.failure}")
        log.warning(
            "no checkpoint of step %d (%d in a row): %s; the run continues and tries again in %.0f s",
            save.progress.step,
            self.failures,
            save.failure,
            RETRY_AFTER_S,
        )

    def _warn_of_grace(self, seconds: float) -> None:
        """Compare the first save's time with what the scheduler gives between its signal and the kill."""
        grace = float(os.environ.get("FULLTUNE_GRACE_S", "inf"))
        if not self.warned_of_grace and seconds > grace and self.world.rank == 0:
            log.warning("a checkpoint takes %.0f s, and ranks that are asked to stop get %.0f s: give them more time", seconds, grace)
        self.warned_of_grace = True

    def _write(self, save: Save, world: World) -> None:
        """Write, hash and commit; in a thread, or in the loop's own with its world."""
        name = name_of(save.progress.step)
        staging, final = self.folder / f".{name}.attempt-{self.attempt.number}.tmp", self.folder / name
        hashes: dict[str, str] = {}
        gathered: dict[str, str] = {}

        def put() -> None:
            dcp.save(save.state, checkpoint_id=staging, process_group=world.group)
            save.state = None
            hashes.update({path.name: sha256(path) for path in _own_files(staging, world)})

        try:
            steps_of_save: list[tuple[Callable[[], None], bool]] = [
                (lambda: self._begin(staging, final, save.num_bytes), False),
                (put, True),
                (lambda: self._commit(staging, final, save, gathered), False),
            ]
            for write, everywhere in steps_of_save:
                save.failure = save.failure or self._attempted(write, everywhere, staging, world)
                if save.failure:
                    break
                if everywhere:
                    for theirs in world.gather(hashes):
                        gathered |= theirs
            if not save.failure and (why := self._attempted(self._rotate, False, staging, world)):
                log.warning("checkpoints that nothing keeps cannot be deleted: %s", why)
        except BaseException as error:  # the loop's thread raises it
            save.error = error
        finally:
            save.state, save.seconds = None, time.perf_counter() - save.started

    def _attempted(self, write: Callable[[], None], everywhere: bool, staging: Path, world: World) -> str:
        """Write on rank 0, or everywhere; return why any could not, after removing what was written."""
        failed = ""
        try:
            if everywhere or world.rank == 0:
                write()
        except (OSError, CheckpointException, Superseded) as error:
            failed = f"rank {world.rank}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
        failures = [str(text) for text in world.gather(failed) if text]
        if failures and world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        return failures[0] if failures else ""

    def _begin(self, staging: Path, final: Path, num_bytes: int) -> None:
        self.attempt.require_current()
        if not why_incomplete(final) and final not in self.damaged:
            raise OSError(f"{final} is in the way: {self._why_not_ours(final)}; move it away")
        for leftover in (staging, final):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir(parents=True)
        needed, free = int(num_bytes * SPARE), shutil.disk_usage(staging).free
        if needed > free:
            raise OSError(f"{self.folder} needs {needed:,} bytes, and {free:,} are free there")

    def _commit(self, staging: Path, final: Path, save: Save, hashes: dict[str, str]) -> None:
        sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        if sizes.keys() != hashes.keys():
            raise OSError(f"{staging} holds files of no rank: {sorted(sizes.keys() ^ hashes.keys())[:3]}")
        for path in staging.iterdir():
            _flush(path)
        said = {"progress": dataclasses.asdict(save.progress), "run": self.run, "attempt": self.attempt.number, "eval_loss": save.eval_loss}
        write_json(staging / MANIFEST, {**finite(said), "sizes": sizes, "sha256": hashes})
        _flush(staging / MANIFEST)
        _flush(staging)
        self.attempt.require_current()
        staging.rename(final)
        _flush(final.parent)

    def _complete(self) -> list[Path]:
        """Return this run's complete checkpoints, oldest first."""
        return [path for path in steps(self.folder) if not self._why_not_ours(path)]

    def _why_not_ours(self, path: Path) -> str:
        """Say why a folder is not a checkpoint of this run; nothing where it is."""
        return self.damaged.get(path) or why_not_of(self.run, path)

    def _rotate(self) -> None:
        """Delete this run's complete checkpoints that nothing keeps, and staging folders of dead saves, not of a newer attempt's."""
        self.attempt.require_current()
        complete = self._complete()
        stay = kept(complete, self.config)
        for path in complete:
            if path not in stay:
                path.rename(path.with_name(f".{path.name}.tmp"))  # complete or absent, also when killed while deleting
        for path in self.folder.glob(".step-*.tmp"):
            if not is_of_newer(path, self.attempt.number):
                shutil.rmtree(path)

    def restore(self, engine: Saved) -> Progress:
        """Load this run's newest valid checkpoint, or return step 0. Rank 0 names them, and each rank verifies some of the files.

        Says which ones it skips, and why. Raises NoCheckpoint where there are some and none is valid: to start again would be to
        lose them.
        """
        found, harmed = self.world.from_first(self._candidates() if self.world.rank == 0 else ([], False))
        path = self._load_first(engine, found)
        if path is not None:
            progress = Progress(**read_manifest(path)["progress"])
            self.saved_step = progress.step
            log.info("continuing from %s: step %d, %s tokens", path, progress.step, f"{progress.tokens:,}")
            return progress
        if found or harmed:
            raise NoCheckpoint(f"none of the checkpoints in {self.folder} can be read; move them away to start from step 0")
        return Progress()

    def restore_best(self, engine: Saved, step: int) -> tuple[int, float] | None:
        """Load the checkpoint of the lowest held-out loss into an engine that is at `step`; return its step and loss. Collective.

        None, and the engine as it is, where no checkpoint has a loss. Raises NoCheckpoint where none of those can be read.
        """
        losses = self.world.from_first(best_first(self._complete()) if self.world.rank == 0 else {})
        if not losses:
            return None
        first = next(iter(losses))
        path = first if number_of(first) == step else self._load_first(engine, list(losses))
        if path is None:
            raise NoCheckpoint(
                f"none of the checkpoints with a held-out loss in {self.folder} can be read; train.export=last exports the last"
            )
        return number_of(path), losses[path]

    def _load_first(self, engine: Saved, found: list[Path]) -> Path | None:
        """Load the first of some checkpoints that is valid, and return it; says which ones it skips, and why."""
        for path in found:
            failed = why_damaged(path, slice(self.world.rank, None, self.world.size))
            try:
                if not any(self.world.gather(failed)):
                    engine.load(path)
            except (OSError, CheckpointException) as error:
                failed = (str(error).strip() or type(error).__name__).splitlines()[-1]
            failures = [text for text in self.world.gather(failed) if text]
            if not failures:
                return path
            log.warning("skipping %s: %s", path, failures[0])
            self.damaged[path] = str(failures[0])  # its step will be saved again
        return None

    def _candidates(self) -> tuple[list[Path], bool]:
        """Return what may be continued from, newest first, and whether others have lost what they held; says what may not."""
        candidates, harmed = [], False
        for path in reversed(steps(self.folder)):
            if why := self._why_not_ours(path):
                log.warning("skipping %s: %s", path, why)
                harmed = harmed or bool(why_incomplete(path))
            else:
                candidates.append(path)
        return candidates, harmed


def _own_files(staging: Path, world: World) -> list[Path]:
    """Return the files that this rank wrote; rank 0 also answers for those of no rank, such as the metadata."""
    prefixes = tuple(f"__{rank}_" for rank in range(world.size))
    every = list(staging.iterdir()) if world.rank == 0 else []
    return [*staging.glob(f"__{world.rank}_*"), *(path for path in every if not path.name.startswith(prefixes))]


def _taken(path: Path) -> bool:
    """Tell whether a file is there that asks for something, and remove it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("%s is ignored: it cannot be removed (%s)", path, error.strerror)
        return False
    return True


def _flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
