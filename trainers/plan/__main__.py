"""python -m trainers.plan: plan the runs that standard input names as JSON; the launcher's mode=plan starts it."""

# ruff: noqa: E402

from __future__ import annotations

import gc

gc.disable()  # as in trainers/__main__.py: nothing that an import makes is garbage

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan is the same wherever it is made
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import transformers
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trainers.config.errors import ConfigError
from trainers.plan.auto import plan_of
from trainers.plan.plan import Plan, Simulations
from trainers.plan.request import UNFIT, Request, from_dict
from trainers.plan.say import say, say_all, say_change
from trainers.processes import never_fail
from trainers.rundir import paths
from trainers.rundir.ending import Exit
from trainers.rundir.files import write_json

gc.enable()

ENOUGH = 4
"""Changes that make a run fit, after which no more are looked for."""


def main() -> int:
    """Plan, print and write; returns 0 where every run fits, 3 where one does not, 2 for bad input."""
    never_fail()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    asked = json.load(sys.stdin)
    requests = [from_dict(item) for item in asked["requests"]]
    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    try:
        if asked["command"] == "choose":
            print(json.dumps(choose(requests[0])))
            return Exit.done
        if asked["command"] == "meshes":
            from trainers.plan.meshes import choose as choose_mesh

            known: Simulations = {}
            print(json.dumps([choose_mesh(request, known) for request in requests]))
            return Exit.done
        if asked["command"] == "changes":
            return try_changes(requests[0], out)
        plans = plan_all(requests)
    except ConfigError as error:
        Path(asked["error"]).write_text(json.dumps(error.parts()))
        return Exit.bad_input
    unfit = [plan for plan in plans if plan.verdict == "does not fit"]
    if asked["command"] == "plan" or unfit:
        say(plans[0], out) if len(plans) == 1 else say_all(plans, out)
    return UNFIT if unfit else Exit.done


def choose(request: Request) -> dict[str, str]:
    """Return what train.activations=auto takes on the one device of a request, `chosen`, and the `reason`."""
    plan = plan_of(request.base, request.hardware, request.plan, {})
    [chosen] = plan.activations.values()
    return {"chosen": chosen, "reason": plan.notes[-1].partition("; ")[2]}


def plan_all(requests: list[Request]) -> list[Plan]:
    """Plan each request and write what it asks for; shows how far it is on a terminal."""
    known: Simulations = {}
    plans = []
    with _bar() as bar:
        task = bar.add_task("", total=len(requests))
        for number, request in enumerate(requests, 1):
            bar.update(task, description=f"planning {number} of {len(requests)}: {Path(request.base.run['run_dir']).name}")
            plan = plan_of(request.base, request.hardware, request.plan, known)
            plan.notes += request.notes
            plans.append(plan)
            if request.write:
                write(plan, asdict(request))
            bar.advance(task)
    return plans


def write(plan: Plan, asked: dict[str, Any]) -> None:
    """Write plan.json, with what was asked for, and plan.svg into the run directory."""
    from trainers.plan.picture import draw

    folder = Path(plan.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", plan.run_dir, f"cannot be made: {error.strerror}", "run_dir=DIR that you may write") from error
    seconds = plan.run_seconds()
    hours = None if seconds is None else [second * plan.place.devices / 3600 for second in seconds]
    told = {"verdict": plan.verdict, "tokens_per_day": plan.tokens_per_day(), "run_seconds": seconds, "gpu_hours": hours}
    write_json(folder / paths.PLAN, asdict(plan) | told | {"asked": asked})
    draw(plan, folder / paths.PLAN_PICTURE)


def try_changes(request: Request, out: Console) -> int:
    """Try each change in order until enough of them fit; prints those that do, the cheapest first. Returns 0 where one does."""
    known: Simulations = {}
    base = plan_of(request.base, request.hardware, request.plan, known)
    fitting: list[Plan] = []
    with _bar() as bar:
        task = bar.add_task("", total=len(request.changes))
        for change in request.changes:
            bar.update(task, description=f"trying {' '.join(change.overrides)}")
            try:
                plan = plan_of(change, request.hardware, request.plan, known)
            except ConfigError:
                continue  # the change asks for what the model does not have
            finally:
                bar.advance(task)
            if plan.verdict != "does not fit":
                fitting.append(plan)
            if len(fitting) == ENOUGH:
                break
    if not fitting:
        out.print(f"none of {len(request.changes)} changes that were tried makes it fit: more nodes, or a smaller model")
        return UNFIT
    out.print("changes that make it fit, each tried in the same way; add one to the command:")
    for plan in sorted(fitting, key=_cost):
        say_change(plan, base, out)
    return Exit.done


def _cost(plan: Plan) -> tuple[bool, float]:
    """Order by what training whole parameters costs; what trains less than was asked for comes last."""
    return plan.method != "none", 0.0 if plan.step_seconds is None else plan.step_seconds[1] * plan.place.devices


def _bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    sys.exit(main())
