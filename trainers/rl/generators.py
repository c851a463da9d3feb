"""What gives a run its answers: one process a machine with the run's weights, watched, and replaced where it ends or says nothing."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainers.config.errors import ConfigError, plural
from trainers.config.schema import RunConfig
from trainers.engines.base import COMPUTE, in_short
from trainers.generate.elsewhere import is_apart, seat_of
from trainers.generate.local import LOOK_S, Broken, Local, TooLarge
from trainers.generate.request import Answer, Request, Sampling
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.host import cores
from trainers.world import World

if TYPE_CHECKING:
    from trainers.generate.vllm import Vllm

log = logging.getLogger("fulltune")
T = TypeVar("T")
TEMPERED = ("--logprobs-mode", "processed_logprobs")
"""Words of a vLLM server that gives log-probabilities after the temperature."""


class Interrupted(Exception):
    """This rank was asked to stop while a generator was writing."""


class GeneratorsLost(TrainingFailed):
    """Too many were lost over one batch on a machine, which may be broken."""

    def __init__(self, message: str, host: str) -> None:
        """Keep what status.json says of the machine."""
        super().__init__(message)
        self.where = {"host": host}


class Generators:
    """The generators of all machines, each started by the first rank there, on machines of their own, or servers that run already.

    Every method but `close` is collective.
    """

    def __init__(self, config: RunConfig, world: World, weights: Path, apart: World | None = None) -> None:
        """Start none yet; `weights` is the directory that they open, a model's or an adapter's, which all machines see.

        `apart` is the World of the thread that asks, where it is not the one that trains.
        """
        self.among = apart or world
        self.is_leaving = False
        self.config, self.rl, self.world, self.weights = config, config.rl, world, weights
        self.sampling = Sampling(max_new_tokens=config.rl.max_new_tokens, temperature=config.rl.temperature, tempered=True)
        self.is_apart, self.seat = is_apart(), seat_of()
        starts = self.seat is not None if self.is_apart else world.local_rank == 0
        self.host = socket.gethostname() if self.seat is None else self.seat.host
        self.leads = [rank for rank, leads in enumerate(world.gather(starts)) if leads]
        if config.rl.servers:
            self.leads = list(range(len(config.rl.servers)))
            if len(self.leads) > world.size:
                reason = f"are {len(self.leads)} servers, and each of {plural(world.size, 'rank')} asks one at most"
                raise ConfigError("rl.servers", str(config.rl.servers), reason, "fewer servers, or more ranks")
        self.local: Local | Vllm | None = None
        self.is_opening = False

    def renew(self, weights: Path | None = None) -> None:
        """Have them open the weights that are in the directory now, or in another one."""
        self.weights = weights or self.weights
        if self.local is not None:
            self.is_opening = True
            try:
                self.local.open(self.weights)
            except (Broken, Interrupted) as error:  # the next batch starts another one, or the run stops there
                self._drop(error)
            finally:
                self.is_opening = False

    def score(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[list[float]] | None:
        """Return what they say of the last ids of each row, (ids, how many of them): log-probabilities in nats.

        Each row is of one generator. None where a rank was asked to stop. Raises TrainingFailed, and ConfigError.
        """
        mine = self._share(rows)

        def ask(local: Local | Vllm) -> list[list[float]]:
            assert isinstance(local, Local)  # validate_rl
            return local.score(mine, self.sampling.temperature)

        found = None if self.is_asked_to_stop() else self._tried(ask) if mine else []
        every = self.among.gather(found)
        if None in every:
            return None
        shares = [iter(every[rank] or ()) for rank in self.leads]
        return [next(shares[place % len(shares)]) for place in range(len(rows))]

    def ask(self, requests: Sequence[Request], sampling: Sampling | None = None) -> dict[int, Answer] | None:
        """Return each request's answer by its key; None where a rank was asked to stop. Raises TrainingFailed, and ConfigError.

        `sampling` is that of training where there is none.

        Batches are the same whatever happens meanwhile, so that so are the answers, to the bit. On machines of their own each generator
        takes whole ones: however many there are, they are those of one.
        """
        ordered = sorted(requests, key=lambda request: (-len(request.ids), request.key))
        found: dict[int, Answer] = {}
        at_once = self.rl.batch * len(self.leads)
        for begin in range(0, len(ordered), at_once):
            watch.beat()
            batch = ordered[begin : begin + at_once]
            answers = None if self.is_asked_to_stop() else self._answers(self._part(batch), sampling or self.sampling)
            for theirs in self.among.gather(answers):
                if theirs is None:
                    return None
                found |= {answer.key: answer for answer in theirs}
        return found

    def _share(self, items: Sequence[T]) -> Sequence[T]:
        """Return what of a batch is this rank's generator's."""
        return items[self.leads.index(self.world.rank) :: len(self.leads)] if self.world.rank in self.leads else []

    def _part(self, batch: Sequence[Request]) -> Sequence[Request]:
        """Return the requests of a batch that this rank's generator answers."""
        if not self.is_apart:
            return self._share(batch)
        begin = self.leads.index(self.world.rank) * self.rl.batch if self.world.rank in self.leads else len(batch)
        return batch[begin : begin + self.rl.batch]

    def is_asked_to_stop(self) -> bool:
        """Tell whether this rank was asked to stop, or ends."""
        return self.is_leaving or self.world.signalled is not None

    def _answers(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer] | None:
        """Return this machine's answers of a batch, in any order; None where this rank was asked to stop."""

        def ask(local: Local | Vllm) -> list[Answer]:
            found: list[Answer] = []
            local.ask(requests, sampling, found.append, apart=False)
            return found

        return self._tried(ask) if requests else []

    def _tried(self, ask: Callable[[Local | Vllm], T]) -> T | None:
        """Return what this machine's generator says, another one's where it is lost; None where this rank was asked to stop."""
        lost = 0
        while True:
            try:
                return ask(self._opened())
            except Interrupted as error:
                self._drop(error)
                return None
            except TooLarge as error:
                self.close()
                raise TrainingFailed(f"the generator on {self.host}: {error}") from error
            except Broken as error:
                self._drop(error)
                if self._is_ended_with_it():
                    return None
                lost += 1
                watch.beat()
                if lost > self.rl.restarts:
                    message = f"{lost} generators on {self.host} were lost over one batch: {error}"
                    raise (TrainingFailed(message) if self.rl.servers else GeneratorsLost(message, self.host)) from error

    def _is_ended_with_it(self) -> bool:
        """Tell whether this rank is asked to stop too: SLURM signals all of a job, and a generator may end a moment earlier."""
        until = time.monotonic() + LOOK_S
        while not self.is_asked_to_stop() and time.monotonic() < until:
            time.sleep(LOOK_S / 50)
        return self.is_asked_to_stop()

    def _opened(self) -> Local | Vllm:
        """Return this machine's generator, started where there is none."""
        if self.local is None:
            config, rl = self.config, self.rl
            machine: dict[str, Any] = {
                "dtype": in_short(COMPUTE[config.train.precision]),
                "device": self.world.device.type,
                "look": self.look,
            }
            machine |= {"timeout_s": rl.timeout_s, "open_s": config.limits.load_s}
            if rl.vllm is None and not rl.servers:
                if self.seat is not None:
                    machine["words"] = self.seat.words
                elif rl.staleness:  # ranks compute meanwhile
                    machine["threads"] = max(1, cores() // (self.world.local_size + 1))
                self.local = Local(config, self.weights, batch=rl.batch, setting="rl.batch", **machine)
            else:
                from trainers.generate.vllm import Vllm

                words = [*(TEMPERED if rl.temperature != 1 else ()), *rl.vllm_words]
                url = rl.servers[self.leads.index(self.world.rank)] if rl.servers else None
                self.local = Vllm(self.weights, python=rl.vllm, url=url, words=words, at_once=rl.batch, **machine)
            self.is_opening = True
            try:
                self.local.__enter__()
                if rl.servers:  # it has other weights yet
                    self.local.open(self.weights)
            finally:
                self.is_opening = False
        return self.local

    def look(self) -> None:
        """Raise Interrupted where this rank was asked to stop."""
        if self.is_opening:  # limits.load_s bounds it, and not limits.sample_s
            watch.beat()
        if self.is_asked_to_stop():
            raise Interrupted

    def _drop(self, error: Exception) -> None:
        if isinstance(error, Broken):
            log.warning("the generator on %s is replaced: %s", self.host, error)
        self.close()

    def close(self) -> None:
        """End this machine's generator."""
        if self.local is not None:
            self.local.close()
            self.local = None
