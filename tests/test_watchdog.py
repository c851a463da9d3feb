"""No run hangs for ever and no death is messy: who failed, where and why is said, everything is gone soon, the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from beats import Clock, passes, write_beat
from command import (
    ROOT,
    SOON_S,
    arguments,
    environment,
    finish,
    launch,
    pids_of,
    read_rows,
    started,
    status_of,
    wait_for,
    wait_for_step,
    wait_until_gone,
)
from conftest import free_port

from launcher.compose import compose
from launcher.ending import settle
from launcher.freeze import freeze
from launcher.job import make_job, next_attempt
from launcher.silence import ENDED_S, LATER_S, Silence
from trainers.config.checks import load
from trainers.config.errors import ConfigError
from trainers.health.activity import FIRST_STEP, Activity
from trainers.health.blockage import find_blockage
from trainers.health.stacks import append_stacks
from trainers.health.watchdog import Watchdog
from trainers.rundir.attempt import Attempt, read_state, read_status
from trainers.rundir.beats import Beat, Phase, read_beats
from trainers.rundir.ending import State
from trainers.rundir.paths import log_file

FAULTS = """
# FAULT=rank:step:what:folder: strikes that rank in that step, once: where the folder is not there yet
import importlib.abc, importlib.util, os, pathlib, sys, time

RANK, STEP, WHAT, ONCE = os.environ["FAULT"].split(":", 3)

def strike():
    pathlib.Path(ONCE).mkdir()
    if WHAT == "raise":
        raise ValueError("the fault of this test")
    if WHAT == "kill":
        os.kill(os.getpid(), 9)
    if WHAT == "wordless":
        os._exit(1)
    if WHAT == "gil":
        import ctypes
        libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)  # waits for itself, without a way for other threads to run
    if WHAT == "sleep":
        time.sleep(1000)
    if WHAT == "memory":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        return bytearray(64 << 30)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in ("trainers.loop", "trainers.data.loader", "trainers.data.prepare"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            if name == "trainers.loop":
                step = module.take_step
                def faulty(engine, *arguments, **options):
                    if module.watch.step == int(STEP) + 1 and not os.path.exists(ONCE):
                        engine.backward = lambda *arguments, **options: strike()
                    return step(engine, *arguments, **options)
                module.take_step = faulty
            elif (STEP, name) in (("-1", "trainers.data.prepare"), ("0", "trainers.data.loader")):
                what = name.rpartition(".")[2].replace("loader", "Loader")
                first = getattr(module, what)
                setattr(module, what, lambda *a, **k: (None if os.path.exists(ONCE) else strike(), first(*a, **k))[1])
        spec.loader.exec_module = exec_module
        return spec

if os.environ.get("RANK", "0") == RANK:
    sys.meta_path.insert(0, Finder())
"""


def with_fault(cache: Path, folder: Path, rank: int, step: int, what: str) -> dict[str, str]:
    """The environment of a run of which one rank strikes once; step -1 is while data are prepared, 0 as the model has been loaded."""
    (folder / "faults").mkdir()
    (folder / "faults" / "sitecustomize.py").write_text(FAULTS)
    return environment(cache) | {
        "PYTHONPATH": os.pathsep.join([str(folder / "faults"), str(ROOT)]),
        "FAULT": f"{rank}:{step}:{what}:{folder / 'struck'}",
    }


def goes_on(cache: Path, line: list[str], run_dir: Path) -> None:
    """The same command finishes the run, at once."""
    launch(cache, line)
    assert status_of(run_dir)["state"] == "done"
    steps = [row["step"] for row in read_rows(run_dir) if "loss" in row]
    assert steps == list(range(1, steps[-1] + 1))


def stacks_of(run_dir: Path, rank: int) -> str:
    return "".join(path.read_text() for path in run_dir.glob(f"logs/attempt-1/rank-{rank}.log"))


STEPS = ("train.steps=60", "checkpoint.every=5", "train.eval_every=null")


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_others(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "train.step_timeout_s=4")
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, 6, process)
        for pid in pids_of(run_dir, rank=1):
            os.kill(pid, signal.SIGSTOP)
        said = finish(process, run_dir)
    error = status_of(run_dir)["error"]
    assert (status_of(run_dir)["state"], error["rank"], error["ranks"]) == ("failed", 1, [1])
    for words in ("rank 1 has not been heard of for", "is stopped", "rank 0 waits in", "train.step_timeout_s"):
        assert words in said.splitlines()[-1]
    for rank in range(2):
        assert "most recent call first" in stacks_of(run_dir, rank), rank
    goes_on(cache, [*line, "train.step_timeout_s=100"], run_dir)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        pytest.param("raise", ["ValueError: the fault of this test", "Traceback"], marks=pytest.mark.slow),
        pytest.param("memory", ["MemoryError", "Traceback"], marks=pytest.mark.soak),
        pytest.param("kill", ["rank 1 was killed by SIGKILL (out of memory, or kill -9)"], marks=pytest.mark.slow),
        pytest.param("sleep", ["rank 1 did not arrive: it is in step 8, at trainers/", "sitecustomize.py"], marks=pytest.mark.soak),
        pytest.param("gil", ["rank 1 has not been heard of for", "is alive", "rank 0 waits in step 8"], marks=pytest.mark.soak),
    ],
)
def test_a_rank_that_fails_in_a_step_is_named(base: Path, chats: Path, cache: Path, tmp_path: Path, what: str, words: list[str]) -> None:
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "train.step_timeout_s=4")
    with started(line, with_fault(cache, tmp_path, rank=1, step=7, what=what)) as process:
        wait_for_step(run_dir, 7, process)
        said = finish(process, run_dir)
    status = status_of(run_dir)
    assert (status["state"], status["error"]["rank"]) == ("failed", 1)
    last = said[said.index("the run failed (first on rank 1)") :]
    written = status["error"].get("traceback", status["error"]["message"])
    assert last.strip().endswith(written.strip())
    assert all(word in last for word in words), last
    if what in ("sleep", "gil"):
        assert "in strike" in stacks_of(run_dir, 1)
        assert "most recent call first" in stacks_of(run_dir, 0)
    if what != "raise":
        goes_on(cache, line, run_dir)


@pytest.mark.soak
def test_the_group_that_a_rank_waits_in_is_named(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Two copies over two ranks each, of which the last rank hangs: the other rank of its copy waits, and its like in the other copy."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "train.step_timeout_s=6", "launch.processes=4", "engine.replicate=2")
    with started(line, with_fault(cache, tmp_path, rank=3, step=7, what="sleep")) as process:
        wait_for_step(run_dir, 7, process)
        finish(process, run_dir)
    error = status_of(run_dir)["error"]
    assert error["rank"] == 3
    assert re.search(
        "; rank (2 waits in step 8, .* in the shard group of ranks 2-3|1 waits in step 8, .* in the replicate group of ranks 1, 3) ",
        error["message"],
    )


@pytest.mark.slow
def test_a_rank_that_ends_wordlessly_before_the_first_step_is_named_though_the_others_were_stopped(
    base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    """Its disk, files or memory let it write nothing: the others are stopped by the agent, and nobody asked for a stop."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir)
    with started(line, with_fault(cache, tmp_path, rank=1, step=-1, what="wordless")) as process:
        said = finish(process, run_dir)
    assert "rank 1 ended with exit code 1 and left no reason" in said
    assert (status_of(run_dir)["state"], status_of(run_dir)["error"]["rank"]) == ("failed", 1)


@pytest.mark.slow
@pytest.mark.for_real
def test_kill_9_of_torchrun_or_launcher_leaves_nothing_and_the_same_command_goes_on(
    base: Path, chats: Path, cache: Path, tmp_path: Path
) -> None:
    """At once, at the same port, and while the ranks that a killed launcher left behind still save."""
    run_dir = tmp_path / "run"
    meeting = ("launch=torchrun", f"launch.rdzv_endpoint=localhost:{free_port()}")
    line = arguments(base, chats, run_dir, *STEPS, *meeting)
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, 6, process)
        os.kill(child_of(process.pid), signal.SIGKILL)
        said = finish(process, run_dir)
    assert "torchrun's agent was killed by SIGKILL" in said.splitlines()[-1]
    assert status_of(run_dir)["state"] == "failed"
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, read_rows(run_dir)[-1]["step"] + 6, process)
        process.kill()
        goes_on(cache, line, run_dir)
    wait_until_gone(run_dir, 10)


@pytest.mark.soak
@pytest.mark.for_real
def test_kill_9_of_torchrun_takes_ranks_that_have_only_just_begun(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """They still import torch, and cannot have asked the kernel to end with their parent."""
    run_dir = tmp_path / "run"
    with started(arguments(base, chats, run_dir), environment(cache)) as process:
        until = time.monotonic() + SOON_S
        while not pids_of(run_dir, rank=0):
            assert time.monotonic() < until
        os.kill(child_of(process.pid), signal.SIGKILL)
        finish(process, run_dir)
        assert not (run_dir / "ranks").exists()


def child_of(pid: int) -> int:
    found = subprocess.run(
        ["pgrep", "-P", str(pid), "-f", "trainers"], capture_output=True, text=True, check=True, timeout=10
    ).stdout.split()
    assert len(found) == 1
    return int(found[0])


@pytest.mark.slow
def test_a_rank_without_others_is_watched_by_the_launcher(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "train.step_timeout_s=4", "launch.processes=1")
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, 6, process)
        os.kill(child_of(process.pid), signal.SIGSTOP)
        said = finish(process, run_dir)
    assert "rank 0 has not been heard of for" in said.splitlines()[-1]
    assert (status_of(run_dir)["state"], status_of(run_dir)["error"]["ranks"]) == ("failed", [0])
    assert "most recent call first" in stacks_of(run_dir, 0)


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_prepares_is_named(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Before there is a process group, and before the attempt has a number."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "limits.prepare_s=6")
    with started(line, with_fault(cache, tmp_path, rank=1, step=-1, what="sleep")) as process:
        said = finish(process, run_dir)
    assert "rank 1 did not arrive: it is in preparing data, at trainers/" in said.splitlines()[-1]
    assert "limits.prepare_s" in said.splitlines()[-1]
    assert "in strike" in stacks_of(run_dir, 1)
    goes_on(cache, [*line, "limits.prepare_s=100"], run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "others"), [(-1, "connecting"), (0, "loading")])
def test_a_rank_that_stops_before_the_first_step_takes_the_others_along(
    base: Path, chats: Path, cache: Path, tmp_path: Path, step: int, others: str
) -> None:
    """Rank 0 waits for it where no signal reaches it: to be connected, or for the first agreement."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS)
    with started(line, with_fault(cache, tmp_path, rank=1, step=step, what="sleep")) as process:
        wait_for(lambda: (tmp_path / "struck").is_dir() and 0 in (beats := read_beats(run_dir)) and beats[0].phase == others)
        os.kill(pids_of(run_dir, rank=1)[0], signal.SIGUSR2)
        said = finish(process, run_dir, expect=75, soon_s=20)  # torch's agent kills what is left after 30 s
    assert "stopped before the first step" in said
    assert status_of(run_dir)["state"] == "preempted"
    goes_on(cache, line, run_dir)


@pytest.mark.slow
def test_a_stopped_rank_does_not_hold_up_a_run_that_is_asked_to_end(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """launch.shutdown_s is for ranks that save: not for one that is stopped, once the others have said so."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "train.step_timeout_s=4")
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, 6, process)
        for pid in pids_of(run_dir, rank=0):
            os.kill(pid, signal.SIGSTOP)
        process.terminate()
        said = finish(process, run_dir)
    assert "rank 0 has not been heard of for" in said.splitlines()[-1]


@pytest.mark.soak
def test_a_rank_that_comes_back_in_time_is_left_alone(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Stopped longer than the limit as well, where all are: a job that is suspended and resumed."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *STEPS, "train.step_timeout_s=8")
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, 6, process)
        for pids, seconds in ((pids_of(run_dir, rank=1), 3), ([process.pid, *pids_of(run_dir)], 14)):
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        finish(process, run_dir, expect=0)


def activity(clock: Clock) -> Activity:
    watch = Activity(clock)
    watch.limits = dict.fromkeys(Phase, 10.0)
    return watch


def test_time_counts_from_the_last_beat_and_the_first_step_gets_more() -> None:
    clock = Clock()
    watch = activity(clock)
    watch.enter(Phase.step, 1)
    assert watch.limit_s() == 10 * FIRST_STEP
    watch.enter(Phase.evaluating, 1)
    clock.now += 9
    for _ in watch.each(range(3)):
        clock.now += 9
    assert watch.idle_s() == 9
    watch.enter(Phase.step, 2)
    assert (watch.limit_s(), watch.idle_s()) == (10, 0)
    clock.now += 10.5
    assert watch.is_overdue()
    watch.limits[Phase.step] = None
    assert not watch.is_overdue()


def test_a_process_that_was_stopped_is_not_overdue_when_it_goes_on() -> None:
    clock = Clock()
    watch = activity(clock)
    watch.enter(Phase.saving)
    watchdog = Watchdog(watch)
    watchdog.wrote = float("inf")  # writes nothing
    clock.now += 3600
    watchdog._tick()
    assert watch.idle_s() < 3
    watch.beat()
    for _ in range(9):
        clock.now += 1
        watchdog._tick()
    assert watch.idle_s() == 9


def test_two_threads_may_write_a_beat_at_once(tmp_path: Path) -> None:
    watchdog = Watchdog(activity(Clock()))
    watchdog.run_dir, watchdog.rank = tmp_path, 0
    (tmp_path / "ranks").mkdir()
    with ThreadPoolExecutor(2) as threads:
        for written in [threads.submit(watchdog._write) for _ in range(400)]:
            written.result(20)
    assert read_beats(tmp_path).keys() == {0}


def test_a_rank_that_ends_removes_what_one_before_it_was_killed_at_writing(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for name in (".rank-1.json.node7.41.tmp", ".rank-10.json.node7.42.tmp", "rank-10.json"):
        (tmp_path / "ranks" / name).touch()
    watchdog = Watchdog(activity(Clock()))
    watchdog.run_dir, watchdog.rank, watchdog.thread = tmp_path, 1, threading.Thread(target=int)
    watchdog.thread.start()
    watchdog._write()
    watchdog.stop()
    assert {path.name for path in (tmp_path / "ranks").iterdir()} == {".rank-10.json.node7.42.tmp", "rank-10.json"}


def beat(rank: int, collectives: int = 5, phase: str = "step", idle_s: float = 100.0, **more: Any) -> Beat:
    fields = {"host": "elsewhere", "pid": 7, "limit_s": 10.0, "stack": ("trainers/loop.py:1 in _step",), "written": 50.0} | more
    return Beat(rank=rank, collectives=collectives, phase=phase, step=7, idle_s=idle_s, **fields)


SHARED = [
    (rank, f"context group of ranks {rank // 2 * 2}-{rank // 2 * 2 + 1}", begun)
    for rank, begun in enumerate([(9, 5), (9, 5), (8, 4), (7, 4)])
]
"""Ranks 0 and 1 wait in a sum over all, rank 2 in an exchange of heads with rank 3."""


@pytest.mark.parametrize(
    ("beats", "silent", "ranks", "words"),
    [
        ([beat(0), beat(1, 4), beat(2)], [], [1], "rank 1 did not arrive: it is in step 7, at trainers/loop.py:1 in _step; rank 0 waits"),
        ([beat(0), beat(1, 4), beat(2)], [2], [2], "rank 2 has not been heard of for 10 s (process 7 on elsewhere): it was in step 7"),
        ([beat(0), beat(1), beat(2)], [], [0, 1, 2], "no rank makes progress: all 3 are equally far"),
        ([beat(0)], [], [0], "rank 0 makes no progress"),
        (
            [beat(0, 0, "connecting"), beat(1, 0, Phase.preparing), beat(2, 0, Phase.preparing)],
            [],
            [1, 2],
            "ranks 1, 2 did not arrive: rank 1",
        ),
        ([beat(0), Beat(rank=1, limit_s=10.0)], [1], [1], "rank 1 never began; rank 0 waits"),
        (
            [beat(rank, sum(begun), groups=dict(zip((pair, "group of all ranks"), begun, strict=True))) for rank, pair, begun in SHARED],
            [],
            [3],
            "rank 2 waits in step 7, at trainers/loop.py:1 in _step, in the context group of ranks 2-3 (",
        ),
    ],
)
def test_who_blocks_the_others(beats: list[Beat], silent: list[int], ranks: list[int], words: str) -> None:
    blockage = find_blockage({beat.rank: beat for beat in beats}, silent)
    assert [beat.rank for beat in blockage.blockers] == ranks
    assert words in blockage.message(60.0, "why")
    assert blockage.left_s(60.0) < 0


def test_a_rank_that_is_waited_for_and_gets_on_is_not_held_up_to_it() -> None:
    """Rank 0 exports tensor by tensor for hours, the others wait for it far longer than their own limits."""
    beats = {0: beat(0, 4, "exporting", idle_s=1.0, limit_s=3600.0), 1: beat(1, 5, "exporting", idle_s=9e4, limit_s=3600.0)}
    assert find_blockage(beats, []).left_s(50.0) == 3599.0


def test_the_first_failure_by_time_stays(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    assert attempt.record_failure({"rank": 0}, at=20.0)
    assert not attempt.record_failure({"rank": 1}, at=21.0)
    assert attempt.record_failure({"rank": 2}, at=19.0)
    assert not attempt.record_failure({"rank": 3}, at=28.0, together_s=5.0)
    assert attempt.record_failure({"rank": 4}, at=22.0, together_s=5.0)
    attempt.set_status(State.running, attempt=3)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["error"]["rank"]) == ("failed", 4)
    assert attempt.record_failure({"rank": 5, "ranks": [5]}, at=18.5), "a watchdog's"
    assert not attempt.record_failure({"rank": 6, "message": "was killed"}, at=18.0, together_s=10.0), "as it was ended"
    assert attempt.record_failure({"rank": 7}, at=12.0)


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ([(1, -9), (0, 75)], 1),  # rank 0 was asked to stop because rank 1 was gone
        ([(1, -11), (0, 75)], 1),
        ([(1, 75), (0, -9)], None),  # rank 0 did not heed rank 1's stop in time
        ([(0, 1), (1, -9)], 1),  # rank 0 failed because rank 1 was gone
        ([(1, -9), (0, -9)], 1),  # rank 0 had to be killed
        ([(1, 1), (0, -6)], 1),  # NCCL aborts where another rank ended
        ([(1, -6), (0, 1)], 1),
        ([(0, 2), (1, -15)], None),
    ],
)
def test_the_agent_names_the_rank_that_was_killed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[tuple[int, int]], named: int | None
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from trainers import agent

    failures = {rank: ProcessFailure(rank, 1, code, "no file") for rank, code in codes}
    stopped = 75 in dict(codes).values()

    def fail(_arguments: list[str]) -> None:
        if stopped:
            Attempt(tmp_path).set_status(State.preempted)
        for rank in (rank for rank, code in codes if code == 1):
            Attempt(tmp_path).record_failure({"rank": rank, "message": "what went wrong"}, at=time.time())
        raise ChildFailedError("trainers", failures)

    monkeypatch.setattr(agent.run, "main", fail)
    monkeypatch.setattr(agent, "_end_late_ranks", lambda attempt: None)
    monkeypatch.setenv("FULLTUNE_AGENT", "")  # which it sets, and which must not be left to the tests that follow
    code = agent.main([str(tmp_path / "config.yaml")])
    if not stopped:
        assert code == (1 if named is not None else codes[0][1])
    assert read_status(tmp_path).get("error", {}).get("rank") == named
    assert read_status(tmp_path).get("state") == ("failed" if named is not None else "preempted" if stopped else None)


def test_tasks_of_one_slurm_job_tell_its_failure_from_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may fail before another has started, whose attempt then finds that status."""
    monkeypatch.setenv("FULLTUNE_SLURM_ATTEMPT", "7.0")
    Attempt(tmp_path).record_failure({"rank": 1}, at=1.0)
    late = Attempt(tmp_path)
    assert late.has_ended(State.failed)
    late.set_status(State.preempted)
    assert not late.record_failure({"rank": 0}, at=2.0)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["error"]["rank"]) == ("failed", 1)
    monkeypatch.setenv("FULLTUNE_SLURM_ATTEMPT", "7.1")
    again = Attempt(tmp_path)
    assert not again.has_ended(State.failed)
    assert again.record_failure({"rank": 2}, at=3.0)
    assert status_of(tmp_path)["error"]["rank"] == 2


def test_the_launcher_gives_up_when_no_rank_writes_any_more(tmp_path: Path) -> None:
    job = make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path}/out", "limits.prepare_s=30"]))
    (job.run_dir / "ranks").mkdir(parents=True)
    written = write_beat(job.run_dir, 0, 100.0)
    clock = Clock()
    watch = Silence(job, next_attempt(job), clock)
    assert not passes(watch, clock, 30 + LATER_S - 1), "nothing of this attempt yet, and all of limits.prepare_s to write it in"
    write_beat(job.run_dir, 0, written + 1)
    assert not passes(watch, clock, 6 + LATER_S), "10 s for a step, of which 4 had passed"
    clock.now += 3600  # this launcher was stopped as well
    assert passes(watch, clock, 5)
    assert status_of(job.run_dir)["error"]["message"].startswith("rank 0 has not been heard of for")


@pytest.mark.parametrize("state", [State.done, State.preempted])
def test_the_launcher_does_not_wait_for_processes_of_a_run_that_has_ended(tmp_path: Path, state: State) -> None:
    """Torchrun's agent may be stopped, and a process group may never close."""
    job = make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path}/out"]))
    freeze(job)
    attempt, clock = next_attempt(job), Clock()
    watch = Silence(job, attempt, clock)
    Attempt(job.run_dir).begin(Attempt(job.run_dir).claim())
    Attempt(job.run_dir).set_status(state)
    assert not passes(watch, clock, ENDED_S - 1)
    assert passes(watch, clock, 3)
    assert read_state(job.run_dir) == state
    assert settle(job, attempt, -9, None) == {State.done: 0, State.preempted: 75}[state]


def test_a_continued_run_takes_new_limits_and_no_other_setting(tmp_path: Path) -> None:
    settings = ["+exp=quickstart_base", f"run_dir={tmp_path}/out"]
    freeze(make_job(compose(settings)))
    changed = make_job(compose([*settings, "train.step_timeout_s=60", "limits.save_s=null"]))
    freeze(changed)
    frozen = load(changed.config_path)
    assert (frozen.train.step_timeout_s, frozen.limits.save_s) == (60, None)
    with pytest.raises(ConfigError, match=r"optim.lr"):
        freeze(make_job(compose([*settings, "optim.lr=1e-9", "train.step_timeout_s=70"])))
    assert load(changed.config_path) == frozen


def test_a_process_that_has_run_out_of_files_can_still_say_so(tmp_path: Path) -> None:
    text = f"""
import os, resource
from pathlib import Path
from trainers.processes import free_reserve, keep_reserve
keep_reserve()
taken = {{int(name) for name in os.listdir("/proc/self/fd")}}
resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken), max(taken)))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
free_reserve()
Path({str(tmp_path / "said")!r}).write_text("no more files")
"""
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=60, check=True)
    assert (tmp_path / "said").read_text() == "no more files"


def test_a_rank_that_waits_for_others_where_no_signal_reaches_it_stops(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """Connecting is one call of a library, in which no handler runs: here the other rank never comes."""
    run_dir = tmp_path / "run"
    words = arguments(base, chats, run_dir)[3:]
    job = make_job(compose(words))
    freeze(job)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables = environment(cache) | place | {"MASTER_PORT": str(free_port())}
    rank = subprocess.Popen([sys.executable, "-m", "trainers", str(job.config_path)], cwd=ROOT, env=variables)
    try:
        wait_for(lambda: any(beat.phase == Phase.connecting for beat in read_beats(run_dir).values()))
        wait_for(lambda: any("init_process_group" in frame for beat in read_beats(run_dir).values() for frame in beat.stack))
        rank.terminate()
        assert rank.wait(40) == 75
    finally:
        rank.kill()
        rank.wait(20)
    assert read_state(run_dir) == State.preempted


def test_stacks_of_ranks_that_never_met_are_no_newer_attempt(tmp_path: Path) -> None:
    """Rank 0 is stopped while all connect: the others leave their stacks in the folder of an attempt that never was."""
    mine = Attempt(tmp_path)
    append_stacks(log_file(mine.folder, 1), "rank 0 never came")
    assert mine.is_current(at_once=True)
    assert Attempt(tmp_path).claim() == 2
    assert not mine.is_current(at_once=True)
