"""How a run ends: what status.json says, what processes exit with, and which of it may follow which. CONTRIBUTING.md draws it. No torch."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

Status = dict[str, Any]
"""What RUN_DIR/status.json holds: `state`, `time`, `step`, `attempt`, and more that a state has."""


class State(StrEnum):
    """What status.json says of a run."""

    submitted = "submitted"
    """An attempt is about to start: it waits for a scheduler, or its ranks prepare data and connect."""
    running = "running"
    preempted = "preempted"
    """Stopped as asked, with a checkpoint or before the first step: the same command continues."""
    failed = "failed"
    """`error` says why: `message`, `time`, and where they are known `rank`, `host`, `ranks`, `traceback`, `setting`."""
    done = "done"
    """Trained, exported and checked."""


class Exit(IntEnum):
    """What ranks, the launcher and tools exit with."""

    done = 0
    failed = 1
    bad_input = 2
    """A setting or an argument is wrong: the message says which."""
    stopped = 75
    """As asked: the same command continues (EX_TEMPFAIL of sysexits.h)."""
    superseded = 76
    """A newer attempt of the run has started: this one ended, and writes nothing."""
    interrupted = 130
    """By Ctrl-C; the launcher and tools, never a rank."""


class Ending(StrEnum):
    """How an attempt ended, as the launcher concludes from its exit code and status.json."""

    done = "done"
    stopped = "stopped"
    """As asked, with a checkpoint or before the first step."""
    cut_short = "cut short"
    """It was asked to stop, and ended without having said anything: the last checkpoint continues."""
    failed = "failed"
    refused = "refused"
    """A setting is wrong."""
    unexplained = "unexplained"
    """It ended without having said anything, and nobody asked it to."""
    superseded = "superseded"


PASSING = ("error", "stragglers", "signal")
"""Keys of status.json that belong to its last state and not to the next."""
TOGETHER_S = 10
"""A rank that fails so shortly before another one is found killed has most likely failed because of that."""
CLOCK_S = 1.0
"""Resolution of the times that torch's agent has of a rank's death."""


def with_state(known: Status, ended: State | None, state: State, **more: object) -> Status | None:
    """Return status.json once an attempt that has `ended`, or not, says `state`; None where what is known stays.

    Failed stays until the next attempt is submitted: the other ranks are stopped because of the failure, and say so.
    """
    if ended is State.failed and state is not State.submitted:
        return None
    return {key: value for key, value in known.items() if key not in PASSING} | {"state": state} | more


def with_failure(
    known: Status, ended: State | None, error: dict[str, Any], at: float, together_s: float = 0.0, over_stop: bool = False
) -> Status | None:
    """Return status.json once an attempt that has `ended`, or not, has failed at the time `at`; None where what is known stays.

    The first failure by time stays, also one of up to `together_s` later, and a death although others say within TOGETHER_S before it what
    they failed of: whoever finds it may write first. So does a stop that was asked for, since other ranks then
    fail because one has gone, unless it was asked for because of this failure: `over_stop`.
    Nothing fails a run that is done: a process that does not end is killed.
    What a watchdog has found, an error with `ranks`, stays too: it ends ranks, which may crash while they write their stacks.
    """
    if ended is State.done or (ended is State.preempted and not over_stop):
        return None
    error_before = known.get("error", {})
    first = at + CLOCK_S if "ranks" in error_before else at - together_s
    if error_before.get("exit_code", 0) < 0:  # a death; of two the first stays
        first = at if together_s else at + TOGETHER_S
    if ended is State.failed and error_before.get("time", 0.0) <= first:
        return None
    return known | {"state": State.failed, "error": error | {"time": at}}


def ending_of(code: int, status: Status, *, was_asked: bool, is_current: bool) -> Ending:
    """Conclude how ranks ended from their exit code and status.json; `was_asked` where their launcher passed on a signal.

    Without word from a rank, exit code 0 is a machine whose ranks are done: rank 0, which writes, may be on another.
    """
    state = status.get("state")
    if code == Exit.superseded or (code != Exit.done and not is_current):  # the status is a newer attempt's
        return Ending.superseded
    if state == State.done:
        return Ending.done
    if state == State.failed:
        return Ending.refused if "setting" in status.get("error", {}) else Ending.failed
    if state == State.preempted or code == Exit.stopped:
        return Ending.stopped
    if was_asked:
        return Ending.cut_short
    return Ending.done if code == Exit.done else Ending.unexplained


def exit_of(ending: Ending, interrupted: bool) -> Exit:
    """Return the launcher's exit code; `interrupted` where it was Ctrl-C that asked the ranks to stop."""
    if interrupted and ending in (Ending.stopped, Ending.cut_short):
        return Exit.interrupted
    codes = {Ending.done: Exit.done, Ending.stopped: Exit.stopped, Ending.superseded: Exit.superseded, Ending.refused: Exit.bad_input}
    return codes.get(ending, Exit.failed)


@dataclass(frozen=True)
class Failure:
    """A rank's process that did not end with 0, as torch's agent found it."""

    rank: int
    code: int
    """Negative where a signal ended it."""
    at: float
    """In whole seconds."""

    @property
    def is_silent(self) -> bool:
        """Tell whether no rank ends so by itself: a signal did it, or a library that ran out of memory."""
        return self.code not in set(Exit)


def first_killed(failures: list[Failure]) -> Failure | None:
    """Return the process whose death is the cause of all failures; None where a rank has said what the cause is.

    The first to die of a signal, or with a code that no rank gives, unless that was the agent's own SIGTERM after another rank's error.
    Else one that was killed soon after the first failure: torch's agent kills what is left 30 s later, and what dies of other signals,
    such as NCCL's abort, does so because another rank has failed.
    """
    ordered = sorted(failures, key=lambda failure: failure.at)  # where equal, in the order in which they were found
    first, said = ordered[0], not all(failure.is_silent for failure in ordered)
    if first.is_silent and not (said and first.code == -signal.SIGTERM):
        return first
    soon = [failure for failure in ordered if failure.is_silent and failure.at <= first.at + TOGETHER_S]
    return next((failure for failure in soon if failure.code == -signal.SIGKILL or failure.code > 0), None)


def first_word(failures: list[Failure]) -> int:
    """Return the exit code of the first rank that ended by itself; Exit.failed where none did."""
    codes = [failure.code for failure in sorted(failures, key=lambda failure: failure.at) if not failure.is_silent]
    return codes[0] if codes else Exit.failed


def stops_others(failures: list[Failure]) -> bool:
    """Tell whether a death came first: the agent stops the other ranks by SIGTERM because of it, and they may say that they stopped."""
    first = min(failures, key=lambda failure: failure.at)
    return first.is_silent and first.code != -signal.SIGTERM


def killed_by(code: int) -> str:
    """Say how a process ended without a word of its own, by its exit code, which is negative where a signal ended it."""
    if code > 0:
        return f"ended with exit code {code} and left no reason"
    return f"was killed by {signal.Signals(-code).name}" + (" (out of memory, or kill -9)" if code == -signal.SIGKILL else "")
