"""torchrun for ranks that explain themselves: python -m trainers.agent TORCHRUN_ARGUMENTS.

Torch's own agent, without its traceback after a rank has said what went wrong, and with that rank's exit code.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FAILED = 1


def main(arguments: list[str]) -> int:
    """Run torch's agent to its end; returns the exit code of the first rank that failed, or 0."""
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else FAILED
    except SignalException:
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
