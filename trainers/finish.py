"""The end of a run: the export, checked and opened again, and summary.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from trainers.batch import IGNORE, Batch, Needs
from trainers.config.choices import PeftMethod, Precision
from trainers.config.schema import RunConfig
from trainers.data.ends import stop_ids
from trainers.data.loader import make_batch
from trainers.data.prepare import Prepared
from trainers.data.tokenizer import pad_id
from trainers.engines.base import Engine
from trainers.health.activity import watch
from trainers.loop import Outcome, as_figures
from trainers.model.blueprint import Blueprint
from trainers.model.export import check_export, export, reopen, sample_answer
from trainers.model.forward import forward
from trainers.peft.base import FILE, FullTraining
from trainers.peft.nf4 import round_base
from trainers.peft.saved import export_adapter, reopen_adapter
from trainers.rundir import paths
from trainers.rundir.attempt import Attempt
from trainers.rundir.ending import State
from trainers.rundir.rows import of_sources, read_rows
from trainers.world import Stopped, World

if TYPE_CHECKING:
    from trainers.data.stream import Ahead
    from trainers.rl.critic import Outlined

log = logging.getLogger("fulltune")
T = TypeVar("T")
STARTED = time.monotonic()
REOPEN_BELOW = 2 << 30
"""Bytes of an export that rank 0 opens whole, as a user would."""
EXPORT_TOLERANCE, EXPORT_TOLERANCE_16_BIT = 1e-3, 0.25
"""Nats a token between trainer and reopened export."""


@dataclass(frozen=True)
class Built:
    """What a rank trains, and with what, once all of it is there."""

    config: RunConfig
    world: World
    attempt: Attempt
    engine: Engine
    data: Prepared
    blueprint: Blueprint
    tokenizer: PreTrainedTokenizerFast
    ahead: Ahead | None = None
    """On rank 0, what prepares a stream's shards."""
    critic: Outlined | None = None
    """What PPO's critic is built from."""


def finish(built: Built, outcome: Outcome) -> None:
    """Export, reopen and check the export, write summary.json; only then is the run done. Collective.

    Raises Stopped on every rank where one is asked to stop while the export is written or read again.
    """
    config, world, attempt, engine, tokenizer = built.config, built.world, built.attempt, built.engine, built.tokenizer
    run_dir = Path(config.run_dir)
    folder = run_dir / paths.EXPORT
    adaptation, first, mark = engine.adaptation, world.rank == 0, f".attempt-{attempt.number}"
    is_adapter = adaptation.library_config is not None
    weights = while_current(engine.weights(), world, attempt)
    if is_adapter:
        own = built.blueprint.config if built.blueprint.scores else None
        sums = export_adapter(weights, adaptation, tokenizer, folder, first, mark, own)
    else:
        assert isinstance(adaptation, FullTraining)
        sums = export(weights, adaptation.form, built.blueprint, tokenizer, stop_ids(tokenizer), folder, first, mark=mark)
    wanted = while_current(adaptation.contents().items(), world, attempt)
    check_export(folder, wanted, sums, read=first, file=FILE if is_adapter else "model.safetensors")
    probe = make_batch(built.data.train, np.zeros(1, np.int64), 1, pad_id(tokenizer))
    engine.train(False)
    with torch.no_grad():
        found = engine.forward(probe.to(world.device), Needs(scores=built.blueprint.scores))
        logps = (found.logps if found.scores is None else found.scores).cpu()
    figures, shapes, state = as_figures(outcome, world), engine.shapes(), engine.state_bytes()
    state_bytes = dict(zip(state, map(int, world.sum(list(map(float, state.values())))), strict=True))
    if world.rank == 0:
        sample = _try_export(built, folder, probe, logps)
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
        if built.data.train.sources:
            figures |= of_sources(read_rows(run_dir), figures["export_step"])
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


def _try_export(built: Built, folder: Path, probe: Batch, logps: torch.Tensor) -> dict[str, str] | None:
    """Open the export as a user would, compare it with the trainer on one row, let it answer; not where it is too large for that.

    The weights have been compared byte for byte: this is about config and code, so that rounding to 16 bits may show.
    """
    config, blueprint, adaptation = built.config, built.blueprint, built.engine.adaptation
    is_adapter = adaptation.library_config is not None
    base = blueprint.folder if is_adapter else None
    files = [path for place in (folder, base) if place is not None for path in place.glob("*.safetensors")]
    if sum(path.stat().st_size for path in files) > REOPEN_BELOW:
        return None
    if blueprint.scores:
        _try_scores(built, folder, base, logps)
        return None
    if is_adapter:
        plain = reopen(base, config.model.trust_remote_code, blueprint.config, built.data.train.parted) if base else blueprint.build("cpu")
        model = reopen_adapter(folder, round_base(plain, adaptation))
    else:
        model = reopen(folder, config.model.trust_remote_code, encodes=built.data.train.parted)
    with torch.no_grad():
        labelled = (forward(model, probe).logps.float() - logps)[probe.labels != IGNORE]
    _require_near(built, folder, float(labelled.abs().mean()), "nats a token", is_adapter)
    return _try_sample(config, model, built.tokenizer, built.data)


def _require_near(built: Built, folder: Path, difference: float, unit: str, is_adapter: bool) -> None:
    """Raise RuntimeError where a reopened export is far from what was trained; say how near it is."""
    exact = built.config.train.precision is Precision.fp32 and built.blueprint.saved_dtype is torch.float32
    if not difference <= (EXPORT_TOLERANCE if exact else EXPORT_TOLERANCE_16_BIT):
        raise RuntimeError(f"the export in {folder} is {difference:.2g} {unit} away from the trained model")
    library = "peft" if is_adapter else "transformers"
    log.info("export reopened with plain %s: %.1e %s from the trained model", library, difference, unit)


def _try_scores(built: Built, folder: Path, base: Path | None, scores: torch.Tensor) -> None:
    """Compare the scores of the first row's documents, (D, C), with those that plain transformers gives each as a row of its own."""
    from trainers.scoring import plain_scores, reopen_scores, score_rows

    trust, adaptation, blueprint = built.config.model.trust_remote_code, built.engine.adaptation, built.blueprint
    if adaptation.library_config is None:
        model = reopen_scores(folder, trust)
    else:
        plain = reopen_scores(base, trust, blueprint) if base else plain_scores(blueprint)
        model = reopen_adapter(folder, round_base(plain, adaptation))
    again = score_rows(model, built.data.train, built.data.train.documents(0))
    difference = float(np.abs(again - scores.float().numpy()).mean())
    _require_near(built, folder, difference, "a score", adaptation.library_config is not None)


def _try_sample(config: RunConfig, model: Any, tokenizer: PreTrainedTokenizerFast, data: Prepared) -> dict[str, str] | None:
    """Return an answer to the first held-out prompt; a model that does not answer is warned of, and does not fail its run."""
    if not config.train.sample_tokens:
        return None
    try:
        return sample_answer(model, tokenizer, (data.eval or data.train).prompt(0).tolist(), config.train.sample_tokens)
    except Exception as error:  # whatever transformers' generate, or code that comes with a model, raises
        log.warning("no sample answer: %s: %s", type(error).__name__, " ".join(str(error).split()))
        return None
