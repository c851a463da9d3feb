"""Chat templates: which one a row takes, and a row rendered with it as transformers would."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.data.formats import BadRow, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools you may call, one JSON object each:\\n' }}
{%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{{- 'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""A chat template for tokenizers without one: system, user, assistant and tool turns, tool calls and reasoning."""
PLAIN = CHATML.replace("<|im_end|>", "' + eos_token + '").replace("<|im_start|>", "### ")
"""The same without tokens of its own, each turn ended by the tokenizer's end token: for tokenizers without ChatML's tokens."""
BUILT_IN = {"chatml": CHATML, "plain": PLAIN}

Span = tuple[int, int]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template with what it needs to know of the tokenizer."""

    jinja: str
    name: str
    variables: dict[str, str]
    """`bos_token`, `eos_token` and the like, as templates name them."""
    tokens: re.Pattern[str] | None
    """Matches the tokenizer's special and added tokens; None where it has none."""
    for_tools: str | None = None
    """The template of rows with tools, where the tokenizer has one of its own for them."""


def template_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Template | None:
    """Return the tokenizer's chat template, or None; `name` is what errors call it."""
    if not tokenizer.chat_template:
        return None
    added = {token for token in [*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens] if token.strip()}
    longest_first = sorted(sorted(added), key=len, reverse=True)
    templates = tokenizer.chat_template
    return Template(
        jinja=tokenizer.get_chat_template(),
        for_tools=templates.get("tool_use") if isinstance(templates, dict) else None,
        name=name,
        variables=dict(tokenizer.special_tokens_map),
        tokens=re.compile("|".join(map(re.escape, longest_first))) if added else None,
    )


def fill(template: Template, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
    """Return the template's rendering of a conversation; raises BadRow where it refuses, ConfigError where it is not valid Jinja."""
    return _render(template, messages, tools, add_generation_prompt=add_generation_prompt)[0]


def try_fill(template: Template, messages: list[Message], tools: list[Any] | None) -> str | None:
    """Return a rendering, or None where the template refuses it."""
    try:
        return fill(template, messages, tools)
    except BadRow:
        return None


def fill_generated(template: Template, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
    """Return a rendering with the spans of its `generation` blocks; raises as `fill` does."""
    marked = GENERATION.search(_jinja_of(template, tools)) is not None
    text, spans = _render(template, messages, tools, return_assistant_tokens_mask=marked)
    return text, spans


def _jinja_of(template: Template, tools: list[Any] | None) -> str:
    """Return the template that transformers takes: that for tools where a row has some."""
    return template.for_tools if tools and template.for_tools is not None else template.jinja


def _render(template: Template, messages: list[Message], tools: list[Any] | None, **options: bool) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        jinja = _jinja_of(template, tools)
        if "thinking" in jinja and "reasoning_content" not in jinja:  # gpt-oss
            messages = [m | {"thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages]
        rendered: Any = render_jinja_template([messages], tools=tools, chat_template=jinja, **options, **template.variables)  # type: ignore
    except TemplateSyntaxError as error:
        raise ConfigError("data.template", template.name, f"is not valid Jinja: line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise BadRow(f"is refused by the chat template: {error}") from None
    texts, spans = rendered
    return texts[0], spans[0] if spans else []
