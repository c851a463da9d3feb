"""What every backend ends up calling on every rank: python -m trainers RUN_DIR/config.yaml."""

# ruff: noqa: E402

from __future__ import annotations

import gc

gc.disable()  # nothing that an import makes is garbage, and looking for it took a third of a rank's start

import logging
import os
import socket
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from trainers.checkpoint import NoCheckpoint
from trainers.config.checks import load
from trainers.config.errors import ConfigError
from trainers.config.secrets import mask
from trainers.config.sharding import check_world
from trainers.health import preflight
from trainers.health.spikes import TrainingFailed
from trainers.health.watchdog import watchdog
from trainers.processes import free_reserve, keep_reserve, never_fail
from trainers.run import run
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import storage_says
from trainers.rundir.metrics import log_to_terminal
from trainers.world import Stopped, World

gc.enable()

log = logging.getLogger("fulltune")


def main(path: str) -> int:
    """Run one rank to its exit code: 0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint, 76 a newer attempt has started."""
    never_fail()
    keep_reserve()
    world = World.from_environment()
    log_to_terminal(world.rank)
    attempt = Attempt(Path(path).parent)
    try:
        world.say_stopped = lambda name: attempt.set_status(State.preempted, signal=name)
        world.watch_signals()
        config = load(path)
        check_world(config, world.size, world.local_size)
        if world.rank == 0 and "FULLTUNE_LAUNCHER" not in os.environ and not attempt.has_ended(State.failed, State.preempted):
            attempt.set_status(State.submitted)  # forget how an earlier attempt ended, as the launcher does
        watchdog.collectives, watchdog.flight_record, watchdog.is_asked = world.collectives, world.flight_record, world.is_asked
        watchdog.start(config, attempt, world.rank, world.size, partial(_fail, attempt, world, Exit.failed))
        return run(config, world, attempt)
    except Stopped as signal_name:
        log.info("%s before the first step: nothing to save", signal_name)
        if world.signalled is not None or not attempt.has_ended(State.preempted):
            attempt.set_status(State.preempted, signal=str(signal_name))
        return Exit.stopped
    except Superseded as error:
        log.error("rank %d: %s", world.rank, error)
        return Exit.superseded
    except ConfigError as error:
        return _fail(attempt, world, Exit.bad_input, {"message": str(error), "setting": error.parts()})
    except preflight.BadNode as error:
        return _fail(attempt, world, Exit.failed, error.parts())
    except TrainingFailed as error:
        where = getattr(error, "where", {"of_node": False})  # a generator's node may be broken
        return _fail(attempt, world, Exit.failed, {"message": str(error)} | where)
    except NoCheckpoint as error:
        return _fail(attempt, world, Exit.failed, {"message": str(error)})
    except Exception as error:
        if isinstance(error, OSError) and (said := storage_says(error, attempt.run_dir)):
            return _fail(attempt, world, Exit.failed, {"message": said})
        return _fail(attempt, world, Exit.failed, {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


def _fail(attempt: Attempt, world: World, code: int, error: dict[str, Any]) -> int:
    """Keep the first failing rank's error in status.json, and return the exit code.

    Ranks that fail because of it come later and only write their log. A launcher that waits shows the error, and has
    cleared that of an earlier attempt. Whatever an older attempt fails of, and be it that what it staged is gone, it is superseded;
    and what fails once a rank has stopped, fails because it has.
    """
    at, error = time.time(), mask(error)
    free_reserve()
    world.interruptible = False  # the agent stops the other ranks as soon as one has ended
    first, stopped, unwritten = True, False, ""
    try:
        if not attempt.is_current(at_once=True):
            log.error("rank %d: a newer attempt of this run has started since, and this one ends: %s", world.rank, error["message"])
            return Exit.superseded
        first = attempt.record_failure({"rank": world.rank, "host": socket.gethostname(), "exit_code": code} | error, at)
        stopped = not first and attempt.has_ended(State.preempted)
    except Exception as other:  # a full disk, no memory, a file that is not JSON
        unwritten = f"\n(status.json could not be written: {other})"
    shown = unwritten or (first and "FULLTUNE_LAUNCHER" not in os.environ)
    log.log(logging.ERROR if shown else logging.DEBUG, "rank %d: %s%s", world.rank, error.get("traceback") or error["message"], unwritten)
    return Exit.stopped if stopped else code


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"{__doc__}\n\nThe launcher writes that file and starts this: python -m launcher --help", file=sys.stderr)
        sys.exit(Exit.bad_input)
    code: int = Exit.failed
    gc.freeze()  # a collection in a step need not look at what was imported either
    try:
        code = main(sys.argv[1])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # saying why it failed has failed: no memory, a closed pipe
        traceback.print_exc()
    finally:
        os._exit(code)  # a mirror that hangs or a half-dead process group must not hold the exit
