"""Reasoning in front of an answer: where it ends, and rows of which it is left out or carries no loss. No torch.

Reasoning is a turn's `reasoning_content`, or what its text has between `<think>` and `</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trainers.config.choices import Reasoning
from trainers.data.formats import BadRow, Message
from trainers.data.parts import unmarked, unused_characters
from trainers.data.template import Span, try_fill
from trainers.data.turns import Conversation, has_thought, shared_length

OPEN, CLOSE = "<think>", "</think>"
HARMONY = re.compile(r"analysis.*assistantfinal", re.DOTALL)
"""How a gpt-oss answer begins once its special tokens, `<|start|>`, `<|channel|>` and `<|message|>`, have been left out."""


def answer_at(text: str) -> int:
    """Return where the answer begins in a text, after reasoning and blanks: 0 without reasoning, the text's end where that never closes.

    As templates of reasoning models do, the last `</think>` counts. Its `<think>` may be missing: several templates write it as a part of
    the prompt.
    """
    end = text.rfind(CLOSE)
    if end >= 0:
        end += len(CLOSE)
    elif text.lstrip().startswith(OPEN):
        return len(text)
    elif found := HARMONY.match(text):
        end = found.end()
    else:
        return 0
    return len(text) - len(text[end:].lstrip())


def answer_of(text: str) -> str:
    """Return a text without its reasoning; empty where that never closes."""
    return text[answer_at(text) :]


def opened(prompt: str, answer: str, whole: str) -> str:
    """Return an answer with the `<think>` that the end of its prompt has written, where the reasoning never closes.

    Such an answer would else read as one without reasoning. `prompt` and `whole`, the answer again, have their special tokens.
    """
    is_open = prompt.rstrip().endswith(OPEN) and CLOSE not in whole and not answer.lstrip().startswith(OPEN)
    return f"{OPEN}\n{answer}" if is_open else answer


def reasons(message: Message) -> bool:
    """Tell whether a turn of the assistant has reasoning, be it one that never closes. Other turns have none, whatever tags they name."""
    return message["role"] == "assistant" and (has_thought(message) or message.get("content", "").lstrip().startswith(OPEN))


def content_at(message: Message) -> int:
    """Return where the answer begins in the content of a turn that reasons.

    At its start where the reasoning has a field of its own, unless the content begins with `<think>` all the same.
    """
    content = message.get("content") or ""
    return 0 if message.get("reasoning_content") and not content.lstrip().startswith(OPEN) else answer_at(content)


def stripped(messages: Sequence[Message]) -> list[Message]:
    """Return turns without the assistant's reasoning; raises BadRow for one that has nothing else."""
    return [_without(message, number) if reasons(message) else message for number, message in enumerate(messages, 1)]


def _without(message: Message, number: int) -> Message:
    _require_answer(message, number, Reasoning.strip)
    kept = {name: value for name, value in message.items() if name != "reasoning_content"}
    return kept | {"content": kept["content"][content_at(message) :]} if "content" in kept else kept


def _require_answer(message: Message, number: int, how: Reasoning) -> None:
    """Raise BadRow for a turn with neither an answer nor a tool call after its reasoning."""
    if not message.get("content", "")[content_at(message) :].strip() and not message.get("tool_calls"):
        raise BadRow(f"turn {number} has nothing but reasoning, and data.reasoning={how} does not train it")


def after_reasoning(row: Conversation, spans: Mapping[int, list[Span]]) -> list[list[Span]]:
    """Return the trained spans of each turn from its answer on; `spans` are those of turns by their numbers.

    Raises BadRow for a turn that has nothing but reasoning.
    """
    numbers = [number for number in spans if reasons(row.messages[number])]
    for number in numbers:  # else the end of the turn would be trained alone: to stop after thinking
        _require_answer(row.messages[number], number + 1, Reasoning.mask)
    starts = answer_starts(row, numbers)
    found = []
    for number, own in spans.items():
        first = starts.get(number, 0)
        found.append([(max(start, first), end) for start, end in own if end > first])
    return found


def answer_starts(row: Conversation, numbers: Sequence[int]) -> dict[int, int]:
    """Return where the answers of turns with reasoning begin in the row's rendering, in characters.

    A mark in front of each answer says it, in one rendering for all; where marks change what the template does, in one for each.
    """
    marks = dict(zip(unused_characters(row.text, len(numbers)), numbers, strict=True))
    messages = list(row.messages)
    for mark, number in marks.items():
        messages[number] = _marked(row.messages[number], mark)
    text = try_fill(row.template, messages, row.tools) if numbers else row.text
    if text is None or unmarked(text, marks) != row.text or any(text.count(mark) != 1 for mark in marks):
        return {number: _start_of(row, number, mark) for mark, number in marks.items()}
    places = sorted((text.index(mark), number) for mark, number in marks.items())
    return {number: place - before for before, (place, number) in enumerate(places)}


def _marked(message: Message, mark: str) -> Message:
    content = message.get("content") or ""
    at = content_at(message)
    return {**message, "content": f"{content[:at]}{mark}{content[at:]}"}


def _start_of(row: Conversation, number: int, mark: str) -> int:
    """Return where one answer begins: at the mark in front of it, else where its reasoning ends.

    The second is for templates that take no text next to a tool call. 0 where the template leaves the reasoning out.
    """
    message, text = row.messages[number], None
    ways = [_marked(message, mark)]
    if thought := message.get("reasoning_content"):
        ways.append({**message, "reasoning_content": f"{thought.rstrip()}{mark}{thought[len(thought.rstrip()) :]}"})
    for way in ways:
        text = try_fill(row.template, [*row.messages[:number], way, *row.messages[number + 1 :]], row.tools)
        if text is not None and mark in text and (at := shared_length(text, row.text)) == text.index(mark):
            return at
    if text is not None and mark not in text:  # the template leaves the reasoning out
        return 0
    raise BadRow(f"turn {number + 1} has reasoning that cannot be told from its answer in the chat template's rendering")
