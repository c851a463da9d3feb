"""Whether two mathematical answers are the same, by math-verify, in a process of its own: python -m trainers.rewards.mathematics.

What math-verify hands to sympy may take for ever, and its own limits count what they end as different. So they are off, and who has started
this process ends it. It reads {"reference", "answer"} a line from stdin, and says {"reward"} or {"failure"}.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from functools import partial
from importlib.util import find_spec

from trainers.config.errors import ConfigError
from trainers.data.reasoning import answer_of
from trainers.processes import prepare_child
from trainers.rewards.shapes import NoReward, Row

START_S = 60.0
"""To import sympy and what is built on it."""


def main() -> None:
    """Compare until stdin ends."""
    from math_verify import parse, verify

    read = partial(parse, parsing_timeout=None)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            wanted = read(asked["reference"])
            same = bool(wanted) and verify(wanted, read(asked["answer"]), timeout_seconds=None)
            said = {"reward": float(same)} if wanted else {"failure": "the reference is not mathematics"}
        except Exception as error:  # of sympy, for whatever an answer holds
            said = {"failure": f"math-verify raises {type(error).__name__}"}
        print(json.dumps(said), flush=True)


class Mathematics:
    """1 where answer and reference are the same, else 0. A comparison that takes too long gives no reward."""

    def __init__(self, timeout_s: float) -> None:
        """Raise ConfigError where math-verify is not installed."""
        if find_spec("math_verify") is None:
            raise ConfigError("reward", "math", "needs the package math-verify", "pip install 'fulltune[math]'")
        self.timeout_s = timeout_s
        self.process: subprocess.Popen[str] | None = None
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, row: Row) -> float:
        """Return an answer's reward; raises NoReward."""
        if not str(row["reference"]).strip():
            raise NoReward("the row has no reference")
        process = self._start() if self.process is None else self.process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"reference": answer_of(str(row["reference"])), "answer": answer_of(str(row["answer"]))}) + "\n")
            process.stdin.flush()
            said = json.loads(self.said.get(timeout=self.timeout_s))
        except queue.Empty:
            self.close()
            raise NoReward(f"takes longer than {self.timeout_s:g} s") from None
        except (BrokenPipeError, ValueError):
            self.close()
            raise NoReward("the comparison has ended its process") from None
        if "failure" in said:
            raise NoReward(said["failure"])
        return float(said["reward"])

    def _start(self) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "trainers.rewards.mathematics"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(line, text=True, preexec_fn=prepare_child(last=signal.SIGKILL), **pipes)  # type: ignore[call-overload]
        self.said = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self.process, self.said), daemon=True).start()
        try:
            json.loads(self.said.get(timeout=START_S))
        except (queue.Empty, ValueError):
            self.close()
            raise ConfigError("reward", "math", "math-verify could not be started") from None
        return self.process

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _listen(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.put(line)
    said.put("")


if __name__ == "__main__":
    main()
