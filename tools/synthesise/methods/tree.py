"""Questions on the leaves of a tree of topics, so that none is forgotten; with personas, as these would ask (arXiv 2406.20094)."""

from __future__ import annotations

from tools.synthesise.methods.answers import Asked, Row, answered, user
from tools.synthesise.prompts import listed
from tools.synthesise.sources import read_topics
from tools.synthesise.work import Work

Path = tuple[str, ...]
"""A topic with those above it, from the root."""


def tree(work: Work) -> list[Row]:
    """Return answered questions of each leaf."""
    roots = read_topics(work.settings, work.prompts)
    of = work.of
    leaves = len(roots) * of.breadth**of.depth
    nodes = sum(len(roots) * of.breadth**level for level in range(of.depth))
    voices = leaves * (of.personas or 1)
    work.planned = nodes + (leaves if of.personas else 0) + voices + voices * of.questions
    paths: list[Path] = [(root,) for root in roots]
    for level in range(of.depth):
        paths = _grow(work, paths, level)
    speakers = _personas(work, paths) if of.personas else [(path, "") for path in paths]
    return answered(work, _questions(work, speakers)[: work.settings.rows])


def _grow(work: Work, paths: list[Path], level: int) -> list[Path]:
    """Return the subtopics of each topic; one that the tree has already is removed, and a topic without any stays a leaf."""
    asked = [work.prompts.fill("subtopics", topic=said(path), count=work.of.breadth) for path in paths]
    known = {name.lower() for path in paths for name in path}
    found: list[Path] = []
    for path, reply in zip(paths, work.ask(asked, f"topics of level {level + 1}"), strict=True):
        names = listed(reply.text, work.of.breadth)
        if not names:
            work.remove("topic: no list in the reply")
            found.append(path)
        for name in names:
            if name.lower() in known:
                work.remove("topic: there already")
            else:
                known.add(name.lower())
                found.append((*path, name))
    return found


def _personas(work: Work, paths: list[Path]) -> list[tuple[Path, str]]:
    """Return each leaf with each of its personas."""
    asked = [work.prompts.fill("personas", topic=said(path), count=work.of.personas) for path in paths]
    found = []
    for path, reply in zip(paths, work.ask(asked, "personas"), strict=True):
        people = listed(reply.text, work.of.personas)
        if not people:
            work.remove("persona: no list in the reply")
        found += [(path, text) for text in people]
    return found


def _questions(work: Work, speakers: list[tuple[Path, str]]) -> list[Asked]:
    """Return the questions that pass the filters, with the path and the persona of each."""
    asked = []
    for path, persona in speakers:
        name, more = ("persona_questions", {"persona": persona}) if persona else ("questions", {})
        asked.append(work.prompts.fill(name, topic=said(path), count=work.of.questions, **more))
    found: list[Asked] = []
    for (path, persona), reply in zip(speakers, work.ask(asked, "questions"), strict=True):
        texts = listed(reply.text, work.of.questions)
        if not texts:
            work.remove("questions: no list in the reply")
        origin = {"topic": list(path), "question": reply.number} | ({"persona": persona} if persona else {})
        found += [(user(text), origin) for text in texts if work.takes(text)]
    return found


def said(path: Path) -> str:
    """Return a topic as a prompt names it: with those above it."""
    return " > ".join(path)
