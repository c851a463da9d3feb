"""Fields that say what of a row is trained or meant, besides its text: honoured, refused by name, or listed as not read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainers.config.choices import Layout
from trainers.data.formats import (
    CONVERSATION_KEYS,
    KEPT_KEYS,
    RANKED_KEYS,
    REASONING_KEYS,
    SCORE_KEYS,
    SYSTEM_KEYS,
    BadRow,
    Message,
    Row,
    conversation_of,
    ranked_key,
)
from trainers.data.ranked import TEXT_KEYS
from trainers.data.weights import NAMES, ROW_NAMES, is_weight

FLAGS = (
    *(*NAMES, "train", "training", "trainable", "trained", "train_on_turn"),
    *("supervised", "loss", "loss_mask", "step_loss_mask"),
)
"""Of a turn: 1 or true trains it, 0 or false does not. NAMES may be any number from 0 on."""
INVERSE_FLAGS = ("masked",)
"""Of a turn: true does not train it."""
OPEN_ENDS = ("add_generation_prompt", "continue_final_message")
MODALITIES = ("image", "images", "image_url", "video", "videos", "audio", "audios")
REFUSED = dict.fromkeys(MODALITIES, "and only text is trained") | {
    "input_ids": "and tokens are not read, only text",
    "token_ids": "and tokens are not read, only text",
}
REFUSED_ROW = REFUSED | {
    **dict.fromkeys(OPEN_ENDS, "and a row that is trained is whole: nothing is generated after its last turn"),
    "history": "earlier turns, which this layout does not read; rows of layout `messages` can have them",
    **dict.fromkeys(("rejected", "rejected_response"), "the answer that is not preferred, which this objective does not read"),
}
REFUSED_TURN = REFUSED | {
    "mask": "and it is not clear whether that is what is trained or what is not; `weight` says it",
    **dict.fromkeys(("train_detail", "training_detail"), "and a turn is trained as a whole or not at all"),
    "refusal": "and it is not read; put what is to be trained into `content`",
    "tools": "and tools are read from the row, not from a turn",
}
NEMO_MASKS = (None, "", "User", "user", "human")
"""Values of a row's `mask`, the roles that are not trained, which ask for what is done anyway."""
TEMPLATE_KEYS = ("chat_template_kwargs", "documents")
RESERVED = ("messages", "conversation", "conversations", "chat_template", "tools", "tokenize", "return_dict", *OPEN_ENDS)

CONTEXT = (*SYSTEM_KEYS, "tools", "functions", *TEMPLATE_KEYS)
KNOWN_ROW = {*CONTEXT, *REFUSED_ROW, *ROW_NAMES, *FLAGS, "mask"}
KNOWN_TURN = {
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "function_call",
    *KEPT_KEYS,
    *REASONING_KEYS,
    *REFUSED_TURN,
    *FLAGS,
    *INVERSE_FLAGS,
}
READ = {
    Layout.messages: {*CONVERSATION_KEYS, *KNOWN_ROW},
    Layout.sharegpt: {*CONVERSATION_KEYS, *KNOWN_ROW},
    Layout.prompt_completion: {"prompt", "completion", "response", "label", *KNOWN_ROW},
    Layout.question_answer: {"question", "answer", *KNOWN_ROW},
    Layout.alpaca: {"instruction", "input", "output", *KNOWN_ROW},
    Layout.preference: {"prompt", "chosen", "rejected", *KNOWN_ROW},
    Layout.ranked: {"prompt", "instruction", "question", *RANKED_KEYS, *SCORE_KEYS, *KNOWN_ROW},
    Layout.unpaired: {"prompt", "completion", "response", "label", *CONVERSATION_KEYS, *KNOWN_ROW},
    Layout.styles: KNOWN_ROW,
    Layout.text: {"text", *KNOWN_ROW} - set(CONTEXT),
}


def check(row: Row, layout: Layout) -> None:
    """Raise BadRow, which names the field, where a row or a turn holds what is known to matter and is not honoured."""
    for name in row.keys() & REFUSED_ROW.keys():
        if row[name] and not (name == "rejected" and layout is Layout.preference):
            raise _refusal("", name, REFUSED_ROW[name])
    _check_weights(row)
    if row.get("mask") not in NEMO_MASKS:
        raise _refusal("", "mask", "roles that are not to be trained, and only the assistant is")
    if row.get("label") is False and layout is Layout.prompt_completion:
        raise _refusal("", "label", "false: an answer that is not wanted, which this objective would train")
    if layout in (Layout.preference, Layout.ranked, Layout.unpaired) and has_flags(row, layout):
        raise BadRow("has a turn that says that it is not trained, or has a weight, and this objective takes whole answers")
    for number, turn in enumerate(_turns(row, layout), 1):
        if not REFUSED_TURN.keys().isdisjoint(turn):
            _check_turn(turn, number)


def _check_turn(turn: dict[str, Any], number: int) -> None:
    for name in turn.keys() & REFUSED_TURN.keys():
        if turn[name]:
            raise _refusal(f"turn {number} ", name, REFUSED_TURN[name])


def _check_weights(row: Row) -> None:
    for name in row.keys() & {*FLAGS, *ROW_NAMES}:
        value = row[name]
        if name in ROW_NAMES and value is not None and not is_weight(value):
            raise _refusal("", name, f"{value!r}, which is not a number from 0 on")
        if name not in ROW_NAMES and (value == 0 or isinstance(value, list)):
            raise _refusal("", name, f"{value!r}: `weight` 0 leaves a row out, or give the field to single turns")


def _refusal(where: str, name: str, reason: str) -> BadRow:
    return BadRow(f"{where}has `{name}`, {reason}; data.ignore=[{name}] reads the rest as if it were not there")


def turn_weights(row: Row, layout: Layout, messages: Sequence[Message]) -> dict[int, float]:
    """Return what those of a row's messages (0-based) weigh that do not weigh 1: 0 is not trained, by a flag or as a part of the prompt.

    `messages` are the row's, which may begin with a system turn that the row holds elsewhere. Raises BadRow for what is not a weight,
    for flags that contradict each other, or that train a turn of somebody else.
    """
    turns = list(_turns(row, layout))
    first = int(bool(turns) and messages[0]["role"] == "system" and turns[0].get("role", turns[0].get("from")) != "system")
    in_prompt = len(row["prompt"]) if layout is Layout.prompt_completion and isinstance(row.get("prompt"), list) else 0
    found = {first + number: 0.0 for number in range(in_prompt)}
    for number, turn in enumerate(turns):
        weight = _weight(turn, number + 1)
        if weight and messages[first + number]["role"] != "assistant":
            raise BadRow(f"turn {number + 1} is to be trained and is not the assistant's; data.supervise=all trains every turn")
        if weight not in (None, 1) and found.get(first + number) != 0:
            found[first + number] = float(weight)
    return found


def has_flags(row: Row, layout: Layout) -> bool:
    """Tell whether a turn says that it is not trained, or has a weight."""
    return any(_weight(turn, number) not in (None, 1) for number, turn in enumerate(_turns(row, layout), 1))


def _weight(turn: dict[str, Any], number: int) -> float | None:
    """Return what a turn weighs, 0 where it is not trained; None where it says nothing."""
    said = {name: turn[name] for name in (*FLAGS, *INVERSE_FLAGS) if turn.get(name) is not None}
    for name, value in said.items():
        if not is_weight(value) or (name not in NAMES and value not in (0, 1)):
            wanted = "not a number from 0 on" if name in NAMES else "neither 0 nor 1"
            raise BadRow(f"turn {number} has `{name}` = {value!r}, which is {wanted}; data.ignore=[{name}] trains it all the same")
    meant = {bool(value) is (name not in INVERSE_FLAGS) for name, value in said.items()}
    weights = {float(value) for name, value in said.items() if name in NAMES}
    if len(meant) > 1 or len(weights) > 1:
        raise BadRow(
            f"turn {number} has flags that contradict each other: {', '.join(f'{name} = {value!r}' for name, value in said.items())}"
        )
    return weights.pop() if weights else float(meant.pop()) if meant else None


def unread(row: Row, layout: Layout) -> set[str]:
    """Return the fields of a row that nobody reads; those of turns as `turn.NAME`."""
    found = {str(name) for name in row.keys() - READ[layout] if row[name] is not None}
    for turn in _turns(row, layout):
        if turn.keys() - KNOWN_TURN:
            found.update(f"turn.{name}" for name in turn.keys() - KNOWN_TURN if turn[name] is not None)
    return found


def template_variables(row: Row) -> dict[str, Any]:
    """Return what a row gives its chat template in addition: `chat_template_kwargs`, and `documents`; raises BadRow."""
    found = row.get("chat_template_kwargs") or {}
    if not isinstance(found, dict) or found.keys() & set(RESERVED):
        names = ", ".join(sorted(found.keys() & set(RESERVED))) if isinstance(found, dict) else "no object"
        raise BadRow(f"has `chat_template_kwargs` that a template cannot take from a row: {names}")
    return found | ({"documents": row["documents"]} if row.get("documents") else {})


def _turns(row: Row, layout: Layout) -> Iterator[dict[str, Any]]:
    """Yield the turns of a row as they are in it, prompt before completion or answers."""
    one = layout in (Layout.messages, Layout.sharegpt) or (layout is Layout.unpaired and conversation_of(row) is not None)
    names = ("prompt", "chosen", "rejected") if layout is Layout.preference else ("prompt", "completion", "response")
    parts = [conversation_of(row)] if one else [row.get(name) for name in names]
    if layout is Layout.ranked:
        parts += [_text_of(answer) for answer in row.get(ranked_key(row) or "", [])]
    for part in parts:
        if isinstance(part, list):
            yield from (turn for turn in part if isinstance(turn, dict))


def _text_of(answer: Any) -> Any:
    """Return the text or the turns of an answer in a ranked list."""
    return next((answer[name] for name in TEXT_KEYS if answer.get(name) is not None), None) if isinstance(answer, dict) else answer
