"""The only loop: rows in, steps taken, figures out."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trainers.batch import IGNORE, Batch
from trainers.checkpoint import Checkpointer, Progress
from trainers.config.errors import ConfigError
from trainers.config.schema import OnSpike, RunConfig
from trainers.data.loader import Ints, Loader, eval_batches
from trainers.data.prepare import Prepared
from trainers.engines.base import Engine
from trainers.health.activity import watch
from trainers.health.spikes import Spikes
from trainers.health.stragglers import Stragglers
from trainers.objectives import CHOICES, Objective
from trainers.optim import learning_rate, warmup_steps
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.beats import Phase
from trainers.rundir.files import finite
from trainers.rundir.metrics import Metrics, device_bytes_peak, host_bytes_peak, peak_tflops
from trainers.rundir.rows import eval_losses
from trainers.world import World, seed_step

log = logging.getLogger("fulltune")
STATUS_EVERY_S = 5.0
LEAK_SHARE = 0.02
DISAGREEMENT = 1e-5
"""Largest relative difference of the gradient norm between ranks."""


class Spike(Exception):
    """A step's loss or gradient norm is out of the ordinary: says which. It has updated nothing."""


class TrainingFailed(Exception):
    """The run cannot go on, for a reason the user can act on."""


@dataclass(kw_only=True)
class Outcome:
    """How `train` ended."""

    progress: Progress
    stopped: bool = False
    """The run was asked to stop before its end."""
    saved_step: int = 0
    """Step of the newest checkpoint."""
    failed_saves: int = 0
    """Checkpoints that could not be written."""
    eval_losses: list[float] = field(default_factory=list)
    """Held-out losses in nats a token, the one before the first step first."""
    train_loss: float | None = None
    mfu: float | None = None


@torch.no_grad()
def evaluate(engine: Engine, objective: Objective, batches: Iterable[Batch], world: World) -> tuple[float, int] | None:
    """Return the held-out loss in nats a token and its number of tokens: one sum over all rows, each counted once.

    Only sums are kept, so memory does not grow with the number of rows. None where a rank was asked to stop on the way.
    """
    engine.train(False)
    total, weight = 0.0, 0
    for batch in watch.each(batches):
        if world.any(world.signalled is not None)[0]:
            return None
        weight += objective.targets(batch.sizes())
        on_device = batch.to(world.device)
        total += float(objective(engine.forward(on_device, objective.needs), on_device).total)
    engine.train(True)
    total, whole = world.sum([total, float(weight)])
    return total / whole if whole else math.nan, int(whole)


def stalled(losses: list[float], patience: int | None, min_improvement: float) -> bool:
    """Tell whether the last `patience` held-out losses brought no improvement over the best before each."""
    if patience is None:
        return False
    best, waited = math.inf, 0
    for loss in losses:
        if loss < best - min_improvement:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= patience


def require_isolation(engine: Engine, world: World, vocab_size: int, microbatch: int) -> None:
    """Refuse packing unless another document in the row leaves a document's log-probabilities alone.

    Asked of the real model on the real device with two short documents a row: it holds for any architecture and backend.
    A document's neighbour may move it by LEAK_SHARE of what its own first token does: rounding in experts' batches, no more.
    """
    length = 12
    ids = torch.arange(2 * length).remainder(vocab_size).repeat(microbatch, 1)
    positions = torch.arange(length).repeat(2).expand_as(ids)
    labels = ids.roll(-1, 1).where(positions != length - 1, IGNORE)
    neighbour, own = ids.clone(), ids.clone()
    neighbour[:, :length] = (ids[:, :length] + vocab_size // 2).remainder(vocab_size)
    own[:, length] = (ids[:, length] + vocab_size // 2).remainder(vocab_size)
    engine.train(False)
    logps = []
    with torch.no_grad():
        for rows in (ids, neighbour, own):
            batch = Batch.of(rows, labels, positions)
            logps.append(engine.forward(batch.to(world.device)).logps[:, length:].cpu())
    engine.train(True)
    leak, effect = (float((changed - logps[0]).abs().max()) for changed in logps[1:])
    if not leak <= LEAK_SHARE * effect:
        reason = f"this model with this attention backend lets packed documents see each other ({leak:.2g} nats)"
        raise ConfigError("data.packing", True, reason, "data.packing=false")


class Training:
    """What one attempt holds while it trains; `train` is the way in."""

    def __init__(
        self, config: RunConfig, world: World, attempt: Attempt, engine: Engine, data: Prepared, loader: Loader, flops_per_token: float
    ) -> None:
        """Keep the parts."""
        self.config, self.world, self.attempt, self.engine, self.data, self.loader = config, world, attempt, engine, data, loader
        self.objective = CHOICES[config.objective.name](config.objective)
        self.checkpointer = Checkpointer(config.checkpoint, attempt, world)
        self.metrics = Metrics(config, attempt, world.rank, loader.num_steps)
        self.flops_per_token, self.peak = flops_per_token, peak_tflops(config)
        self.outcome = Outcome(progress=Progress())
        self.skipped_in_a_row, self.status_at, self.evaluated_at = 0, 0.0, -1
        self.spikes, self.rollbacks, self.back_at = Spikes(config.train.spike_threshold), 0, 0
        self.stragglers = Stragglers(world, config.limits.slow_node)
        warmup_steps(config.optim, loader.num_steps)
        if engine.adaptation.update is not None:
            engine.adaptation.update.at(0, loader.num_steps)

    def run(self) -> Outcome:
        """Continue from the newest checkpoint to the last step, an early stop, or a signal."""
        progress = self.checkpointer.restore(self.engine)
        with self.metrics as metrics:
            kept = metrics.start(progress.step)
            known = [math.nan if row["eval_loss"] is None else row["eval_loss"] for row in kept if "eval_loss" in row]
            last = next((row["loss"] for row in reversed(kept) if "loss" in row), None)
            judged = max((row["step"] for row in kept if "eval_loss" in row), default=-1)
            self.outcome.eval_losses, self.outcome.train_loss, judged = self.world.from_first((known, last, judged))
            self.spikes.recall(self.world.from_first(_taken_steps(kept)))
            if self._eval_due(progress.step) and judged < progress.step:
                self._evaluate(progress)
            while not self.outcome.stopped and progress.step < self.loader.num_steps and not self._is_stalled():
                try:
                    progress = self._step(progress)
                except Spike as spike:
                    progress = self._go_back(progress, spike)
                    continue
                if self._eval_due(progress.step):
                    self._evaluate(progress)
                self._heed(progress)
            self._save(progress, wait=True)  # whatever the export meets, the training is kept
            self.outcome.saved_step, self.outcome.failed_saves = self.checkpointer.saved_step, self.checkpointer.all_failures
            if self.outcome.stopped and self.world.rank == 0:  # before anything slow, such as a mirror that does not answer, delays it
                self.attempt.set_status("preempted", step=self.outcome.saved_step)
            self.outcome.progress = progress
            return self.outcome

    def _heed(self, progress: Progress) -> None:
        """Agree with all ranks on what is to be done at the end of a step: stop, save, take a save's outcome, give way; collective."""
        stop, save = self.checkpointer.wishes()
        late = self.world.rank == 0 and not self.attempt.is_current()
        stop, save, writing, late = self.world.any(stop or self.world.signalled is not None, save, self.checkpointer.is_writing(), late)
        if late:
            raise Superseded(f"a newer attempt of this run has started; attempt {self.attempt.number} writes nothing any more")
        if not writing:
            self.checkpointer.finish()
        self.outcome.stopped = self.outcome.stopped or stop
        best = self._judged(progress) and self.checkpointer.is_best(self.outcome.eval_losses)
        if not self.outcome.stopped and (save or best or self.checkpointer.due(progress.step)):
            self._save(progress)

    def _judged(self, progress: Progress) -> bool:
        return self.evaluated_at == progress.step

    def _save(self, progress: Progress, wait: bool = False) -> None:
        watch.enter(Phase.saving, progress.step)
        eval_loss = self.outcome.eval_losses[-1] if self._judged(progress) and self.outcome.eval_losses else None
        self.checkpointer.save(self.engine, progress, eval_loss, wait)

    def _step(self, progress: Progress) -> Progress:
        """Take one optimizer step over the rows that (seed, step) names."""
        watch.enter(Phase.step, progress.step + 1)
        started = time.perf_counter()
        self.stragglers.probe(progress.step)
        began = time.perf_counter()
        seed_step(self.config.seed, progress.step, self.world.rank)
        row_ids = self.loader.row_ids(progress.step, progress.ahead)
        microbatches = self.loader.batches(row_ids)
        counts = [
            sum(self.objective.targets(batch.sizes()) for batch in microbatches),
            sum(b.num_rows for b in microbatches),
            sum(b.num_tokens for b in microbatches),
        ]
        data_seconds = time.perf_counter() - began
        weight, rows, inputs = (int(count) for count in self.world.sum(counts))
        lr = learning_rate(self.config.optim, progress.step, self.loader.num_steps)
        local_loss = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(microbatches if weight else [], 1):
            on_device = batch.to(self.world.device)
            loss = self.objective(self.engine.forward(on_device, self.objective.needs), on_device)
            self.engine.backward(loss.total / weight, last=number == len(microbatches))
            local_loss += loss.total.detach()
        if self.engine.adaptation.update is not None:
            self.engine.adaptation.update.at(progress.step, self.loader.num_steps)
        loss_sum = self.world.sum([float(local_loss)])[0]
        mean = loss_sum / weight if weight else math.nan
        most_loss, most_norm = (math.inf, math.inf) if self.config.train.on_spike is OnSpike.none else self.spikes.limits()
        grad_norm = self.engine.step(lr, lambda norm: mean <= most_loss and norm <= most_norm) if weight else 0.0
        seconds = time.perf_counter() - started
        spike = self._judge(mean, most_loss, grad_norm, most_norm)
        skipped = self._count_skipped(progress.step, grad_norm, weight, spike)
        progress = Progress(
            ahead=progress.ahead,
            step=progress.step + 1,
            rows=progress.rows + rows,
            tokens=progress.tokens + weight,
            input_tokens=progress.input_tokens + inputs,
            skipped=progress.skipped + skipped,
            seconds=progress.seconds + seconds,
            device_seconds=progress.device_seconds + seconds * self.world.size,
        )
        named = self.stragglers.gather(progress.step, data_seconds, seconds)
        self._record(progress, mean, lr, grad_norm, weight, inputs, seconds, row_ids, named)
        return progress

    def _judge(self, loss: float, most_loss: float, grad_norm: float, most_norm: float) -> str:
        """Say what of a step that updated nothing is a spike, nothing where none is; raises Spike where more than the step is left out.

        Whether it is an ordinary step is remembered.
        """
        if loss > most_loss:
            spike = f"the loss is {loss:.4g}, and up to {most_loss:.4g} would be ordinary"
        elif grad_norm > most_norm and math.isfinite(grad_norm):
            spike = f"the gradient norm is {grad_norm:.4g}, and up to {most_norm:.4g} would be ordinary"
        else:
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.spikes.add(loss, grad_norm)
            return ""
        if self.config.train.on_spike is not OnSpike.skip:
            raise Spike(spike)
        return spike

    def _go_back(self, progress: Progress, spike: Spike) -> Progress:
        """Return to the last checkpoint, with the rows since it left out; or save and end the run, where that is asked for."""
        if self.config.train.on_spike is OnSpike.stop:
            self._save(progress, wait=True)
            raise TrainingFailed(f"step {progress.step + 1} was not taken: {spike}; look at its rows with python -m tools.show_batch")
        watch.enter(Phase.loading)
        self.checkpointer.finish()
        self.rollbacks = self.rollbacks + 1 if self.back_at == self.checkpointer.saved_step else 1
        self.back_at = self.checkpointer.saved_step
        if self.rollbacks > self.config.train.max_skipped or not self.back_at:
            reason = f"it did not {self.rollbacks - 1} times from step {self.back_at}" if self.back_at else "there is no checkpoint yet"
            raise TrainingFailed(f"step {progress.step + 1}: {spike}; going back does not help: {reason}")
        back = self.checkpointer.restore(self.engine)
        ahead = progress.ahead + progress.step + 1 - back.step
        log.warning("step %d: %s; back to step %d, and past the rows of %d steps", progress.step + 1, spike, back.step, ahead - back.ahead)
        kept, self.evaluated_at = self.metrics.cut(back.step), -1
        self.spikes.recall(self.world.from_first(_taken_steps(kept)))
        self.outcome.eval_losses = self.world.from_first(eval_losses(kept))
        self.metrics.write({"step": back.step, "rollback_from": progress.step + 1, "rows_left_out_steps": ahead - back.ahead})
        return replace(back, ahead=ahead)

    def _count_skipped(self, step: int, grad_norm: float, weight: int, spike: str) -> int:
        """Count a step that updated nothing; too many in a row end the run."""
        if math.isfinite(grad_norm) and weight and not spike:
            self.skipped_in_a_row = 0
            return 0
        self.skipped_in_a_row += 1
        why = spike or (f"the gradient norm is {grad_norm}" if weight else "no row has a supervised token")
        log.warning("step %d is skipped: %s (%d in a row)", step + 1, why, self.skipped_in_a_row)
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            remedy = "lower optim.lr, raise optim.warmup_steps, or look at the rows with python -m tools.show_batch"
            raise TrainingFailed(f"{self.skipped_in_a_row} steps in a row were skipped, the last because {why}; {remedy}")
        return 1

    def _record(
        self,
        progress: Progress,
        loss: float,
        lr: float,
        grad_norm: float,
        weight: int,
        inputs: int,
        seconds: float,
        row_ids: Ints,
        named: dict[str, Any],
    ) -> None:
        peaks = [float(device_bytes_peak() or 0), float(host_bytes_peak())]
        norms = [grad_norm, -grad_norm] if math.isfinite(grad_norm) else [0.0, 0.0]
        device_peak, host_peak, highest, lowest = self.world.max([*peaks, *norms])
        if highest + lowest > DISAGREEMENT * highest:
            reason = f"ranks disagree on the gradient norm of step {progress.step}: from {-lowest} to {highest}"
            raise TrainingFailed(f"{reason}; their weights are no longer one model: continue from a checkpoint before it, on other devices")
        self.outcome.train_loss = loss
        mfu = None
        if self.peak is not None:
            self.outcome.mfu = self.flops_per_token * progress.input_tokens / (self.peak * 1e12 * progress.device_seconds)
            mfu = self.flops_per_token * inputs / (self.peak * 1e12 * seconds * self.world.size)
        self.metrics.write(
            {
                "step": progress.step,
                "epoch": self.loader.epoch(progress.step),
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": progress.tokens,
                "tokens_per_second": weight / seconds,
                "input_tokens_per_second": inputs / seconds,
                "step_seconds": seconds,
                "device_bytes_peak": int(device_peak) or None,
                "host_bytes_peak": int(host_peak),
                "mfu": mfu,
                "skipped": progress.skipped,
                "rows_hash": f"{zlib.crc32(row_ids.tobytes()):08x}",
            }
            | named
        )
        if self.world.rank == 0 and time.monotonic() - self.status_at > STATUS_EVERY_S:
            self.status_at = time.monotonic()
            self.attempt.set_status("running", step=progress.step, num_steps=self.loader.num_steps, **self.stragglers.entry())

    def _eval_due(self, step: int) -> bool:
        every = self.config.train.eval_every
        return self.data.eval is not None and (step in (0, self.loader.num_steps) or (every is not None and step % every == 0))

    def _evaluate(self, progress: Progress) -> None:
        assert self.data.eval is not None
        watch.enter(Phase.evaluating, progress.step)
        rows = self.config.train.eval_microbatch or self.config.train.microbatch
        batches = eval_batches(self.data.eval, rows, rank=self.world.rank, world_size=self.world.size, pad_id=self.loader.pad_id)
        result = evaluate(self.engine, self.objective, batches, self.world)
        if result is None:
            self.outcome.stopped = True
            return
        loss, weight = result
        self.outcome.eval_losses.append(loss)
        self.evaluated_at = progress.step
        self.metrics.write({"step": progress.step, "tokens": progress.tokens, "eval_loss": loss, "eval_tokens": weight})

    def _is_stalled(self) -> bool:
        train = self.config.train
        ends = stalled(self.outcome.eval_losses, train.patience, train.min_improvement)
        if ends:
            log.info("stopping early: %d evaluations brought no improvement", train.patience)
        return ends


def _taken_steps(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of the steps among metrics that updated the weights."""
    taken, skipped = [], 0
    for row in rows:
        if "loss" in row:
            if row["skipped"] == skipped and row["loss"] is not None and row["grad_norm"] is not None:
                taken.append((row["loss"], row["grad_norm"]))
            skipped = row["skipped"]
    return taken


def train(
    config: RunConfig, world: World, attempt: Attempt, engine: Engine, data: Prepared, loader: Loader, flops_per_token: float
) -> Outcome:
    """Train to the end, an early stop, or a signal; collective. Raises Superseded where a newer attempt has started."""
    return Training(config, world, attempt, engine, data, loader, flops_per_token).run()


def as_figures(outcome: Outcome, world: World) -> dict[str, Any]:
    """Return the figures of summary.json that the loop knows; collective."""
    progress, losses = outcome.progress, outcome.eval_losses
    device_peak, host_peak = world.max([float(device_bytes_peak() or 0), float(host_bytes_peak())])
    seconds = max(progress.seconds, 1e-9)
    figures = {
        "eval_loss_before": losses[0] if losses else None,
        "eval_loss_after": losses[-1] if losses else None,
        "train_loss": outcome.train_loss,
        "steps": progress.step,
        "rows": progress.rows,
        "tokens": progress.tokens,
        "input_tokens": progress.input_tokens,
        "tokens_per_second": progress.tokens / seconds,
        "input_tokens_per_second": progress.input_tokens / seconds,
        "mfu": outcome.mfu,
        "device_bytes_peak": int(device_peak) or None,
        "host_bytes_peak": int(host_peak),
        "skipped_steps": progress.skipped,
        "failed_saves": outcome.failed_saves,
        "train_seconds": progress.seconds,
        "gpu_hours": progress.device_seconds / 3600 if world.device.type == "cuda" else None,
        "world_size": world.size,
    }
    return finite(figures)
