"""torchrun for ranks that explain themselves: python -m trainers.agent TORCHRUN_ARGUMENTS.

Torch's own agent, without its traceback after a rank has said what went wrong, and with that rank's exit code.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from trainers.status import newest_attempt, read_json, set_status

FAILED = 1
TOGETHER_S = 10


def main(arguments: list[str]) -> int:
    """Run torch's agent to its end; returns the exit code of the first rank that failed, or 0."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    run_dir = Path(arguments[-1]).parent
    before = newest_attempt(run_dir)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        said = [failure for failure in error.failures.values() if failure.exitcode > 0]
        own = {-signal.SIGTERM} if said else set()  # this agent's, of a rank too young to take it, because another one failed
        killed = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode < 0 and failure.exitcode not in own]
        if not killed:
            return int(min(said, key=lambda failure: failure.timestamp).exitcode)
        rank, failure = killed[0]
        if newest_attempt(run_dir) <= before + 1:  # else another attempt has started after ours
            _record_kill(run_dir, rank, signal.Signals(-failure.exitcode).name)
        return FAILED
    except SignalException:
        return FAILED
    return 0


def _record_kill(run_dir: Path, rank: int, name: str) -> None:
    """Name the rank that was killed: the others fail because of it, and only they can write status.json.

    Where a rank gave its reason well before, the kill is this agent's own, of a rank that did not end in time.
    """
    known = read_json(run_dir / "status.json")
    if known.get("state") == "failed" and time.time() - known.get("time", 0) > TOGETHER_S:
        return
    why = " (out of memory, or kill -9)" if name == "SIGKILL" else ""
    set_status(run_dir, "failed", error={"rank": rank, "message": f"rank {rank} was killed by {name}{why}"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
