"""What answers a model turn by turn: a person's class, in processes of its own. python -m trainers.rl.environment MODULE:CLASS SECONDS.

The class runs with the user's rights. A process reads an order a line, {"key", "row", "seed"} to begin a conversation, {"key", "messages"}
for the next turn, {"key"} at its end, and says a reply a line, or {"failure"}. What takes too long is left by an alarm; where that does not
help, the process is ended and another started. No torch.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

from trainers.config.errors import ConfigError
from trainers.health.activity import watch
from trainers.processes import prepare_child
from trainers.rundir.files import try_row

START_S, GRACE_S, LOOK_S = 60.0, 5.0, 0.5
"""For a process to import the class; after a limit until the process is ended; between two looks at whether to stop."""
ROLES = ("user", "tool")
"""Whose turns an environment may write."""
LOST = "was lost with the process of another conversation"
SHOWN = 120
"""Characters of an error that are told."""

Message = Mapping[str, Any]
Order = dict[str, Any]


class Environment(Protocol):
    """What a class of `rl.environment` has; each conversation has an object of its own, made without arguments."""

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | None:
        """Begin; return the messages that the model is asked with, None for the row's own.

        `row` has `prompt` (messages), `reference` and `row`, the data's. All answers to one prompt have the same `seed`.
        """
        ...

    def step(self, messages: Sequence[Message]) -> tuple[Sequence[Message], float, bool]:
        """Answer the conversation so far, whose last turn is the model's.

        Returns the turns that follow, of the roles `user` and `tool`, a reward that is added to those before, and whether this is the end.
        """
        ...


class _Late(BaseException):
    """A call takes too long; not an Exception, which the class may catch."""


def main(arguments: list[str]) -> None:
    """Answer until stdin ends."""
    path, timeout_s = arguments[0], float(arguments[1])
    for asked in (signal.SIGINT, signal.SIGTERM):  # of a job whose processes all get it: who has started this one ends it
        signal.signal(asked, signal.SIG_IGN)
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the class prints is no reply
    try:
        kind: Any = _imported(path)
    except Exception as error:  # of a person's module
        print(json.dumps({"fault": _words(error)}), file=said, flush=True)
        return
    print(json.dumps({"ready": True}), file=said, flush=True)
    is_late = False

    def late(*_: object) -> None:
        nonlocal is_late
        is_late = True
        raise _Late

    signal.signal(signal.SIGALRM, late)
    open_ones: dict[int, Any] = {}
    for line in sys.stdin:
        is_late = False
        try:
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            text = json.dumps(_reply(kind, open_ones, json.loads(line)), allow_nan=False)
        except _Late:
            text = ""
        except (Exception, SystemExit) as error:  # whatever a person's class does, or gives: counted, and shown by its type
            text = json.dumps({"failure": f"raises {_words(error)}"})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"failure": f"takes longer than {timeout_s:g} s"}) if is_late else text, file=said, flush=True)


def _imported(path: str) -> object:
    """Return the class; raises what its module raises, AttributeError, and TypeError for what holds no conversation."""
    module, _, name = path.partition(":")
    sys.path.append(os.getcwd())  # a run's processes leave it out: PYTHONSAFEPATH
    found = getattr(importlib.import_module(module), name)
    missing = [method for method in ("reset", "step") if not callable(getattr(found, method, None))] if isinstance(found, type) else []
    if missing or not callable(found):
        raise TypeError(f"{name} has no {' and no '.join(missing)}" if missing else f"{name} is not a class")
    return found


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:SHOWN]}"


def _reply(kind: Any, open_ones: dict[int, Any], order: Order) -> dict[str, Any]:
    """Carry out an order."""
    key = order["key"]
    if "row" in order:
        open_ones[key] = kind()
        begun = open_ones[key].reset(order["row"], order["seed"])
        return {"messages": None if begun is None else _checked(begun, (*ROLES, "system", "assistant"))}
    if "messages" not in order:
        getattr(open_ones.pop(key, None), "close", lambda: None)()
        return {}
    if key not in open_ones:
        return {"failure": LOST}
    messages, reward, is_done = open_ones[key].step(order["messages"])
    if not math.isfinite(reward):
        return {"failure": "gives a reward that is not a finite number"}
    if not messages and not is_done:
        return {"failure": "gives no turn, and is not done"}
    return {"messages": _checked(messages, ROLES), "reward": float(reward), "done": bool(is_done)}


def _checked(messages: Sequence[Message], roles: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return messages by themselves; raises ValueError for one of another role, or without a text."""
    for message in messages:
        if message["role"] not in roles or not isinstance(message["content"], str):
            raise ValueError(f"a message has a role of {', '.join(roles)} and a text as content, not {str(message)[:SHOWN]}")
    return [dict(message) for message in messages]


class _Process:
    """One process. It ends with the thread that starts it."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s
        self.process: subprocess.Popen[str] | None = None
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()

    def start(self) -> None:
        """Start it, where it does not run."""
        if self.process is not None:
            return
        line = [sys.executable, "-m", "trainers.rl.environment", self.path, str(self.timeout_s)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        begin = prepare_child(last=signal.SIGKILL)
        self.process = subprocess.Popen(line, text=True, start_new_session=True, preexec_fn=begin, **pipes)  # type: ignore[call-overload]
        self.said = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self.process, self.said), daemon=True).start()

    def require_ready(self) -> None:
        """Wait until it has the class, after its start; raises ConfigError where that cannot be imported."""
        try:
            fault = (try_row(self.said.get(timeout=START_S)) or {"fault": "its process has ended"}).get("fault")
        except queue.Empty:
            fault = f"it takes longer than {START_S:g} s"
        if fault:
            raise ConfigError("rl.environment", self.path, f"could not be imported: {fault}", "module:Class, in this folder or PYTHONPATH")

    def ask(self, order: Order) -> dict[str, Any]:
        """Return the reply to an order."""
        process = self.process
        if process is None:
            return {"failure": LOST}
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            reply = try_row(self.said.get(timeout=self.timeout_s + GRACE_S))
        except queue.Empty:
            self.close()
            return {"failure": f"takes longer than {self.timeout_s:g} s"}
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.close()
            return {"failure": "has ended its process"}
        return reply

    def close(self) -> None:
        """End it."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()


def _listen(process: subprocess.Popen[str], said: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.put(line)
    said.put("")


class Environments:
    """The processes; a conversation stays with one of them, by its key. Methods are for the main thread."""

    def __init__(self, path: str, timeout_s: float, processes: int) -> None:
        """Start them all; raises ConfigError where the class cannot be imported."""
        self.processes = [_Process(path, timeout_s) for _ in range(processes)]
        self._start()

    def _start(self) -> None:
        """Start those that do not run: here, as each would end with the thread of a pool."""
        absent = [process for process in self.processes if process.process is None]
        try:
            for process in absent:
                process.start()
            for process in absent:
                process.require_ready()
        except ConfigError:
            self.close()
            raise

    def ask(self, orders: Sequence[Order], look: Callable[[], None]) -> list[dict[str, Any]]:
        """Return the reply to each order; `look` is called now and then, and may raise. Each is a beat.

        What a process had open is lost with it.
        """
        self._start()
        replies: list[dict[str, Any]] = [{} for _ in orders]

        def of_one(number: int) -> None:
            for at, order in enumerate(orders):
                if order["key"] % len(self.processes) == number:
                    replies[at] = self.processes[number].ask(order)
                    watch.beat()

        with ThreadPoolExecutor(len(self.processes)) as pool:
            asked = [pool.submit(of_one, number) for number in range(len(self.processes))]
            try:
                while wait(asked, LOOK_S).not_done:
                    look()
            except BaseException:
                self.close()  # every reply that is still waited for is there at once
                raise
        look()  # a process that was ended with the run has failed nothing
        for one in asked:
            one.result()
        return replies

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.close()


if __name__ == "__main__":
    main(sys.argv[1:])
