"""A judge's scores of a run's answers next to its base's, kept as they come: RUN/evaluation/judge.jsonl, and judge.json for the scores."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tools.evaluate.judge import PROMPT, Question, Verdict, ask, tally
from tools.evaluate.record import JUDGED, Evaluation, answers_key, judged_words, read_lines
from trainers.cache import content_key
from trainers.data.reasoning import answer_of
from trainers.generate.endpoint import NOT_ASKED, check
from trainers.rewards.judged import Judge
from trainers.rundir.files import write_json


def collect_verdicts(folder: Path, ours: Evaluation, theirs: Evaluation, settings: Judge) -> bool:
    """Let a judge score the answers that it has not scored, and say how that went; tell whether any has scores.

    Nothing is made up: what failed is counted by kind, in judge.json and on the terminal, and is asked again by the next call.
    """
    questions = _questions(ours, theirs)
    if not questions:
        print("there are no answers to judge: --rows N", flush=True)
        return False
    file = folder / f"{JUDGED}.jsonl"
    keys = {question.document: _key(question, settings) for question in questions}
    known = _kept(file, keys)
    told = {(verdict.document, verdict.swapped) for verdict in known if verdict.scores is not None}
    reason = check(settings) if len(told) < 2 * len(questions) else ""
    verdicts = [*known, *_not_asked(questions, told)] if reason else _asked(questions, settings, known, file, keys)
    found = tally(verdicts)
    about = {"model": settings.model, "host": urlsplit(settings.url).hostname, "answers": answers_key(ours, theirs), "reason": reason}
    write_json(folder / f"{JUDGED}.json", about | found)
    print(judged_words(about | found), flush=True)
    return bool(found["scored"])


def _questions(ours: Evaluation, theirs: Evaluation) -> list[Question]:
    """Return the answers that both models have given, without their reasoning, as what a judge is asked."""
    others = {row["document"]: answer_of(row["answer"]) for row in theirs.answers}
    return [
        Question(
            document=row["document"],
            prompt=row["prompt"],
            reference=answer_of(row["reference"]),
            answer=answer_of(row["answer"]),
            other=others[row["document"]],
        )
        for row in ours.answers
        if row["document"] in others
    ]


def _kept(file: Path, keys: dict[int, str]) -> list[Verdict]:
    """Return the verdicts that a file has of just these questions."""
    rows = [row for row in read_lines(file) if row.get("key") == keys.get(row.get("document", -1))] if file.is_file() else []
    return [Verdict.from_row({name: value for name, value in row.items() if name != "key"}) for row in rows]


def _asked(questions: list[Question], settings: Judge, known: list[Verdict], file: Path, keys: dict[int, str]) -> list[Verdict]:
    """Return a verdict for each question and order; what is new is written to the file as it comes, with a bar."""
    console = Console(stderr=True)
    words = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TextColumn("verdicts"), TimeRemainingColumn())
    bar = Progress(*words, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=2 * len(questions), completed=sum(verdict.scores is not None for verdict in known))
    with file.open("a", encoding="utf-8") as opened, bar:

        def took(verdict: Verdict) -> None:
            opened.write(json.dumps(verdict.as_row() | {"key": keys[verdict.document]}) + "\n")
            opened.flush()
            bar.advance(task)

        return ask(questions, settings, known, took)


def _key(question: Question, settings: Judge) -> str:
    """Return what a verdict is of: the prompt, the model that judges, and all texts."""
    return content_key(PROMPT.template, settings.model, question.prompt, question.reference, question.answer, question.other)


def _not_asked(questions: list[Question], told: set[tuple[int, bool]]) -> list[Verdict]:
    left = [(question.document, swapped) for question in questions for swapped in (False, True)]
    return [Verdict(document=document, swapped=swapped, failure=NOT_ASKED) for document, swapped in left if (document, swapped) not in told]
