"""Rows of any layout as prompts: what comes before the answer, and the answer that the row has. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.config.choices import Layout, ObjectiveName
from trainers.config.derived import Source
from trainers.config.errors import ConfigError
from trainers.data import sources
from trainers.data.encode import first_token
from trainers.data.formats import BadRow, Message, Row, joined, recognise, require_characters, system_of, to_messages, to_tools
from trainers.data.preferences import to_preference, turns_of
from trainers.data.seq2seq import source_of
from trainers.data.template import fill, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What is asked, and where it was found."""

    messages: list[Message]
    tools: list[Any] | None
    reference: str
    """The text of the answer that the row has; empty where it has none."""
    row: Row
    file: str
    line: int


def read(path: str, split: str = "train") -> list[Prompt]:
    """Return the prompts of a file, a directory or a hub data set; raises ConfigError for a row that has none, with its place."""
    found = list(read_each(Source(path, split)))
    if not found:
        raise ConfigError("PROMPTS", path, "there are no rows")
    return found


def read_each(source: Source | None, named: str = "PROMPTS", ignore: Sequence[str] = ()) -> Iterator[Prompt]:
    """Yield the prompts of a source, of Python's documentation where it is None, without the fields `ignore`.

    Raises ConfigError, of the setting `named`, for a row that has none, with its place.
    """
    for row in sources.rows(source, ObjectiveName.sft):
        try:
            data = sources.parse(row, ignore)
            messages = turns_before_the_answer(data)
            for message in messages:
                require_characters(str(message.get("content", "")))
            yield Prompt(messages, to_tools(data), reference_of(data), data, row.file, row.line)
        except BadRow as error:
            reason = f"{row.file}:{row.line} {error}"
            raise ConfigError(named, source.path if source else None, reason, "rows with `messages`, `prompt` or `question`") from None


def turns_before_the_answer(row: Row) -> list[Message]:
    """Return a row's turns up to the last that is the user's or a tool's; raises BadRow without one."""
    turns = _turns(row)
    end = max((number for number, turn in enumerate(turns, 1) if turn["role"] in ("user", "tool")), default=0)
    if not end:
        raise BadRow("has no turn of the user")
    return turns[:end]


def reference_of(row: Row) -> str:
    """Return the text of a row's last turn where that is the assistant's."""
    last = _turns(row)[-1]
    return str(last.get("content") or "") if last["role"] == "assistant" else ""


def _turns(row: Row) -> list[Message]:
    """Return all turns of a row, those of a pair up to its chosen answer."""
    try:
        layout = recognise(row)
    except BadRow:
        layout = Layout.auto
    if layout is Layout.preference:
        pair = to_preference(row)
        return [*pair.prompt, *pair.chosen]
    if layout not in (Layout.auto, Layout.text, Layout.ranked):
        return to_messages(row, layout, answered=False)
    key = next((name for name in ("prompt", "question", "instruction") if isinstance(row, dict) and row.get(name)), None)
    if key is None:
        raise BadRow("has no `messages`, `prompt`, `question` or `instruction`")
    asked = row[key]
    if key == "instruction" and isinstance(asked, str) and row.get("input") is not None:
        asked = joined(row)
    turns = turns_of(asked, key, "user")
    system = system_of(row)
    return [{"role": "system", "content": system}, *turns] if system and turns[0]["role"] != "system" else turns


def rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool = False) -> list[int]:
    """Return a prompt's ids as training renders it: by the chat template, and without one its last turn; raises ConfigError.

    Of an encoder-decoder they are what its encoder reads.
    """
    template = template_of(tokenizer, "chat template")
    try:
        if encoder_decoder:
            if prompt.tools:
                raise BadRow("has tools, which have no place in plain text")
            text = source_of(prompt.messages, first_token(tokenizer), str(tokenizer.eos_token))
        elif template is not None:
            text = fill(template, prompt.messages, prompt.tools, add_generation_prompt=True)
        elif len(prompt.messages) == 1 and not prompt.tools:
            between = "" if "prompt" in prompt.row else "\n"
            text = f"{first_token(tokenizer)}{prompt.messages[0]['content']}{between}"
        else:
            raise ConfigError("MODEL", tokenizer.name_or_path, "has no chat template, and a conversation needs one", "prompts of one turn")
    except BadRow as error:
        raise ConfigError("PROMPTS", prompt.file, f"line {prompt.line} {error}") from None
    return list(map(int, tokenizer.encode(text, add_special_tokens=False)))
