"""The next step's microbatches, made by a thread while a step is taken."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from trainers.batch import Batch, Sizes
from trainers.data.loader import Ints, Rows


@dataclass(frozen=True)
class Dealt:
    """What a step takes."""

    row_ids: Ints
    """The table's rows that all ranks together take."""
    batches: list[Batch]
    """This rank's microbatches, in pinned memory where they go to a GPU: the copy then waits for nothing."""
    sizes: Sizes
    """Of all ranks' rows."""


class Prefetch:
    """Hands out each step's rows, and has a thread make those of the step after it.

    Rows are a function of the step, so that nothing of this is saved: what was made for a step that does not come is dropped.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        """Make nothing yet."""
        self.rows, self.device = rows, device
        self.thread = ThreadPoolExecutor(1, "prefetch")
        self.made: tuple[tuple[int, int], Future[Dealt]] | None = None

    def take(self, step: int, ahead: int) -> Dealt:
        """Return what a step takes, `ahead` steps further in the stream; raises what making it raised."""
        place = (step, ahead)
        made, self.made = self.made, None
        dealt = made[1].result() if made is not None and made[0] == place else self._make(*place)
        if step + 1 < self.rows.num_steps:
            self.made = (step + 1, ahead), self.thread.submit(self._make, step + 1, ahead)
        return dealt

    def _make(self, step: int, ahead: int) -> Dealt:
        row_ids = self.rows.row_ids(step, ahead)
        batches = self.rows.batches(step, row_ids)
        if self.device.type == "cuda":
            batches = [batch.map(torch.Tensor.pin_memory) for batch in batches]
        return Dealt(row_ids, batches, self.rows.table(step).sizes(row_ids))

    def __enter__(self) -> Prefetch:
        """Return itself; the thread ends with the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the thread, with what it is making."""
        self.thread.shutdown(cancel_futures=True)
