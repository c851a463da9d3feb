"""Chunks of rows to documents in several processes: only of data with so many rows that starting them pays."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

from trainers.data.encode import Documents, Encoder
from trainers.data.sources import Row
from trainers.processes import die_with_parent
from trainers.world import STOP_SIGNALS


def encode_parallel(encoder: Encoder, chunks: Iterator[list[Row]], processes: int) -> Iterator[Documents]:
    """Yield the documents of chunks of rows, in their order.

    Processes are forked, so that nothing is imported again and the encoder is not pickled. The first submit forks all of them.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(encoder, os.getpid())) as pool:
        waiting: deque[Future[Documents]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk))
            if len(waiting) >= 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _worker_encoder
    die_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals every process; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive the fork, and the processes fill the cores
    _worker_encoder = encoder


def _encode_chunk(rows: list[Row]) -> Documents:
    assert _worker_encoder is not None
    return _worker_encoder.encode(rows)
