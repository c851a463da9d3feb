"""Run one child to its end: hand signals on, outlive nothing, leave no orphan; and what it must not find in its environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from trainers.processes import prepare_child

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
KILL_AFTER_S = 30  # beyond the time that ranks get to save: torchrun kills its workers first

OF_A_RANK = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
)
OF_OTHER_LAUNCHERS = ("TORCHELASTIC_", "PET_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_", "ACCELERATE_", "FSDP_")
"""What torchrun, MPI and accelerate tell their processes by: torch, DeepSpeed and transformers would believe it."""


def run(
    command: list[str],
    environment: dict[str, str],
    shutdown_s: int,
    keep_open: tuple[int, ...] = (),
    is_lost: Callable[[], bool] = lambda: False,
    hold: tuple[signal.Signals, ...] = (),
) -> tuple[int, int | None]:
    """Run a command in its own session; returns its exit code and the first signal that we got, or None.

    A signal is passed on once; then the child has `shutdown_s` to save and end by itself before its session is killed, as it is
    at once where `is_lost` says so, which is asked all the time. Signals in `hold` wait until the child, which may be too young to
    take them, unblocks them.
    The child gets SIGTERM when this process dies, even by kill -9.
    """
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in FORWARDED}
    for number in FORWARDED:
        if previous[number] is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        child = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal reaches us alone, and ranks once, through us
            preexec_fn=prepare_child(hold),
            pass_fds=keep_open,
        )
        return _wait(child, received, shutdown_s, is_lost), received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(child: subprocess.Popen[bytes], received: list[int], shutdown_s: int, is_lost: Callable[[], bool]) -> int:
    deadline: float | None = None
    while True:
        try:
            return child.wait(timeout=0.25)
        except subprocess.TimeoutExpired:
            pass
        if received and deadline is None:
            name = signal.Signals(received[0]).name
            print(f"{name}: waiting up to {shutdown_s} s for the ranks to save and stop", file=sys.stderr, flush=True)
            child.send_signal(signal.SIGTERM if received[0] == signal.SIGHUP else received[0])
            deadline = time.monotonic() + shutdown_s + KILL_AFTER_S
        if (deadline is not None and time.monotonic() > deadline) or is_lost():
            os.killpg(child.pid, signal.SIGKILL)


def leftovers() -> list[str]:
    """Return the variables by which ranks would take themselves for those of another job."""
    return sorted(name for name in os.environ if name in OF_A_RANK or name.startswith(OF_OTHER_LAUNCHERS))


def say_leftovers() -> None:
    """Say which variables are ignored, where there are any."""
    if found := leftovers():
        values = " ".join(f"{name}={os.environ[name]}" for name in found[:8])
        print(f"ignored, of another job: {values}{' ...' if len(found) > 8 else ''}", file=sys.stderr, flush=True)
