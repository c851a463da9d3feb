"""metrics.jsonl has one reader: rows tell their kind, null is nan, and what a run must know of its past comes from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from trainers.rundir.rows import Kind, Row, eval_losses, evaluations, history, kind_of, last_step, read_rows, rollbacks, steps, until


def step(number: int, loss: float | None, norm: float | None = 1.0, skipped: int = 0) -> Row:
    return {"kind": "step", "step": number, "loss": loss, "grad_norm": norm, "skipped": skipped}


def evaluation(number: int, loss: float | None) -> Row:
    return {"kind": "evaluation", "step": number, "eval_loss": loss, "eval_tokens": 9}


ROWS = [
    evaluation(0, 4.0),
    step(1, 3.0),
    step(2, None, None, skipped=1),  # not finite: nothing was updated
    evaluation(2, None),
    {"kind": "rollback", "step": 2, "rollback_from": 4, "rows_left_out_steps": 2},
    step(3, 2.0, 0.5, skipped=1),
    {"kind": "rollouts", "step": 3},  # of a later version
]


def without_kind(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "kind"} for row in rows]


def test_each_kind_is_found_with_and_without_its_name() -> None:
    for rows in (ROWS, without_kind(ROWS)):
        assert [row["step"] for row in steps(rows)] == [1, 2, 3]
        assert [row["step"] for row in evaluations(rows)] == [0, 2]
        assert [row["rollback_from"] for row in rollbacks(rows)] == [4]
        assert last_step(steps(rows)) == 3
    assert [kind_of(row) for row in (ROWS[0], ROWS[-1], {"step": 1})] == [Kind.evaluation, "rollouts", ""]


def test_a_loss_that_is_not_finite_is_nan_to_every_reader() -> None:
    losses = eval_losses(ROWS)
    assert losses[0] == 4.0
    assert math.isnan(losses[1])
    past = history(ROWS)
    assert math.isnan(past.eval_losses[1])
    assert past.train_loss == 2.0
    assert math.isnan(history(ROWS[:4]).train_loss or 0.0)
    assert past.evaluated_at == 2


def test_only_steps_that_updated_the_weights_are_ordinary() -> None:
    assert history(ROWS).taken == [(3.0, 1.0), (2.0, 0.5)]
    assert history([step(1, 3.0), step(2, 9.0, 99.0, skipped=1), step(3, 2.0, 0.5, skipped=1)]).taken == [(3.0, 1.0), (2.0, 0.5)]


def test_a_run_without_rows_has_no_past() -> None:
    past = history([])
    assert (past.eval_losses, past.train_loss, past.evaluated_at, past.taken) == ([], None, -1, [])


def test_a_continued_run_keeps_no_rollback_to_where_it_continues() -> None:
    assert [kind_of(row) for row in until(ROWS, 2)] == ["evaluation", "step", "step", "evaluation"]
    assert len(until(ROWS, 3)) == len(ROWS)


def test_half_lines_are_left_out(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 4, "lo')
    assert read_rows(tmp_path) == ROWS
    last = len(json.dumps(ROWS[-1])) + len('{"step": 4, "lo') + 10
    assert read_rows(tmp_path, last_bytes=last) == ROWS[-1:]
