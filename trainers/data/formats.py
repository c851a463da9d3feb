"""A row of any layout to messages, to a prompt and its completion, or to a text: pure functions."""

from __future__ import annotations

import json
from typing import Any

from trainers.config.choices import Layout

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
CONVERSATION_KEYS = ("messages", "conversations", "conversation")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
KEPT_KEYS = ("name", "tool_call_id")
SYSTEM_KEYS = ("system", "system_prompt")
TEXT_PARTS = (None, "text", "input_text", "output_text")


class BadRow(Exception):
    """A row that cannot be trained on; the message is the reason."""


def strict_json(text: str) -> Any:
    """Return the value of JSON text; raises ValueError also where an object has a key twice, or is too deep."""
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has the key `{next(name for name in names if names.count(name) > 1)}` twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def require_characters(text: str) -> None:
    """Raise BadRow for text that no tokenizer takes, or that nobody wrote: half of a surrogate pair, a NUL."""
    if "\0" in text:
        raise BadRow("has a NUL character: its file is damaged, or not in UTF-8")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRow(f"has {half}, which is not a character: half of a surrogate pair, or a byte that is not UTF-8") from None


def recognise(row: object) -> Layout:
    """Tell the layout of a row from its keys; raises BadRow when none fits."""
    if not isinstance(row, dict):
        raise BadRow(f"is {_kind(row)}, not an object with named fields")
    if "chosen" in row and "rejected" in row:
        return Layout.preference
    key = _conversation_key(row)
    if key is not None:
        turns = conversation_of(row)
        first = turns[0] if isinstance(turns, list) and turns else None
        return Layout.sharegpt if isinstance(first, dict) and "from" in first else Layout.messages
    if ranked_key(row) is not None:
        return Layout.ranked
    if "prompt" in row and ("completion" in row or "response" in row):
        return Layout.prompt_completion
    if "question" in row and "answer" in row:
        return Layout.question_answer
    if "instruction" in row and "output" in row:
        return Layout.alpaca
    if "text" in row:
        return Layout.text
    raise BadRow(f"has no known layout; its fields are {', '.join(sorted(map(str, row))) or 'none'}")


RANKED_KEYS = ("completions", "responses", "answers")
SCORE_KEYS = ("scores", "ratings", "ranks", "score", "overall_score", "rating", "rank")
"""Of a list of answers, next to it or in each of them: the best has the highest score and the lowest rank."""


def ranked_key(row: Row) -> str | None:
    """Return the field that holds a row's several answers with what each is worth; None where it has none."""
    for key in RANKED_KEYS:
        if isinstance(answers := row.get(key), list) and answers:
            inside = isinstance(answers[0], dict) and any(name in answers[0] for name in SCORE_KEYS)
            if inside or any(isinstance(row.get(name), list) for name in SCORE_KEYS):
                return key
    return None


def to_messages(row: Row, layout: Layout, answered: bool = True) -> list[Message]:
    """Return a row's conversation, checked and in one form; raises BadRow with the reason. Where it is `answered` it has an answer.

    Messages have `role`, `content` (absent with tool calls), and where the row has them `tool_calls` with arguments
    as objects, `tool_call_id`, `name` and `reasoning_content`.
    """
    _require_object(row)
    if layout in (Layout.messages, Layout.sharegpt):
        messages = _conversation(row, layout)
    elif layout is Layout.prompt_completion and isinstance(row.get("prompt"), list):
        messages = to_turns(row["prompt"], "prompt") + _completion_turns(row)
    else:
        prompt, completion = to_pair(row, layout)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if (system := system_of(row)) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no assistant turn")
    return messages


def to_pair(row: Row, layout: Layout) -> tuple[str, str]:
    """Return a row's prompt and completion as plain strings; raises BadRow where one is missing, empty or no string."""
    _require_object(row)
    if layout is Layout.question_answer:
        prompt, completion = _string(row, "question"), _string(row, "answer")
    elif layout is Layout.alpaca:
        prompt, completion = joined(row), _string(row, "output")
    elif layout is Layout.prompt_completion:
        prompt, completion = _string(row, "prompt"), _string(row, _completion_key(row))
    else:
        raise BadRow(f"has no prompt and completion: its layout is {layout}")
    if not completion.strip():
        raise BadRow("has an empty assistant turn")
    return prompt, completion


def joined(row: Row) -> str:
    """Return the instruction of a row and what it is about, where it has that."""
    instruction = _string(row, "instruction")
    extra = _string(row, "input") if row.get("input") is not None else ""
    return f"{instruction}\n{extra}" if extra else instruction


def to_text(row: Row) -> str:
    """Return the `text` of a row; raises BadRow where it is missing, blank or no string."""
    _require_object(row)
    text = _string(row, "text")
    if not text.strip():
        raise BadRow("has an empty text")
    return text


def system_of(row: Row) -> str:
    """Return the system text that a row holds outside its turns, or ''."""
    found = next((row[key] for key in SYSTEM_KEYS if row.get(key)), "")
    if not isinstance(found, str):
        raise BadRow(f"has a system text that is {_kind(found)}, not a string")
    return found if found.strip() else ""


def to_tools(row: Row) -> list[Any] | None:
    """Return the tool definitions of a row, given as a list or as JSON; None where it has none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _parse_json(tools, "tools")
    if not tools and row.get("functions"):  # OpenAI's earlier form
        tools = [{"type": "function", "function": function} for function in row["functions"]]
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("has `tools` that are not a list of objects")
    _require_json(tools, "`tools`")
    return tools


def is_conversation(row: Row, layout: Layout) -> bool:
    """Tell whether a row holds turns, which need a chat template, and not a plain prompt or text."""
    return layout in (Layout.messages, Layout.sharegpt) or (layout is Layout.prompt_completion and isinstance(row.get("prompt"), list))


def first_prompt(messages: list[Message]) -> str:
    """Return the content of the first user turn, by which rows are grouped into splits."""
    for message in messages:
        if message["role"] == "user":
            return str(message.get("content", ""))
    return str(messages[0].get("content", ""))


def conversation_of(row: Row) -> Any:
    """Return the turns of a row of one conversation, from JSON where a table holds them as text; None where it has none."""
    key = _conversation_key(row)
    if key is None:
        return None
    return _parse_json(row[key], f"`{key}`") if isinstance(row[key], str) else row[key]


def _conversation_key(row: Row) -> str | None:
    return next((key for key in CONVERSATION_KEYS if row.get(key) is not None), None)


def _completion_key(row: Row) -> str:
    return "completion" if row.get("completion") is not None else "response"


def _completion_turns(row: Row) -> list[Message]:
    completion = row.get(_completion_key(row))
    if isinstance(completion, list):
        return to_turns(completion, "completion")
    return to_turns([{"role": "assistant", "content": completion}], "completion")


def _conversation(row: Row, layout: Layout) -> list[Message]:
    key = _conversation_key(row)
    if key is None:
        raise BadRow("has no `messages` or `conversations`")
    turns = conversation_of(row)
    others = [other for other in CONVERSATION_KEYS if other != key and row.get(other) not in (None, row[key])]
    if others:
        raise BadRow(f"has two conversations, in `{key}` and `{others[0]}`; data.ignore=[{others[0]}] reads the first")
    if layout is Layout.sharegpt and isinstance(turns, list):
        turns = [_from_sharegpt(turn, number) for number, turn in enumerate(turns, 1)]
    return to_turns(turns, key)


def _from_sharegpt(turn: object, number: int) -> object:
    if not isinstance(turn, dict):
        return turn
    name = turn.get("from")
    if name not in SHAREGPT_ROLES:
        raise BadRow(f"turn {number} has no known `from`: {name!r}; known are {', '.join(SHAREGPT_ROLES)}")
    value = turn.get("value")
    if name == "function_call" and isinstance(value, str):
        return {"role": "assistant", "tool_calls": _parse_calls(value)}
    return {"role": SHAREGPT_ROLES[name], "content": value} | {key: turn[key] for key in (*KEPT_KEYS, *REASONING_KEYS) if key in turn}


def _parse_calls(value: str) -> list[Any]:
    calls = _parse_json(value, "function_call")
    return calls if isinstance(calls, list) else [calls]


def to_turns(turns: object, key: str) -> list[Message]:
    """Return the turns of a field, checked and in one form; raises BadRow."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"has `{key}` that is {_kind(turns)}, not a list of turns" if turns != [] else f"has an empty `{key}`")
    return [_turn(turn, number) for number, turn in enumerate(turns, 1)]


def _turn(turn: object, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {_kind(turn)}, not an object")
    role = turn.get("role")
    if role is None:
        raise BadRow(f"turn {number} has no role")
    if role not in ROLES:
        raise BadRow(f"turn {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    message: Message = {"role": role} | {key: turn[key] for key in KEPT_KEYS if turn.get(key) is not None}
    reasoning = next((turn[key] for key in REASONING_KEYS if isinstance(turn.get(key), str) and turn[key]), None)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, number)
    content = _content(turn.get("content"), number)
    if content is not None:
        message["content"] = content
    _check_content(message, number)
    return message


def _check_content(message: Message, number: int) -> None:
    if message["role"] == "assistant":
        if not message.get("content", "").strip() and not message.get("tool_calls") and not message.get("reasoning_content"):
            raise BadRow(f"turn {number} is an empty assistant turn")
    elif "content" not in message:
        raise BadRow(f"turn {number} ({message['role']}) has no content")


def _content(content: object, number: int) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    for part in parts:
        if part not in TEXT_PARTS:
            raise BadRow(f"turn {number} has a part of type {part!r}, and only text is trained")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise BadRow(f"turn {number} has content that is {_kind(content)}, not a string")


def _tool_calls(calls: object, number: int) -> list[Message]:
    if isinstance(calls, str):
        calls = _parse_json(calls, "tool_calls")
    if not isinstance(calls, list):
        raise BadRow(f"turn {number} has tool_calls that are {_kind(calls)}, not a list")
    return [_tool_call(call, number) for call in calls]


def _tool_call(call: object, number: int) -> Message:
    if not isinstance(call, dict):
        raise BadRow(f"turn {number} has a tool call that is {_kind(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"turn {number} has a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # templates iterate over the arguments or turn them into JSON themselves
        arguments = _parse_json(arguments or "{}", "tool call arguments")
    _require_json(arguments, "tool call arguments")
    kept = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return kept | {"type": "function", "function": {"name": function["name"], "arguments": {} if arguments is None else arguments}}


def _parse_json(text: str, what: str) -> Any:
    try:
        return strict_json(text)
    except ValueError as error:
        raise BadRow(f"has {what} that are not JSON: {error}") from None


def _require_json(value: Any, what: str) -> None:
    """Raise BadRow for what JSON has no word for: NaN (elsewhere a missing number), dates, bytes."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(f"has {what} that are not JSON: {error}") from None


def _string(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        raise BadRow(f"has no `{key}`")
    if not isinstance(value, str):
        raise BadRow(f"has `{key}` that is {_kind(value)}, not a string")
    return value


def _require_object(row: object) -> None:
    if not isinstance(row, dict):
        raise BadRow(f"is {_kind(row)}, not an object with named fields")


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
