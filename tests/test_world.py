"""A signal ends a rank that has nothing to save yet, wherever it comes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import Ranks

from trainers.world import World

FINALIZER = """
import gc, os, signal, time, weakref
from trainers.world import Stopped, World

world = World.from_environment()
world.watch_signals()

class Part:
    pass

def callback(_):
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(1000))  # the handler runs in here, where Python drops what it raises

part = Part()
watched = weakref.ref(part, callback)
try:
    del part
    until = time.monotonic() + 20
    while time.monotonic() < until:
        time.sleep(0.01)
    print("never stopped")
except Stopped as name:
    print("stopped by", name)
"""


@pytest.mark.parametrize("swallowed", [True, False], ids=["in a callback", "in the main code"])
def test_a_signal_is_not_lost_where_python_drops_exceptions(swallowed: bool) -> None:
    code = FINALIZER if swallowed else FINALIZER.replace("watched = weakref.ref(part, callback)", "").replace("del part", "callback(None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "stopped by SIGTERM\n"
    assert done.stderr == ""


def counted(world: World) -> list[dict[str, int]]:
    aside = world.beside()
    found = [world.collectives()]
    for which in (aside, world):
        which.barrier()
        found.append(world.collectives())
    dist.destroy_process_group(aside.group)
    return found


def test_collectives_of_a_thread_of_its_own_are_not_those_that_ranks_wait_in(ranks: Callable[[int], Ranks]) -> None:
    """Else a rank whose rollouts are ahead of another's would hide that it is behind in a step."""
    for begun, aside, here in ranks(2).call(counted):
        assert begun
        assert aside == begun
        assert here != begun


FAILING = """
import os, signal, sys
from pathlib import Path
from trainers import __main__ as rank
from trainers.rundir import attempt as status
from trainers.world import World

world = World.from_environment()
world.watch_signals()
told = status.Attempt.record_failure

def told_while_stopped(*args, **fields):
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(1000))
    return told(*args, **fields)

status.Attempt.record_failure = told_while_stopped
print(rank._fail(status.Attempt(Path(sys.argv[1])), world, 2, {"message": "why"}))
"""


LOST = """
import sys
from trainers import __main__ as rank
from trainers.health.spikes import TrainingFailed
from trainers.rl.generators import GeneratorsLost

def fail(path):
    raise TrainingFailed("why") if path.endswith("loss.yaml") else GeneratorsLost("why", "node5")

rank.load = fail
sys.exit(rank.main(sys.argv[1]))
"""


@pytest.mark.parametrize(("name", "of_node", "host"), [("loss", False, socket.gethostname()), ("generators", True, "node5")])
def test_a_failure_that_may_be_of_a_node_names_it(name: str, of_node: bool, host: str, tmp_path: Path) -> None:
    """Those of the training itself are of none, and launch.requeue_on_failure tries them on no other."""
    (tmp_path / "status.json").write_text("{}")
    line = [sys.executable, "-c", LOST, str(tmp_path / f"{name}.yaml")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    error = json.loads((tmp_path / "status.json").read_text())["error"]
    assert (done.returncode, error["message"], error.get("of_node", True), error["host"]) == (1, "why", of_node, host), done.stderr


def test_a_failing_rank_says_why_though_it_is_stopped(tmp_path: Path) -> None:
    """The agent stops every rank as soon as one has ended, also one that is writing down its own error."""
    (tmp_path / "status.json").write_text("{}")
    done = subprocess.run([sys.executable, "-c", FAILING, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert json.loads((tmp_path / "status.json").read_text())["error"]["message"] == "why"
