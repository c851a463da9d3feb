"""Who this rank is, how ranks agree, and the flag that asks a run to stop."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainers.config.mesh import words_of_group
from trainers.processes import die_with_parent

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
RAISE_AGAIN_S = 0.02
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
"""Where a user sets torch's allocator up; ours is to leave no gaps in a device's memory that nothing fits into."""
BESIDE = "beside"
"""The description of a process group of a thread that does not train."""


class Stopped(BaseException):
    """A signal came where no step is being taken; like KeyboardInterrupt, no `except Exception` may catch it."""


@dataclass(kw_only=True)
class World:
    """This rank among all: numbers come from the environment that torchrun sets."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Ranks on this machine."""
    signalled: int | None = None
    """The signal that asked this rank to stop; set by the handler, read at step boundaries."""
    group: dist.ProcessGroup | None = None
    """The process group of the sums below; None is the one of all tensors."""
    collective_s: int = 1800
    """Seconds that torch lets a collective wait."""
    interruptible: bool = True
    """Nothing is to be saved yet: a signal raises Stopped at once instead of waiting for a step to end."""
    say_stopped: Callable[[str], None] = lambda name: None
    """Called before Stopped is raised: what is torn down by that closes connections, and other ranks fail of it."""
    arrived: int = -1
    """A file from which the numbers of signals are read as they arrive, before their handlers run."""
    asked: bool = False

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, LOCAL_RANK and WORLD_SIZE; one rank where none is set. Raises RuntimeError if only some are set."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        missing = [name for name in names if name not in os.environ]
        if missing and len(missing) < len(names):
            raise RuntimeError(f"{', '.join(missing)} is not set though {', '.join(set(names) - set(missing))} is: start through torchrun")
        rank, local_rank, size = (0, 0, 1) if missing else (int(os.environ[name]) for name in names)
        cuda = torch.cuda.is_available()
        if cuda and not ALLOCATOR & os.environ.keys():
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read with the first allocation; trainers/plan counts on it
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return cls(rank=rank, local_rank=local_rank, size=size, device=device, local_size=local_size)

    def watch_signals(self) -> None:
        """Let signals set the stop flag (and, before the first step, raise Stopped); let the kernel end this rank with its parent."""
        agent = os.environ.get("FULLTUNE_AGENT")
        die_with_parent(int(agent) if agent else os.getppid())  # nobody says who started a rank without our agent
        for number in STOP_SIGNALS:
            signal.signal(number, self._flag)
        signal.signal(signal.SIGALRM, self._raise_again)
        self.arrived, written = os.pipe()
        os.set_blocking(self.arrived, False)
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # those that came while this process was starting
        sys.unraisablehook = self._when_swallowed

    def is_asked(self) -> bool:
        """Tell whether this rank has been asked to stop, though its handler may wait for a library's call to return."""
        with contextlib.suppress(OSError):  # nothing has arrived
            self.asked = self.asked or any(number in STOP_SIGNALS for number in os.read(self.arrived, 64))
        return self.asked or self.signalled is not None

    def _flag(self, number: int, _frame: object) -> None:
        first, self.signalled = self.signalled is None, number
        if first and self.interruptible:
            self.say_stopped(signal.Signals(number).name)
            raise Stopped(signal.Signals(number).name)

    def _when_swallowed(self, swallowed: sys.UnraisableHookArgs) -> None:
        """Try again shortly when the signal came inside a finalizer or a weak reference's callback, where Python drops what is raised."""
        if isinstance(swallowed.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN_S)
        else:
            sys.__unraisablehook__(swallowed)

    def _raise_again(self, _number: int, _frame: object) -> None:
        if self.interruptible and self.signalled is not None:
            raise Stopped(signal.Signals(self.signalled).name)

    def connect(self, timeout_s: int = 1800) -> None:
        """Start the process group: gloo for CPU tensors always, nccl for CUDA tensors where there is a GPU."""
        self.collective_s = timeout_s
        limit = datetime.timedelta(seconds=timeout_s)
        if self.device.type == "cuda":
            os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # collectives that NCCL's flight record keeps
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.size == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        else:
            dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=limit)

    def begin_steps(self) -> None:
        """Let signals wait for the end of a step from now on, on all ranks or none; collective.

        Raises Stopped, on every rank, where one was signalled by now. A rank that had stopped earlier ends this here: what waits for
        ranks without being connected to them yet, such as a new process group, would not notice.
        """
        self.interruptible = False
        if self.any(self.signalled is not None)[0]:
            raise Stopped(signal.Signals(self.signalled).name if self.signalled is not None else "a signal to another rank")

    def beside(self) -> World:
        """Return a World of the same ranks with a process group of its own, for a thread; collective."""
        limit = datetime.timedelta(seconds=self.collective_s)
        return replace(self, group=dist.new_group(backend="gloo", timeout=limit, group_desc=BESIDE) if self.size > 1 else None)

    def disconnect(self) -> None:
        """End the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def collectives(self) -> dict[str, int]:
        """Return how many collectives this rank has begun, by the process group's name; empty for one rank, or where torch does not say.

        Those of a thread of its own are not among them: ranks may be apart in these, and none waits for another.
        """
        if self.size == 1:
            return {}
        begun: dict[str, int] = {}
        try:
            groups: list[Any] = list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []
            for group in (group for group in groups if group.group_desc != BESIDE):
                name, kinds = _name_of(group), group._device_types
                number = sum(group._get_backend(kind)._get_sequence_number_for_group() for kind in kinds)
                begun[name] = begun.get(name, 0) + number
        except (AttributeError, KeyError, RuntimeError, ValueError):
            return {}
        return begun

    def flight_record(self) -> bytes | None:
        """Return NCCL's record of its last collectives, pickled; None without a GPU."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None) if self.device.type == "cuda" else None
        return bytes(dump()) if dump is not None else None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise maximum over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def sum_and_max(self, sums: Sequence[float], maxima: Sequence[float]) -> tuple[list[float], list[float]]:
        """Return the element-wise sums and maxima over ranks, in float64, by one collective; as many of each on every rank."""
        if self.size == 1:
            return list(map(float, sums)), list(map(float, maxima))
        mine = torch.tensor([*sums, *maxima], dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        by_rank = torch.stack(every)
        return by_rank[:, : len(sums)].sum(0).tolist(), by_rank[:, len(sums) :].amax(0).tolist()

    def _reduce(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, op=how, group=self.group)
        return [float(value) for value in tensor]

    def any(self, *claims: bool) -> list[bool]:
        """Tell of each claim whether it holds on any rank; all ranks get the same answer."""
        return [bool(value) for value in self.max([float(claim) for claim in claims])]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, on every rank; small picklable values only."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """Return rank 0's value on every rank; small picklable values only."""
        values: list[T] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"), group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.max([0.0])

    def require_agreement(self, what: str, value: str) -> None:
        """Raise RuntimeError, on every rank and naming the ranks, unless all ranks hold the same value."""
        values = self.gather(value)
        others = [f"rank {rank}: {theirs}" for rank, theirs in enumerate(values) if theirs != values[0]]
        if others:
            raise RuntimeError(f"ranks disagree on {what}: rank 0: {values[0]}; {'; '.join(others[:4])}")


def _name_of(group: dist.ProcessGroup) -> str:
    """Say what the ranks of a group share, by the name of the mesh's dimension, and which they are."""
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == dist.get_world_size():
        return "group of all ranks"
    kind = group.group_desc.removeprefix("mesh_") if group.group_desc.startswith("mesh_") else ""
    return words_of_group(kind, ranks)


def read(values: Sequence[torch.Tensor]) -> list[float]:
    """Return scalars of one device on the host, in float64; the host waits for the device, once."""
    return [float(value) for value in torch.stack([value.double() for value in values]).cpu()]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout from (seed, step, rank) alone, so that no generator state lives in checkpoints."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank & (1 << 63) - 1)
