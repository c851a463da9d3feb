"""torchrun for ranks that explain themselves: python -m trainers.agent TORCHRUN_ARGUMENTS.

Torch's own agent, without its traceback after a rank has said what went wrong, and with that rank's exit code.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainers.processes import never_fail, send
from trainers.rundir.attempt import Attempt, newest_attempt
from trainers.rundir.beats import read_beats
from trainers.rundir.ending import TOGETHER_S, Exit, Failure, State, first_killed, first_word, killed_by, stops_others

LATE_S = 15
"""For ranks to end by themselves once the run has failed: those that save get longer only while it has not."""


def main(arguments: list[str]) -> int:
    """Run torch's agent to its end; returns the exit code of the first rank that failed, or 0."""
    never_fail()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ["FULLTUNE_AGENT"] = str(os.getpid())  # ranks end with this process, also where it ends before they could ask for that
    run_dir = Path(arguments[-1]).parent
    attempt = Attempt(run_dir, newest_attempt(run_dir) + 1)
    threading.Thread(target=_end_late_ranks, args=(attempt,), daemon=True).start()
    try:
        run.main(arguments)
    except ChildFailedError as error:
        failures = [Failure(rank, failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()]
        killed, code = first_killed(failures), first_word(failures)
        wordless = code == Exit.failed and not attempt.has_ended(State.failed)  # it could not write, and others stopped because of it
        if killed is None and not wordless:
            return code
        killed = killed or min(failures, key=lambda failure: failure.at)
        message = f"rank {killed.rank} {killed_by(killed.code)}"
        cause = {"rank": killed.rank, "host": socket.gethostname(), "message": message, "exit_code": killed.code}
        attempt.record_failure(cause, at=killed.at, together_s=TOGETHER_S, over_stop=wordless or stops_others(failures))
        return Exit.failed
    except SignalException:
        return Exit.failed
    return Exit.done


def _end_late_ranks(attempt: Attempt) -> None:
    """Kill the ranks that are still there LATE_S after the run has failed: one that is stopped or hangs takes no signal."""
    while attempt.is_current():  # what fails after that, and RUN_DIR/ranks, is a newer attempt's
        time.sleep(1)
        if attempt.has_ended(State.failed):
            time.sleep(LATE_S)
            if attempt.is_current(at_once=True):
                for beat in read_beats(attempt.run_dir).values():
                    send(beat.host, beat.pid, attempt.run_dir, signal.SIGKILL)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch apart takes half a second, and its ranks have ended
