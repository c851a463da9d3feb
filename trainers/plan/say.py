"""A plan in words: one run in full, or a table of many."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from trainers.config.errors import plural
from trainers.plan.plan import WORDS, Plan
from trainers.units import in_bytes, in_digits, in_time

COLOURS = {"fits": "green", "tight": "yellow", "unknown": "yellow", "does not fit": "red"}


def say(plan: Plan, console: Console) -> None:
    """Print one plan."""
    place = plan.place
    kind = "GPU" if place.gpus else "CPU rank"
    console.print(
        f"[bold]{plan.name}[/]: {plan.model}, {plan.method}, {plan.engine}, {plan.precision}, on {plural(place.nodes, 'node')} of "
        f"{plural(place.ranks_per_node, kind)}" + (f", and {plural(place.generators, 'node')} for generators" if place.generators else ""),
        soft_wrap=True,
    )
    for name, verdict in plan.verdicts.items():
        of = f"{in_bytes(plan.needed[name])} of {in_bytes(plan.capacity[name])}" if plan.capacity[name] else in_bytes(plan.needed[name])
        console.print(f"  [{COLOURS[verdict]}]{verdict:<12}[/] {name:<8} {of} a rank")
    console.print()
    console.print(_memory(plan))
    rows = Table.grid(padding=(0, 2))
    for row in (*_size(plan), *_host(plan), *_saving(plan), *_work(plan), *_cost(plan)):
        rows.add_row(*row)
    console.print(rows)
    for note in (*filter(None, [plan.host_short, plan.generator_short]), *plan.notes):
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    if plan.assumptions:
        console.print("\nassumptions of the time: " + "; ".join(plan.assumptions), soft_wrap=True, highlight=False, style="dim")


def _memory(plan: Plan) -> Table:
    table = Table("memory of a rank at its peak", "bytes", title=plan.peak_at, title_justify="left", box=None, padding=(0, 2))
    table.columns[1].justify = "right"
    for kind, words in WORDS.items():
        table.add_row(words, in_bytes(plan.peak.get(str(kind), 0.0)))
    table.add_row("tensors together", in_bytes(sum(plan.peak.values())))
    name = next(iter(plan.needed))
    next_to = 0.0 if plan.answers is None else plan.answers.of_rank(plan.place)
    outside = plan.needed[name] - sum(plan.peak.values()) - plan.slack - next_to
    if plan.place.gpus:
        table.add_row("slack of torch's allocator (its rules, replayed for this step)", in_bytes(plan.slack))
        table.add_row("outside of it: CUDA context and NCCL (conf/hardware)", in_bytes(outside))
    else:
        table.add_row("the process itself", in_bytes(outside))
    if plan.answers is not None:
        if not plan.place.generators:
            table.add_row("its share of its node's generator", in_bytes(plan.answers.bytes / plan.place.ranks_per_node))
        if own := plan.answers.reference_of_rank(plan.place):
            table.add_row("its share of the frozen reference", in_bytes(own))
        if plan.answers.judges_bytes:
            table.add_row("reward models, on the first rank", in_bytes(plan.answers.judges_bytes))
    return table


def _size(plan: Plan) -> list[tuple[str, str]]:
    trained = "all trained" if plan.trainable == plan.parameters else f"{plan.trainable:,} trained ({plan.trainable / plan.parameters:.3%})"
    rows = [("parameters", f"{plan.parameters:,}, {trained}"), ("attention", plan.attention)]
    if plan.critic is None:
        return rows
    of = plan.critic
    return [*rows, ("the critic", f"{of.parameters:,} parameters, {of.trainable:,} trained, peak learning rate {of.learning_rate}")]


def _host(plan: Plan) -> list[tuple[str, str]]:
    total = sum(plan.host.values())
    limit = f" of {in_bytes(plan.host_limit)}" if plan.host_limit else ""
    parts = " + ".join(f"{in_bytes(size)} {name}" for name, size in plan.host.items())
    staged = f", and {in_bytes(plan.staged)} for a copy of the state while it is saved" if plan.staged else ""
    return [("host memory of a node", f"{in_bytes(total)}{limit} ({parts}{staged})")] if plan.place.gpus else []


def _saving(plan: Plan) -> list[tuple[str, str]]:
    words = in_bytes(plan.checkpoint_bytes)
    if plan.save_seconds is not None:
        late = plan.save_seconds > plan.place.save_s
        words += f", {plan.save_seconds:,.0f} s to write"
        words += (
            f": longer than the {plan.place.save_s:,.0f} s before a kill" if late else f" (of {plan.place.save_s:,.0f} s before a kill)"
        )
    return [("a checkpoint", words), ("the export", in_bytes(plan.export_bytes))]


def _work(plan: Plan) -> list[tuple[str, str]]:
    tokens = plan.global_batch * plan.data.row_tokens
    rows = [("peak learning rate", plan.learning_rate)]
    rows += [("a step", f"{plan.global_batch} rows, {tokens:,} tokens where all are full, {plan.flops:.3g} FLOPs over all ranks")]
    sent = "; ".join(f"{in_bytes(size)} by {name}" for name, size in plan.sent.items())
    return [*rows, ("sent by a rank in a step", sent or "nothing")]


def _cost(plan: Plan) -> list[tuple[str, str]]:
    rows = [("training data", _data(plan))]
    if plan.steps is not None:
        rows.append(("steps", f"{plan.steps:,}"))
    rows += [*_reference(plan), *_answers(plan)]
    if plan.step_seconds is None:
        return [*rows, ("time", "name a device: hardware=h100")] if plan.place.gpus and len(plan.verdicts) > 1 else rows
    fast, slow = plan.step_seconds
    rows.append(("seconds a step", f"{fast:.3g} to {slow:.3g}{_by_part(plan)}"))
    if (day := plan.tokens_per_day()) is not None:
        rows.append(("tokens a day", " to ".join(map(in_digits, day))))
    if (seconds := plan.run_seconds()) is not None:
        hours = [second / 3600 for second in seconds]
        rows += [("the whole run", f"{in_time(seconds[0])} to {in_time(seconds[1])}, {_spent(plan, hours)}")]
    return rows


def _reference(plan: Plan) -> list[tuple[str, str]]:
    """Say what the reference of preferences takes, next to a second model."""
    if plan.reference is None:
        return []
    seconds, kept = plan.reference.seconds, plan.reference.disk_bytes
    words = "one pass before the first step"
    words += f", {in_time(seconds[0])} to {in_time(seconds[1])}" if seconds is not None else ""
    words += f", {in_bytes(kept)} on disk" if kept is not None else ""
    return [("the reference", f"{words}; a second model would take {in_bytes(plan.reference.second_model_bytes)} of each rank")]


def _answers(plan: Plan) -> list[tuple[str, str]]:
    """Say what a run's own answers take."""
    if plan.answers is None:
        return []
    found = plan.answers
    sizes = {"weights": found.weights_bytes, "keys and values": found.cache_bytes, "work": found.work_bytes}
    parts = " + ".join(f"{in_bytes(size)} {name}" for name, size in sizes.items())
    asked = f"{found.answers:,} answers a step, {found.batch:,} at once in {plural(found.rounds, 'round')} a rollout"
    where = f"{plural(found.generators, 'generator')}, one a node" if found.generators > 1 else "one generator"
    where += " of its own" if plan.place.generators > 1 else ", on a node of its own" if plan.place.generators else ""
    return [("the answers", f"{asked}, by {where}"), ("a generator", f"{in_bytes(found.bytes)} ({parts})")]


def _by_part(plan: Plan) -> str:
    """Return the parts of a step's seconds where it has answers of its own."""
    if plan.answers is None:
        return ""
    return ": " + ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in plan.answers.seconds.items() if high)


def _spent(plan: Plan, hours: list[float]) -> str:
    low, high = (hour * plan.place.devices for hour in hours)
    price = "" if plan.price is None else f", {low * plan.price:,.0f} to {high * plan.price:,.0f} at {plan.price:g} a GPU-hour"
    return f"{low:,.3g} to {high:,.3g} GPU-hours{price}" if high < 1000 else f"{low:,.0f} to {high:,.0f} GPU-hours{price}"


def _data(plan: Plan) -> str:
    data = plan.data
    tokens = "" if data.tokens is None else f"{data.tokens:,.0f} tokens in {data.rows:,.0f} rows a pass: "
    return f"{tokens}{data.source}"


def say_all(plans: list[Plan], console: Console) -> None:
    """Print one row a plan."""
    table = Table("run", "verdict", "GiB a rank", "highest in", "trained", "s a step", "GPU-hours")
    for column in (2, 4, 5, 6):
        table.columns[column].justify = "right"
    for plan in plans:
        name = plan.run_dir.rpartition("/")[2]
        seconds, whole = plan.step_seconds, plan.run_seconds()
        fits = [device for device, verdict in plan.verdicts.items() if verdict != "does not fit"]
        verdict = plan.verdict if len(plan.verdicts) == 1 else (", ".join(fits) or "does not fit")
        table.add_row(
            name,
            f"[{COLOURS[plan.verdict]}]{verdict}[/]",
            f"{plan.most_needed / 2**30:,.1f}",
            plan.peak_at,
            f"{plan.trainable:,}",
            "" if seconds is None else f"{seconds[0]:.3g} to {seconds[1]:.3g}",
            "" if whole is None else f"{whole[0] * plan.place.devices / 3600:,.3g} to {whole[1] * plan.place.devices / 3600:,.3g}",
        )
    console.print(table)


def say_change(plan: Plan, base: Plan, console: Console) -> None:
    """Print a change that was tried, as overrides to paste, with what it needs and how a step's time changes."""
    slower = ""
    if plan.step_seconds is not None and base.step_seconds is not None:
        slower = f", {plan.step_seconds[1] * plan.place.devices / (base.step_seconds[1] * base.place.devices):.2f} x the GPU-hours a step"
    rate = "" if plan.learning_rate == base.learning_rate else f", learning rate {plan.learning_rate}"
    verdict = plan.verdict
    line = f"  [{COLOURS[verdict]}]{verdict:<12}[/] {in_bytes(plan.most_needed)}{slower}{rate}: {' '.join(plan.overrides)}"
    console.print(line, soft_wrap=True)
