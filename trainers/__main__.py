"""What every backend ends up calling on every rank: python -m trainers RUN_DIR/config.yaml."""

# ruff: noqa: E402

from __future__ import annotations

import gc

gc.disable()  # nothing that an import makes is garbage, and looking for it took a third of a rank's start

import contextlib
import hashlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from trainers.batch import IGNORE, Batch, forward
from trainers.checkpoint import NoCheckpoint
from trainers.config.checks import check_world, load
from trainers.config.derived import exports_best, peak_lr, rows_words, scarcity
from trainers.config.errors import ConfigError
from trainers.config.schema import PeftMethod, Precision, RunConfig
from trainers.config.secrets import mask
from trainers.data.ends import stop_ids
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared, prepare
from trainers.data.report import summary
from trainers.data.tokenizer import load_tokenizer, pad_id
from trainers.engines.base import Engine
from trainers.engines.build import build_engine, require_parts
from trainers.health import preflight
from trainers.health.activity import watch
from trainers.health.isolation import require_isolation
from trainers.health.spikes import TrainingFailed
from trainers.health.watchdog import watchdog
from trainers.loop import Outcome, as_figures, train
from trainers.model.blueprint import Blueprint, flops_per_token, make_blueprint, positions_limit
from trainers.model.export import check_export, export, rehearse_export, reopen, sample_answer
from trainers.peft.base import FILE, Adaptation, FullTraining
from trainers.peft.nf4 import round_base
from trainers.peft.saved import export_adapter, rehearse_adapter, reopen_adapter
from trainers.processes import exit_after, free_reserve, keep_reserve, never_fail
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.base import base_of, pinned, require_same_base
from trainers.rundir.beats import Phase
from trainers.rundir.checkpoints import steps
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import read_json, storage_says
from trainers.rundir.metrics import console, log_to, log_to_terminal
from trainers.world import Stopped, World

gc.enable()

log = logging.getLogger("fulltune")
T = TypeVar("T")
STARTED = time.monotonic()
COLLECTIVE_S, WATCHED_COLLECTIVE_S = 1800, 86_400
"""What torch lets a collective wait: with a watchdog, which ends hung runs and names the rank, longer than any work."""
REOPEN_BELOW = 2 << 30
"""Bytes of an export that rank 0 opens whole, as a user would."""
ENDING_S = 60
"""For the process group to end once all is done; some never do."""
EXPORT_TOLERANCE, EXPORT_TOLERANCE_16_BIT = 1e-3, 0.25
"""Nats a token between trainer and reopened export."""


def main(path: str) -> int:
    """Run one rank to its exit code: 0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint, 76 a newer attempt has started."""
    never_fail()
    keep_reserve()
    world = World.from_environment()
    log_to_terminal(world.rank)
    attempt = Attempt(Path(path).parent)
    try:
        world.say_stopped = lambda name: attempt.set_status(State.preempted, signal=name)
        world.watch_signals()
        config = load(path)
        check_world(config, world.size)
        if world.rank == 0 and "FULLTUNE_LAUNCHER" not in os.environ and not attempt.has_ended(State.failed, State.preempted):
            attempt.set_status(State.submitted)  # forget how an earlier attempt ended, as the launcher does
        watchdog.collectives, watchdog.flight_record, watchdog.is_asked = world.collectives, world.flight_record, world.is_asked
        watchdog.start(config, attempt, world.rank, world.size, partial(_fail, attempt, world, Exit.failed))
        return run(config, world, attempt)
    except Stopped as signal_name:
        log.info("%s before the first step: nothing to save", signal_name)
        if world.signalled is not None or not attempt.has_ended(State.preempted):
            attempt.set_status(State.preempted, signal=str(signal_name))
        return Exit.stopped
    except Superseded as error:
        log.error("rank %d: %s", world.rank, error)
        return Exit.superseded
    except ConfigError as error:
        return _fail(attempt, world, Exit.bad_input, {"message": str(error), "setting": error.parts()})
    except preflight.BadNode as error:
        return _fail(attempt, world, Exit.failed, error.parts())
    except TrainingFailed as error:
        return _fail(attempt, world, Exit.failed, {"message": str(error), "of_node": False})
    except NoCheckpoint as error:
        return _fail(attempt, world, Exit.failed, {"message": str(error)})
    except Exception as error:
        if isinstance(error, OSError) and (said := storage_says(error, attempt.run_dir)):
            return _fail(attempt, world, Exit.failed, {"message": said})
        return _fail(attempt, world, Exit.failed, {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


def _fail(attempt: Attempt, world: World, code: int, error: dict[str, Any]) -> int:
    """Keep the first failing rank's error in status.json, and return the exit code.

    Ranks that fail because of it come later and only write their log. A launcher that waits shows the error, and has
    cleared that of an earlier attempt. Whatever an older attempt fails of, and be it that what it staged is gone, it is superseded;
    and what fails once a rank has stopped, fails because it has.
    """
    at, error = time.time(), mask(error)
    free_reserve()
    world.interruptible = False  # the agent stops the other ranks as soon as one has ended
    first, stopped, unwritten = True, False, ""
    try:
        if not attempt.is_current(at_once=True):
            log.error("rank %d: a newer attempt of this run has started since, and this one ends: %s", world.rank, error["message"])
            return Exit.superseded
        first = attempt.record_failure({"rank": world.rank, "host": socket.gethostname(), "exit_code": code} | error, at)
        stopped = not first and attempt.has_ended(State.preempted)
    except Exception as other:  # a full disk, no memory, a file that is not JSON
        unwritten = f"\n(status.json could not be written: {other})"
    shown = unwritten or (first and "FULLTUNE_LAUNCHER" not in os.environ)
    log.log(logging.ERROR if shown else logging.DEBUG, "rank %d: %s%s", world.rank, error.get("traceback") or error["message"], unwritten)
    return Exit.stopped if stopped else code


def run(config: RunConfig, world: World, attempt: Attempt) -> int:
    """Prepare, connect, build, train, export."""
    run_dir = Path(config.run_dir)
    given, config = config, pinned(config, run_dir)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    require_parts(config, world)
    tokenizer = load_tokenizer(config)
    data = prepare(config, progress=world.rank == 0, tokenizer=tokenizer)
    blueprint = make_blueprint(config.model, config.seed, tokenizer)
    watch.enter(Phase.connecting)
    preflight.require_gpu(world)
    world.connect(COLLECTIVE_S if config.train.step_timeout_s is None else WATCHED_COLLECTIVE_S)
    if attempt.has_ended(State.failed):
        raise TrainingFailed("the others have given up waiting for this rank")
    world.require_agreement("config.yaml", hashlib.sha256((run_dir / paths.CONFIG).read_bytes()).hexdigest())
    world.require_agreement("the prepared data", data.path.name)
    _check_positions(config, data, blueprint)
    base = world.from_first(base_of(given, blueprint.folder, blueprint.revision) if world.rank == 0 else {})
    _require_same_sources(run_dir, data, base)
    attempt.begin(world.from_first(attempt.claim() if world.rank == 0 else 0))
    watch.enter(Phase.checking)
    readings, findings = preflight.check(world, attempt.folder, data.path, config.limits.slow_node)
    log_to(attempt.folder, world.rank, world.size)
    watchdog.log_to(attempt.folder)
    if world.rank == 0:
        preflight.say(readings, findings)
        console.print(summary(data.report, data.reused), soft_wrap=True, highlight=False)
        documents = len(data.train.offsets) - 1
        if scarce := scarcity(config.train, config.data.packing, len(data.train), documents, world.size):
            log.warning(scarce)
        _note_sources(attempt, data, base)
        attempt.set_status(State.running, attempt=attempt.number)
    watch.enter(Phase.loading)
    rehearsal = partial(rehearse, world, attempt, blueprint, tokenizer)
    with contextlib.closing(build_engine(config, world, blueprint, rehearsal)) as engine:
        return train_and_export(config, world, attempt, engine, data, blueprint, tokenizer)


def rehearse(world: World, attempt: Attempt, blueprint: Blueprint, tokenizer: PreTrainedTokenizerFast, adaptation: Adaptation) -> None:
    """Let rank 0 try the end of the run before weights are read; raises its ConfigError on every rank. Collective."""
    fault: dict[str, str] | None = None
    if world.rank == 0:
        try:
            if isinstance(adaptation, FullTraining):
                rehearse_export(adaptation.form, blueprint, tokenizer, stop_ids(tokenizer), attempt.run_dir / paths.EXPORT)
            else:
                rehearse_adapter(adaptation, blueprint, tokenizer, attempt.run_dir / paths.EXPORT)
        except ConfigError as error:
            fault = error.parts()
    if (found := world.from_first(fault)) is not None:
        raise ConfigError(**found)


def train_and_export(
    config: RunConfig,
    world: World,
    attempt: Attempt,
    engine: Engine,
    data: Prepared,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerFast,
) -> int:
    """Train with a built engine to the end, or to a stop that was asked for, and return the exit code; collective."""
    report = engine.report()
    if world.rank == 0:
        console.print(_as_table("the model on each rank", report))
        peak, rows = peak_lr(config.optim, config.peft), rows_words(config.train, world.size)
        console.print(_as_table("a step", {"peak learning rate": peak, "rows": rows}))
        step = "the checkpoint of the lowest held-out loss" if exports_best(config) else "the last step"
        console.print(_as_table("the export", {"step": step}))
    if config.data.packing:
        engine.train(False)
        vocab_size = blueprint.config.get_text_config().vocab_size
        rounds = config.train.precision is not Precision.fp32 and any(".experts" in name for name in engine.shapes())
        require_isolation(lambda batch: engine.forward(batch.to(world.device)).logps, vocab_size, config.train.microbatch, rounds)
        engine.train(True)
    loader = Loader(data.train, config.train, seed=config.seed, rank=world.rank, world_size=world.size, pad_id=pad_id(tokenizer))
    world.begin_steps()
    adaptation = engine.adaptation
    shapes = {name: shape for name, shape in engine.shapes().items() if name not in adaptation.unreached}
    flops = flops_per_token(shapes, blueprint.config, data.train.mean_attended(), shapes.keys() - adaptation.trained)
    outcome = train(config, world, attempt, engine, data, loader, flops)
    engine.report()
    stopped = outcome.stopped
    if not stopped:
        watch.enter(Phase.exporting)
        try:
            finish(config, world, attempt, engine, data, blueprint, tokenizer, outcome)
        except Stopped:
            attempt.set_status(State.preempted, step=outcome.saved_step)
            stopped = True
    world.barrier()  # rank 0 may still be waiting for a mirror: all end together
    if stopped:
        log.info("stopped after step %d; the checkpoint of step %d continues", outcome.progress.step, outcome.saved_step)
    watchdog.stop()
    code = Exit.stopped if stopped else Exit.done
    exit_after(ENDING_S, code)
    world.disconnect()
    return code


def _check_positions(config: RunConfig, data: Prepared, blueprint: Blueprint) -> None:
    """Refuse documents longer than a model's learned positions; rotary positions continue, with a warning."""
    limit, learned = positions_limit(blueprint.config)
    longest = max(int(np.diff(table.offsets).max()) for table in (data.train, data.eval) if table is not None)
    if limit is None or longest <= limit:
        return
    reason = f"documents have up to {longest} tokens, the model was made for {limit} positions"
    if learned:
        raise ConfigError("data.seq_len", config.data.seq_len, reason, f"data.seq_len={limit}")
    log.warning("data.seq_len = %d: %s; it has not learned later positions: data.seq_len=%d", config.data.seq_len, reason, limit)


def _require_same_sources(run_dir: Path, data: Prepared, base: dict[str, Any]) -> None:
    """Refuse to continue a run on other data or another base than it began with: files can change under the same name."""
    if not steps(run_dir / paths.CHECKPOINTS):
        return
    begun = read_json(run_dir / paths.MANIFEST).get("prepared")
    if begun is not None and begun != data.path.name:
        reason = f"the data has changed since this run began (prepared as {begun}, now {data.path.name})"
        raise ConfigError("run_dir", str(run_dir), reason, f"put the data back, or run_dir={run_dir}-new, which begins again")
    require_same_base(run_dir, base)


def _note_sources(attempt: Attempt, data: Prepared, base: dict[str, Any]) -> None:
    """Add to manifest.json what only preparation knows: fingerprints of data, tokenizer, template and base, and the base's commit."""
    manifest = read_json(attempt.run_dir / paths.MANIFEST)
    manifest |= {"data": data.report, "base_revision": base["commit"], "base": base, "prepared": data.path.name}
    attempt.write_json(attempt.run_dir / paths.MANIFEST, manifest)


def finish(
    config: RunConfig,
    world: World,
    attempt: Attempt,
    engine: Engine,
    data: Prepared,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerFast,
    outcome: Outcome,
) -> None:
    """Export, reopen and check the export, write summary.json; only then is the run done. Collective.

    Raises Stopped on every rank where one is asked to stop while the export is written or read again.
    """
    run_dir = Path(config.run_dir)
    folder = run_dir / paths.EXPORT
    adaptation, first, mark = engine.adaptation, world.rank == 0, f".attempt-{attempt.number}"
    is_adapter = adaptation.library_config is not None
    weights = while_current(engine.weights(), world, attempt)
    if is_adapter:
        sums = export_adapter(weights, adaptation, tokenizer, folder, first, mark)
    else:
        assert isinstance(adaptation, FullTraining)
        sums = export(weights, adaptation.form, blueprint, tokenizer, stop_ids(tokenizer), folder, first, mark=mark)
    wanted = while_current(adaptation.contents().items(), world, attempt)
    check_export(folder, wanted, sums, read=first, file=FILE if is_adapter else "model.safetensors")
    probe = make_batch(data.train, np.zeros(1, np.int64), 1, pad_id(tokenizer))
    engine.train(False)
    with torch.no_grad():
        logps = engine.forward(probe.to(world.device)).logps.cpu()
    figures, shapes, state = as_figures(outcome, world), engine.shapes(), engine.state_bytes()
    state_bytes = dict(zip(state, map(int, world.sum(list(map(float, state.values())))), strict=True))
    if world.rank == 0:
        sample = _try_export(config, folder, blueprint, tokenizer, probe, logps, data, adaptation)
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        unreached = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name in adaptation.unreached)
        trained = sum(torch.Size(shapes[name]).numel() for name in adaptation.trained)
        figures |= {
            "wall_seconds": time.monotonic() - STARTED,
            "parameters": parameters,
            "trainable_parameters": trained if config.peft.method is not PeftMethod.none else parameters - unreached,
            "state_bytes": state_bytes,
            "export": str(folder),
            "sample": sample,
        }
        if not attempt.write_json(run_dir / paths.SUMMARY, figures):
            attempt.require_current()
        attempt.set_status(State.done, step=outcome.progress.step)


def while_current(items: Iterable[T], world: World, attempt: Attempt) -> Iterator[T]:
    """Yield items until a rank is asked to stop, on all ranks alike; the end needs that no newer attempt has started."""
    for item in items:
        if world.any(world.signalled is not None)[0]:
            raise Stopped("a signal while exporting")
        watch.beat()
        yield item
    attempt.require_current()


def _try_export(
    config: RunConfig,
    folder: Path,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerFast,
    probe: Batch,
    logps: torch.Tensor,
    data: Prepared,
    adaptation: Adaptation,
) -> dict[str, str] | None:
    """Open the export as a user would, compare it with the trainer on one row, let it answer; not where it is too large for that.

    The weights have been compared byte for byte: this is about config and code, so that rounding to 16 bits may show.
    """
    is_adapter = adaptation.library_config is not None
    base = blueprint.folder if is_adapter else None
    files = [path for place in (folder, base) if place is not None for path in place.glob("*.safetensors")]
    if sum(path.stat().st_size for path in files) > REOPEN_BELOW:
        return None
    if is_adapter:
        plain = reopen(base, config.model.trust_remote_code, blueprint.config) if base else blueprint.build("cpu")
        model = reopen_adapter(folder, round_base(plain, adaptation))
    else:
        model = reopen(folder, config.model.trust_remote_code)
    with torch.no_grad():
        labelled = (forward(model, probe).logps.float() - logps)[probe.labels != IGNORE]
    difference = float(labelled.abs().mean())
    exact = config.train.precision is Precision.fp32 and blueprint.saved_dtype is torch.float32
    if not difference <= (EXPORT_TOLERANCE if exact else EXPORT_TOLERANCE_16_BIT):
        raise RuntimeError(f"the export in {folder} is {difference:.2g} nats a token away from the trained model")
    log.info(
        "export reopened with plain %s: %.1e nats a token from the trained model", "peft" if is_adapter else "transformers", difference
    )
    return _try_sample(config, model, tokenizer, data)


def _try_sample(config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerFast, data: Prepared) -> dict[str, str] | None:
    """Return an answer to the first held-out prompt; a model that does not answer is warned of, and does not fail its run."""
    if not config.train.sample_tokens:
        return None
    try:
        return sample_answer(model, tokenizer, (data.eval or data.train).prompt(0).tolist(), config.train.sample_tokens)
    except Exception as error:  # whatever transformers' generate, or code that comes with a model, raises
        log.warning("no sample answer: %s: %s", type(error).__name__, " ".join(str(error).split()))
        return None


def _as_table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"{__doc__}\n\nThe launcher writes that file and starts this: python -m launcher --help", file=sys.stderr)
        sys.exit(Exit.bad_input)
    code: int = Exit.failed
    gc.freeze()  # a collection in a step need not look at what was imported either
    try:
        code = main(sys.argv[1])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # saying why it failed has failed: no memory, a closed pipe
        traceback.print_exc()
    finally:
        os._exit(code)  # a mirror that hangs or a half-dead process group must not hold the exit
