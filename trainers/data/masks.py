"""What of a rendered row is trained, as character spans, and which of its parts the chat template has left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from trainers.config.choices import Supervise
from trainers.config.errors import ConfigError
from trainers.data.at_once import MANY, all_at_once
from trainers.data.formats import Message
from trainers.data.parts import left_out, mark, parts_of, search, unmarked
from trainers.data.reasoning import after_reasoning
from trainers.data.template import BUILT_IN, CHATML, Span, Template, fill, fill_generated, template_of, try_fill
from trainers.data.turns import Conversation, Place, Turn, find_turns

__all__ = ["BUILT_IN", "CHATML", "Rendered", "Span", "Template", "fill", "plain_pair", "plain_text", "render", "template_of"]


@dataclass(frozen=True)
class Rendered:
    """A row as text, and the spans of it that are trained, in characters, in order, end excluded."""

    text: str
    spans: list[Span]
    weights: list[float] = field(default_factory=list)
    """What each of these spans weighs; empty where each weighs 1."""
    left_out: dict[str, bool] = field(default_factory=dict)
    """For each kind of part that the row has (parts.py), whether the template has left one out."""
    signals: Mapping[str, float] = field(default_factory=dict)
    """What the document carries besides its text, by name; the same names in every document."""


def plain_pair(prompt: str, completion: str, bos: str, eos: str) -> Rendered:
    """Return prompt and completion as text, the completion and `eos` trained; ends that are there already are not added."""
    before = _with_ends(prompt, bos, "")
    text = before + _with_ends(completion, "", eos)
    return Rendered(text, [(len(before), len(text))])


def plain_text(text: str, bos: str, eos: str) -> Rendered:
    """Return a text between `bos` and `eos`, all of it trained; ends that are there already are not added."""
    text = _with_ends(text, bos, eos)
    return Rendered(text, [(0, len(text))])


def _with_ends(text: str, bos: str, eos: str) -> str:
    front = "" if bos and text.lstrip().startswith(bos) else bos
    back = "" if eos and text.rstrip().endswith(eos) else eos
    return f"{front}{text}{back}"


def render(
    template: Template,
    messages: list[Message],
    tools: list[Any] | None = None,
    supervise: Supervise = Supervise.assistant,
    untrained: frozenset[int] = frozenset(),
    weights: Mapping[int, float] = MappingProxyType({}),
    answers_only: bool = False,
) -> Rendered:
    """Render a conversation with the spans that `supervise` asks for, each through its end-of-turn text, without turns in `untrained`.

    `weights` are those of turns that do not weigh 1, by their numbers. `answers_only` leaves out the reasoning before an answer.
    Raises BadRow where the template refuses the row or leaves a supervised turn out, and ConfigError where nothing marks
    the end of the last turn, since a model trained so would never stop.
    """
    text, generated = fill_generated(template, messages, tools)
    row = Conversation(template, messages, tools, text)
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    numbers = numbers[-1:] if supervise is Supervise.last else numbers
    found, missing = _look(row, numbers, [number for number in numbers if number not in untrained], supervise)
    if supervise is Supervise.all:
        return Rendered(text, [(0, len(text))], left_out=missing)
    turns = find_turns(row, numbers, found)
    if turns[-1].end is None:
        raise ConfigError(
            "data.template",
            template.name,
            "the chat template puts nothing after the last assistant turn, so the model would never learn to stop",
            "add {{ eos_token }} after the assistant's content in the template, or data.template=chatml",
        )
    own = [weights.get(number, 1.0) for number in numbers if number not in untrained]
    own = own if any(weight != 1 for weight in own) else []
    turns = [turn for number, turn in zip(numbers, turns, strict=True) if number not in untrained]
    spans_of = [_marked(generated, turn) if generated else [(turn.start, _end(turn))] for turn in turns]
    if answers_only:
        trained = [number for number in numbers if number not in untrained]
        spans_of = after_reasoning(row, dict(zip(trained, spans_of, strict=True)))
    weight_of = [weight for weight, spans in zip(own, spans_of, strict=False) for _ in spans]
    return Rendered(text, [span for spans in spans_of for span in spans], weight_of, missing)


def _look(row: Conversation, numbers: list[int], trained: list[int], supervise: Supervise) -> tuple[dict[int, Place], dict[str, bool]]:
    """Return the places of turns that one rendering tells, and what the template leaves out.

    A short row of nothing but questions and answers is only searched.
    """
    documents = row.template.variables.get("documents")
    parts = parts_of(row.messages, row.tools, documents, trained)
    is_long = len(numbers) >= MANY and supervise is not Supervise.all
    if not is_long and all(part.is_anchor for part in parts) and not search(parts, row.text):
        return {}, left_out(parts, [])
    marked = mark(row.messages, row.tools, documents, parts, row.text)
    template = replace(row.template, variables=row.template.variables | {"documents": marked.documents}) if documents else row.template
    text = try_fill(template, marked.messages, marked.tools)
    if text is None or unmarked(text, marked.marks) != row.text:  # the marks change what the template does
        return {}, left_out(parts, search(parts, row.text))
    missing = [part for character, part in marked.marks.items() if character not in text]
    return all_at_once(row, numbers, marked, text) if is_long else {}, left_out(parts, missing)


def _marked(marked: list[Span], turn: Turn) -> list[Span]:
    """Return the template's own `generation` spans within a turn, made longer where they stop short of the end of turn."""
    last = _end(turn)
    return [(start, max(end, last) if end >= turn.text_end else end) for start, end in marked if start < last and end > turn.start]


def _end(turn: Turn) -> int:
    return turn.text_end if turn.end is None else turn.end
