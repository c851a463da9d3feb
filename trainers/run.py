"""One rank's run from its config to its exit code: prepare, connect, build, train."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from trainers.batch import Batch
from trainers.config.choices import Activations, MeshChoice, ObjectiveName, Precision
from trainers.config.derived import SAMPLED, SCORED, exports_best, peak_lr, rows_words, scarcity
from trainers.config.errors import ConfigError
from trainers.config.mesh import mesh_of
from trainers.config.schema import RunConfig
from trainers.data.ends import stop_ids
from trainers.data.loader import Loader, Rows, Stream
from trainers.data.prepare import Prepared, prepare
from trainers.data.report import summary, warnings
from trainers.data.tokenizer import load_tokenizer, pad_id
from trainers.engines.build import build_engine, require_parts
from trainers.finish import Built, finish
from trainers.health import preflight
from trainers.health.activity import watch
from trainers.health.isolation import require_isolation
from trainers.health.spikes import TrainingFailed
from trainers.health.watchdog import watchdog
from trainers.loop import train
from trainers.model.blueprint import Blueprint, flops_per_token, make_blueprint, positions_limit
from trainers.model.export import rehearse_export
from trainers.objectives import CHOICES, REFERENCE
from trainers.peft.base import Adaptation, FullTraining
from trainers.peft.saved import rehearse_adapter
from trainers.processes import exit_after
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.base import base_of, pinned, require_same_base
from trainers.rundir.beats import Phase
from trainers.rundir.checkpoints import steps
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import read_json
from trainers.rundir.metrics import console, log_to
from trainers.world import Stopped, World

if TYPE_CHECKING:
    from trainers.data.stream import Ahead
    from trainers.rl.critic import Outlined
    from trainers.rl.held_out import HeldOutPrompts

log = logging.getLogger("fulltune")
COLLECTIVE_S, WATCHED_COLLECTIVE_S = 1800, 86_400
"""What torch lets a collective wait: with a watchdog, which ends hung runs and names the rank, longer than any work."""
SAME_FILES = " (a stream's files must have the same names, sizes and times on every node: copy them with rsync -a or cp -a)"
ENDING_S = 60
"""For the process group to end once all is done; some never do."""


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
    data = (_prompts if config.objective.name in SAMPLED else prepare)(config, world.rank == 0, tokenizer)
    if config.objective.name is ObjectiveName.distil:
        from trainers.teacher import with_teacher

        data = with_teacher(config, data, verify=world.rank == 0)
    blueprint = make_blueprint(config.model, config.seed, tokenizer)
    if config.objective.name in SCORED:
        from trainers import scoring

        blueprint, data = scoring.headed(blueprint, data.report, tokenizer), scoring.weighted(config, data)
    critic = _critic(config, world, tokenizer) if config.objective.name is ObjectiveName.ppo else None
    watch.enter(Phase.connecting)
    preflight.require_gpu(world)
    world.connect(COLLECTIVE_S if config.train.step_timeout_s is None else WATCHED_COLLECTIVE_S)
    if attempt.has_ended(State.failed):
        raise TrainingFailed("the others have given up waiting for this rank")
    world.require_agreement("config.yaml", hashlib.sha256((run_dir / paths.CONFIG).read_bytes()).hexdigest())
    what = f"the prepared data{SAME_FILES if config.data.streaming else ''}"
    world.require_agreement(what, f"{data.path.name} {data.report.get('teacher', {}).get('key', '')}".strip())
    _check_positions(config, data, blueprint)
    base = world.from_first({} if world.rank else base_of(given, blueprint.folder, blueprint.revision) | (critic.base() if critic else {}))
    _require_same_sources(run_dir, data, base)
    attempt.begin(world.from_first(attempt.claim() if world.rank == 0 else 0))
    watch.enter(Phase.checking)
    readings, findings = preflight.check(world, mesh_of(config.engine, world.size), attempt.folder, data.path, config.limits.slow_node)
    log_to(attempt.folder, world.rank, world.size)
    watchdog.log_to(attempt.folder)
    if world.rank == 0:
        preflight.say(readings, findings)
        console.print(summary(data.report, data.reused), soft_wrap=True, highlight=False)
        for line in warnings(data.report):
            log.warning(line)
        groups = mesh_of(config.engine, world.size).data_size
        scarce = scarcity(config.train, config.data.packing, len(data.train), len(data.train.offsets) - 1, groups)
        if scarce and not config.data.streaming and config.objective.name not in SAMPLED:
            log.warning(scarce)
        _note_sources(attempt, data, base)
        attempt.set_status(State.running, attempt=attempt.number)
    if config.train.activations is Activations.auto:
        from trainers.settle import settled

        config = settled(config, world, attempt)
    if config.objective.reference is not None:
        from trainers.reference import with_other_reference

        data = with_other_reference(config, world, attempt, data, tokenizer)
    ahead = _ahead(config, data) if config.data.streaming and world.rank == 0 else None
    watch.enter(Phase.loading)
    with contextlib.closing(build_engine(config, world, blueprint, partial(rehearse, world, attempt, blueprint, tokenizer))) as engine:
        return train_and_export(Built(config, world, attempt, engine, data, blueprint, tokenizer, ahead, critic), base)


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


def train_and_export(built: Built, base: dict[str, Any]) -> int:
    """Train to the end, or to a stop that was asked for, and return the exit code; collective. `base` tells its weights from others."""
    config, world, attempt, engine, data = built.config, built.world, built.attempt, built.engine, built.data
    report = engine.report()
    if world.rank == 0:
        _say_what_is_trained(config, world, report)
    if config.data.packing:
        engine.train(False)
        rounds = config.train.precision is not Precision.fp32 and any(".experts" in name for name in engine.shapes())
        require_isolation(_asking(built), built.blueprint.config.get_text_config().vocab_size, config.train.microbatch, rounds)
        engine.train(True)
    padding = pad_id(built.tokenizer)
    if REFERENCE in CHOICES[config.objective.name](config.objective).signals - data.train.signals.keys():
        from trainers.reference import with_reference

        data = with_reference(config, world, attempt, engine, data, base, padding)
    dealt = _streamed if config.data.streaming else _loader
    rows, held_out = _sampled(built) if config.objective.name in SAMPLED else (dealt(built, data, padding), None)
    world.begin_steps()
    adaptation, flops_of = engine.adaptation, _of_parts(data) if data.train.parted else flops_per_token
    shapes = {name: shape for name, shape in engine.shapes().items() if name not in adaptation.unreached}
    flops = flops_of(shapes, built.blueprint.config, data.train.mean_attended(), shapes.keys() - adaptation.trained)
    critic = None if held_out is None else held_out.sampler.critic
    if critic is not None and (of_critic := critic.engine.report()) and world.rank == 0:
        console.print(_as_table("the critic on each rank", of_critic))
    outcome = train(config, world, attempt, engine, data, rows, flops, held_out=held_out, critic=critic)
    if held_out is not None:
        built = _without_generators(built, rows, held_out, outcome.progress.step, outcome.stopped)
    engine.report()
    stopped = outcome.stopped
    if config.data.streaming:
        _let_go(rows)
    if not stopped:
        watch.enter(Phase.exporting)
        try:
            finish(built, outcome)
        except Stopped:
            attempt.set_status(State.preempted, step=outcome.saved_step)
            stopped = True
    world.barrier()  # rank 0 may still be waiting for a mirror: all end together
    if built.ahead is not None:
        built.ahead.remove(done=not stopped)
    if stopped:
        log.info("stopped after step %d; the checkpoint of step %d continues", outcome.progress.step, outcome.saved_step)
    watchdog.stop()
    code = Exit.stopped if stopped else Exit.done
    exit_after(ENDING_S, code)
    world.disconnect()
    return code


def _of_parts(data: Prepared) -> Callable[..., float]:
    """Return what counts the FLOPs of an encoder-decoder, of whose tokens each goes through one of the two."""
    from trainers.model.seq2seq import flops_of_parts

    return partial(flops_of_parts, float(np.count_nonzero(data.train.supervised)) / float(data.train.offsets[-1]))


def _prompts(config: RunConfig, progress: bool, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    """Return the prompts of a run whose model gives the answers."""
    from trainers.rl.prompts import prepare_prompts
    from trainers.rl.sampler import require_imports

    if progress:
        require_imports(config)
    return prepare_prompts(config, tokenizer, progress)


def _critic(config: RunConfig, world: World, tokenizer: PreTrainedTokenizerFast) -> Outlined:
    """Return what PPO's critic is built from."""
    from trainers.rl.critic import outline_critic

    return outline_critic(config, tokenizer, world.device.type)


def _sampled(built: Built) -> tuple[Rows, HeldOutPrompts]:
    """Return the rows that the model's own answers make, and the held-out prompts."""
    from trainers.rl.held_out import HeldOutPrompts
    from trainers.rl.rollouts import Rollouts
    from trainers.rl.sampler import make_sampler

    sampler = make_sampler(built.config, built.world, built.attempt, built.engine, built.blueprint, built.tokenizer, built.critic)
    rows = Rollouts(sampler, built.data)
    return rows, HeldOutPrompts(sampler, built.data, rows.num_steps, rows.pad_id)


def _without_generators(built: Built, rows: Rows, held_out: HeldOutPrompts, step: int, continues: bool) -> Built:
    """End what gives and judges answers; return what was built with the rows of the last step, which have answers to try the export on."""
    held_out.sampler.close(continues)
    return replace(built, data=replace(built.data, train=rows.table(step - 1), eval=None)) if step else built


def _asking(built: Built) -> Callable[[Batch], torch.Tensor]:
    """Return what tells whether documents see each other: log-probabilities of labels, or scores at each token, (B, S)."""
    engine, device = built.engine, built.world.device
    if not built.blueprint.scores:
        return lambda batch: engine.forward(batch.to(device)).logps
    from trainers.scoring import of_each_token

    return lambda batch: of_each_token(engine, batch.to(device))


def _loader(built: Built, data: Prepared, padding: int) -> Rows:
    """Return the rows of prepared data."""
    stream = _mixed(built.config, data, built.attempt, built.world) if data.train.sources else None
    share = built.engine.mesh.share_of(built.world.rank)
    return Loader(data.train, built.config.train, seed=built.config.seed, pad_id=padding, stream=stream, **share)


def _ahead(config: RunConfig, data: Prepared) -> Ahead:
    """Start the process that prepares a stream's shards."""
    from trainers.data.shards import folder_of
    from trainers.data.stream import Ahead

    return Ahead(config, folder_of(config, data.path.name))


def _streamed(built: Built, data: Prepared, padding: int) -> Rows:
    """Return the rows of a stream."""
    from trainers.data.shards import folder_of
    from trainers.data.stream import Streamed

    folder, share = folder_of(built.config, data.path.name), built.engine.mesh.share_of(built.world.rank)
    return Streamed(built.config, folder, built.world, pad_id=padding, ahead=built.ahead, **share)


def _let_go(rows: Rows) -> None:
    """End the process ahead of a stream, on rank 0, and close the shards."""
    from trainers.data.stream import Streamed

    assert isinstance(rows, Streamed)
    rows.close()


def _mixed(config: RunConfig, data: Prepared, attempt: Attempt, world: World) -> Stream:
    """Return the stream of a mixture; rank 0 says what each source's share of the run is."""
    from trainers.data.mixture import mixture_of

    mixture = mixture_of(config, data.train)
    if world.rank == 0:
        shares = mixture.report()
        table = Table("source", "rows", "tokens", "of the rows", "of the tokens", "passes", title="the mixture", title_justify="left")
        for name, of in shares.items():
            amounts = (f"{of[key]:,}" for key in ("rows", "tokens"))
            table.add_row(name, *amounts, *(f"{of[key]:.2%}" for key in ("row_share", "token_share")), f"{of['passes']:.2f}")
        console.print(table)
        path = attempt.run_dir / paths.MANIFEST
        attempt.write_json(
            path, read_json(path) | {"mixture": {"rows": mixture.num_rows, "pass_rows": mixture.pass_rows, "sources": shares}}
        )
    return mixture


def _say_what_is_trained(config: RunConfig, world: World, report: dict[str, str]) -> None:
    console.print(_as_table("the model on each rank", report))
    peak, rows = peak_lr(config.optim, config.peft), rows_words(config.train, mesh_of(config.engine, world.size))
    why = _why_mesh(config) if config.engine.mesh is MeshChoice.auto else {}
    console.print(_as_table("a step", {"peak learning rate": peak, "rows": rows} | why))
    step = "the checkpoint of the lowest held-out loss" if exports_best(config) else "the last step"
    console.print(_as_table("the export", {"step": step}))


def _why_mesh(config: RunConfig) -> dict[str, str]:
    return {"mesh": read_json(Path(config.run_dir) / paths.MANIFEST).get("mesh", "as it is in config.yaml")}


def _as_table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _check_positions(config: RunConfig, data: Prepared, blueprint: Blueprint) -> None:
    """Refuse documents longer than a model's learned positions; rotary positions continue, with a warning."""
    limit, learned = positions_limit(blueprint.config)
    longest = max(int(np.diff(table.offsets).max()) for table in (data.train, data.eval) if table is not None)
    longest = config.data.seq_len if config.data.streaming else longest
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
