"""Talk to a model in the terminal.

python -m tools.chat runs/mine                     a run's export, also one of adapters
python -m tools.chat some/model --temperature 0    a model directory, or a hub id

A line is a message, and the answer appears word by word. /new begins another conversation, /undo takes the last message back, /quit or
Ctrl-D ends. Ctrl-C ends too. A message that leaves no room for an answer is left out. Lines that come through a pipe are answered in turn,
on stdout.

Exit codes: 0 ended, 1 the model could not answer, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tools.command import ended, parser_of
from trainers.config.errors import ConfigError
from trainers.generate.local import Broken, Local
from trainers.generate.models import named
from trainers.generate.prompts import Prompt, rendered
from trainers.generate.request import STOP, Answer, Request, Sampling

DTYPES = ("float32", "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    """Talk; returns the exit code."""
    options = _parser().parse_args(arguments)
    return ended(lambda: chat(options), failures=(Broken,))


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("chat", __doc__)
    parser.add_argument("model", metavar="RUN|DIR", help="a run, a model directory or a hub id")
    parser.add_argument("--system", metavar="TEXT", help="what every conversation begins with")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default 0.7)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the probability that is kept (default 1: all)")
    parser.add_argument("--top-k", type=int, default=0, help="tokens that are kept (default 0: all)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto is the GPUs where there are some")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="type to compute in (default float32)")
    return parser


def chat(options: argparse.Namespace) -> None:
    """Answer line by line until they end; raises ConfigError and Broken."""
    from trainers.data.tokenizer import load_tokenizer

    sampling = Sampling(**{name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")})
    model = named(options.model)
    tokenizer: Any = load_tokenizer(model.config)
    if tokenizer.chat_template is None:
        raise ConfigError(
            "MODEL", options.model, "has no chat template, and a conversation needs one", "python -m tools.sample asks a prompt"
        )
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages, turn = list(opening), 0
    with Local(model.config, model.folder, batch=1, dtype=options.dtype, device=options.device) as local:
        while (said := _line()) is not None:
            if said == "/quit":
                return
            if said in ("/new", "/undo"):
                messages = list(opening) if said == "/new" else messages[: max(len(messages) - 2, len(opening))]
            elif said:
                turn += 1
                asked = [*messages, {"role": "user", "content": said}]
                request = Request(key=turn, seed=options.seed + turn, ids=rendered(Prompt(asked, None, "", {}, "stdin", turn), tokenizer))
                answer = _answer(local, request, sampling, tokenizer)
                messages = messages if answer is None else [*asked, {"role": "assistant", "content": answer}]


def _line() -> str | None:
    """Return what a person has written, None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()  # with readline's editing where Python has it
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(local: Local, request: Request, sampling: Sampling, tokenizer: Any) -> str | None:
    """Print an answer as its tokens come, and return it; None where there is none, and stderr says why."""
    ids: list[int] = []
    answers: list[Answer] = []
    shown = ""

    def heard(token: int) -> None:
        nonlocal shown
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.startswith(shown) and not text.endswith("\ufffd"):  # a character of several tokens is not whole before the last
            print(text[len(shown) :], end="", flush=True)
            shown = text

    local.ask([request], sampling, answers.append, heard)
    (answer,) = answers
    if answer.failure:
        print(f"{answer.failure}: /undo takes a message back, /new begins another conversation", file=sys.stderr)
        return None
    kept = (answer.ids or [])[: -1 if answer.finish == STOP else None]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    print(text[len(shown) :] if text.startswith(shown) else "")
    return text


if __name__ == "__main__":
    sys.exit(main())
