"""The stages of a pipeline side by side: what each trained on, what it gave over the one before, and what it made the model forget."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.stages import command_words, names_of, read_record, stages_of
from tools.compare.gather import Run, load
from tools.compare.page import LONGEST, OPEN, SHOWN, document, shown, table
from tools.compare.plots import Picture, bars, chain
from tools.compare.say import Grid, turned
from tools.evaluate.intervals import Estimate, verdict
from tools.evaluate.record import FOLDER, are_of_the_same, loss_apart, score_apart, task_metric
from tools.evaluate.say import NOTHING, Form, interval, marked, plus_minus
from tools.markdown import cell_of
from tools.runs import is_run
from trainers.config.errors import ConfigError, plural
from trainers.rundir.ending import State
from trainers.rundir.files import try_json
from trainers.units import in_time


@dataclass(kw_only=True)
class Part:
    """A stage that has a run, as far as its directory says."""

    name: str
    run: Run
    seconds: float
    """At work, its commands included."""
    ended: bool
    commands: list[str]
    """What its commands have made, in words."""
    gates: list[tuple[str, bool]] = field(default_factory=list)
    """Rules and whether they were kept; empty without a gate."""

    def score(self, metric: str | None) -> Estimate | None:
        """Return the task's score after the stage."""
        return None if metric is None or self.run.ours is None else self.run.ours.score(metric)

    def score_before(self, metric: str | None) -> Estimate | None:
        """Return the task's score of the model that the stage began with."""
        return None if metric is None or self.run.base is None else self.run.base.score(metric)

    def gave(self, metric: str | None) -> Estimate | None:
        """Return by how much the score has changed, over the same documents."""
        if metric is None or self.run.ours is None or self.run.base is None:
            return None
        return score_apart(self.run.ours, self.run.base, metric)

    def general(self) -> Estimate | None:
        """Return the loss on general text, in nats a token."""
        return None if self.run.ours is None else self.run.ours.loss("general")

    def forgot(self) -> Estimate | None:
        """Return by how much the loss on general text has changed, in nats a token."""
        if self.run.ours is None or self.run.base is None:
            return None
        return loss_apart(self.run.ours, self.run.base, "general")


@dataclass(kw_only=True)
class Story:
    """A pipeline's stages."""

    name: str
    folder: Path
    parts: list[Part]
    planned: int
    """Stages with a run that the pipeline has."""
    metric: str | None
    """The task's score."""


def tell(folder: Path) -> Story:
    """Read a pipeline's directory; raises ConfigError where no run of it has begun."""
    record = read_record(folder)
    stages, state = stages_of(record), record["state"]
    parts = []
    for stage in stages:
        run_dir = folder / stage.name
        if not stage.run or not is_run(run_dir):
            continue
        known = state.get(stage.name, {})
        words = [command_words(text, names_of(stages, stage, folder), "") for text in known.get("before", [])]
        run = load(run_dir, stage.name)
        ended = _has_ended(run, stage.after, known)
        part = Part(name=stage.name, run=run, seconds=known.get("seconds", 0.0), ended=ended, commands=[])
        part.commands += [line for command in words if (line := _made(command))]
        part.gates += [(str(check["rule"]), bool(check["passed"])) for check in try_json(run_dir / FOLDER / "gate.json").get("checks", [])]
        parts.append(part)
    if not parts:
        raise ConfigError("RUN_DIR", str(folder), "no run of this pipeline has begun", f"python -m launcher +pipeline={record['pipeline']}")
    metrics = [task_metric(part.run.ours) for part in parts if part.run.ours is not None]
    metric = next((metric for metric in metrics if metric is not None), None)
    return Story(name=record["pipeline"], folder=folder, parts=parts, planned=sum(bool(stage.run) for stage in stages), metric=metric)


def _has_ended(run: Run, after: list[str], known: dict[str, Any]) -> bool:
    """Tell whether a stage is done, but for a `compare` of its own, which tells of it and changes nothing."""
    left = after[len(known.get("after", [])) :]
    return "ended" in known or (run.state == State.done and all(command.startswith("compare ") for command in left))


def _made(words: list[str]) -> str:
    """Say what a command before a run has made, as far as it says so itself."""
    out = next((value for option, value in itertools.pairwise(words) if option == "--out"), "")
    found = try_json(Path(f"{out}.json"))
    if words[0] == "sample" and "answers" in found:
        return f"sampled {plural(found['answers'], 'answer')}"
    if words[0] == "select" and "chosen" in found:
        pairs = f" and {plural(found['pairs'], 'pair')}" if "--pairs" in words else ""
        of_prompts = f"for {found['prompts'] - found['prompts_without']} of {plural(found['prompts'], 'prompt')}"
        return f"chose {plural(found['chosen'], 'answer')}{pairs} of {found['answers']:,}, {of_prompts}"
    return ""


def grid(story: Story, form: Form) -> Grid:
    """Return the table of stages; a column in which no stage has something is left out."""
    metric = story.metric
    columns: list[tuple[str, Callable[[Part], str]]] = [
        ("stage", lambda part: part.name),
        ("trained", _trained),
        ("rows", lambda part: _count(part.run.manifest.get("data", {}).get("rows"))),
        ("steps", lambda part: _count(part.run.summary.get("steps"))),
        ("time", lambda part: in_time(part.seconds)),
        ("objective's held-out loss", _held_out),
        (f"{metric} before", lambda part: form(part.score_before(metric), 3, "")),
        (f"{metric} after", lambda part: form(part.score(metric), 3, "")),
        ("gave", lambda part: marked(part.gave(metric), verdict(part.gave(metric), False), 3, form)),
        ("loss on general text", lambda part: form(part.general(), 3, "")),
        ("forgot", lambda part: marked(part.forgot(), verdict(part.forgot(), True), 3, form)),
        ("gate", _gate),
    ]
    known = [(name, text) for name, text in columns if any(text(part) != NOTHING for part in story.parts)]
    lines = [[text(part) for _, text in known] for part in story.parts]
    return Grid(title="What each stage gave", heads=[name for name, _ in known], lines=lines)


def _trained(part: Part) -> str:
    method = part.run.config["peft.method"]
    return f"{part.run.config['objective.name']}{'' if method == 'none' else f', {method}'}"


def _count(value: Any) -> str:
    return NOTHING if value is None else f"{value:,}"


def _held_out(part: Part) -> str:
    before, after = part.run.summary.get("eval_loss_before"), part.run.loss
    if after is None:
        return NOTHING
    return f"{after:.3f}" if before is None else f"{before:.3f} to {after:.3f}"


def _gate(part: Part) -> str:
    if not part.gates:
        return NOTHING
    failed = [rule for rule, passed in part.gates if not passed]
    return f"failed: {', '.join(failed)}" if failed else "passed"


def conclusions(story: Story) -> list[str]:
    """Return what can be said of the whole, each with its numbers."""
    ended, seconds = [part for part in story.parts if part.ended], sum(part.seconds for part in story.parts)
    lines = [f"{len(ended)} of {plural(story.planned, 'stage')} done, in {in_time(seconds)}."]
    lines += [f"`{part.name}` is {part.run.state}, or its commands are not done." for part in story.parts if not part.ended]
    scored = [(part, score) for part in story.parts if (score := part.score(story.metric)) is not None]
    if scored:
        before = scored[0][0].score_before(story.metric)
        start = NOTHING if before is None else f"{before.value:.3f}"
        lines.append(f"{story.metric}: {start} before `{scored[0][0].name}`, {scored[-1][1].value:.3f} after `{scored[-1][0].name}`.")
    gifts = [(part, gave) for part in story.parts if (gave := part.gave(story.metric)) is not None]
    lines += [f"`{part.name}` gave {gave.value:+.3f}: {_words(verdict(gave, False))}." for part, gave in gifts]
    lost = [(part, forgot) for part in story.parts if (forgot := part.forgot()) is not None]
    if lost:
        part, most = max(lost, key=lambda pair: pair[1].value)
        ours = [one.run.ours for one, _ in lost if one.run.ours is not None]
        total = f"Forgotten in all: {sum(forgot.value for _, forgot in lost):+.3f} nats a token on general text"
        if not all(are_of_the_same(ours[0], one, "general") for one in ours):
            total = "Forgotten in all is not given: stages were measured on different general texts"
        lines.append(f"{total}; most by `{part.name}`, {most.value:+.3f}.")
    lines += [f"The gate after `{part.name}`: {_gate(part)}." for part in story.parts if part.gates]
    return lines


def _words(told: str) -> str:
    return {"": "too few documents to tell"}.get(told, told)


def print_text(story: Story, console: Console) -> None:
    """Print the table of stages and what can be said."""
    console.print(f"[bold]pipeline {escape(story.name)}[/]", highlight=False)
    for part in turned(grid(story, plus_minus), console.width):
        console.print(part)
    for line in conclusions(story):
        console.print(f"- {line}", highlight=False, markup=False)
    for line in legend(story):
        console.print(line, style="dim", highlight=False, markup=False)


def legend(story: Story) -> list[str]:
    """Return how the table is read."""
    lines = ["Before and gave are of the model that the stage began with, over the same documents; intervals are of 95 %, over documents."]
    lines.append(
        "▲ better, ▼ worse, = no difference beyond the noise. Losses are in nats a token; forgot is what that on general text rose by."
    )
    if not any(part.run.ours for part in story.parts):
        lines.append("No stage is evaluated: an `evaluate {stage}` after a run measures what it gave and forgot.")
    return lines


def markdown(story: Story) -> str:
    """Return the stages as Markdown."""
    found = grid(story, interval)
    lines = [found.heads, ["---"] * len(found.heads), *([cell_of(cell) for cell in line] for line in found.lines)]
    parts = [f"# Pipeline {story.name}", f"## {found.title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in conclusions(story)), *legend(story)]) + "\n"


def write_csv(story: Story, file: Path) -> None:
    """Write a line for each stage, in plain numbers."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        lines = [_csv_line(part, story) for part in story.parts]
        writer = csv.DictWriter(opened, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _csv_line(part: Part, story: Story) -> dict[str, Any]:
    line: dict[str, Any] = {"stage": part.name, "state": part.run.state, "objective": part.run.config["objective.name"]}
    line |= {"seconds": part.seconds} | {
        key: part.run.summary.get(key) for key in ("steps", "tokens", "eval_loss_before", "eval_loss_after")
    }
    estimates = {
        "score_before": part.score_before(story.metric),
        "score": part.score(story.metric),
        "gave": part.gave(story.metric),
        "general_loss": part.general(),
        "forgot": part.forgot(),
    }
    for name, estimate in estimates.items():
        ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
        line |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return line | {"score_metric": story.metric, "gate": _gate(part)}


def page(story: Story) -> str:
    """Return the page that tells the story: everything inside, no script, no network."""
    said = "".join(f"<li>{_with_code(line)}</li>" for line in conclusions(story))
    way = " → ".join(f'<a href="#{escape(part.name)}">{escape(part.name)}</a>' for part in story.parts)
    figures = "".join(
        f"<figure>{picture.svg}<figcaption><b>{escape(picture.title)}</b>{escape(picture.words)}</figcaption></figure>"
        for picture in pictures(story)
    )
    parts = [
        f"<h1>Pipeline {escape(story.name)}</h1>",
        f'<p class="sub">{way}</p>',
        f'<ul class="said">{said}</ul>',
        table(grid(story, interval)),
        f'<h2>Pictures</h2><div class="plots">{figures}</div>' if figures else "",
        f"<h2>Stage by stage</h2>{''.join(_chapter(number, part) for number, part in enumerate(story.parts, 1))}",
        _answers(story),
        f'<h2>How to read this</h2><ul class="legend">{"".join(f"<li>{escape(line)}</li>" for line in legend(story))}</ul>',
    ]
    return document(f"Pipeline {story.name}", parts)


def _chapter(number: int, part: Part) -> str:
    """Return what a stage did, in order."""
    config, data = part.run.config, part.run.manifest.get("data", {})
    source = Path(str(config["data.path"])).name if config["data.path"] else config["data.source"]
    lines = [("before", line) for line in part.commands]
    lines.append(("trained on", f"{source}: {_count(data.get('rows'))} rows, {_count(part.run.summary.get('tokens'))} tokens in training"))
    lines.append(("how", f"{_trained(part)}, {_count(part.run.summary.get('steps'))} steps at a peak rate of {part.run.lr:g}"))
    lines += [("held-out loss", _held_out(part))] if _held_out(part) != NOTHING else []
    lines += [(f"held-out {name}", interval(estimate, 3, "")) for name, estimate in part.run.rewarded.items()]
    sample = part.run.summary.get("sample")
    lines += [("it says", str(sample if isinstance(sample, str) else sample.get("answer", sample)))] if sample else []
    lines += [("gate", f"{rule}: {'passed' if passed else 'failed'}") for rule, passed in part.gates]
    lines.append(("run", str(part.run.run_dir)))
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{shown(text)}</dd>" for name, text in lines)
    ended = "" if part.ended else f", {part.run.state}"
    summary = f"<summary><b>{number}. {escape(part.name)}</b>, {in_time(part.seconds)}{escape(ended)}</summary>"
    return f'<details open id="{escape(part.name)}">{summary}<dl class="answers">{cells}</dl></details>'


def _with_code(line: str) -> str:
    """Return a line as HTML, what is in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(line))


def pictures(story: Story) -> list[Picture]:
    """Return the plots that the stages have values for."""
    scores = [(part.name, part.score(story.metric)) for part in story.parts]
    first = next((part for part in story.parts if part.score(story.metric) is not None), None)
    start = None if first is None else first.score_before(story.metric)
    found = [
        chain(
            f"{story.metric} after each stage",
            "On the same documents, with intervals of 95 %.",
            str(story.metric),
            [(f"before {first.name}" if first else "", start), *scores],
        ),
        chain(
            "Loss on general text after each stage",
            "The higher, the more is forgotten.",
            "nats a token",
            [*_general_before(story), *((part.name, part.general()) for part in story.parts)],
        ),
        bars("Time of each stage", "Its commands included.", [(part.name, part.seconds / 60) for part in story.parts], "minutes"),
    ]
    return [picture for picture in found if picture is not None]


def _general_before(story: Story) -> list[tuple[str, Estimate | None]]:
    """Return the loss on general text of the model that the first measured stage began with, with its name in a picture."""
    first = next((part for part in story.parts if part.general() is not None), None)
    return [] if first is None or first.run.base is None else [(f"before {first.name}", first.run.base.loss("general"))]


def _answers(story: Story) -> str:
    """Put the answers of each stage to the same prompts side by side, those first whose scores differ most."""
    by_stage = [(part.name, _by_prompt(part.run.ours)) for part in story.parts if part.run.ours is not None and part.run.ours.answers]
    if len(by_stage) < 2:
        return ""
    prompts = [prompt for prompt in by_stage[0][1] if all(prompt in rows for _, rows in by_stage)]
    metric = story.metric or ""

    def apart(prompt: str) -> float:
        values = [rows[prompt]["scores"].get(metric) or 0.0 for _, rows in by_stage]
        return min(values) - max(values)

    boxes = []
    for number, prompt in enumerate(sorted(prompts, key=apart)[:SHOWN]):
        first = by_stage[0][1][prompt]
        lines = [
            ("prompt", first["prompt"]),
            ("reference", first["reference"]),
            *((name, rows[prompt]["answer"]) for name, rows in by_stage),
        ]
        cells = "".join(f"<dt>{escape(name)}</dt><dd>{shown(str(text))}</dd>" for name, text in lines)
        title = " ".join(str(first["reference"]).split())[:110]
        boxes.append(
            f'<details{" open" if number < OPEN else ""}><summary>{escape(title)}</summary><dl class="answers">{cells}</dl></details>'
        )
    words = f"{len(boxes)} of {plural(len(prompts), 'prompt')} that every stage answered, at most {LONGEST:,} characters of each."
    return f'<h2>Answers</h2><p class="legend">{words}</p>{"".join(boxes)}' if boxes else ""


def _by_prompt(evaluation: Any) -> dict[str, dict[str, Any]]:
    return {str(row["prompt"]): row for row in evaluation.answers}
