"""The only loop: rows in, steps taken, metrics out."""

from __future__ import annotations

import logging
import math
import time
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
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
from trainers.health.spikes import Guard, Limits, Spike, TrainingFailed
from trainers.health.stragglers import Stragglers
from trainers.objectives import Objective, make_objective
from trainers.optim import require_warmup_ends
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.beats import Phase
from trainers.rundir.ending import State
from trainers.rundir.metrics import Metrics, device_bytes_peak, host_bytes_peak, peak_tflops
from trainers.rundir.rows import Kind, finite, history
from trainers.step import StepResult, take_step
from trainers.world import World, seed_step

if TYPE_CHECKING:
    from trainers.checkpoint import Saved
    from trainers.profiling import Profile
    from trainers.rl.critic import Critic

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
    """The objective's held-out losses, the one before the first step first."""
    train_loss: float | None = None
    mfu: float | None = None
    loss_scale: float | None = None
    """Of the last step of this attempt, in float16."""


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


@dataclass(kw_only=True)
class Run:
    """What all steps of a run share."""

    config: RunConfig
    world: World
    attempt: Attempt
    engine: Engine
    rows: Rows
    objective: Objective
    sources: list[str]
    """Of a mixture, whose losses are reported too; empty where there are none."""
    held_out: HeldOut
    guard: Guard
    stragglers: Stragglers
    checkpointer: Checkpointer
    metrics: Metrics
    peak_lr: float
    flops_per_token: float
    peak_tflops: float | None
    """Of one device, in the type that it computes in; None where it is not known."""
    critic: Critic | None
    """What is trained next to the model, and kept in its checkpoints."""
    status_at: float = 0.0
    """When rank 0 last wrote status.json, by time.monotonic."""


@dataclass(frozen=True)
class Step:
    """One step as it was computed, before anything is decided of it."""

    result: StepResult
    reports: Reports
    lr: float
    limits: Limits
    targets: float
    sizes: Sizes
    row_ids: Ints
    seconds: float
    data_seconds: float
    """Of these, until the rows were there."""
    loss_scale: float | None
    """What the loss was multiplied by, in float16."""

    @property
    def overflowed(self) -> bool:
        """Whether float16 overflowed in backward alone, so that half the loss scale may do; then nothing was updated.

        A loss that is not finite, or gradients that are not at a scale of 1 or less, come of weights or rows, or of the type's range.
        """
        return (self.loss_scale or 0.0) > 1 and math.isfinite(self.result.loss) and not math.isfinite(self.result.grad_norm)


def train(
    config: RunConfig,
    world: World,
    attempt: Attempt,
    engine: Engine,
    data: Prepared,
    rows: Rows,
    flops_per_token: float,
    checkpointer: Checkpointer | None = None,
    held_out: HeldOut | None = None,
    critic: Critic | None = None,
) -> Outcome:
    """Continue from the newest checkpoint to the last step, an early stop, or a signal; collective.

    Raises Superseded where a newer attempt has started, TrainingFailed where the run cannot continue.
    """
    require_warmup_ends(config.optim, rows.num_steps)
    if engine.adaptation.update is not None:
        engine.adaptation.update.at(0, rows.num_steps)
    run = Run(
        config=config,
        world=world,
        attempt=attempt,
        engine=engine,
        rows=rows,
        objective=make_objective(config.objective, rows.signals | data.train.signals.keys(), config.train.balance_loss),
        sources=list(data.train.sources),
        held_out=held_out or HeldOut(data.eval, config.train, rows.num_steps, world, rows.pad_id),
        guard=Guard(config.train),
        stragglers=Stragglers(world, engine.mesh, config.limits.slow_node),
        checkpointer=checkpointer or Checkpointer(replace(config.checkpoint, keep_best=best_kept(config)), attempt, world),
        metrics=Metrics(config, attempt, world.rank, rows.num_steps),
        peak_lr=peak_lr(config.optim, config.peft).value,
        flops_per_token=flops_per_token,
        peak_tflops=peak_tflops(config),
        critic=critic,
    )
    outcome = Outcome(progress=run.checkpointer.restore(_saved(run)))
    with run.metrics, Prefetch(rows, world.device) as prefetch:
        _begin(run, outcome)
        profile = None if config.train.profile is None else _begin_profile(config.train.profile, attempt, world)
        while not outcome.stopped and outcome.progress.step < rows.num_steps and not run.held_out.is_stalled():
            if outcome.progress.step >= rows.made_until and not rows.make(outcome.progress.step, outcome.progress.ahead):
                outcome.stopped = True
                break
            step = _compute(run, prefetch, outcome.progress)
            try:
                found = step.result.loss, step.result.grad_norm, step.targets, step.limits
                taken = not step.overflowed and run.guard.check(outcome.progress.step + 1, *found)
            except Spike as spike:
                outcome.progress = _left_out(run, outcome.progress, spike)
                outcome.stopped = not rows.make(outcome.progress.step, outcome.progress.ahead)
                continue
            outcome.progress = _advanced(outcome.progress, step, taken, world.size)
            if taken and outcome.progress.updates == 1:
                require_moved(engine, world)
            _record(run, outcome, step)
            if profile is not None:
                profile.after_step(step.data_seconds)
            _evaluate_and_save(run, outcome, step.reports)
        if profile is not None:
            profile.close()
        _end(run, outcome)
    return outcome


def _begin(run: Run, outcome: Outcome) -> None:
    """Take over what metrics.jsonl says of the steps before, and evaluate where that is due."""
    progress = outcome.progress
    past = run.world.from_first(history(run.metrics.start(progress.step)))
    run.held_out.losses, outcome.train_loss = past.eval_losses, past.train_loss
    run.guard.recall(past.taken)
    if run.held_out.is_due(progress.step) and past.evaluated_at < progress.step:
        outcome.stopped = not _evaluate(run, progress)


def _compute(run: Run, prefetch: Prefetch, progress: Progress) -> Step:
    """Take the step after `progress`; raises Superseded where a newer attempt has started."""
    engine, objective, world = run.engine, run.objective, run.world
    scale = None if engine.scale is None else engine.scale.factor
    watch.enter(Phase.step, progress.step + 1)
    started = time.perf_counter()
    run.stragglers.probe(progress.step)
    began = time.perf_counter()
    seed_step(run.config.seed, progress.step, world.rank // engine.mesh.tensor)
    dealt = prefetch.take(progress.step, progress.ahead)
    data_seconds = time.perf_counter() - began
    targets, limits = objective.targets(dealt.sizes), run.guard.limits()
    lr, report = learning_rate(run.config.optim, run.peak_lr, progress.step, run.rows.num_steps), partial(_report, run)
    if engine.adaptation.update is not None:
        engine.adaptation.update.at(progress.step, run.rows.num_steps)
    if run.sources:
        objective = _by_source(objective, run.sources)
    result = take_step(engine, objective, dealt.batches, world, lr=lr, targets=targets, limits=limits, report=report, first=dealt.first)
    if run.critic is not None and math.isfinite(result.grad_norm) and not limits.exceeded(result.loss, result.grad_norm):
        more = run.critic.step(dealt.batches, world, progress.step, run.rows.num_steps, dealt.sizes.labels)
        result = replace(result, figures=result.figures | more)
    reports, seconds = _read_reports(result, run.guard), time.perf_counter() - started + run.rows.made.seconds
    if reports.superseded:
        raise Superseded(f"a newer attempt of this run has started; attempt {run.attempt.number} writes nothing any more")
    return Step(result, reports, lr, limits, targets, dealt.sizes, dealt.row_ids, seconds, data_seconds, scale)


def _record(run: Run, outcome: Outcome, step: Step) -> None:
    """Write a step's row of metrics.jsonl and, now and then, status.json."""
    progress = outcome.progress
    outcome.train_loss, outcome.loss_scale = step.result.loss, step.loss_scale
    if step.overflowed:
        log.info("step %d is not taken: its gradients overflow float16 at a loss scale of %.10g", progress.step, step.loss_scale)
    row = _row(progress, step, run.rows.epoch(progress.step)) | run.rows.made.more
    row |= {f"epoch/{name}": passes for name, passes in run.rows.passes(progress.step).items()}
    if run.peak_tflops is not None:
        peak = run.peak_tflops * 1e12
        outcome.mfu = run.flops_per_token * progress.input_tokens / (peak * progress.device_seconds)
        row["mfu"] = run.flops_per_token * step.sizes.tokens / (peak * step.seconds * run.world.size)
    row |= run.stragglers.gather(progress.step, step.data_seconds, step.seconds)
    run.metrics.write(Kind.step, row, step.result.figures | run.rows.made.figures)
    if run.world.rank == 0 and time.monotonic() - run.status_at > STATUS_EVERY_S:
        run.status_at = time.monotonic()
        run.attempt.set_status(State.running, step=progress.step, num_steps=run.rows.num_steps, **run.stragglers.entry())


def _evaluate_and_save(run: Run, outcome: Outcome, reports: Reports) -> None:
    """Do what is due after a step; a run that is to stop evaluates as it continues."""
    step, held_out, checkpointer = outcome.progress.step, run.held_out, run.checkpointer
    outcome.stopped = reports.stop
    if not outcome.stopped and held_out.is_due(step):
        outcome.stopped = not _evaluate(run, outcome.progress)
    if not reports.writing:
        checkpointer.finish()
    is_best = held_out.at == step and checkpointer.is_best(held_out.losses)
    if not outcome.stopped and (reports.save or is_best or checkpointer.due(step)):
        _save(run, outcome.progress)


def _end(run: Run, outcome: Outcome) -> None:
    """Save, and give the engine the weights that are exported; whatever the export meets, the training is kept."""
    progress, checkpointer = outcome.progress, run.checkpointer
    if run.held_out.is_stalled():
        log.info("stopping early: %d evaluations brought no improvement", run.config.train.patience)
    _save(run, progress, wait=True)
    outcome.saved_step, outcome.failed_saves = checkpointer.saved_step, checkpointer.all_failures
    if not outcome.stopped and exports_best(run.config):
        watch.enter(Phase.loading)
        outcome.best = checkpointer.restore_best(_saved(run), progress.step)
        _say_best(outcome.best, progress.step, run.held_out.losses)
    if outcome.stopped and run.world.rank == 0:  # before anything slow, such as a mirror that does not answer, delays it
        run.attempt.set_status(State.preempted, step=outcome.saved_step)
    outcome.eval_losses = run.held_out.losses


def _evaluate(run: Run, progress: Progress) -> bool:
    """Measure and record the held-out loss; tell whether that came to its end."""
    watch.enter(Phase.evaluating, progress.step)
    found = run.held_out.measure(run.engine, run.objective, progress.step)
    if found is not None:
        row = {"step": progress.step, "tokens": progress.tokens, "eval_loss": found.loss, "eval_tokens": run.held_out.sizes.labels}
        run.metrics.write(Kind.evaluation, row, found.figures)
    return found is not None


def _save(run: Run, progress: Progress, wait: bool = False) -> None:
    watch.enter(Phase.saving, progress.step)
    run.guard.require_agreement(run.world.max(run.guard.norms()))
    run.checkpointer.save(_saved(run), progress, run.held_out.loss_at(progress.step), wait)


def _saved(run: Run) -> Saved:
    """Return what a checkpoint holds."""
    return run.engine if run.critic is None else run.critic.next_to(run.engine)


def _report(run: Run) -> list[float]:
    """Return what this rank reports with a step's loss: `_read_reports` reads the largest of each."""
    stop, save_now = run.checkpointer.requests()
    late = run.world.rank == 0 and not run.attempt.is_current()
    claims = (stop or run.world.signalled is not None, save_now, run.checkpointer.is_writing(), late)
    return [*map(float, claims), float(device_bytes_peak() or 0), float(host_bytes_peak()), *run.guard.norms()]


def _begin_profile(steps: int, attempt: Attempt, world: World) -> Profile | None:
    """Return what traces rank 0's steps; None on the other ranks."""
    from trainers.profiling import Profile

    return Profile(steps, attempt, world.device) if world.rank == 0 else None


def _by_source(objective: Objective, names: list[str]) -> Objective:
    from trainers.objectives.by_source import BySource

    return BySource(objective, names)


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


def _advanced(progress: Progress, step: Step, taken: bool, num_ranks: int) -> Progress:
    """Return how far the run is after a step."""
    sizes, seconds, skipped = step.sizes, step.seconds, not taken and not step.overflowed
    more: dict[str, Any] = {"step": 1, "rows": sizes.rows, "tokens": sizes.labels, "input_tokens": sizes.tokens, "seconds": seconds}
    more |= {"device_seconds": seconds * num_ranks, "skipped": skipped, "overflows": step.overflowed}
    return replace(progress, **{name: getattr(progress, name) + value for name, value in more.items()})


def _row(progress: Progress, step: Step, epoch: float) -> dict[str, Any]:
    """Return what metrics.jsonl says of a step, without the objective's own numbers."""
    return {
        "step": progress.step,
        "epoch": epoch,
        "loss": step.result.loss,
        "lr": step.lr,
        "grad_norm": step.result.grad_norm,
        "tokens": progress.tokens,
        "tokens_per_second": step.sizes.labels / step.seconds,
        "input_tokens_per_second": step.sizes.tokens / step.seconds,
        "step_seconds": step.seconds,
        "device_bytes_peak": step.reports.device_bytes or None,
        "host_bytes_peak": step.reports.host_bytes,
        "mfu": None,
        "skipped": progress.skipped,
        "rows_hash": f"{zlib.crc32(step.row_ids.tobytes()):08x}",
        **({} if step.loss_scale is None else {"loss_scale": step.loss_scale, "overflows": progress.overflows}),
    }


def _left_out(run: Run, progress: Progress, spike: Spike) -> Progress:
    """Stop before a step that is out of the ordinary, or return to the last checkpoint with the rows since it left out.

    Raises TrainingFailed where `train.on_spike` says stop, or where going back does not help.
    """
    if run.config.train.on_spike is OnSpike.stop:
        _save(run, progress, wait=True)
        remedy = "look at its rows with python -m tools.show_batch"
        raise TrainingFailed(f"step {progress.step + 1} was not taken: {spike}; {remedy}") from spike
    watch.enter(Phase.loading)
    run.checkpointer.finish()
    run.guard.count_rollback(run.checkpointer.saved_step, spike)
    back = run.checkpointer.restore(_saved(run))
    ahead = progress.ahead + progress.step + 1 - back.step
    log.warning("step %d: %s; back to step %d, and past the rows of %d steps", progress.step + 1, spike, back.step, ahead - back.ahead)
    past = run.world.from_first(history(run.metrics.cut(back.step)))
    run.held_out.losses, run.held_out.at = past.eval_losses, -1
    run.guard.recall(past.taken)
    row = {"step": back.step, "rollback_from": progress.step + 1, "rows_left_out_steps": ahead - back.ahead}
    run.metrics.write(Kind.rollback, row)
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
        **({} if outcome.loss_scale is None else {"overflow_steps": progress.overflows, "loss_scale": outcome.loss_scale}),
        "failed_saves": outcome.failed_saves,
        "train_seconds": progress.seconds,
        "gpu_hours": progress.device_seconds / 3600 if world.device.type == "cuda" else None,
        "world_size": world.size,
    }
    return finite(figures)
