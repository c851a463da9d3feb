"""Rows of an encoder-decoder as text: the source that the encoder reads and the target that the decoder writes. No torch.

On disk a row is one document, the source through its end token and then the target through its own; the target has the labels.
"""

from __future__ import annotations

from typing import Any

from trainers.config.choices import Layout
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data import fields, formats
from trainers.data.formats import BadRow, Message
from trainers.data.masks import Rendered, plain_text


def require_plain(config: RunConfig, layout: Layout, name: str, eos: str, remedy: str) -> None:
    """Raise ConfigError where plain rows have no answer, or nothing to end one with."""
    if config.model.encoder_decoder and layout is Layout.text:
        reason = "rows are texts, and an encoder-decoder (model.encoder_decoder) reads a prompt and writes an answer"
        raise ConfigError("data.path", config.data.path, reason, "rows of prompt and completion, instruction and output, or two turns")
    if not eos:
        remedy = "another tokenizer" if config.model.encoder_decoder else remedy
        raise ConfigError("model.tokenizer", name, "the tokenizer has no eos_token, so nothing would end an answer", remedy)


def source_of(messages: list[Message], bos: str, eos: str) -> str:
    """Return the text that the encoder reads of the turns before an answer: one turn of the user, after a system text if there is one.

    Raises BadRow for a conversation.
    """
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"], ["developer", "user"]):
        reason = f"has turns of {', '.join(roles)} before its answer, and an encoder-decoder reads one question"
        raise BadRow(f"{reason}: rows of one turn of the user and one of the assistant")
    return plain_text("\n".join(str(message["content"]) for message in messages), bos, eos).text


def render_pair(row: Any, layout: Layout, bos: str, eos: str) -> tuple[Rendered, str]:
    """Return a row's source and target as one text whose target is trained, and its first prompt; raises BadRow."""
    messages = formats.to_messages(row, layout)
    *before, answer = messages
    if formats.to_tools(row) is not None:
        raise BadRow("has tools, which have no place in plain text; data.ignore=[tools,functions] leaves them out")
    if answer["role"] != "assistant" or answer.keys() - {"role", "content"}:
        raise BadRow("does not end with an answer that is text alone, which the decoder would write")
    source = source_of(before, bos, eos)
    text = source + plain_text(str(answer["content"]), "", eos).text
    weight = fields.turn_weights(row, layout, messages).get(len(before), 1.0)
    spans = [(len(source), len(text))] if weight else []
    return Rendered(text, spans, [weight] if spans and weight != 1 else []), formats.first_prompt(messages)
