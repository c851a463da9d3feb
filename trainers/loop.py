"""The only loop: rows in, steps taken, metrics out."""

from __future__ import annotations

import logging
import time
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trainers.batch import Sizes
from trainers.checkpoint import Checkpointer, Progress
from trainers.config.choices import OnSpike
from trainers.config.derived import best_kept, exports_best, learning_rate, peak_lr
from trainers.config.schema import RunConfig
from trainers.data.loader import Ints, Prefetch, Rows
from trainers.data.prepare import Prepared
from trainers.engines.base import Engine, require_moved
from trainers.evaluation import HeldOut
from trainers.health.activity import watch
from trainers.health.spikes import Guard, Spike, TrainingFailed
from trainers.health.stragglers import Stragglers
from trainers.objectives import make_objective
from trainers.optim import require_warmup_ends
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.beats import Phase
from trainers.rundir.ending import State
from trainers.rundir.metrics import Metrics, device_bytes_peak, host_bytes_peak, peak_tflops
from trainers.rundir.rows import Kind, finite, history
from trainers.step import StepResult, take_step
from trainers.world import World, seed_step

if TYPE_CHECKING:
    from trainers.profiling import Profile

log = logging.getLogger("fulltune")
STATUS_EVERY_S = 5.0


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
    best: tuple[int, float] | None = None
    """Step and held-out loss of the checkpoint that the engine holds at the end; None where it holds the last step."""
    eval_losses: list[float] = field(default_factory=list)
    """Held-out losses in nats a token, the one before the first step first."""
    train_loss: float | None = None
    mfu: float | None = None


@dataclass(frozen=True)
class Reports:
    """What the ranks reported together with a step's loss: requests of any of them, and the largest memory peaks."""

    stop: bool
    save: bool
    writing: bool
    """A checkpoint is being written on some rank."""
    superseded: bool
    device_bytes: int
    host_bytes: int


def train(
    config: RunConfig,
    world: World,
    attempt: Attempt,
    engine: Engine,
    data: Prepared,
    rows: Rows,
    flops_per_token: float,
    checkpointer: Checkpointer | None = None,
) -> Outcome:
    """Continue from the newest checkpoint to the last step, an early stop, or a signal; collective.

    Raises Superseded where a newer attempt has started, TrainingFailed where the run cannot continue.
    """
    num_steps, peak = rows.num_steps, peak_lr(config.optim, config.peft).value
    tflops = peak_tflops(config)
    require_warmup_ends(config.optim, num_steps)
    update = engine.adaptation.update
    if update is not None:
        update.at(0, num_steps)
    objective = make_objective(config.objective, data.train.signals, config.train.balance_loss)
    held_out = HeldOut(data.eval, config.train, num_steps, world, rows.pad_id)
    guard, stragglers = Guard(config.train), Stragglers(world, config.limits.slow_node)
    checkpointer = checkpointer or Checkpointer(replace(config.checkpoint, keep_best=best_kept(config)), attempt, world)
    outcome, status_at = Outcome(progress=checkpointer.restore(engine)), 0.0

    def evaluate(step: int, tokens: int) -> bool:
        watch.enter(Phase.evaluating, step)
        found = held_out.measure(engine, objective, step)
        if found is not None:
            row = {"step": step, "tokens": tokens, "eval_loss": found.loss, "eval_tokens": held_out.sizes.labels}
            metrics.write(Kind.evaluation, row, found.figures)
        return found is not None

    def save(progress: Progress, wait: bool = False) -> None:
        watch.enter(Phase.saving, progress.step)
        guard.require_agreement(world.max(guard.norms()))
        checkpointer.save(engine, progress, held_out.loss_at(progress.step), wait)

    def report() -> list[float]:
        stop, save_now = checkpointer.requests()
        late = world.rank == 0 and not attempt.is_current()
        claims = (stop or world.signalled is not None, save_now, checkpointer.is_writing(), late)
        return [*map(float, claims), float(device_bytes_peak() or 0), float(host_bytes_peak()), *guard.norms()]

    with Metrics(config, attempt, world.rank, num_steps) as metrics, Prefetch(rows, world.device) as prefetch:
        progress = outcome.progress
        past = world.from_first(history(metrics.start(progress.step)))
        held_out.losses, outcome.train_loss = past.eval_losses, past.train_loss
        guard.recall(past.taken)
        if held_out.is_due(progress.step) and past.evaluated_at < progress.step:
            outcome.stopped = not evaluate(progress.step, progress.tokens)
        profile = None if config.train.profile is None else _begin_profile(config.train.profile, attempt, world)
        while not outcome.stopped and progress.step < num_steps and not held_out.is_stalled():
            watch.enter(Phase.step, progress.step + 1)
            started = time.perf_counter()
            stragglers.probe(progress.step)
            began = time.perf_counter()
            seed_step(config.seed, progress.step, world.rank)
            dealt = prefetch.take(progress.step, progress.ahead)
            sizes, data_seconds = dealt.sizes, time.perf_counter() - began
            targets, limits = objective.targets(sizes), guard.limits()
            lr = learning_rate(config.optim, peak, progress.step, num_steps)
            if update is not None:
                update.at(progress.step, num_steps)
            result = take_step(
                engine, objective, dealt.batches, world, lr=lr, targets=targets, limits=limits, report=report, first=dealt.first
            )
            seconds = time.perf_counter() - started
            reports = _read_reports(result, guard)
            if reports.superseded:
                raise Superseded(f"a newer attempt of this run has started; attempt {attempt.number} writes nothing any more")
            try:
                taken = guard.check(progress.step + 1, result.loss, result.grad_norm, targets, limits)
            except Spike as spike:
                if config.train.on_spike is OnSpike.stop:
                    save(progress, wait=True)
                    remedy = "look at its rows with python -m tools.show_batch"
                    raise TrainingFailed(f"step {progress.step + 1} was not taken: {spike}; {remedy}") from spike
                progress = _go_back(progress, spike, engine, world, checkpointer, guard, held_out, metrics)
                continue
            progress = _advanced(progress, sizes, taken, seconds, world.size)
            if taken and progress.step - progress.skipped == 1:
                require_moved(engine, world)
            outcome.train_loss = result.loss
            row = _row(progress, result, lr, sizes, seconds, reports, rows.epoch(progress.step), dealt.row_ids)
            if tflops is not None:
                outcome.mfu = flops_per_token * progress.input_tokens / (tflops * 1e12 * progress.device_seconds)
                row["mfu"] = flops_per_token * sizes.tokens / (tflops * 1e12 * seconds * world.size)
            metrics.write(Kind.step, row | stragglers.gather(progress.step, data_seconds, seconds), result.figures)
            if profile is not None:
                profile.after_step(data_seconds)
            if world.rank == 0 and time.monotonic() - status_at > STATUS_EVERY_S:
                status_at = time.monotonic()
                attempt.set_status(State.running, step=progress.step, num_steps=num_steps, **stragglers.entry())
            outcome.stopped = reports.stop  # what is due is evaluated as the run continues
            if not outcome.stopped and held_out.is_due(progress.step):
                outcome.stopped = not evaluate(progress.step, progress.tokens)
            if not reports.writing:
                checkpointer.finish()
            is_best = held_out.at == progress.step and checkpointer.is_best(held_out.losses)
            if not outcome.stopped and (reports.save or is_best or checkpointer.due(progress.step)):
                save(progress)
        if profile is not None:
            profile.close()
        if held_out.is_stalled():
            log.info("stopping early: %d evaluations brought no improvement", config.train.patience)
        save(progress, wait=True)  # whatever the export meets, the training is kept
        outcome.saved_step, outcome.failed_saves = checkpointer.saved_step, checkpointer.all_failures
        if not outcome.stopped and exports_best(config):
            watch.enter(Phase.loading)
            outcome.best = checkpointer.restore_best(engine, progress.step)
            _say_best(outcome.best, progress.step, held_out.losses)
        if outcome.stopped and world.rank == 0:  # before anything slow, such as a mirror that does not answer, delays it
            attempt.set_status(State.preempted, step=outcome.saved_step)
    outcome.progress, outcome.eval_losses = progress, held_out.losses
    return outcome


def _begin_profile(steps: int, attempt: Attempt, world: World) -> Profile | None:
    """Return what traces rank 0's steps; None on the other ranks."""
    from trainers.profiling import Profile

    return Profile(steps, attempt, world.device) if world.rank == 0 else None


def _say_best(best: tuple[int, float] | None, last: int, losses: list[float]) -> None:
    """Say which step is exported, with its held-out loss, and warn where that does not improve on the start."""
    if best is None:
        log.warning("no checkpoint has a held-out loss: the last step, %d, is exported", last)
        return
    if best[0] != last:
        log.info("step %d is exported: its held-out loss is %.4f, and that of step %d %.4f", *best, last, losses[-1])
    if losses and best[1] >= losses[0]:
        log.warning("the held-out loss of step %d, %.4f, is not below %.4f, that before the first step", *best, losses[0])


def _read_reports(result: StepResult, guard: Guard) -> Reports:
    """Take what ranks reported with the loss; raises TrainingFailed where they disagree on the gradient norm of the step before."""
    stop, save, writing, late, device_bytes, host_bytes, *norms = result.reports
    guard.require_agreement(norms)
    return Reports(bool(stop), bool(save), bool(writing), bool(late), int(device_bytes), int(host_bytes))


def _advanced(progress: Progress, sizes: Sizes, taken: bool, seconds: float, num_ranks: int) -> Progress:
    """Return how far the run is after a step over rows of these sizes."""
    return Progress(
        ahead=progress.ahead,
        step=progress.step + 1,
        rows=progress.rows + sizes.rows,
        tokens=progress.tokens + sizes.labels,
        input_tokens=progress.input_tokens + sizes.tokens,
        skipped=progress.skipped + (not taken),
        seconds=progress.seconds + seconds,
        device_seconds=progress.device_seconds + seconds * num_ranks,
    )


def _row(
    progress: Progress, result: StepResult, lr: float, sizes: Sizes, seconds: float, reports: Reports, epoch: float, row_ids: Ints
) -> dict[str, Any]:
    """Return what metrics.jsonl says of a step, without the objective's own numbers."""
    return {
        "step": progress.step,
        "epoch": epoch,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": progress.tokens,
        "tokens_per_second": sizes.labels / seconds,
        "input_tokens_per_second": sizes.tokens / seconds,
        "step_seconds": seconds,
        "device_bytes_peak": reports.device_bytes or None,
        "host_bytes_peak": reports.host_bytes,
        "mfu": None,
        "skipped": progress.skipped,
        "rows_hash": f"{zlib.crc32(row_ids.tobytes()):08x}",
    }


def _go_back(
    progress: Progress,
    spike: Spike,
    engine: Engine,
    world: World,
    checkpointer: Checkpointer,
    guard: Guard,
    held_out: HeldOut,
    metrics: Metrics,
) -> Progress:
    """Return to the last checkpoint, with the rows since it left out."""
    watch.enter(Phase.loading)
    checkpointer.finish()
    guard.count_rollback(checkpointer.saved_step, spike)
    back = checkpointer.restore(engine)
    ahead = progress.ahead + progress.step + 1 - back.step
    log.warning("step %d: %s; back to step %d, and past the rows of %d steps", progress.step + 1, spike, back.step, ahead - back.ahead)
    past = world.from_first(history(metrics.cut(back.step)))
    held_out.losses, held_out.at = past.eval_losses, -1
    guard.recall(past.taken)
    row = {"step": back.step, "rollback_from": progress.step + 1, "rows_left_out_steps": ahead - back.ahead}
    metrics.write(Kind.rollback, row)
    return replace(back, ahead=ahead)


def as_figures(outcome: Outcome, world: World) -> dict[str, Any]:
    """Return the values of summary.json that the loop knows; collective."""
    progress, losses = outcome.progress, outcome.eval_losses
    device_peak, host_peak = world.max([float(device_bytes_peak() or 0), float(host_bytes_peak())])
    seconds = max(progress.seconds, 1e-9)
    figures = {
        "eval_loss_before": losses[0] if losses else None,
        "eval_loss_after": outcome.best[1] if outcome.best else losses[-1] if losses else None,
        "eval_loss_last": losses[-1] if losses else None,
        "export_step": outcome.best[0] if outcome.best else progress.step,
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
