"""How a run ended, as the launcher's exit code and one message; status.json knows more than torchrun's exit code."""

from __future__ import annotations

import signal
import sys

from launcher.config import is_plain
from launcher.job import Job, mark_failed
from launcher.report import print_summary
from trainers.config.errors import ConfigError
from trainers.rundir.attempt import DONE, FAILED, STOPPED, SUPERSEDED, Attempt, killed_by, read_status

INTERRUPTED = 130


def settle(job: Job, attempt: Attempt, code: int, signalled: int | None) -> int:
    """Print how the run ended and return the launcher's exit code; raises ConfigError where ranks refused a setting.

    `code` is the child's, `signalled` the signal that we passed on. status.json's `error` has a message, and where they are
    known rank, traceback and setting (a ConfigError's parts).
    """
    status = read_status(job.run_dir)
    state, interrupted = status.get("state"), signalled == signal.SIGINT
    if code == SUPERSEDED or (code != DONE and not attempt.is_current(at_once=True)):  # the status is a newer one's
        _say("a newer attempt of this run has started elsewhere: this one has ended, and wrote nothing since")
        return SUPERSEDED
    if state == "done":
        print_summary(job.run_dir)
        return DONE
    if state == "preempted" or (code == STOPPED and state != "failed"):
        done = f"with a checkpoint at step {status['step']}" if status.get("step") else "before the first step"
        _say(f"stopped {done}: the same command continues")
        return INTERRUPTED if interrupted else STOPPED
    if state != "failed" and signalled is not None:
        _say("stopped without a new checkpoint: the same command continues from the last one, if any")
        return INTERRUPTED if interrupted else FAILED
    if state != "failed" and code == 0:
        return DONE  # on a machine without rank 0, which writes the status and may not have yet
    if state != "failed":
        mark_failed(attempt, **_unsaid(job, code))
        status = read_status(job.run_dir)
    error = status["error"]
    if "setting" in error:
        raise ConfigError(**error["setting"])
    where = f"first on rank {error['rank']}" if "rank" in error else f"exit code {code}"
    _say(f"the run failed ({where}): {error.get('traceback') or error['message']}")
    return FAILED


def _unsaid(job: Job, code: int) -> dict[str, object]:
    """Return the error of ranks that left none."""
    if code >= 0:
        return {"message": f"the ranks ended with exit code {code} and left no reason"}
    if is_plain(job.launch):
        return {"rank": 0, "message": f"rank 0 {killed_by(code)}"}
    return {"message": f"torchrun's agent {killed_by(code)}, and its ranks with it"}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
