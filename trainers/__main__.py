"""What every backend ends up calling on every rank: python -m trainers RUN_DIR/config.yaml."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from trainers.batch import Batch, token_logps
from trainers.config import ConfigError, Precision, RunConfig, check_world, load
from trainers.data.loader import Loader, make_batch
from trainers.data.prepare import Prepared, prepare, summary
from trainers.data.tokenizer import load_tokenizer, pad_id, stop_ids
from trainers.engines.base import Engine, build_engine
from trainers.loop import Outcome, TrainingFailed, as_figures, require_isolation, train
from trainers.metrics import console, log_to, log_to_terminal, read_json, set_status, write_json
from trainers.model import Blueprint, check_export, export, flops_per_token, make_blueprint, reopen, sample_answer
from trainers.world import World

log = logging.getLogger("fulltune")
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
REOPEN_BELOW = 2_000_000_000
LEAK_TOLERANCE = {Precision.fp32: 1e-5, Precision.bf16: 5e-2}
EXPORT_TOLERANCE = {Precision.fp32: 1e-3, Precision.bf16: 5e-2}


def main(path: str) -> int:
    """Run one rank to its exit code: 0 done, 1 failed, 2 bad input, 75 stopped with a checkpoint."""
    world = World.from_environment()
    world.watch_signals()
    log_to_terminal(world.rank)
    run_dir = Path(path).parent
    try:
        config = load(path)
        check_world(config, world.size)
        return run(config, world)
    except (ConfigError, TrainingFailed) as error:
        code = BAD_INPUT if isinstance(error, ConfigError) else FAILED
        return _fail(run_dir, world, code, str(error), "")
    except Exception as error:
        return _fail(run_dir, world, FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())


def _fail(run_dir: Path, world: World, code: int, message: str, trace: str) -> int:
    """Keep the first failing rank's error in status.json, and return the exit code.

    Ranks that fail because of it come within a minute and only write their log. A launcher that waits shows the error.
    """
    known = read_json(run_dir / "status.json")
    first = known.get("state") != "failed" or time.time() - known.get("time", 0) > 60
    if first:
        set_status(run_dir, "failed", error={"rank": world.rank, "message": message, "traceback": trace, "exit_code": code})
    shown = first and "FULLTUNE_LAUNCHER" not in os.environ
    log.log(logging.ERROR if shown else logging.DEBUG, "rank %d: %s", world.rank, trace or message)
    return code


def run(config: RunConfig, world: World) -> int:
    """Prepare, connect, build, train, export."""
    run_dir = Path(config.run_dir)
    torch.use_deterministic_algorithms(config.train.deterministic)
    transformers.utils.logging.disable_progress_bar()
    data = prepare(config, progress=world.rank == 0)
    tokenizer = load_tokenizer(config)
    blueprint = make_blueprint(config.model, config.seed, tokenizer)
    world.connect()
    world.require_agreement("config.yaml", hashlib.sha256((run_dir / "config.yaml").read_bytes()).hexdigest())
    attempt = start_attempt(run_dir, world)
    log_to(run_dir / "logs" / f"attempt-{attempt}", world.rank, world.size)
    if world.rank == 0:
        console.print(summary(data.report), soft_wrap=True, highlight=False)
        _note_sources(run_dir, data, blueprint)
        set_status(run_dir, "running", attempt=attempt, step=0)
    engine = build_engine(config, world, blueprint)
    if world.rank == 0:
        console.print(_as_table("the model on each rank", engine.report()))
    else:
        engine.report()
    if config.data.packing:
        require_isolation(engine, world, blueprint.config.get_text_config().vocab_size, LEAK_TOLERANCE[config.train.precision])
    loader = Loader(data.train, config.train, seed=config.seed, rank=world.rank, world_size=world.size, pad_id=pad_id(tokenizer))
    outcome = train(config, world, engine, data, loader, flops_per_token(blueprint.build(), blueprint.config, config.data.seq_len))
    engine.report()
    if outcome.stopped_by is not None:
        return _stop(run_dir, world, outcome)
    finish(config, world, engine, data, blueprint, tokenizer, outcome)
    world.disconnect()
    return DONE


def start_attempt(run_dir: Path, world: World) -> int:
    """Return this attempt's number, chosen by rank 0 by making its log folder; collective."""
    number = 0
    if world.rank == 0:
        logs = run_dir / "logs"
        logs.mkdir(exist_ok=True)
        taken = [int(path.name.removeprefix("attempt-")) for path in logs.glob("attempt-*")]
        number = max(taken, default=0) + 1
        (logs / f"attempt-{number}").mkdir()
    return int(world.max([float(number)])[0])


def _note_sources(run_dir: Path, data: Prepared, blueprint: Blueprint) -> None:
    """Add to manifest.json what only preparation knows: fingerprints of data, tokenizer, template, and the base's commit."""
    manifest = read_json(run_dir / "manifest.json")
    manifest |= {"data": data.report, "base_revision": blueprint.revision, "prepared": str(data.path)}
    write_json(run_dir / "manifest.json", manifest)


def _stop(run_dir: Path, world: World, outcome: Outcome) -> int:
    if world.rank == 0:
        set_status(run_dir, "preempted", step=outcome.progress.step)
    log.info("stopped after step %d, saved; the same command continues", outcome.progress.step)
    world.disconnect()
    return STOPPED


def finish(
    config: RunConfig,
    world: World,
    engine: Engine,
    data: Prepared,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerFast,
    outcome: Outcome,
) -> None:
    """Export, reopen and check the export, write summary.json; only then is the run done. Collective."""
    run_dir = Path(config.run_dir)
    folder = run_dir / "export"
    export(engine.weights(), blueprint, tokenizer, stop_ids(tokenizer), folder, write=world.rank == 0)
    probe = make_batch(data.train, np.zeros(1, np.int64), 1, pad_id(tokenizer))
    engine.train(False)
    with torch.no_grad():
        logps = engine.token_logps(probe.to(world.device)).cpu()
    figures = as_figures(outcome, world)
    shapes = engine.shapes()
    if world.rank == 0:
        check_export(folder, shapes)
        sample = _check_logps(config, folder, blueprint, tokenizer, probe, logps, data)
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        figures |= {"parameters": parameters, "trainable_parameters": parameters, "export": str(folder), "sample": sample}
        write_json(run_dir / "summary.json", figures)
        set_status(run_dir, "done", step=outcome.progress.step)
    world.barrier()


def _check_logps(
    config: RunConfig,
    folder: Path,
    blueprint: Blueprint,
    tokenizer: PreTrainedTokenizerFast,
    probe: Batch,
    logps: torch.Tensor,
    data: Prepared,
) -> dict[str, str] | None:
    """Compare the reopened export with the trainer on one row, and let it answer a prompt; large models are left to their shapes."""
    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) > REOPEN_BELOW * 4:
        return None
    model = reopen(folder, config.model.trust_remote_code)
    with torch.no_grad():
        difference = float((token_logps(model, probe) - logps).abs().mean())
    if not difference <= EXPORT_TOLERANCE[config.train.precision]:
        raise RuntimeError(f"the export in {folder} is {difference:.2g} nats a token away from the trained model")
    log.info("export reopened with plain transformers: %.1e nats a token from the trained model", difference)
    if not config.train.sample_tokens:
        return None
    return sample_answer(model, tokenizer, (data.eval or data.train).prompt(0).tolist(), config.train.sample_tokens)


def _as_table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"{__doc__}\n\nThe launcher writes that file and starts this: python -m launcher --help", file=sys.stderr)
        sys.exit(BAD_INPUT)
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a mirror that hangs or a half-dead process group must not hold the exit
