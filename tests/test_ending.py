"""How a run ends: which word of status.json may follow which, and what the launcher concludes of an exit code and status.json."""

from __future__ import annotations

import json
import re
import time
from itertools import product
from pathlib import Path

import pytest
from command import ROOT

from trainers.rundir.attempt import Attempt, read_state, read_status
from trainers.rundir.ending import (
    TOGETHER_S,
    Ending,
    Exit,
    Failure,
    State,
    Status,
    ending_of,
    exit_of,
    first_killed,
    first_word,
    stops_others,
    with_failure,
    with_state,
)

FAILED: Status = {"state": "failed", "error": {"message": "first", "time": 100.0, "rank": 1}, "step": 3}
HUNG: Status = {"state": "failed", "error": {"message": "rank 1 did not arrive", "time": 100.0, "ranks": [1]}, "step": 3}


def failed(known: Status, ended: State | None, at: float, **how: bool | float) -> str:
    """The message of status.json once an attempt has failed with "second" at a time."""
    status = with_failure(known, ended, {"message": "second"}, at, **how)  # type: ignore[arg-type]
    return str((known if status is None else status).get("error", {}).get("message", "none"))


@pytest.mark.parametrize(("ended", "state"), list(product([None, State.preempted, State.failed, State.done], State)))
def test_failed_stays_until_the_next_attempt_and_nothing_else_does(ended: State | None, state: State) -> None:
    known = {"state": ended or State.running, "step": 3, "attempt": 2, "error": {"message": "x"}, "stragglers": [1], "signal": "SIGTERM"}
    status = with_state(known, ended, state, step=4)
    if ended is State.failed and state is not State.submitted:
        assert status is None
    else:
        assert status == {"state": state, "step": 4, "attempt": 2}  # what belonged to the last state has gone


def test_the_first_failure_by_time_stays() -> None:
    assert failed({"state": "running"}, None, at=100.0) == "second"
    assert failed(FAILED, None, at=200.0) == "second"  # of an older attempt
    assert failed(FAILED, State.failed, at=100.5) == "first"
    assert failed(FAILED, State.failed, at=99.5) == "second"


def test_a_death_is_known_late_and_comes_before_what_it_caused() -> None:
    """A rank found killed within TOGETHER_S of another's error has most likely died first, and caused it."""
    assert failed(FAILED, State.failed, at=100.0 + TOGETHER_S - 1, together_s=TOGETHER_S) == "second"
    assert failed(FAILED, State.failed, at=100.0 + TOGETHER_S + 1, together_s=TOGETHER_S) == "first"


def test_a_death_that_is_written_first_stays_as_the_cause() -> None:
    """Its task may find it before another rank, which failed of it a moment earlier, has the lock of status.json."""
    dead: Status = {"state": "failed", "error": {"message": "first", "time": 100.0, "rank": 1, "exit_code": -9}}
    assert failed(dead, State.failed, at=99.9) == "first"
    assert failed(dead, State.failed, at=100.0 - TOGETHER_S - 1) == "second"
    assert failed(dead, State.failed, at=101.0, together_s=TOGETHER_S) == "first"
    assert failed(dead, State.failed, at=99.0, together_s=TOGETHER_S) == "second", "of two deaths the first by time"
    assert failed(dead, None, at=99.9) == "second", "an older attempt's"


def test_what_a_watchdog_found_stays() -> None:
    """It ends ranks, whose deaths torch's agent knows to the second only."""
    assert failed(HUNG, State.failed, at=99.5, together_s=TOGETHER_S) == "rank 1 did not arrive"
    assert failed(HUNG, State.failed, at=101.0, together_s=TOGETHER_S) == "rank 1 did not arrive"


def test_a_stop_that_was_asked_for_is_no_failure() -> None:
    stopped: Status = {"state": "preempted", "step": 3}
    assert failed(stopped, State.preempted, at=100.0) == "none"
    assert failed(stopped, State.preempted, at=100.0, over_stop=True) == "second"  # a death came first, and asked the others to stop
    assert failed(stopped, None, at=100.0) == "second"  # an older attempt's


@pytest.mark.parametrize(
    ("code", "status", "was_asked", "is_current", "ending"),
    [
        (0, {"state": "done"}, False, True, Ending.done),
        (0, {"state": "running"}, False, True, Ending.done),  # a machine without rank 0
        (75, {"state": "preempted"}, True, True, Ending.stopped),
        (75, {"state": "running"}, True, True, Ending.stopped),
        (-9, {"state": "preempted"}, True, True, Ending.stopped),  # killed once it had said so
        (75, FAILED, True, True, Ending.failed),
        (-15, {"state": "running"}, True, True, Ending.cut_short),
        (1, FAILED, False, True, Ending.failed),
        (2, {"state": "failed", "error": {"message": "x", "setting": {"path": "optim.lr"}}}, False, True, Ending.refused),
        (-9, {"state": "running"}, False, True, Ending.unexplained),
        (1, {}, False, True, Ending.unexplained),
        (76, {"state": "running"}, False, True, Ending.superseded),
        (1, FAILED, False, False, Ending.superseded),  # a newer attempt's status
        (0, {"state": "done"}, False, False, Ending.done),
    ],
)
def test_what_the_launcher_concludes(code: int, status: Status, was_asked: bool, is_current: bool, ending: Ending) -> None:
    assert ending_of(code, status, was_asked=was_asked, is_current=is_current) is ending


@pytest.mark.parametrize(
    ("failures", "killed", "code", "stops"),
    [
        ([Failure(0, 1, 100.0), Failure(1, -15, 101.0)], None, 1, False),  # rank 0 has said why, and the agent ended rank 1
        ([Failure(0, -15, 100.0), Failure(1, 1, 100.0)], None, 1, False),  # found in the other order, in the same second
        ([Failure(0, 2, 100.0), Failure(1, 1, 100.5)], None, 2, False),
        ([Failure(0, 1, 101.0), Failure(1, -9, 100.0)], 1, 1, True),
        ([Failure(0, 1, 100.0), Failure(1, -9, 105.0)], 1, 1, False),  # found late: its death is what rank 0 met
        ([Failure(0, 1, 100.0), Failure(1, -9, 130.0)], None, 1, False),  # torch's agent killed what was left
        ([Failure(0, -6, 102.0), Failure(1, -9, 101.0)], 1, 1, True),  # NCCL aborts once a peer has gone
        ([Failure(0, -15, 100.0), Failure(1, -15, 100.0)], 0, 1, False),  # nobody has said anything
        ([Failure(0, 1, 100.0), Failure(1, 127, 100.0)], 1, 1, False),  # the C library ends a process that gets no memory so
        ([Failure(0, 127, 100.0), Failure(1, 1, 100.0)], 0, 1, True),
        ([Failure(0, 75, 101.0), Failure(1, -11, 100.0)], 1, 75, True),
    ],
)
def test_a_death_that_caused_the_others_is_told_from_those_it_caused(
    failures: list[Failure], killed: int | None, code: int, stops: bool
) -> None:
    found = first_killed(failures)
    assert (found.rank if found else None, first_word(failures), stops_others(failures)) == (killed, code, stops)


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    assert {code.name: code.value for code in Exit} == {
        "done": 0,
        "failed": 1,
        "bad_input": 2,
        "stopped": 75,
        "superseded": 76,
        "interrupted": 130,
    }
    assert [exit_of(ending, interrupted=False) for ending in Ending] == [0, 75, 1, 1, 2, 1, 76]
    assert [exit_of(ending, interrupted=True) for ending in Ending] == [0, 130, 130, 1, 2, 1, 76]


def test_an_attempt_of_a_job_knows_which_end_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_SLURM_ATTEMPT", "7.0")
    first = Attempt(tmp_path)
    first.set_status(State.submitted)
    assert first.record_failure({"message": "x"}, time.time())
    assert first.has_ended(State.failed)
    monkeypatch.setenv("FULLTUNE_SLURM_ATTEMPT", "7.1")
    second = Attempt(tmp_path)
    assert not second.has_ended(State.failed)
    second.set_status(State.running)
    assert read_state(tmp_path) == "running"
    assert read_status(tmp_path)["slurm_attempt"] == "7.1"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "running"


def test_the_diagram_has_every_state_and_exit_code() -> None:
    drawn = re.search(r"```mermaid\nstateDiagram-v2\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert drawn
    assert {word for line in drawn[1].splitlines() for word in re.findall(r"^\s*(\w+) -->|--> (\w+)", line) for word in word if word} == {
        *(str(state) for state in State)
    }
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(re.search(rf"^\| {code.value} \|", table, re.MULTILINE) for code in Exit)
