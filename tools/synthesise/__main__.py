"""Write rows with a model: instructions, answers, questions on documents, paraphrases and more.

python -m tools.synthesise conf/synthesise/self_instruct.yaml model.path=runs/mine rows=1000 --out tasks.jsonl
python -m tools.synthesise conf/synthesise/answers.yaml source=tasks.jsonl model.path=http://host:8000/v1 model.name=NAME --out rows.jsonl
python -m tools.synthesise conf/synthesise/documents.yaml source=docs/ model.path=runs/mine --out questions.jsonl --dry-run

CONFIG says what is written and how; conf/synthesise has one for each method, with a comment on each setting. KEY=VALUE after it takes the
place of a setting. The model is a run, a model directory, a hub id or a server, as in tools.sample; a server's key is read from
FULLTUNE_ENDPOINT_KEY, or OPENAI_API_KEY. --dry-run shows what it would cost and the first prompt, and asks nothing.

OUT has rows that training reads, each with `from`: the method, the model, its requests and what it was made of. OUT.json has the settings,
the tokens and the money, and how many texts each filter removed. A stopped command continues: replies are in OUT.part until all are there.
With a model of this machine the rows are those of a command that was never stopped.

Exit codes: 0 written, or there already, 1 replies are missing, the money is spent, or no row is left, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tools.command import ended, parser_of
from tools.synthesise import finish, methods, sources
from tools.synthesise.checks import check
from tools.synthesise.config import Settings, read_settings
from tools.synthesise.prompts import Prompts
from tools.synthesise.similar import require_library
from tools.synthesise.work import Shown, Unanswered, Work
from tools.synthesise.writer import Writer, writer_of
from trainers.cache import content_key
from trainers.config.errors import ConfigError, plural
from trainers.generate.kept import Kept
from trainers.generate.local import Broken
from trainers.rundir.ending import Exit

VERSION = 1
"""Of the methods: raise it when the same replies make other rows."""


def main(arguments: list[str] | None = None) -> int:
    """Write rows; returns the exit code."""
    parser = parser_of("synthesise", __doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="what is written, such as conf/synthesise/self_instruct.yaml")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings in the place of the file's, such as rows=1000")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the rows go, a JSON object a line")
    parser.add_argument("--dry-run", action="store_true", help="show the costs and the first prompt, and ask nothing")
    options = parser.parse_args(arguments)
    stopped = "stopped: replies are kept, and the same command continues from there"
    return ended(lambda: synthesise(options), lambda: stopped, (Broken, Unanswered, OSError))


def synthesise(options: argparse.Namespace) -> int:
    """Write the rows, or what is missing; returns the exit code. Raises ConfigError, Broken and Unanswered."""
    settings = read_settings(options.config, options.settings)
    check(settings)
    require_library()
    prompts = Prompts(settings.language, settings.prompts)
    writer = writer_of(settings.model)
    known = settings.known()
    own = [Path(name).read_bytes() for name in own_lists(settings)]
    kept = Kept(options.out, content_key(VERSION, known, writer.key, prompts.key, sources.content_of(settings), own))
    if kept.is_whole:
        print(f"there already: {options.out}")
        return Exit.done
    with Work(settings, writer, kept, prompts, options.dry_run) as work:
        try:
            made = methods.METHODS[settings.method](work)
        except Shown:
            return Exit.done
        rows = finish.chosen(work, made)
    return written(work, rows, known, writer)


def own_lists(settings: Settings) -> list[str]:
    """Return the files of one's own that a method's settings name; raises ConfigError where one is not there."""
    found = []
    for name in ("principles", "categories"):
        if file := getattr(settings.of_method, name, None):
            if not Path(file).is_file():
                raise ConfigError(f"{settings.method}.{name}", file, "no such file", "a text file with an entry a line")
            found.append(file)
    return found


def written(work: Work, rows: list[dict[str, Any]], known: dict[str, Any], writer: Writer) -> int:
    """Write the rows with their report, and print it; returns the exit code."""
    spent = work.spent
    lines = [f"  removed: {reason} ({count:,})" for reason, count in work.removed.most_common()]
    lines += [f"  failed: {reason} ({count:,})" for reason, count in work.failed.most_common()]
    if not rows:
        kept = f"No row is left of {plural(spent.requests, 'request')}; {work.kept.part} has the replies"
        print("\n".join([f"error: {kept}. Look at the counts, and change the settings or the model", *lines]), file=sys.stderr)
        return Exit.failed
    about = {
        "rows": len(rows),
        "requests": spent.requests,
        "prompt_tokens": spent.prompt,
        "answer_tokens": spent.answer,
        "money": spent.money,
        "currency": spent.cost.currency,
        "removed": dict(work.removed),
        "failed": dict(work.failed),
        "model_name": writer.name,
        "settings": known,
    }
    work.kept.write(about, rows)
    finish.replies_of(work).unlink(missing_ok=True)
    print("\n".join([f"{plural(len(rows), 'row')}: {work.kept.file}", f"  {plural(spent.requests, 'request')}, {spent.said()}", *lines]))
    return Exit.done


if __name__ == "__main__":
    sys.exit(main())
