"""How a run ended, as the launcher's exit code and one message; status.json knows more than torchrun's exit code."""

from __future__ import annotations

import signal
import sys

from launcher.config import is_plain
from launcher.job import Job, mark_failed
from launcher.report import print_summary
from trainers.config.errors import ConfigError
from trainers.rundir.attempt import Attempt, read_status
from trainers.rundir.ending import Ending, Exit, State, ending_of, exit_of, killed_by


def settle(job: Job, attempt: Attempt, code: int, signalled: int | None, last_words: str = "") -> int:
    """Print how the run ended and return the launcher's exit code; raises ConfigError where ranks refused a setting.

    `code` is the child's, `signalled` the signal that we passed on, `last_words` what the scheduler says where no rank has begun.
    """
    status = read_status(job.run_dir)
    is_current = code == Exit.done or attempt.is_current(at_once=True)
    ending = ending_of(code, status, was_asked=signalled is not None, is_current=is_current)
    if ending is Ending.unexplained:
        mark_failed(attempt, **_unsaid(job, code, last_words))
        status = read_status(job.run_dir)
    if ending is Ending.superseded:
        _say("a newer attempt of this run has started elsewhere: this one has ended, and wrote nothing since")
    elif ending is Ending.stopped:
        done = f"with a checkpoint at step {status['step']}" if status.get("step") else "before the first step"
        _say(f"stopped {done}: the same command continues")
    elif ending is Ending.cut_short:
        _say("stopped without a new checkpoint: the same command continues from the last one, if any")
    elif ending is Ending.refused:
        raise ConfigError(**status["error"]["setting"])
    elif ending is not Ending.done:
        error = status["error"]
        where = f"first on rank {error['rank']}" if "rank" in error else f"exit code {code}"
        _say(f"the run failed ({where}): {error.get('traceback') or error['message']}")
    elif status.get("state") == State.done:  # rank 0, which writes it, may still be at work on another machine
        print_summary(job.run_dir)
    return exit_of(ending, interrupted=signalled == signal.SIGINT)


def _unsaid(job: Job, code: int, last_words: str) -> dict[str, object]:
    """Return the error of ranks that left none."""
    if last_words:
        return {"message": last_words}
    if code >= 0:
        return {"message": f"the ranks ended with exit code {code} and left no reason"}
    if is_plain(job.launch):
        return {"rank": 0, "message": f"rank 0 {killed_by(code)}"}
    return {"message": f"torchrun's agent {killed_by(code)}, and its ranks with it"}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
