"""torchrun for ranks that explain themselves: python -m trainers.agent TORCHRUN_ARGUMENTS.

Torch's own agent, without its traceback after a rank has said what went wrong, and with that rank's exit code.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainers.status import TOGETHER_S, Attempt, newest_attempt, read_json
from trainers.watchdog import read_beats, send

FAILED = 1
LATE_S = 15
"""For ranks to end by themselves once the run has failed: those that save get longer only while it has not."""


def main(arguments: list[str]) -> int:
    """Run torch's agent to its end; returns the exit code of the first rank that failed, or 0."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ["FULLTUNE_AGENT"] = str(os.getpid())  # ranks end with this process, also where it ends before they could ask for that
    run_dir = Path(arguments[-1]).parent
    attempt = Attempt(run_dir, newest_attempt(run_dir) + 1)
    threading.Thread(target=_end_late_ranks, args=(attempt,), daemon=True).start()
    try:
        run.main(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)  # where equal, in the order they were found in
        said = [failure for _, failure in failures if failure.exitcode > 0]
        killed = [(rank, failure) for rank, failure in failures if failure.exitcode == -signal.SIGKILL]
        if failures[0][1].exitcode < 0 and not (said and failures[0][1].exitcode == -signal.SIGTERM):
            killed = failures  # others that die of a signal do so because another rank failed: NCCL aborts, this agent sends SIGTERM
        if not killed:
            return int(said[0].exitcode)
        rank, failure = killed[0]
        name = signal.Signals(-failure.exitcode).name
        why = " (out of memory, or kill -9)" if name == "SIGKILL" else ""
        cause = {"rank": rank, "exit_code": failure.exitcode, "message": f"rank {rank} was killed by {name}{why}"}
        attempt.record_failure(cause, at=failure.timestamp, together_s=TOGETHER_S)
        return FAILED
    except SignalException:
        return FAILED
    return 0


def _end_late_ranks(attempt: Attempt) -> None:
    """Kill the ranks that are still there LATE_S after the run has failed: one that is stopped or hangs takes no signal."""
    run_dir = attempt.run_dir
    known = {} if "FULLTUNE_LAUNCHER" in os.environ else read_json(run_dir / "status.json")
    while attempt.is_current():  # what fails after that, and RUN_DIR/ranks, is a newer attempt's
        time.sleep(1)
        try:
            status = read_json(run_dir / "status.json")
        except (OSError, ValueError):
            continue
        if status.get("state") != "failed" or status.get("error") == known.get("error"):
            continue
        time.sleep(LATE_S)
        if not attempt.is_current(at_once=True):
            return
        send(read_beats(run_dir).values(), run_dir, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
