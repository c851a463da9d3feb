"""New tasks from seed tasks (Wang et al. 2022, arXiv 2212.10560), with an input and an output each.

A prompt shows some tasks and asks for more. What is too like a task that is there is removed. Tasks with a few possible labels are
classification: they are asked for the labels first and for an input to each, so that labels are not all the same (section 2.2).
"""

from __future__ import annotations

from tools.synthesise.methods.answers import Row, row_of, user
from tools.synthesise.prompts import listed, marked
from tools.synthesise.sources import Begun, read_seeds
from tools.synthesise.work import Reply, Work
from trainers.generate.request import LENGTH

YES = ("yes", "예", "네", "그렇")
NONE = ("", "none", "n/a", "<noinput>", "없음")
LABEL, INPUT, OUTPUT = "Class label|Label|분류", "Input|입력", "Output|출력"


def self_instruct(work: Work) -> list[Row]:
    """Return rows until there are so many, or until rounds give nothing new."""
    seeds = read_seeds(work.settings, work.prompts)
    for seed in seeds:
        work.pool.add(seed.instruction)
    per_row = 2 + 1 / work.of.tasks
    work.planned = round(per_row * (work.settings.rows or 1))
    rows: list[Row] = []
    written: list[str] = []
    idle = number = 0
    while not work.is_full(rows) and idle < work.of.idle:
        tasks = _tasks(work, seeds, written, number)
        made = _instances(work, tasks)
        idle = 0 if made else idle + 1
        rows += made
        written += [text for text, _, _ in tasks]
        number += 1
    return rows[: work.settings.rows]


def _tasks(work: Work, seeds: list[Begun], written: list[str], number: int) -> list[tuple[str, Reply, list[str]]]:
    """Return a round's new tasks, the reply that each is in, and the tasks that its prompt showed."""
    shown = [_examples(work, seeds, written, number, prompt) for prompt in range(work.of.round)]
    asked = [
        work.prompts.fill("tasks", count=work.of.tasks, examples="\n".join(f"{at}. {_one_line(text)}" for at, text in enumerate(texts, 1)))
        for texts in shown
    ]
    found = []
    for reply, texts in zip(work.ask(asked, "tasks"), shown, strict=True):
        entries = listed(reply.text, work.of.tasks + 1)
        if reply.failure or not entries:
            work.remove("tasks: failed" if reply.failure else "tasks: no list in the reply")
            continue
        if reply.finish == LENGTH:
            entries = entries[:-1]  # the last one was cut
        found += [(text, reply, texts) for text in entries[: work.of.tasks] if work.takes(text)]
    return found


def _examples(work: Work, seeds: list[Begun], written: list[str], number: int, prompt: int) -> list[str]:
    """Return the tasks that a prompt shows: one of three is a written one, as far as there are some."""
    draw = work.draw("examples", number, prompt)
    own = min(work.of.examples // 3, len(written))
    texts = [seed.instruction for seed in draw.sample(seeds, min(work.of.examples - own, len(seeds)))]
    texts += draw.sample(written, own)
    draw.shuffle(texts)
    return texts


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _instances(work: Work, tasks: list[tuple[str, Reply, list[str]]]) -> list[Row]:
    """Return a row for each task with an input and an output that can be read."""
    asked = [work.prompts.fill("classify", task=text) for text, _, _ in tasks]
    kinds = [reply.text.strip().lower().lstrip("*\"' ").startswith(YES) for reply in work.ask(asked, "kinds of tasks", likeliest=True)]
    asked = [work.prompts.fill("labels" if kind else "instance", task=text) for (text, _, _), kind in zip(tasks, kinds, strict=True)]
    rows: list[Row] = []
    for (text, made, shown), kind, reply in zip(tasks, kinds, work.ask(asked, "inputs and outputs"), strict=True):
        if not work.is_whole(reply, "instance"):
            continue
        pair = _labelled(reply.text) if kind else _plain(reply.text)
        if pair is None:
            work.remove("instance: no input and output in the reply")
        elif pair[0] and pair[0] == pair[1]:
            work.remove("instance: the output is the input")
        elif work.passes(text, Reply(reply.number, pair[1], reply.finish)):
            prompt = f"{text}\n\n{pair[0]}" if pair[0] else text
            origin = {"examples": shown, "classification": kind}
            rows.append(row_of(work, user(prompt), pair[1], origin, made, reply))
    return rows


def _plain(text: str) -> tuple[str, str] | None:
    """Return input and output of a reply; the input is empty where the task needs none."""
    found = marked(text, INPUT, OUTPUT)
    if found is None:
        found = marked(text, OUTPUT)
        return None if found is None else ("", found[0])
    return ("" if found[0].lower() in NONE else found[0]), found[1]


def _labelled(text: str) -> tuple[str, str] | None:
    """Return an input and its label of a reply that has the label first."""
    found = marked(text, LABEL, INPUT)
    return None if found is None or not found[0] or not found[1] else (found[1], found[0])
