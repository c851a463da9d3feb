"""A process of its own that is asked what an answer is worth, a line of JSON each way: what it hangs in is ended with it."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from trainers.config.errors import ConfigError
from trainers.processes import prepare_child
from trainers.rewards.shapes import NoReward, Row

START_S = 60.0
"""To import what the process needs."""


def serve(reward_of: Callable[[dict[str, Any]], float], failure_of: Callable[[dict[str, Any], Exception], str]) -> None:
    """Be that process: reward what each line asks until stdin ends. What raises is a failure, in the words of `failure_of` or NoReward."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        said: dict[str, Any]
        try:
            said = {"reward": reward_of(asked)}
        except NoReward as error:
            said = {"failure": str(error)}
        except Exception as error:  # of a package, for whatever an answer holds
            said = {"failure": failure_of(asked, error)}
        print(json.dumps(said), flush=True)


class Asked:
    """A process that says {"ready"} once, and {"reward"} or {"failure"} to each line. One that takes too long gives no reward."""

    module: ClassVar[str]
    """It is `python -m MODULE`."""
    what: ClassVar[str]
    """The package that it asks."""

    def __init__(self, timeout_s: float) -> None:
        """Start nothing yet."""
        self.timeout_s = timeout_s
        self.process: subprocess.Popen[str] | None = None
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, row: Row) -> float:
        """Return an answer's reward; raises NoReward."""
        raise NotImplementedError

    def ask(self, about: dict[str, Any]) -> float:
        """Return the reward that the process says; raises NoReward."""
        process = self._start() if self.process is None else self.process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(about) + "\n")
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
        line = [sys.executable, "-m", self.module]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(line, text=True, preexec_fn=prepare_child(last=signal.SIGKILL), **pipes)  # type: ignore[call-overload]
        self.said = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self.process, self.said), daemon=True).start()
        try:
            json.loads(self.said.get(timeout=START_S))
        except (queue.Empty, ValueError):
            self.close()
            raise ConfigError("reward", self.module.rpartition(".")[2], f"{self.what} could not be started") from None
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
