"""launch.generators: nodes of a SLURM job next to those of its ranks, each with a process that writes answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from launcher.config import Backend, JobConfig, LaunchConfig, world_size
from trainers.config.derived import SAMPLED
from trainers.config.errors import ConfigError, plural
from trainers.generate.elsewhere import SEAT

NONE = "launch.generators=0, which has one on each node of ranks"


def require_place(config: JobConfig) -> None:
    """Raise ConfigError where generators cannot have nodes of their own, or some would have nothing to do."""
    launch, rl, count = config.launch, config.rl, config.launch.generators
    if count < 0:
        raise ConfigError("launch.generators", count, "must be 0 or greater", "launch.generators=0")
    if config.objective.name not in SAMPLED:
        reason = f"generators write answers, and objective={config.objective.name} trains on rows that are there"
        raise ConfigError("launch.generators", count, reason, f"launch.generators=0, or objective={SAMPLED[0]}")

    def refuse(reason: str, remedy: str) -> None:
        raise ConfigError("launch.generators", count, reason, f"{remedy}, or {NONE}")

    if launch.backend is not Backend.slurm:
        servers = ", or rl.servers=[http://HOST:8000] with servers that run already"
        refuse(f"launch={launch.backend} has no nodes but those of its ranks", f"launch=slurm{servers}")
    if rl.servers or rl.vllm is not None:
        path = "rl.servers" if rl.servers else "rl.vllm"
        refuse(
            f"its nodes run plain transformers, and {path} names others who write the answers", f"{path}={'[]' if rl.servers else 'null'}"
        )
    if launch.container is not None:
        refuse("ranks start generators by srun, which is not to be found in launch.container", "launch.container=null")
    if count > world_size(launch):
        refuse(
            f"each is asked by a rank of its own, and there are {plural(world_size(launch), 'rank')}",
            f"launch.generators={world_size(launch)}",
        )
    answers = config.train.global_batch * rl.steps_per_rollout
    if (count - 1) * rl.batch >= answers:
        reason = f"each writes rl.batch={rl.batch} answers at once, and a rollout has {answers}: some would write none"
        refuse(reason, f"rl.batch={answers // count}" if count <= answers else f"launch.generators={math.ceil(answers / rl.batch)}")


def step_words(launch: LaunchConfig) -> list[str]:
    """Return the words of srun that keep ranks to the first nodes of the job; none where all nodes are theirs."""
    return ["--relative=0", f"--nodes={launch.nodes}", f"--ntasks={world_size(launch)}"] if launch.generators else []


def words(host: str) -> list[str]:
    """Return the command that starts a generator's process on a node of this job: all of the node is for it."""
    own = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}", "--mem=0", "--cpu-bind=none", "--mpi=none"]
    return ["srun", "--quiet", "--overlap", "--unbuffered", *own]


def apart(launch: LaunchConfig, hosts: Sequence[str], of_ranks: Sequence[str]) -> list[str]:
    """Return the nodes of a job that are for generators, those without ranks; raises ConfigError where they are not as many."""
    found = [host for host in hosts if host not in of_ranks]
    if len(found) != launch.generators:
        reason = f"the job has {plural(len(found), 'node')} without ranks ({','.join(found)}): two sources contradict each other"
        raise ConfigError("launch.generators", launch.generators, reason, "the launcher's command again, which submits the job anew")
    return found


def variable(rank: int, hosts: Sequence[str]) -> dict[str, str]:
    """Return what tells a rank of the generator that it starts and asks: one each of the first ranks, and none the others."""
    seat = {"host": hosts[rank], "words": words(hosts[rank])} if rank < len(hosts) else {}
    return {SEAT: json.dumps(seat)}


def lines(launch: LaunchConfig) -> list[str]:
    """Return where each generator is, a line each, for a job that has no nodes yet."""
    hosts = [f"<node {launch.nodes + number + 1} of the job>" for number in range(launch.generators)]
    return [f"# generator {number}, asked by rank {number}: {' '.join(words(host))} ..." for number, host in enumerate(hosts)]
