"""train.activations=auto: of what may be kept of a block for backward, the cheapest with which a run fits."""

from __future__ import annotations

import dataclasses

from trainers.config.activations import offered
from trainers.config.choices import Activations
from trainers.config.errors import ConfigError
from trainers.config.schema import parse
from trainers.plan.plan import Plan, Simulations, make_plan
from trainers.plan.request import HardwareConfig, PlanConfig, Variant
from trainers.units import in_bytes


def plan_of(variant: Variant, hardware: list[HardwareConfig], settings: PlanConfig, known: Simulations) -> Plan:
    """Plan one run, `auto` replaced for each device; raises ConfigError as `make_plan` does."""
    config = parse(variant.run)
    if config.train.activations is not Activations.auto:
        return make_plan(variant, hardware, settings, known)
    tried: dict[str, Plan] = {}
    for how in offered(config):
        train = variant.run["train"] | {"activations": str(how)}
        try:
            tried[str(how)] = make_plan(dataclasses.replace(variant, run=variant.run | {"train": train}), hardware, settings, known)
        except ConfigError:
            if not tried:
                raise  # of the run itself
            continue  # what this model's blocks do does not go with it
        if all(choice_of(tried, device)[1] in ("fits", "unknown") for device in tried[str(how)].verdicts):
            break
    return _together(tried)


def choice_of(tried: dict[str, Plan], device: str) -> tuple[str, str]:
    """Return the cheapest with which a run fits a device, and its verdict; the one that needs least where none does."""
    for wanted in (("fits", "unknown"), ("tight",)):
        for how, plan in tried.items():
            if plan.verdicts[device] in wanted:
                return how, plan.verdicts[device]
    how = min(tried, key=lambda name: tried[name].needed[device])
    return how, tried[how].verdicts[device]


def _together(tried: dict[str, Plan]) -> Plan:
    """Return the plan for the smallest device that the run fits, with what each device needs as it is chosen for that."""
    devices = list(next(iter(tried.values())).verdicts)
    chosen = {device: choice_of(tried, device)[0] for device in devices}
    told = next((device for device in devices if tried[chosen[device]].verdicts[device] != "does not fit"), devices[-1])
    plan = tried[chosen[told]]
    verdicts = {device: tried[chosen[device]].verdicts[device] for device in devices}
    needed = {device: tried[chosen[device]].needed[device] for device in devices}
    short = "" if "does not fit" not in verdicts.values() else plan.host_short
    note = f"train.activations=auto: what follows is of {chosen[told]}; " + "; ".join(_why(tried, device) for device in devices)
    return dataclasses.replace(plan, verdicts=verdicts, needed=needed, activations=chosen, host_short=short, notes=[*plan.notes, note])


def _why(tried: dict[str, Plan], device: str) -> str:
    """Say what a device gets, and what the cheaper ones would need of it."""
    how = choice_of(tried, device)[0]
    cheaper = [f"{name} needs {in_bytes(plan.needed[device])}" for name, plan in list(tried.items())[: list(tried).index(how)]]
    words = f"{device} takes {how} ({in_bytes(tried[how].needed[device])})"
    capacity = tried[how].capacity[device]
    return words + (f", as {', '.join(cheaper)} of {in_bytes(capacity)}" if cheaper else "")
