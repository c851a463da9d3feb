"""`python -m tools.bench peers`: what is made of other trainers' runs, whatever these do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT, environment

from tools.bench.peers import command, drivers, venvs
from tools.bench.peers.command import BETAS, CLIP, LEARNING_RATE, OurSteps, Trainer, difference, table
from tools.bench.peers.drivers.recorder import Recorder
from tools.bench.peers.inputs import whole_microbatches
from tools.bench.peers.measure import Measured, RunFailed, Step, measure, recorded
from trainers.processes import state_of

WRITES = "import json,sys,time\ndef step(loss): open('steps.jsonl','a').write(json.dumps({'loss':loss,'at':time.time()})+'\\n')\n"


def run(code: str, folder: Path, num_steps: int = 3, limit_s: float = 20.0, show: Callable[[int], None] = lambda done: None) -> Measured:
    line = [sys.executable, "-S", "-c", WRITES + code]
    return measure(line, folder, dict(os.environ), num_steps, limit_s, lambda: recorded(folder / "steps.jsonl"), show)


def test_a_run_is_measured_from_its_command_to_its_last_step(tmp_path: Path) -> None:
    code = "held = b'x' * (64 << 20)\ntime.sleep(0.2)\nstep(4.0)\ntime.sleep(0.3)\nstep(3.0)\ntime.sleep(0.3)\nstep(2.0)\ntime.sleep(0.2)"
    found = run(code, tmp_path)
    assert found.losses == [4.0, 3.0, 2.0]
    assert found.step_seconds >= 0.3
    assert found.first_step_s >= 0.2
    assert found.peak_bytes > 64 << 20
    assert found.cpu_seconds < 0.2


def test_cpu_time_of_all_processes_counts_and_waiting_does_not(tmp_path: Path) -> None:
    spin = "until = time.process_time() + 0.3\nwhile time.process_time() < until: pass\n"
    code = f"import os\nstep(2.0)\ntime.sleep(0.3)\nchild = os.fork()\n{spin}\nif not child: time.sleep(30)\n"
    code += "time.sleep(0.5)\nstep(1.0)\ntime.sleep(0.3)\nos.kill(child, 9)"
    assert 0.5 < run(code, tmp_path, num_steps=2, limit_s=60.0).cpu_seconds < 0.9


def test_forked_processes_count_once(tmp_path: Path) -> None:
    """The child shares 128 MiB with its parent and has 32 of its own."""
    code = "import os\nheld = b'x' * (128 << 20)\nchild = os.fork()\nmine = b'y' * (32 << 20) if not child else b''\n"
    code += "time.sleep(0.4)\nchild or os._exit(0)\nstep(1.0)\ntime.sleep(0.2)\nstep(1.0)\nos.wait()"
    found = run(code, tmp_path, num_steps=2)
    assert 160 << 20 < found.peak_bytes < 220 << 20


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("step(1.0)\nraise ValueError('no rows')", r"ended with exit code 1 after 1 of 3 steps: ValueError: no rows"),
        ("import os\nos.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        (
            "sys.stdout.buffer.write(b'\\xff\\x00{')\nopen('steps.jsonl','wb').write(b'\\xff{\\n[1]\\n{\"loss\": 1}\\n3')",
            "exit code 0 after 0 of 3",
        ),
        ("time.sleep(60)", "took longer than 1 s, at step 0 of 3"),
    ],
    ids=["fails", "is killed", "prints garbage", "hangs"],
)
def test_a_run_without_numbers_says_why(tmp_path: Path, code: str, said: str) -> None:
    with pytest.raises(RunFailed, match=said):
        run(code, tmp_path, limit_s=1.0 if "sleep(60)" in code else 20.0)


def test_nothing_is_left_of_a_run(tmp_path: Path) -> None:
    """Ctrl-C comes, as `show` raises it here: the run's process, one that it started and one that left its session are gone."""
    code = "import os, subprocess\nothers = [subprocess.Popen(['sleep','60'], start_new_session=new) for new in (False, True)]\n"
    code += "open('pids','w').write(' '.join(map(str, [os.getpid(), *[o.pid for o in others]])))\nstep(1.0)\ntime.sleep(60)"

    def show(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(code, tmp_path, show=show)
    host = os.uname().nodename
    until = time.monotonic() + 10
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while state_of(host, pid) not in ("gone", "dead") and time.monotonic() < until:
            time.sleep(0.02)
        assert state_of(host, pid) in ("gone", "dead")


def measured(first: float, last: float, seconds: float = 1.0, peak: int = 1 << 30, first_step_s: float = 10.0) -> Measured:
    return Measured(losses=[first, last], step_seconds=seconds, first_step_s=first_step_s, peak_bytes=peak, cpu_seconds=2 * seconds)


def test_the_table_has_ratios_of_what_trains_the_same_only() -> None:
    ours = Trainer("fulltune", runs={("packed", 1): [measured(9.9, 8.0)] * 3, ("packed", 4): [measured(9.9, 8.0, seconds=0.5)]})
    ours.failed["padded", 1] = "exit | 1"
    peers = [
        Trainer("fast", runs={("packed", 4): [measured(9.901, 8.01, seconds=1.0, peak=2 << 30, first_step_s=20.0)]}),
        Trainer("other", runs={("packed", 4): [measured(9.95, 8.0)]}),
        Trainer("drifts", runs={("packed", 4): [measured(9.9, 8.5)]}),
        Trainer("absent", failed={("packed", 4): "not installed: no network"}),
    ]
    lines = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table(["packed", "padded"], 1000, ours, peers).splitlines()
    ]
    assert lines[2][:4] == ["fulltune", "packed", "4", "2,000"], "each at its best microbatch"
    assert lines[3][:7] == ["fast", "packed", "4", "1,000", "**2.00**", "2.0", "0.50"]
    assert lines[3][7:] == ["2.0 GiB", "**0.50**", "20.0 s", "0.50", "9.9010, 8.0100"]
    assert lines[4][4] == lines[5][4] == "-"
    assert "the first is not ours" in lines[4][-1]
    assert "the last is not ours" in lines[5][-1]
    assert lines[6][2] == "not installed: no network"
    assert lines[7][2] == "exit \\| 1"
    assert len({len(line.replace("\\|", "").split("|")) for line in table(["packed"], 1000, ours, peers).splitlines()}) == 1


@pytest.mark.parametrize(("theirs", "same"), [((9.9, 8.0), True), ((9.9, float("nan")), False), ((9.92, 8.0), False), ((9.9, 8.2), False)])
def test_losses_that_differ_are_said(theirs: tuple[float, float], same: bool) -> None:
    assert (difference([measured(9.9, 8.0)], [measured(*theirs)]) == "") is same


def test_steps_are_read_as_both_leave_them(tmp_path: Path) -> None:
    Recorder(str(tmp_path / "steps.jsonl")).write(2.5)
    assert [step.loss for step in recorded(tmp_path / "steps.jsonl")] == [2.5]
    ours = OurSteps(tmp_path)
    assert ours() == []
    row = {"kind": "step", "step": 1, "loss": 3.0, "grad_norm": 1.0, "skipped": 0, "device_bytes_peak": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    before = ours()[0]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"step": 2, "loss": None}) + "\n")
    assert ours()[0] == before == Step(loss=3.0, at=before.at)
    assert ours()[1].loss != ours()[1].loss


def test_an_installation_that_hangs_says_why(tmp_path: Path) -> None:
    """The environment is not taken for one that is whole."""
    for _ in range(2):
        with pytest.raises(venvs.NotInstalled, match=r"took longer than 0 s"):
            venvs.environment("trl", tmp_path / "venvs", 0.05, lambda text: None)
    assert not list((tmp_path / "venvs").glob("*/pins.json"))


def test_every_peer_has_a_driver_and_exact_versions() -> None:
    for peer in venvs.NAMES:
        assert (Path(drivers.__file__).parent / f"{peer.replace('-', '')}.py").is_file()
        assert all(package.count("==") == 1 for package in venvs.packages_of(peer))


def test_a_step_is_whole_microbatches_packed_and_padded() -> None:
    """Ours refuses a step of 47 rows in microbatches of 4; each step is to be one pass over the rows all the same."""
    sizes = [30, 50, 100, 60, 40, 100, 90, 20, 100, 10, 80]
    count, packed = whole_microbatches(sizes, 100, 2)
    assert count % 2 == packed % 2 == 0 < count < len(sizes)
    assert whole_microbatches(sizes, 100, 1)[0] == len(sizes)
    with pytest.raises(ValueError, match="no first documents of 3"):
        whole_microbatches([10, 10, 10], 100, 4)


@pytest.mark.soak
def test_ours_is_measured_by_the_command_that_a_user_types(cache: Path, tmp_path: Path) -> None:
    """The one peer cannot be installed: a row says so. Folders of this machine are not in what is written."""
    out = tmp_path / "figures.md"
    out.write_text("# By hand\n")
    line = [sys.executable, "-m", "tools.bench", "peers", "--peer", "trl", "--rows", "packed", "padded", "--runs", "1", "--steps", "2"]
    line += ["--step-rows", "2", "--seq-len", "128", "--microbatch", "2", "--venvs", str(tmp_path / "venvs"), "--out", str(out)]
    no_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(line, cwd=ROOT, env=environment(cache) | no_index, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "venvs").glob("*/pins.json"))
    text = out.read_text()
    assert text == f"# By hand\n\n{done.stdout}"
    assert str(tmp_path) not in text
    rows = {cells[1]: cells[2:-1] for row in text.splitlines() if len(cells := [cell.strip() for cell in row.split("|")]) > 2}
    assert float(rows["fulltune"][2].replace(",", "")) > 0
    assert rows["TRL"][1].startswith("not installed: No matching distribution found for torch")
    first, last = map(float, rows["fulltune"][-1].split(", "))
    assert first > last > 0
    assert {command.OURS, "TRL"} <= rows.keys()
    assert (LEARNING_RATE, *BETAS, CLIP) == (1e-3, 0.9, 0.95, 1.0)
