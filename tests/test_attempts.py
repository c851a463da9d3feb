"""Two attempts of one run alive at once, as where a node is cut off and its job restarts elsewhere: the older one leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from beats import Clock, passes, write_beat
from command import ROOT, arguments, environment, launch, pids_of, read_rows, status_of, trace, wait_for, wait_for_step, wandb_records

from launcher.compose import compose
from launcher.ending import settle
from launcher.freeze import freeze
from launcher.job import make_job, next_attempt
from launcher.silence import Silence
from trainers.health.watchdog import LAST_RESORT_S
from trainers.rundir.attempt import Attempt
from trainers.rundir.ending import State

SOON_S = 40
COMMON = ("train.steps=24", "checkpoint.every=3", "train.eval_every=8", "data.packing=false")
HOOK = """
# AT=verb:regex:number:seconds: rank 0 stops the numbered time that it is about to open or rename such a path; with seconds it sleeps then,
# and each time after
import os, pathlib, re, signal, socket, time

VERB, PATTERN, NUMBER, SECONDS = os.environ["AT"].split(":")
seen = 0

def hook(verb):
    plain = getattr(pathlib.Path, verb)
    def hooked(self, *arguments, **options):
        global seen
        if re.search(PATTERN, str(self)) and (verb == "rename" or arguments[:1] == ("a",)):
            seen += 1
            if SECONDS and seen >= int(NUMBER):
                time.sleep(float(SECONDS))
            elif seen == int(NUMBER):
                os.kill(os.getpid(), signal.SIGSTOP)
        return plain(self, *arguments, **options)
    setattr(pathlib.Path, verb, hooked)

if os.environ.get("RANK", "0") == "0":
    hook(VERB)
if "NODE" in os.environ:
    socket.gethostname = lambda: os.environ["NODE"]
"""
MOMENTS = {
    "writing a checkpoint": r"rename:/\.step-000006\.[^/]*/\.metadata\.tmp$:1:",
    "committing a checkpoint": r"rename:/\.step-000006\.[^/]*\.tmp$:1:",
    "writing a row": r"open:/metrics\.jsonl$:9:",  # that of step 8, behind its evaluation before step 1
    "writing status.json": r"rename:/\.status\.json\.[^/]*$:2:",
    "exporting": r"rename:/export[^/]*\.tmp$:1:",
}
SUITES = dict.fromkeys(("writing a checkpoint", "committing a checkpoint", "writing status.json", "exporting"), pytest.mark.soak)


def hooked(cache: Path, folder: Path, at: str) -> dict[str, str]:
    """The environment of a run of which rank 0 stops, or sleeps, at a moment."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    return environment(cache) | {"PYTHONPATH": os.pathsep.join([str(folder / "hook"), str(ROOT)]), "AT": at}


def elsewhere(line: list[str]) -> list[str]:
    """The command as on another node: under another host name, by which the launcher's lock goes, and which can be looked up."""
    ours = ["unshare", "--uts", "sh", "-c", 'hostname localhost && exec "$@"', "sh"]
    able = shutil.which("unshare") and not subprocess.run([*ours, "true"], capture_output=True, check=False, timeout=10).returncode
    return [*ours, *line] if able and socket.gethostname() != "localhost" else ["env", "NODE=127.0.0.1", *line]  # else the hook says so


@contextmanager
def started(line: list[str], variables: dict[str, str], run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(line, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        for pid in pids_of(run_dir):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def stop_all(process: subprocess.Popen[str], run_dir: Path) -> list[int]:
    """Stop launcher, agent and ranks once rank 0 has stopped by itself; returns their process ids."""
    wait_for(lambda: process.poll() is not None or any(is_stopped(pid) for pid in pids_of(run_dir, rank=0)), 90)
    assert process.poll() is None, process.communicate(timeout=10)[0]
    pids = [process.pid, *pids_of(run_dir)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def wake(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def require_given_way(process: subprocess.Popen[str], pids: list[int], soon_s: float = SOON_S) -> None:
    """It ends by itself, soon, with the exit code of an older attempt; none of its processes stays."""
    said = process.communicate(timeout=soon_s)[0]
    assert process.returncode == 76, said
    assert "a newer attempt of this run has started elsewhere" in said.splitlines()[-1]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def digests(run_dir: Path) -> dict[str, str]:
    """All that a run leaves, except for logs, which attempts do not share."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and "logs" not in path.relative_to(run_dir).parts]
    kept = [path for path in files if not path.name.endswith(".lock")]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


@pytest.fixture(scope="module")
def whole(base: Path, chats: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    launch(cache, arguments(base, chats, run_dir, *COMMON))
    return run_dir


def require_exact(run_dir: Path, whole: Path) -> None:
    assert trace(run_dir) == trace(whole)
    assert (status_of(run_dir)["state"], status_of(run_dir)["attempt"]) == ("done", 2)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    )
    exports = [folder / "export" / "model.safetensors" for folder in (run_dir, whole)]
    assert exports[0].read_bytes() == exports[1].read_bytes()


@pytest.mark.parametrize("moment", [pytest.param(name, marks=SUITES.get(name, pytest.mark.slow)) for name in MOMENTS])
def test_an_older_attempt_that_was_stopped_leaves_nothing(
    base: Path, chats: Path, cache: Path, tmp_path: Path, whole: Path, moment: str
) -> None:
    """Stopped behind its last look whether it may write, and continued when the newer one is done."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *COMMON)
    with started(elsewhere(line), hooked(cache, tmp_path, MOMENTS[moment]), run_dir) as older:
        pids = stop_all(older, run_dir)
        launch(cache, line)
        require_exact(run_dir, whole)
        left = digests(run_dir)
        wake(pids)
        require_given_way(older, pids)
        assert digests(run_dir) == left


LONG_STEPS = r"open:/metrics\.jsonl$:6:2"
ENDLESS_STEP = r"open:/metrics\.jsonl$:6:200"


@pytest.mark.parametrize(
    ("at", "soon_s"),
    [
        pytest.param(LONG_STEPS, 10, marks=pytest.mark.slow, id="between steps"),
        pytest.param(ENDLESS_STEP, LAST_RESORT_S + 30, marks=pytest.mark.soak, id="by its watchdog"),
    ],
)
def test_an_older_attempt_that_is_alive_gives_way_by_itself(
    base: Path, chats: Path, cache: Path, tmp_path: Path, whole: Path, at: str, soon_s: float
) -> None:
    """Rank 0 sleeps for seconds between its look whether it may write a row and the row itself."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *COMMON)
    with started(elsewhere(line), hooked(cache, tmp_path, at), run_dir) as older:
        wait_for_step(run_dir, 4, older)
        pids = [older.pid, *pids_of(run_dir)]
        launch(cache, line)
        require_given_way(older, pids, soon_s)
        require_exact(run_dir, whole)


@pytest.mark.slow
def test_how_an_older_attempt_ends_is_not_said_of_the_newer(base: Path, chats: Path, cache: Path, tmp_path: Path, whole: Path) -> None:
    """Its ranks are killed while the newer one runs: neither its agent nor its launcher marks the run failed, which would end it."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, *COMMON)
    with started(elsewhere(line), hooked(cache, tmp_path, MOMENTS["writing a row"]), run_dir) as older:
        pids = stop_all(older, run_dir)
        with started(line, hooked(cache, tmp_path, r"open:/metrics\.jsonl$:1:0.3"), run_dir) as newer:
            wait_for_step(run_dir, 9, newer)
            for pid in set(pids) & {*pids_of(run_dir, rank=0), *pids_of(run_dir, rank=1)}:
                os.kill(pid, signal.SIGKILL)
            wake([pid for pid in pids if pid in {older.pid, *pids_of(run_dir)}])
            require_given_way(older, pids)
            assert status_of(run_dir)["state"] == "running"
            said = newer.communicate(timeout=60)[0]
            assert newer.returncode == 0, said
        require_exact(run_dir, whole)


def test_a_launcher_leaves_a_newer_attempt_alone(tmp_path: Path) -> None:
    """It was stopped, or is on a node that was cut off: silence, and an exit code, are of its own ranks alone."""
    job = make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path}/out", "limits.prepare_s=30"]))
    freeze(job)
    ours, clock = next_attempt(job), Clock()
    watch = Silence(job, ours, clock)
    assert Attempt(job.run_dir).claim() == ours.number
    (job.run_dir / "ranks").mkdir()
    write_beat(job.run_dir, 0, 100.0)
    newer = Attempt(job.run_dir)
    newer.begin(newer.claim())
    newer.set_status(State.running, attempt=newer.number)
    assert not passes(watch, clock, 200)
    assert settle(job, ours, 1, None) == 76
    assert status_of(job.run_dir)["state"] == "running"
    assert passes(Silence(job, newer, clock), clock, 200)


def test_a_rank_that_had_not_met_the_others_says_nothing_of_a_newer_attempt(tmp_path: Path) -> None:
    late = Attempt(tmp_path)
    assert late.record_failure({"message": "nothing has begun"}, 1.0)
    assert Attempt(tmp_path).claim() == 1
    assert not late.record_failure({"message": "too late"}, 0.5)
    assert status_of(tmp_path)["error"]["message"] == "nothing has begun"


def test_a_newer_attempt_takes_away_what_older_ones_have_staged(tmp_path: Path) -> None:
    """Of saves that were killed too: they would take the room of the next one."""
    staged = [tmp_path / "checkpoints" / ".step-000003.attempt-1.tmp", tmp_path / "export.attempt-1.tmp"]
    for folder in staged:
        folder.mkdir(parents=True)
        (folder / "a file").touch()
    (tmp_path / "metrics.attempt-1.tmp").touch()
    (tmp_path / ".status.json.node.7.tmp").touch()
    of_version = tmp_path / "rollouts" / "weights" / "step-000002"
    of_version.mkdir(parents=True)
    of_version.with_name(f"{of_version.name}.attempt-1.tmp").mkdir()
    of_version.with_name(f".{of_version.name}.json.node.7.tmp").touch()
    older = tmp_path / "logs" / "attempt-1"
    older.mkdir(parents=True)
    (older / ".preflight-0.tmp").touch()
    Attempt(tmp_path).claim()
    left = ["attempt", "attempt-1", "attempt-2", "checkpoints", "rollouts", "step-000002", "weights"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.name != "logs") == left


def preempted(cache: Path, line: list[str], run_dir: Path, step: int, one_rank: bool, how: signal.Signals, expect: int = 75) -> None:
    """Start the run, and send a signal to the launcher or to one rank behind a step."""
    with started(line, environment(cache), run_dir) as process:
        wait_for_step(run_dir, step, process)
        os.kill(pids_of(run_dir)[-1] if one_rank else process.pid, how)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == expect, said


def wandb_rows(run_dir: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """The ids and the rows of every offline file, in the order that `wandb sync` sends them in."""
    from wandb.proto import wandb_internal_pb2

    ids, rows = set(), []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            if items := record.history.item:
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


BY_THE_LAUNCHER, BY_A_RANK, BY_USR2 = (3, False, signal.SIGTERM), (14, True, signal.SIGTERM), (26, False, signal.SIGUSR2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "preemptions", "killed"),
    [
        pytest.param(1, [BY_THE_LAUNCHER, BY_A_RANK, BY_USR2], False, marks=pytest.mark.soak),
        pytest.param(2, [BY_THE_LAUNCHER, BY_A_RANK, BY_USR2], True, marks=pytest.mark.soak),
        (2, [BY_A_RANK], True),
    ],
    ids=["preempted", "and killed", "each once"],
)
def test_wandb_has_one_run_and_each_step_once_across_attempts(
    base: Path,
    chats: Path,
    cache: Path,
    tmp_path: Path,
    processes: int,
    preemptions: list[tuple[int, bool, signal.Signals]],
    killed: bool,
) -> None:
    """Preemptions of several kinds. A kill -9 leaves rows behind the last checkpoint that are trained again: they come twice, the same."""
    run_dir = tmp_path / "run"
    more = ("train.steps=60", "train.eval_every=20", "checkpoint.every=50", "log.wandb=offline", f"launch.processes={processes}")
    line = arguments(base, chats, run_dir, *more)
    for step, one_rank, how in preemptions:
        preempted(cache, line, run_dir, step, one_rank, how)
    saved = status_of(run_dir)["step"]
    if killed:
        preempted(cache, line, run_dir, read_rows(run_dir)[-1]["step"] + 3, True, signal.SIGKILL, expect=1)
    launch(cache, line)
    ids, rows = wandb_rows(run_dir)
    assert ids == {json.loads((run_dir / "manifest.json").read_text())["wandb_id"]}
    assert (
        len(list((run_dir / "wandb").glob("offline-run-*")))
        == len(list((run_dir / "logs").glob("attempt-*")))
        == len(preemptions) + 1 + killed
    )
    mirrored = [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]
    written = [(row["step"], row.get("loss"), row.get("eval_loss")) for row in read_rows(run_dir)]
    assert sorted(set(mirrored), key=mirrored.index) == written
    assert all(mirrored.count(row) == 1 for row in mirrored if not killed or row[0] <= saved)
    assert [step for step, loss, _ in written if loss is not None] == list(range(1, 61))


def test_an_attempt_that_cannot_write_its_number_is_not_taken_for_an_older_one(tmp_path: Path) -> None:
    """On a full disk a folder can be made, and a file not be written."""
    text = f"""
import resource
from pathlib import Path
from trainers.rundir.attempt import Attempt
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
attempt = Attempt(Path({str(tmp_path)!r}))
try:
    attempt.claim()
except OSError:
    raise SystemExit(0 if attempt.is_current(at_once=True) else 1)
raise SystemExit(2)
"""
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=60, check=True)
    assert Attempt(tmp_path).claim() == 2
