"""A row's prompt with its answers, in pairs or each with whether it is wanted: what objectives of whole answers take of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainers.config.choices import Layout, ObjectiveName, PairsOf
from trainers.config.derived import DESIRABLE
from trainers.data.formats import BadRow, Message, Row, conversation_of, to_messages
from trainers.data.preferences import to_preference, turns_of, with_system
from trainers.data.ranked import to_pairs
from trainers.data.reasoning import stripped


@dataclass(frozen=True)
class Answers:
    """A prompt and its answers, each a list of turns: those of a pair one after the other, the preferred one first."""

    prompt: list[Message]
    answers: list[list[Message]]
    signals: list[Mapping[str, float]]
    """What each answer carries, by name."""


def answers_of(row: Row, layout: Layout, objective: ObjectiveName, pairs: PairsOf) -> Answers:
    """Return a row's prompt and the answers that an objective takes of it; raises BadRow with the reason."""
    if layout is Layout.unpaired:
        return to_judged(row)
    if layout is Layout.ranked:
        prompt, chosen = to_pairs(row, pairs)
        signals = {"margin": 0.0} if objective is ObjectiveName.reward else {}  # scores are of another scale than rewards
        return Answers(prompt, chosen, [signals] * len(chosen))
    pair = to_preference(row)
    judged: list[Mapping[str, float]] = [{DESIRABLE: 1.0}, {DESIRABLE: 0.0}] if objective is ObjectiveName.kto else [{}, {}]
    return Answers(pair.prompt, [pair.chosen, pair.rejected], judged)


def without_reasoning(found: Answers, layout: Layout) -> Answers:
    """Return prompt and answers without reasoning; raises BadRow for a pair that differs in its reasoning alone.

    Of a ranked list such pairs are left out, as those of equal texts are.
    """
    found = replace(found, prompt=stripped(found.prompt), answers=[stripped(answer) for answer in found.answers])
    if layout is Layout.unpaired:
        return found
    pairs = range(0, len(found.answers), 2)
    kept = [number for at in pairs if found.answers[at] != found.answers[at + 1] for number in (at, at + 1)]
    if layout is Layout.preference and not kept:
        raise BadRow("has two equal answers once their reasoning is left out")
    return replace(found, answers=[found.answers[number] for number in kept], signals=[found.signals[number] for number in kept])


def to_judged(row: Row) -> Answers:
    """Return a row's prompt and its answer, which its `label` says is wanted or not; raises BadRow with the reason.

    The answer is the `completion` (or `response`) after a `prompt`, each a text or turns, or of a conversation what follows the last
    turn that is not the assistant's.
    """
    wanted = _label(row.get("label"))
    if conversation_of(row) is not None:
        layout = Layout.sharegpt if "from" in (conversation_of(row) or [{}])[0] else Layout.messages
        turns = to_messages(row, layout)
        end = max((number for number, turn in enumerate(turns, 1) if turn["role"] not in ("assistant", "tool")), default=0)
        prompt, answer = turns[:end], turns[end:]
    else:
        name = "completion" if row.get("completion") is not None else "response"
        if missing := [field for field in ("prompt", name) if row.get(field) is None]:
            raise BadRow(f"has no `{missing[0]}`")
        prompt, answer = turns_of(row["prompt"], "prompt", "user"), turns_of(row[name], name, "assistant")
        prompt = with_system(row, prompt)
    if not prompt or not answer or answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
        raise BadRow("has no answer of the assistant after its prompt")
    return Answers(prompt, [answer], [{DESIRABLE: wanted}])


def _label(value: Any) -> float:
    """Return 1 for an answer that is wanted, 0 for one that is not: true and false, as a text, or 1 and 0."""
    found = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}.get(str(value).strip().lower())
    if value is None or found is None:
        raise BadRow("has no `label`" if value is None else f"has a `label` that is {value!r}, neither true nor false")
    return found
