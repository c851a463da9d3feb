"""Before weights are read a bad or slow node is named; while training, the rank that slows all down."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from command import ROOT, arguments, damaged_bases, environment, finish, pids_of, read_rows, started, status_of, wait_for_step

from launcher.compose import compose
from launcher.job import make_job
from trainers.config.checks import validate
from trainers.config.errors import ConfigError
from trainers.config.mesh import Mesh
from trainers.health import preflight
from trainers.health.blockage import Blockage
from trainers.health.preflight import DISK_BYTES, LINK_BYTES, BadNode, Finding, Product, Reading, check, clock_off, find_faults, rings
from trainers.health.stragglers import EVERY, IN_A_ROW, Reported, Straggler, Stragglers, find_stragglers
from trainers.rundir.attempt import Attempt
from trainers.rundir.beats import Beat
from trainers.rundir.ending import State
from trainers.world import World

HOST = socket.gethostname()
SLOW = 1.5
CLOCKS = ((1000.0, 2e-4), (1001.0, 1e-4), (1002.0, 9.0))


def nodes(num_ranks: int = 6, kind: str = "cuda", **more: Any) -> list[Reading]:
    """Readings of healthy nodes of two ranks each: 1 ms for a product, 20 GB/s within a node and 5 GB/s between nodes."""
    link_s = [LINK_BYTES[kind] / (20e9 if rank % 2 else 5e9) for rank in range(num_ranks)]
    fields = {"kind": kind, "product_s": 1e-3, "clocks": CLOCKS, "local_size": 2} | more
    return [Reading(rank=rank, host=f"node{rank // 2}", link_s=link_s[rank], **fields) for rank in range(num_ranks)]


def with_rank(rank: int, **more: Any) -> list[Reading]:
    readings = nodes()
    readings[rank] = replace(readings[rank], **more)
    return readings


def late(seconds: float) -> tuple[tuple[float, float], ...]:
    return tuple((now + seconds, took) for now, took in CLOCKS)


@pytest.mark.parametrize(
    ("rank", "more", "fatal", "words"),
    [
        (3, {"device_fault": "multiplies two matrices wrongly"}, True, ["its device", "wrongly"]),
        (3, {"device_fault": "does not work: CUDA error"}, True, ["CUDA error"]),
        (2, {"kind": "cpu"}, True, ["no GPU is seen there"]),
        (1, {"write_fault": "/runs cannot be written: Read-only file system"}, True, ["Read-only"]),
        (1, {"link_fault": "it gets a wrong sum over all ranks"}, True, ["wrong sum"]),
        (3, {"product_s": 2e-3}, False, ["2.0 x the median", "2 ms"]),
        (3, {"link_s": LINK_BYTES["cuda"] / 5e9}, False, ["receives 5 GB/s from rank 2 on node1, 4.0 x the time", "link 1 within nodes"]),
        (2, {"link_s": LINK_BYTES["cuda"] / 1e9}, False, ["receives 1 GB/s from rank 1 on node0, 5.0 x the time", "between nodes"]),
        (2, {"clocks": late(-63.0)}, False, ["63.0 s behind that of rank 0 on node0"]),
        (2, {"memory_free_bytes": 1 << 30}, False, ["1.0 GiB of host memory are free for 2 ranks"]),
        (2, {"run_dir_free_bytes": DISK_BYTES // 2}, False, ["1.0 GiB are free on the disk of run_dir"]),
        (2, {"cache_free_bytes": DISK_BYTES // 2}, False, ["1.0 GiB are free on the disk of the prepared data"]),
    ],
)
def test_what_is_wrong_is_named_with_rank_and_host(rank: int, more: dict[str, Any], fatal: bool, words: list[str]) -> None:
    findings = find_faults(with_rank(rank, **more), SLOW)
    assert [(finding.rank, finding.host, finding.fatal) for finding in findings] == [(rank, f"node{rank // 2}", fatal)]
    assert all(word in str(findings[0]) for word in words), findings[0]


@pytest.mark.parametrize(
    "readings",
    [
        nodes(),
        nodes(run_dir_free_bytes=None),  # a file system that does not say
        with_rank(3, product_s=1.4e-3),
        with_rank(2, clocks=late(1.0)),
        [replace(reading, product_s=1e-3 * (1 + 3 * reading.rank)) for reading in nodes(2, "cpu")],  # 3 ms: a busy host's scheduler
        nodes(1, link_fault="", clocks=()),
    ],
)
def test_nobody_is_named_where_all_is_well(readings: list[Reading]) -> None:
    assert find_faults(readings, SLOW) == []


@pytest.mark.parametrize("num_nodes", [1, 2, 4])
def test_links_that_differ_by_design_are_not_slow(num_nodes: int) -> None:
    """Four GPUs a node, bridged in pairs: every other link goes over PCIe, ten times as slow, and nodes are slower still."""
    speeds = [5e9, 200e9, 20e9, 200e9] * num_nodes
    readings = [
        Reading(rank=rank, host=f"node{rank // 4}", kind="cuda", product_s=1e-3, clocks=CLOCKS, link_s=LINK_BYTES["cuda"] / speed)
        for rank, speed in enumerate(speeds)
    ]
    assert find_faults(readings, SLOW) == []


def test_a_slow_link_is_named_by_its_dimension() -> None:
    """Two nodes of four ranks, of which two share rows and two split layers; the link from rank 2 to rank 4 is slow."""
    mesh, readings = Mesh(shard=2, context=2, tensor=2), []
    for rank in range(8):
        links = {name: (before, LINK_BYTES["cuda"] / 20e9) for name, (before, _) in rings(mesh, rank).items()}
        readings.append(Reading(rank=rank, host=f"node{rank // 4}", kind="cuda", product_s=1e-3, clocks=CLOCKS, link_s=1e-2, links=links))
    assert find_faults(readings, SLOW) == []
    slow = replace(readings[4], links=readings[4].links | {"shard": (2, 1.0)})
    [found] = find_faults([*readings[:4], slow, *readings[5:]], SLOW)
    assert (found.rank, found.host) == (4, "node1")
    assert "from rank 2 on node0" in found.what
    assert "of shard links between nodes" in found.what


def test_the_rings_of_a_mesh() -> None:
    """(Before, after) in each group; a dimension that all ranks are in is the ring of all."""
    mesh = Mesh(replicate=2, shard=2, context=2, tensor=2)
    assert rings(mesh, 5) == {"tensor": (4, 4), "context": (7, 7), "shard": (3, 7), "replicate": (13, 13)}
    assert rings(Mesh(shard=8), 3) == {}
    assert rings(Mesh(shard=8, expert=4), 6) == {"expert": (5, 7), "expert shard": (2, 2)}
    assert rings(Mesh(replicate=2, shard=4, expert=4), 6) == {"shard": (5, 7), "replicate": (2, 2), "expert": (5, 7)}
    assert rings(Mesh(context=2, tensor=2), 3) == {"tensor": (2, 2), "context": (1, 1)}
    whole = Mesh(shard=2, context=3, tensor=4, expert=6)
    for name in ("tensor", "context", "shard", "expert", "expert shard"):
        assert sorted(rings(whole, rank)[name][1] for rank in range(24)) == list(range(24)), name
        assert all(rings(whole, rings(whole, rank)[name][1])[name][0] == rank for rank in range(24)), name


def test_a_node_without_most_of_its_gpus_is_the_one_that_is_named() -> None:
    """Though the CPU's figures are of another kind, and there are more of them."""
    readings = [replace(reading, kind="cpu") if reading.rank else reading for reading in nodes()]
    assert [finding.rank for finding in find_faults(readings, SLOW)] == [1, 2, 3, 4, 5]


def test_of_two_ranks_the_faster_counts_and_what_is_of_a_node_is_said_once() -> None:
    slower = [replace(reading, product_s=1e-3 * (1 + reading.rank), link_s=None) for reading in nodes(2)]
    assert [finding.rank for finding in find_faults(slower, SLOW)] == [1]
    full = find_faults([replace(reading, run_dir_free_bytes=0) for reading in nodes()], SLOW)
    assert [finding.rank for finding in full] == [0, 2, 4]


def test_a_clock_is_only_as_far_off_as_the_shortest_barrier_allows() -> None:
    """A rank that left one barrier 5 s late, for it was stopped there, has no clock that is off."""
    first = Reading(rank=0, host="a", clocks=((10.0, 1e-3), (11.0, 1e-3)))
    stopped = Reading(rank=1, host="b", clocks=((15.0, 5.0), (11.0, 2e-3)))
    assert clock_off(first, stopped) == (0.0, 2e-3)
    assert find_faults([first, stopped], SLOW) == []
    first = replace(first, clocks=first.clocks[:1])
    assert find_faults([first, replace(stopped, clocks=((15.0, 5.0),))], SLOW) == []
    assert len(find_faults([first, replace(stopped, clocks=((15.0, 1e-3),))], SLOW)) == 1


def test_the_first_bad_rank_is_that_of_status_json() -> None:
    error = BadNode([Finding(5, "node2", "is broken", fatal=True), Finding(7, "node3", "too", fatal=True)])
    assert error.parts() == {"message": str(error), "rank": 5, "host": "node2"}
    assert "rank 5 on node2: is broken; rank 7 on node3: too" in str(error)


def test_the_product_is_the_known_one_and_takes_no_random_numbers() -> None:
    product, state = Product(torch.device("cpu")), torch.random.get_rng_state()
    assert 0 < product.seconds() < 10
    assert product.is_right()
    assert torch.equal(product.result.double(), product.left.double() @ product.left.double().T)
    product.result[17, 4] += 1
    assert not product.is_right()
    assert torch.equal(state, torch.random.get_rng_state())


def test_too_few_gpus_are_named_before_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rank=11, local_rank=3, size=16, device=torch.device("cuda", 3), local_size=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(BadNode, match=rf"rank 11 on {HOST}: it is number 3 of 4 ranks on this machine, where 3 GPUs can be seen"):
        preflight.require_gpu(world)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    preflight.require_gpu(world)


def break_one(fault: str, folder: Path) -> Any:
    """Return a patch that makes this rank's device, sum, link or clock wrong, on what is really computed."""
    seconds, reduce, exchange, now = Product.seconds, dist.all_reduce, dist.batch_isend_irecv, time.time

    def miscalculate(product: Product) -> float:
        taken = seconds(product)
        product.result[7, 11] += 1
        return taken

    def missum(tensor: torch.Tensor, **options: Any) -> None:
        reduce(tensor, **options)
        tensor[-1] += float(len(tensor) > 1)

    def misreceive(pair: list[dist.P2POp]) -> list[Any]:
        for work in exchange(pair):
            work.wait()
        pair[1].tensor[-1] += float(pair[1].peer == 3)
        return []

    def pause(product: Product) -> float:
        time.sleep(0.1)
        return 0.1 + seconds(product)

    if fault in ("product", "slow"):
        return mock.patch.object(Product, "seconds", miscalculate if fault == "product" else pause)
    if fault == "sum":
        return mock.patch.object(dist, "all_reduce", missum)
    if fault == "link from rank 3":
        return mock.patch.object(dist, "batch_isend_irecv", misreceive)
    return mock.patch.object(time, "time", side_effect=lambda: now() + 60)


MESHES = {2: Mesh(shard=2), 3: Mesh(shard=3), 4: Mesh(context=2, tensor=2)}


def try_nodes(world: World, folder: Path, fault: str) -> tuple[Any, ...]:
    """Pre-flight of real ranks, of which rank 1 has a fault: what each returns or raises, and the seconds it took."""
    broken, place = world.rank == 1 and fault, folder
    if broken and fault == "disk":
        (folder / "file").touch()
        place = folder / "file" / "logs"
    began, state = time.perf_counter(), torch.random.get_rng_state()
    try:
        with break_one(fault, folder) if broken and fault != "disk" else nullcontext():
            readings, findings = check(world, MESHES[world.size], place, folder, SLOW)
    except BadNode as error:
        return "bad", error.parts()
    assert torch.equal(state, torch.random.get_rng_state())
    return "well", [str(finding) for finding in findings], [reading.link_s for reading in readings], time.perf_counter() - began


def test_real_ranks_try_their_nodes_in_a_second(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    group = ranks(3)
    for rank, (outcome, findings, links, seconds) in enumerate(group.call(try_nodes, tmp_path, "")):
        assert (outcome, [said for said in findings if "clock" in said or "wrong" in said]) == ("well", []), rank
        assert all(0 < link < 1 for link in links)
        assert seconds < 5, "0.2 s on two cores that others use too"
    written = json.loads((tmp_path / "preflight.json").read_text())
    assert [reading["rank"] for reading in written["ranks"]] == [0, 1, 2]
    assert all(abs(reading["clock_off_s"][0]) <= reading["clock_off_s"][1] + 1e-3 for reading in written["ranks"]), "one clock"
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_a_wrong_link_is_named_by_its_dimension(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    """Ranks 1 and 3 share rows, and are not next to each other in the ring of all four."""
    said = ranks(4).call(try_nodes, tmp_path, "link from rank 3")
    assert said == [said[0]] * 4
    assert "rank 1 on" in said[0][1]["message"]
    assert "in its context group what it receives from rank 3 is not what that sent" in said[0][1]["message"]


@pytest.mark.parametrize(
    ("fault", "words"), [("product", "multiplies two matrices wrongly"), ("sum", "wrong sum"), ("disk", "cannot be written")]
)
def test_a_bad_node_ends_all_ranks_in_the_same_words(ranks: Callable[[int], Any], tmp_path: Path, fault: str, words: str) -> None:
    said = ranks(3).call(try_nodes, tmp_path, fault)
    assert said == [said[0]] * 3
    assert (said[0][0], said[0][1]["rank"], said[0][1]["host"]) == ("bad", 1, HOST)
    assert f"rank 1 on {HOST}" in said[0][1]["message"]
    assert words in said[0][1]["message"]
    assert json.loads((tmp_path / "preflight.json").read_text())["found"][0]["rank"] == 1


def test_a_slow_device_is_warned_of(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    outcome, findings, *_ = ranks(3).call(try_nodes, tmp_path, "slow")[0]
    assert outcome == "well"
    assert any(f"rank 1 on {HOST}: its device (CPU)" in said for said in findings), findings


def test_a_clock_that_is_off_is_measured(ranks: Callable[[int], Any], tmp_path: Path) -> None:
    """To less than a second of 60; who is warned of is above: all ranks are of one node here, whose first speaks for it."""
    ranks(3).call(try_nodes, tmp_path, "clock")
    off = [reading["clock_off_s"][0] for reading in json.loads((tmp_path / "preflight.json").read_text())["ranks"]]
    assert [round(seconds) for seconds in off] == [0, 60, 0]


def test_a_rank_is_named_after_several_gatherings_and_for_as_long() -> None:
    named, slow = Reported(), {1: Straggler("device", 4.0)}
    for _ in range(3):  # hiccups
        assert [named.update(found) for found in (slow, slow, {})] == [([], [])] * 3
    assert [named.update(slow) for _ in range(IN_A_ROW + 1)] == [([], []), ([], []), ([1], []), ([], [])]
    assert [named.update(found) for found in ({}, {}, {1: Straggler("device", 9.0)})] == [([], [])] * 3
    assert named.slow == {1: Straggler("device", 9.0)}
    assert [named.update({}) for _ in range(IN_A_ROW)] == [([], []), ([], []), ([], [1])]
    assert named.slow == {}


@pytest.mark.parametrize(
    ("data_s", "product_s", "expected"),
    [
        ([0.1, 0.1, 0.1], [1e-3, 1e-3, 1.6e-3], {2: "device"}),
        ([0.1, 0.9, 0.1], [1e-3, 1e-3, 1e-3], {1: "data"}),
        ([0.1, 0.9, 0.1], [1e-3, 3e-3, 1e-3], {1: "device"}),
        ([1e-3, 9e-3, 1e-3], [1e-3, 1e-3, 1e-3], {}),  # nine times nothing
        ([0.1, 0.1, 0.1], [1e-3, 1e-3, 1.4e-3], {}),
        ([0.9, 0.9, 0.9], [9e-3, 9e-3, 9e-3], {}),
    ],
)
def test_who_is_slow(data_s: list[float], product_s: list[float], expected: dict[int, str]) -> None:
    found = find_stragglers(data_s, product_s, step_s=2.0, slow=SLOW, slice_s=0.0)
    assert {rank: slow.what for rank, slow in found.items()} == expected


def step(world: World, mesh: Mesh, steps: int, slow: str) -> list[dict[str, Any]]:
    """Steps of real ranks, of which rank 2 is slow at something."""
    stragglers, state = Stragglers(world, mesh, SLOW), torch.random.get_rng_state()
    rows, is_slow = [], world.rank == 2
    with mock.patch.object(Product, "seconds", return_value=0.02 if is_slow and slow == "device" else 1e-3):
        for number in range(1, steps + 1):
            stragglers.probe(number - 1)
            said = stragglers.gather(number, 0.4 if is_slow and slow == "data" else 0.1, step_s=1.0)
            rows.append(said or {"status": stragglers.entry()})
    stragglers.probe(steps)
    assert torch.equal(state, torch.random.get_rng_state())
    return rows


@pytest.mark.parametrize(
    ("slow", "factor", "mesh", "groups"),
    [
        ("device", 20.0, Mesh(shard=3), {}),
        ("data", 4.0, Mesh(shard=2, context=2), {"groups": ["context group of ranks 2-3"]}),
    ],
)
def test_real_ranks_name_the_slow_one(
    ranks: Callable[[int], Any], slow: str, factor: float, mesh: Mesh, groups: dict[str, list[str]]
) -> None:
    """And the groups of the mesh that it is in, other than that of all ranks."""
    rows, *others = ranks(mesh.size).call(step, mesh, 45, slow)
    nobody, entry = {"status": {}}, {"stragglers": {"ranks": [2], "hosts": [HOST], "what": [slow], "factors": [factor]} | groups}
    assert others == [[nobody] * 45] * (mesh.size - 1), "rank 0 alone writes"
    for number, row in enumerate(rows, 1):
        assert row == (nobody if number < 30 else {"status": entry} if number % EVERY else entry)
    assert ranks(mesh.size).call(step, mesh, 45, "nothing")[0] == [nobody] * 45


def test_probes_take_a_hundredth_of_the_time_however_short_steps_are(ranks: Callable[[int], Any]) -> None:
    """10 ms in steps of 20 ms: after the first steps one in fifty, by all ranks in the same step; they would wait for each other."""
    probed = ranks(3).call(steps_with_probes)
    assert probed[0] == probed[1] == probed[2]
    assert probed[0][:EVERY] == list(range(EVERY))
    assert set(probed[0][EVERY:]) == {50, 100, 150, 200, 250, 300}


def steps_with_probes(world: World) -> list[int]:
    stragglers, probed = Stragglers(world, Mesh(shard=world.size), SLOW), []
    with mock.patch.object(Product, "seconds", side_effect=lambda: 0.01):
        for step in range(301):
            before = stragglers.product.seconds.call_count  # type: ignore[attr-defined]
            stragglers.probe(step)
            if stragglers.product.seconds.call_count > before:  # type: ignore[attr-defined]
                probed.append(step)
            stragglers.gather(step + 1, 0.0, 0.02 * (1 + 0.1 * (world.rank - 1)))
    return probed


def test_stragglers_pass_from_the_status_and_stay_in_a_failure(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.set_status(State.running, step=3, stragglers={"ranks": [1]})
    assert status_of(tmp_path)["stragglers"] == {"ranks": [1]}
    attempt.set_status(State.running, step=4)
    assert "stragglers" not in status_of(tmp_path)
    attempt.set_status(State.running, step=5, stragglers={"ranks": [1]})
    attempt.record_failure({"rank": 0}, at=1.0)
    assert status_of(tmp_path)["stragglers"] == {"ranks": [1]}


def test_a_watchdog_names_the_host_of_whom_it_names() -> None:
    """Not its own; none where the rank never began."""
    for beat, host in ((Beat(rank=1, host="node7", limit_s=1.0), "node7"), (Beat(rank=1, limit_s=1.0), None)):
        error = {"rank": 0, "host": HOST} | Blockage([beat], False, []).error(9.0, "why")
        assert (error["rank"], error["host"]) == (1, host)


def test_a_factor_that_names_everybody_is_refused(tmp_path: Path) -> None:
    config = make_job(compose(["+exp=quickstart_base", f"run_dir={tmp_path}/out"])).run
    config.limits.slow_node = 1.0
    with pytest.raises(ConfigError, match=r"limits.slow_node"):
        validate(config)


FAULT = """
# The device of rank 1 gets one element of the product wrong.
import importlib.util, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "trainers.health.preflight":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            seconds = module.Product.seconds
            def wrong(self):
                taken = seconds(self)
                self.result[7, 11] += 1
                return taken
            module.Product.seconds = wrong
        spec.loader.exec_module = exec_module
        return spec

if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_a_device_that_computes_wrongly_ends_the_run_before_weights_are_read(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """The weights are damaged too, which nobody notices: they are not read."""
    run_dir, damaged = tmp_path / "run", damaged_bases(base, tmp_path)["truncated"][0]
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults" / "sitecustomize.py").write_text(FAULT)
    variables = environment(cache) | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "faults"), str(ROOT)])}
    with started(arguments(damaged, chats, run_dir), variables) as process:
        said = finish(process, run_dir)
    error, words = status_of(run_dir)["error"], f"rank 1 on {HOST}: its device (CPU) multiplies two matrices wrongly"
    assert (error["rank"], error["host"]) == (1, HOST)
    assert words in error["message"]
    assert said.count(words) == 1
    assert said.strip().splitlines()[-1].startswith("the run failed (first on rank 1): pre-flight")
    assert "Traceback" not in said
    assert json.loads((run_dir / "logs" / "attempt-1" / "preflight.json").read_text())["found"][0]["rank"] == 1


def test_every_attempt_begins_with_it(finished: Path) -> None:
    written = json.loads((finished / "logs" / "attempt-1" / "preflight.json").read_text())
    assert [reading["rank"] for reading in written["ranks"]] == [0, 1]
    assert "pre-flight: " in (finished / "logs" / "attempt-1" / "rank-0.log").read_text()


DISTURB = """
import os, signal, sys, time
while True:
    for number, seconds in ((signal.SIGSTOP, 0.02), (signal.SIGCONT, 0.001)):
        for pid in sys.argv[1:]:
            os.kill(int(pid), number)
        time.sleep(seconds)
"""


@contextmanager
def slowed(run_dir: Path, rank: int) -> Iterator[None]:
    """Let a rank run now and then only, as another job on its node might."""
    pids = pids_of(run_dir, rank)
    process = subprocess.Popen([sys.executable, "-c", DISTURB, *map(str, pids)])
    try:
        yield
    finally:
        process.kill()
        process.wait()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def wait(condition: Callable[[], bool]) -> None:
    """Look now and then only: two ranks are all that two cores can bear."""
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.5)


def gatherings(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir) if row["step"] % EVERY == 0]


@pytest.mark.soak
def test_a_rank_that_is_slow_for_a_while_is_named_meanwhile(base: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    """A factor of 2, since the cores that these ranks run on may be shared; the rank runs a millisecond in twenty, or a few of them."""
    run_dir = tmp_path / "run"
    line = arguments(base, chats, run_dir, "train.steps=100000", "train.eval_every=null", "limits.slow_node=2")
    with started(line, environment(cache)) as process:
        wait_for_step(run_dir, 100, process)
        assert not any("stragglers" in row for row in read_rows(run_dir))
        assert "stragglers" not in status_of(run_dir)
        with slowed(run_dir, rank=1):
            wait(lambda: "stragglers" in gatherings(run_dir)[-1])
            wait(lambda: "stragglers" in status_of(run_dir))
            named = [status_of(run_dir)["stragglers"], gatherings(run_dir)[-1]["stragglers"]]
        assert [(said["ranks"], said["hosts"], said["what"]) for said in named] == [([1], [HOST], ["device"])] * 2
        assert all(said["factors"][0] > 2 for said in named)
        wait(lambda: "stragglers" not in gatherings(run_dir)[-1])
        wait(lambda: "stragglers" not in status_of(run_dir))
        process.terminate()
        finish(process, run_dir, expect=75)
    logged = (run_dir / "logs" / "attempt-1" / "rank-0.log").read_text()
    for words in ("slows all down: its device takes", "slows nobody down any more"):
        assert logged.count(f"rank 1 on {HOST} {words}") == 1
