"""`python -m launcher`: compose, check, freeze, start. Bad input ends with one message and exit code 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Protocol

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launcher import config as schema
from launcher import help as help_text
from launcher import local, plan, presets, slurm, sweep, torchrun, ways
from launcher.compose import checked, compose_with, explained
from launcher.config import Backend, JobConfig, Mode, ranks_per_node, validate_machine, world_size
from launcher.freeze import freeze
from launcher.job import Job, frozen_text, make_job
from launcher.meshes import settled
from launcher.report import print_summary
from trainers.config.choices import MeshChoice
from trainers.config.derived import rows_words
from trainers.config.errors import ConfigError, plural
from trainers.config.mesh import mesh_of, seats_of
from trainers.processes import never_fail
from trainers.rundir.attempt import read_state
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import storage_says


class Starter(Protocol):
    """What a backend's module offers."""

    def submit(self, job: Job) -> int:
        """Run a frozen job, or hand it to a scheduler; returns the launcher's exit code."""

    def commands(self, job: Job) -> list[str]:
        """Return what dry_run prints: the exact command of every rank."""


BACKENDS: dict[Backend, Starter] = {Backend.local: local, Backend.torchrun: torchrun, Backend.slurm: slurm}
WHAT_TO_TYPE = """Nothing to run yet. Try one of
  python -m launcher +exp=quickstart_base                                  a first run: minutes, no network, no GPU
  python -m launcher model=hf model.id=DIR data=files data.path=FILE run_dir=OUT
  python -m launcher --help                                                presets, experiments, every field"""


def main() -> int:
    """Run the command line; returns the exit code that --help documents."""
    never_fail()
    if len(sys.argv) == 1:
        print(WHAT_TO_TYPE, file=sys.stderr)
        return Exit.bad_input
    arguments = get_args_parser().parse_args()
    sweep.prepare_hydra()
    schema.register()
    help_text.register(arguments.config_dir)
    for file in presets.hidden(arguments.config_dir):
        print(f"{file} is not used: fulltune has a preset of that name; give yours another", file=sys.stderr)
    if not arguments.help and any(text.lstrip("+").startswith("pipeline=") for text in arguments.overrides):
        from launcher import pipeline

        return pipeline.main(arguments)
    with explained(arguments.overrides, arguments.config_dir):
        ways.require_ours(arguments)
        try:
            composed = compose_command_line()
        except KeyboardInterrupt:
            return Exit.interrupted
        except Exception:
            sweep.forget()
            raise
        if composed is None:
            return sweep.worst(sweep.codes)
        config = checked(composed)
    with explained(arguments.overrides, arguments.config_dir, kinds=(ConfigError,)):
        try:
            return begin(config, lambda more: compose_with(arguments.overrides, more, arguments.config_dir))
        except KeyboardInterrupt:
            return Exit.interrupted
        except OSError as error:
            if (said := storage_says(error, Path(config.run_dir))) is None:
                raise
            print(f"error: {said}", file=sys.stderr)
            return Exit.failed


def compose_command_line() -> DictConfig | None:
    """Let Hydra read sys.argv; None where it only printed (--help, --cfg, --info), or has run a sweep (--multirun)."""
    composed: list[DictConfig] = []

    @hydra.main(config_path=str(presets.CONF), config_name="config", version_base="1.3")
    def take(config: DictConfig) -> None:
        ways.require_own_settings(HydraConfig.get())
        composed.append(config)

    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us as exceptions, instead of Hydra printing them
    try:
        take()
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
    return composed[0] if composed else None


def begin(config: JobConfig, compose: plan.Compose | None = None) -> int:
    """Start a checked job, continue it, or say what starting it would do; returns the exit code."""
    job, backend = make_job(config), BACKENDS[config.launch.backend]
    if job.run.engine.mesh is MeshChoice.auto:
        [job] = settled([job])
    if config.mode is Mode.dry_run:
        print(dry_run(job, backend.commands(job)))
        return Exit.done
    if config.mode is Mode.plan:
        return plan.plan([job], compose)
    validate_machine(job.launch)
    waiting = slurm.require_free(job)
    if config.launch.backend is Backend.slurm and read_state(job.run_dir) != State.done and not waiting:
        plan.require_fit([job], compose)
    freeze(job)
    if read_state(job.run_dir) == State.done:
        print(f"{job.run_dir} is done already: nothing to start")
        print_summary(job.run_dir)
        return Exit.done
    return backend.submit(job)


def dry_run(job: Job, commands: list[str]) -> str:
    """Return the frozen config and every command, as text."""
    steps = plural(job.run.train.steps, "step") if job.run.train.steps else "steps known once the data are prepared"
    ranks = world_size(job.launch)
    rows = rows_words(job.run.train, mesh_of(job.run.engine, ranks))
    size = f"# {plural(ranks, 'rank')} on {plural(job.launch.nodes, 'node')}, {rows}, {steps}"
    size += f"; {plural(job.launch.generators, 'generator')}, one a node of its own" if job.launch.generators else ""
    seats = seats_of(mesh_of(job.run.engine, ranks), ranks_per_node(job.launch))
    seats += [f"# engine.mesh=auto: {job.mesh}"] if job.mesh else []
    return "\n".join([f"# {job.config_path}", frozen_text(job.run), size, *seats, *commands])


if __name__ == "__main__":
    sys.exit(main())
