"""Ask a model for answers: n of each prompt, kept as they arrive.

python -m tools.sample runs/mine prompts.jsonl --out answers.jsonl --n 8         a run's export, also one of adapters
python -m tools.sample some/model prompts.jsonl --out answers.jsonl              a model directory, or a hub id
python -m tools.sample some/model prompts.jsonl --out answers.jsonl --vllm .venv-vllm/bin/python
python -m tools.sample http://host:8000/v1 prompts.jsonl --model NAME --out answers.jsonl
python -m tools.sample http://host:8000/v1 prompts.jsonl --model NAME --tokenizer DIR --out answers.jsonl

PROMPTS are rows of any layout that a run reads, in a file, a directory or a hub data set; what comes before a row's answer is asked. Rows
may have no answer: `messages` that end with the user, or `prompt`, `question` or `instruction` alone. OUT has a row for each answer: its
`prompt`, `answer`, `ids`, `logps` (nats, before temperature and limits), `finish`, `sample`, `seed`, the row's own answer as `reference`,
and the `row` with its `file` and `line`. OUT.json says how they were asked for, and what failed.

A model of this machine is opened in a process of its own. Each answer draws from its own seed, so that it does not depend on the other
prompts, nor on --batch. A server answers in text; with --tokenizer, that of its model, prompts go to /completions as ids, and ids with
log-probabilities come back (vLLM). Whether its answers depend on each other is the server's doing. Its key is read from
FULLTUNE_ENDPOINT_KEY, or OPENAI_API_KEY. A stopped command continues where it was: answers are in OUT.part until all are there.

Exit codes: 0 written, or there already, 1 answers are missing, or all have failed: the same command asks again, 2 bad input,
130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tools.command import Refused, ended, parser_of
from trainers.cache import content_key
from trainers.config.derived import DIGITS
from trainers.config.errors import ConfigError
from trainers.config.local import is_remote, looks_local
from trainers.config.schema import ModelConfig, RunConfig
from trainers.config.secrets import masked
from trainers.generate import prompts
from trainers.generate.endpoint import REFUSALS, Server, check
from trainers.generate.kept import Kept
from trainers.generate.local import Broken, Local
from trainers.generate.models import is_url, named
from trainers.generate.prompts import Prompt
from trainers.generate.request import NO_ROOM, STOP, Answer, Request, Sampling
from trainers.generate.served import ask
from trainers.rundir.ending import Exit

DTYPES = ("float32", "bfloat16", "float64")
VERSION = 1
"""Of how answers are drawn: raise it when that changes."""
Took = Callable[[Answer], None]


def main(arguments: list[str] | None = None) -> int:
    """Ask for the answers; returns the exit code."""
    options = make_parser().parse_args(arguments)
    return ended(lambda: sample(options), lambda: "stopped: answers are kept, and the same command continues from there", (Broken,))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = parser_of("sample", __doc__)
    parser.add_argument("model", metavar="MODEL|RUN|URL", help="a run, a model directory, a hub id, or a server up to its version")
    parser.add_argument("prompts", metavar="PROMPTS", help="rows that are asked: a file, a directory or a hub data set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the answers go, a JSON object a line")
    parser.add_argument("--split", default="train", help="of a data set (default train)")
    parser.add_argument("--rows", type=int, metavar="N", help="the first N rows alone")
    drawn = parser.add_argument_group("how answers are drawn")
    drawn.add_argument("--n", type=int, default=1, metavar="N", help="answers of each prompt (default 1)")
    drawn.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    drawn.add_argument("--top-p", type=float, default=1.0, help="share of the probability that is kept (default 1: all)")
    drawn.add_argument("--top-k", type=int, default=0, help="tokens that are kept (default 0: all)")
    drawn.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    drawn.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    machine = parser.add_argument_group("a model of this machine; --batch and --silence change no answer")
    machine.add_argument("--batch", type=int, default=16, metavar="N", help="answers at once (default 16)")
    machine.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto is the GPUs where there are some")
    machine.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type to compute in (default float32)")
    machine.add_argument("--vllm", metavar="PYTHON", help="let vLLM answer, by the Python of an environment that has it")
    machine.add_argument("--silence", type=float, metavar="S", help="end a model that gives no answer for so many seconds")
    server = parser.add_argument_group("a server; only --model and --tokenizer change an answer")
    server.add_argument("--model", dest="served", metavar="NAME", help="its model")
    server.add_argument("--tokenizer", metavar="DIR|ID", help="that model's tokenizer: prompts go as ids, and ids come back")
    server.add_argument("--at-once", type=int, default=16, metavar="N", help="requests in flight (default 16)")
    server.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for one reply (default 120)")
    server.add_argument("--attempts", type=int, default=5, metavar="N", help="tries for one reply (default 5)")
    return parser


def sample(options: argparse.Namespace) -> int:
    """Ask for all answers that are not kept, and write them; returns the exit code. Raises ConfigError, Refused and Broken."""
    require(options)
    sampling = Sampling(**{name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")})
    rows = prompts.read(options.prompts, options.split)[: options.rows]
    asked = Served(options, sampling) if is_url(options.model) else Opened(options, sampling)
    asked_for = {"sampling": asdict(sampling), "seed": options.seed, "n": options.n, "prompts": options.prompts}
    about = {"model": asked.name} | asked.machine | asked_for
    kept = Kept(options.out, content_key(VERSION, asked.key, about["sampling"], options.seed, options.n, [vars(row) for row in rows]))
    if kept.is_whole:
        print(f"there already: {options.out}")
        return Exit.done
    requests = [asked.request(rows[number // options.n], number, options.seed) for number in range(len(rows) * options.n)]
    missing: Counter[str] = Counter()
    with progress() as bar:
        task = bar.add_task("answers", total=len(requests), completed=len(kept.rows))

        def took(answer: Answer) -> None:
            if answer.failure and answer.failure not in asked.final:
                missing[answer.failure] += 1
            else:
                kept.add({"number": answer.key} | asked.said(answer))
                bar.advance(task)

        try:
            asked.ask([request for request in requests if request.key not in kept.rows], took)
        finally:
            kept.close()
    return report(kept, about, rows, requests, missing)


def require(options: argparse.Namespace) -> None:
    """Raise ConfigError or Refused for options that cannot be, or do not go together."""
    for name in ("n", "batch", "at_once", "timeout", "attempts", "rows", "silence"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}", getattr(options, name), "must be greater than 0")
    asked = options.prompts
    if asked != DIGITS and not is_remote(asked) and looks_local(asked) and not Path(asked).exists():
        raise ConfigError("PROMPTS", asked, "no such file or directory")
    if is_url(options.model) and not options.served:
        raise Refused(f"nothing says which model of {options.model} answers: --model NAME")
    if options.vllm and is_url(options.model):
        raise Refused(f"--vllm starts a server, and {options.model} is one: without --vllm")
    if options.vllm and not os.access(options.vllm, os.X_OK):
        raise ConfigError(
            "--vllm", options.vllm, "is not a program", "the Python of an environment with vLLM, such as .venv-vllm/bin/python"
        )
    if not is_url(options.model) and (options.served or options.tokenizer):
        raise Refused(f"--model and --tokenizer are of a server, and {options.model} is not a URL: http://HOST:PORT/v1")


def progress() -> Progress:
    """Return a bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    words = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*words, console=console, disable=not console.is_terminal)


class Opened:
    """A model of this machine or the hub."""

    def __init__(self, options: argparse.Namespace, sampling: Sampling) -> None:
        """Find its files; raises ConfigError."""
        from trainers.data.tokenizer import load_tokenizer, tokenizer_hash
        from trainers.generate.subject import Subject, kind_of

        self.options, self.sampling, self.name = options, sampling, options.model
        self.model = named(options.model)
        if options.vllm and self.model.config.model.encoder_decoder:
            raise Refused(f"{options.model} is an encoder-decoder, which vLLM does not open: without --vllm")
        self.tokenizer: Any = load_tokenizer(self.model.config)
        subject = Subject(config=self.model.config, folder=self.model.folder)
        self.machine = {"dtype": options.dtype, "device": kind_of(options.device)} | ({"by": "vllm"} if options.vllm else {})
        self.folder = self.model.folder or (subject.base if options.vllm else None)
        tokenizer = tokenizer_hash(self.tokenizer), str(self.tokenizer.chat_template)
        self.key = content_key("local", subject.fingerprint, *tokenizer, *self.machine.values())
        self.final: Sequence[str] = (NO_ROOM,)

    def request(self, prompt: Prompt, number: int, seed: int) -> Request:
        """Return what is asked: the rendered prompt's ids."""
        return Request(
            key=number, seed=seed_of(seed, number), ids=prompts.rendered(prompt, self.tokenizer, self.model.config.model.encoder_decoder)
        )

    def ask(self, requests: Sequence[Request], took: Took) -> None:
        """Open the model and ask it; raises ConfigError and Broken."""
        if not requests:
            return
        options = self.options
        if options.vllm:
            self._ask_vllm(requests, took)
            return
        machine = {"batch": options.batch, "dtype": options.dtype, "device": options.device, "timeout_s": options.silence}
        with Local(self.model.config, self.model.folder, **machine) as local:
            local.ask(requests, self.sampling, took)

    def _ask_vllm(self, requests: Sequence[Request], took: Took) -> None:
        from trainers.data.ends import stop_ids
        from trainers.generate.vllm import Vllm

        assert self.folder is not None
        of_server = {"python": self.options.vllm, "at_once": self.options.batch, "timeout_s": self.options.silence or 600.0}
        with Vllm(self.folder, dtype=self.options.dtype, device=self.machine["device"], **of_server) as vllm:
            vllm.ask(requests, self.sampling, took, stop_ids(self.tokenizer))

    def said(self, answer: Answer) -> dict[str, Any]:
        """Return what is kept of an answer."""
        return decoded(answer, self.tokenizer)


class Served:
    """A model of a server, known by its name alone."""

    def __init__(self, options: argparse.Namespace, sampling: Sampling) -> None:
        """Find out whether it can be asked; raises ConfigError."""
        self.sampling, self.name = sampling, masked(f"{options.served} at {options.model}")
        at = {"timeout_s": options.timeout, "attempts": options.attempts, "at_once": options.at_once}
        self.server = Server(url=options.model, model=options.served, refusals_are_replies=True, **at)
        self.key = content_key("served", options.model, options.served, options.tokenizer)
        self.machine: dict[str, str] = {}
        self.final = REFUSALS
        self.tokenizer: Any = None
        if reason := check(self.server):
            raise ConfigError("MODEL", options.model, reason, "an OpenAI-compatible endpoint up to its version")
        if options.tokenizer:
            from trainers.data.tokenizer import load_tokenizer

            self.tokenizer = load_tokenizer(RunConfig(model=ModelConfig(id=options.tokenizer)))

    def request(self, prompt: Prompt, number: int, seed: int) -> Request:
        """Return what is asked: ids where the tokenizer is known, else messages."""
        ids = [] if self.tokenizer is None else prompts.rendered(prompt, self.tokenizer)
        return Request(key=number, seed=seed_of(seed, number), ids=ids, messages=prompt.messages)

    def ask(self, requests: Sequence[Request], took: Took) -> None:
        """Ask it."""
        ask(requests, self.sampling, self.server, took)

    def said(self, answer: Answer) -> dict[str, Any]:
        """Return what is kept of an answer."""
        return decoded(answer, self.tokenizer)


def seed_of(seed: int, number: int) -> int:
    """Return the seed of one request, 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big") >> 1


def decoded(answer: Answer, tokenizer: Any) -> dict[str, Any]:
    """Return an answer with its text, without the token that ended it."""
    if answer.failure:
        return {"failure": answer.failure}
    text = answer.text
    if answer.ids is not None:
        kept = answer.ids[:-1] if answer.finish == STOP else answer.ids
        text = tokenizer.decode(kept, skip_special_tokens=True)
    return {"answer": text, "finish": answer.finish, "ids": answer.ids, "logps": answer.logps}


def report(kept: Kept, about: dict[str, Any], rows: list[Prompt], requests: list[Request], missing: Counter[str]) -> int:
    """Write the answers where all are there, and say how many are not; returns the exit code."""
    n = about["n"]
    if left := len(requests) - len(kept.rows):
        why = ", ".join(f"{kind} ({count})" for kind, count in missing.most_common()) or "the server answers no more"
        print(
            f"error: {left} of {len(requests)} answers are missing: {why}. {kept.part} has the others; the same command continues",
            file=sys.stderr,
        )
        return Exit.failed

    failures = Counter(row["failure"] for row in kept.rows.values() if "failure" in row)
    finishes = Counter(row["finish"] for row in kept.rows.values() if "finish" in row)
    if not finishes:
        kept.drop()
        why = ", ".join(f"{kind} ({count})" for kind, count in failures.most_common())
        print(f"error: all {len(requests)} answers have failed: {why}. Nothing is written; the same command asks again", file=sys.stderr)
        return Exit.failed

    def shown(row: dict[str, Any]) -> dict[str, Any] | None:
        prompt = rows[row["number"] // n]
        if "failure" in row:
            return None
        drawn = {name: row[name] for name in ("answer", "finish", "ids", "logps")}
        origin = {"reference": prompt.reference, "row": prompt.row, "file": prompt.file, "line": prompt.line}
        tools = {} if prompt.tools is None else {"tools": prompt.tools}
        about_it = {"sample": row["number"] % n, "seed": requests[row["number"]].seed, "model": about["model"]}
        return {"prompt": prompt.messages} | tools | drawn | about_it | origin

    counts = {"answers": finishes.total(), "finish": dict(finishes), "failures": dict(failures)}
    kept.finish(about | counts, shown)
    words = [f"{count} failed: {kind}" for kind, count in failures.items()]
    print("; ".join([f"{finishes.total()} answers of {len(rows)} prompts: {kept.file}", *words]))
    return Exit.done


if __name__ == "__main__":
    sys.exit(main())
