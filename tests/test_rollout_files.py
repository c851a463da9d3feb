"""Files of rollouts: an attempt that was superseded touches no newer one's, and no rank trains on a rollout that it sees a part of."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from trainers.config.schema import RlConfig
from trainers.data.table import TokenTable, save_table
from trainers.health.activity import watch
from trainers.health.spikes import TrainingFailed
from trainers.rl import measured
from trainers.rl.held_out import HeldOutPrompts
from trainers.rl.measured import GIVEN, open_rollout
from trainers.rl.rollouts import Rollouts
from trainers.rl.sync import while_current
from trainers.rundir.attempt import Attempt, Superseded
from trainers.rundir.beats import Phase
from trainers.world import World


def alone() -> World:
    return World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def test_an_older_attempt_leaves_rollouts_and_weights_of_a_newer_one(tmp_path: Path) -> None:
    older, newer = Attempt(tmp_path), Attempt(tmp_path)
    older.claim()
    assert list(while_current([1, 2], older)) == [1, 2]
    newer.claim()
    with pytest.raises(Superseded):
        list(while_current([1, 2], older))
    made = tmp_path / "rollouts" / "step-000001"
    made.mkdir(parents=True)
    rollouts = object.__new__(Rollouts)
    rollouts.opened, rollouts.rl, rollouts.world, rollouts.attempt, rollouts.folder = None, RlConfig(), alone(), older, made.parent
    with pytest.raises(Superseded):
        rollouts.make(0)
    assert made.is_dir()


def test_held_out_prompts_are_sampled_in_that_phase_and_a_stop_ends_their_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = []

    def score(*_: Any) -> None:
        phases.append(watch.phase)

    monkeypatch.setattr(watch, "phase", Phase.evaluating)
    held_out = object.__new__(HeldOutPrompts)
    places = np.array([0, 1, 2])
    held_out.table = TokenTable(tokens=places[:2], supervised=places[:2] > 1, offsets=places, order=places[:2], rows=places)
    held_out.world, held_out.rows = alone(), []
    sampler = SimpleNamespace(sync=score, score=score, answers=lambda *_: {}, rl=RlConfig())
    held_out.sampler = cast(Any, sampler)
    assert held_out.measure(cast(Any, None), cast(Any, None), 3) is None
    assert (phases, watch.phase) == ([Phase.sampling] * 2, Phase.evaluating)


def test_a_rollout_is_opened_with_all_its_signals_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that appears late is waited for; one that does not is named."""
    two, places = np.array([1, 2]), np.array([0, 1, 2])
    signals = {name: np.zeros(2, np.float32) for name in GIVEN}
    table = TokenTable(tokens=two, supervised=two > 1, offsets=places, order=places[:2], rows=places, signals=signals)
    save_table(table, tmp_path / "made")
    late = tmp_path / "made" / "signals" / "old_logps.npy"
    timer = threading.Timer(0.3, lambda: np.save(late, np.zeros(2, np.float32)))
    timer.start()
    assert open_rollout(tmp_path / "made", GIVEN | {"old_logps"}).signals.keys() == GIVEN | {"old_logps"}
    timer.join()
    monkeypatch.setattr(measured, "APPEARS_S", 0.0)
    with pytest.raises(TrainingFailed, match=r"made/signals/reference_logps.npy is not there on"):
        open_rollout(tmp_path / "made", GIVEN | {"reference_logps"})
