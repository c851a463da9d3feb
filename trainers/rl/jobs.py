"""Work that is done while a step is taken: a thread of each rank that does what it is given one after another, such as rollouts."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from trainers.health.activity import watch

log = logging.getLogger("fulltune")
Spent = dict[str, float]
"""Seconds by part."""
Job = Callable[[], Spent | None]
"""It returns None, and so ends all jobs, where a rank was asked to stop: all ranks' do, or none's."""
LOOK_S = 0.5
LEAVE_S = 30.0
"""For a job to see that it is to stop: the model or the judge that it waits for may answer first."""


class Jobs:
    """The thread. Every rank gives it the same jobs in the same order, so that their collectives meet."""

    def __init__(self) -> None:
        """Start it; it ends with the process, or with `close`."""
        self.jobs: queue.SimpleQueue[tuple[Job, Future[Spent | None]] | None] = queue.SimpleQueue()
        self.asked: dict[int, Future[Spent | None]] = {}
        self.is_over = False
        self.thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self.thread.start()

    def ask(self, place: int, job: Job) -> None:
        """Have a job done after all those before it; `place` is where `take` finds it."""
        self.asked[place] = Future()
        self.jobs.put((job, self.asked[place]))

    def has(self, place: int) -> bool:
        """Tell whether a job was asked for and not taken."""
        return place in self.asked

    def take(self, place: int) -> Spent | None:
        """Wait for a job, and return what it did; nothing for one that was not asked. Raises what the job has raised.

        While it is waited for, its progress is this rank's.
        """
        if place not in self.asked:
            return {}
        began = time.perf_counter()
        found = _waited(self.asked.pop(place))
        return None if found is None else found | {"waiting_seconds": time.perf_counter() - began}

    def settle(self) -> None:
        """Wait until all is done that was asked; raises what a job has raised."""
        for future in self.asked.values():
            _waited(future)

    def close(self) -> None:
        """End the thread once the jobs have seen that they are to stop; where one raised on another rank, it may wait for ever."""
        self.jobs.put(None)
        self.thread.join(LEAVE_S)
        if self.thread.is_alive():
            log.warning("a rollout that was given ahead has not ended within %g s; this rank ends without it", LEAVE_S)
        for error in (future.exception() for future in self.asked.values() if future.done()):
            if error is not None:
                log.warning("a rollout that was given ahead has failed: %s", error)

    def _run(self) -> None:
        watch.aside = threading.get_ident()
        while (asked := self.jobs.get()) is not None:
            job, future = asked
            try:
                found = None if self.is_over else job()
            except BaseException as error:  # whoever takes it raises it
                self.is_over = True
                future.set_exception(error)
            else:
                self.is_over = found is None
                future.set_result(found)
        watch.aside = None


def _waited(future: Future[Any]) -> Any:
    """Return what comes of a job; each beat of the thread is one of this rank's meanwhile."""
    while not future.done():
        seen = watch.aside_beats
        wait([future], LOOK_S)
        if watch.aside_beats != seen:
            watch.beat()
    return future.result()
