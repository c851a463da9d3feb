"""Hold a model against rules, so that a pipeline stops a bad one; a model that passes gets a model card.

python -m tools.evaluate runs/mine && python -m tools.gate runs/mine
python -m tools.gate runs/mine --rules my_rules.yaml

Metrics are those that `python -m tools.evaluate` has left in RUN/evaluation; what the rules ask for and nobody has measured is not
passed. Safety and regression prompts are answered now, by the export. The verdict goes to RUN/evaluation/gate.json, and a model card to
RUN/export/README.md: data, method, metrics and limits, from the run's own records.

Exit codes: 0 passed, 1 not passed, with the reasons, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from launcher.presets import CONF
from tools.command import ended, parser_of
from tools.evaluate import record
from tools.evaluate.measurements import Measurement
from tools.evaluate.record import FOLDER
from tools.evaluate.workers import run_workers
from tools.gate.card import write_card
from tools.gate.rules import Check, Prompt, Rules, hold, hold_prompts, read_prompts, read_rules
from tools.runs import is_run
from trainers.config.choices import DataSource, Layout, ObjectiveName, TooLong
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.generate.identity import digest_of
from trainers.rundir import paths
from trainers.rundir.attempt import read_state
from trainers.rundir.base import config_of
from trainers.rundir.ending import Exit, State
from trainers.rundir.files import try_json, write_json

RULES = CONF / "gate" / "default.yaml"
ROOM = 4096
"""Tokens that a prompt may have."""
NOTHING = "-"
"""What a row has in the place of an answer, which is not looked at."""


class NotMeasured(Exception):
    """The prompts could not be answered, which has been said."""


def main(arguments: list[str] | None = None) -> int:
    """Hold a run against rules; returns the exit code."""
    options = make_parser().parse_args(arguments)
    return ended(lambda: gate(options), lambda: "stopped: nothing was decided")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = parser_of("gate", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run that is done and evaluated")
    parser.add_argument("--rules", type=Path, default=RULES, metavar="FILE", help="what it must reach (default conf/gate/default.yaml)")
    parser.add_argument("--no-card", action="store_true", help="write no model card")
    machine = parser.add_argument_group("the machine that answers the prompts")
    machine.add_argument("--batch", type=int, default=8, metavar="N", help="prompts at once (default 8); changes no answer")
    machine.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto is the GPU where there is one")
    machine.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type to compute in (default float32)")
    return parser


def gate(options: argparse.Namespace) -> int:
    """Hold a run against rules and say so; returns the exit code, raises ConfigError."""
    run: Path = options.run
    if not is_run(run):
        raise ConfigError("RUN", str(run), "is not a run directory")
    if (state := read_state(run)) != State.done:
        raise ConfigError("RUN", str(run), f"is {state}, not done", "the command that started it continues it")
    rules, prompts = require(options)
    ours, theirs = (record.load(run / FOLDER, name) for name in ("run", "base"))
    if ours is None:
        raise ConfigError("RUN", str(run), "is not evaluated", f"python -m tools.evaluate {run}")
    if ours.about.get("files") != digest_of(run / paths.EXPORT):
        raise ConfigError("RUN", str(run), "its export is not the one that was evaluated", f"python -m tools.evaluate {run}")
    checks = hold(rules, ours, theirs, None if theirs is None else record.load_judged(run / FOLDER, ours, theirs))
    if not checks and not prompts:
        raise ConfigError("--rules", str(options.rules), "asks nothing, so that any model would pass", "a rule, or prompts")
    if prompts:
        try:
            checks += hold_prompts(rules, prompts, answer(config_of(run), run, prompts, rules, options))
        except NotMeasured:
            return Exit.failed
    passed = all(check.passed for check in checks if check.decides)
    verdict = {"passed": passed, "rules": str(options.rules), "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    write_json(run / FOLDER / "gate.json", verdict | {"checks": [dataclasses.asdict(check) for check in checks]})
    say(checks, passed)
    if passed and not options.no_card:
        print(f"model card: {write_card(run, ours, theirs, checks, options.rules)}")
    return Exit.done if passed else Exit.failed


def require(options: argparse.Namespace) -> tuple[Rules, list[Prompt]]:
    """Return the rules and prompts that options name; raises ConfigError."""
    rules = read_rules(options.rules)
    return rules, read_prompts(options.rules.parent / rules.prompts) if rules.prompts else []


def answer(config: RunConfig, run: Path, prompts: list[Prompt], rules: Rules, options: argparse.Namespace) -> list[str]:
    """Return the export's answer to each prompt; raises NotMeasured, and ConfigError for a prompt that the chat template refuses."""
    if config.objective.name is ObjectiveName.cpt:
        raise ConfigError("prompts", rules.prompts, "the run was trained on plain text, which has no prompts", "prompts: null")
    layout, rows = rows_of(prompts, try_json(run / paths.MANIFEST).get("data", {}))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        data = dataclasses.replace(config.data, source=DataSource.files, layout=layout, seq_len=ROOM, too_long=TooLong.drop)
        data = dataclasses.replace(data, max_lost_fraction=1.0, skip_bad_rows=False)
        asked = dataclasses.replace(config.evaluation, path=str(file), rows=len(prompts), general=None, max_new_tokens=rules.max_new_tokens)
        config = dataclasses.replace(config, data=data, evaluation=asked)
        subject = Measurement(name="gate", config=config, folder=run / paths.EXPORT, out=run / FOLDER)
        if run_workers([subject], batch=options.batch, device=options.device, dtype=options.dtype) != Exit.done:
            raise NotMeasured
        part = subject.parts.get("answers", {"documents": []})
        if len(part["documents"]) != len(prompts):
            reason = f"{len(prompts) - len(part['documents'])} of {len(prompts)} prompts are longer than {ROOM} tokens"
            raise ConfigError("prompts", rules.prompts, reason, "shorter ones")
        return [str(row["answer"]) for row in record.collect(Path(part["folder"]), part["documents"])]


def rows_of(prompts: list[Prompt], trained_on: dict[str, Any]) -> tuple[Layout, list[dict[str, Any]]]:
    """Return prompts as rows like those that the run was trained on: conversations where it has a chat template, else plain pairs.

    Raises ConfigError for a conversation without a template.
    """
    if trained_on.get("template_hash") is not None:
        return Layout.messages, [{"messages": [*prompt.messages, {"role": "assistant", "content": NOTHING}]} for prompt in prompts]
    if long := [prompt.name for prompt in prompts if len(prompt.messages) > 1]:
        raise ConfigError("prompts", long[0], "has several turns, and the run's tokenizer has no chat template", "one `prompt`")
    if trained_on.get("layout") == Layout.prompt_completion:
        return Layout.prompt_completion, [{"prompt": prompt.messages[0]["content"], "completion": NOTHING} for prompt in prompts]
    return Layout.question_answer, [{"question": prompt.messages[0]["content"], "answer": NOTHING} for prompt in prompts]


def say(checks: list[Check], passed: bool) -> None:
    """Print each rule with its value, and the verdict."""
    console = Console(highlight=False)
    for check in checks:
        console.print(
            f"{'[green]passed[/]' if check.passed else '[red]failed[/]'}  {escape(check.rule)}: {escape(check.words)}", soft_wrap=True
        )
    console.print("[bold green]the model passes[/]" if passed else "[bold red]the model does not pass[/]")


if __name__ == "__main__":
    sys.exit(main())
