"""Run a program that starts others: python -m trainers.generate.guard PROGRAM WORD... All of them end with who has started this.

A server that is killed leaves the processes of its engine. They are in this process's group, which ends as a whole: with a SIGTERM, which
the kernel sends where the parent has ended, and with the program. No torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NoReturn

from trainers.processes import prepare_child


def main(words: list[str]) -> NoReturn:
    """Run the program to its end, say how it ended, and end its group; this process must lead one of its own."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(os.getpgid(0), signal.SIGKILL))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of this Python, and not of the program's
    code = subprocess.Popen(words, env=variables, preexec_fn=prepare_child(last=signal.SIGKILL)).wait()
    print(f"{words[0]} has ended with {code}", file=sys.stderr, flush=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)
    raise SystemExit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
