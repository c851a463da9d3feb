"""What of a rendered row is trained: character spans, found in the template's own renderings and never in token ids.

A turn's span is found by rendering the conversation again with that turn replaced by one character that occurs nowhere
else: what the two renderings share at the start and at the end is the template's, and what lies
between is the turn's own. This needs nothing of a generation prompt, which for several templates is not a prefix of the
whole rendering.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigError
from trainers.config.schema import Supervise
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

Span = tuple[int, int]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A row as text, and the spans of it that are trained, in characters, in order, end excluded."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template with what it needs to know of the tokenizer."""

    jinja: str
    name: str
    variables: dict[str, str]
    """`bos_token`, `eos_token` and the like, as templates name them."""
    tokens: re.Pattern[str] | None
    """Matches the tokenizer's special and added tokens; None where it has none."""


@dataclass(frozen=True)
class Turn:
    """Where an assistant turn's own text lies, and where the end-of-turn text after it ends (None: there is none)."""

    start: int
    text_end: int
    end: int | None


def template_of(tokenizer: PreTrainedTokenizerBase, name: str) -> Template | None:
    """Return the tokenizer's chat template, or None; `name` is what errors call it."""
    if not tokenizer.chat_template:
        return None
    added = {token for token in [*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens] if token.strip()}
    longest_first = sorted(sorted(added), key=len, reverse=True)
    return Template(
        jinja=tokenizer.get_chat_template(),
        name=name,
        variables=dict(tokenizer.special_tokens_map),
        tokens=re.compile("|".join(map(re.escape, longest_first))) if added else None,
    )


def plain_pair(prompt: str, completion: str, bos: str, eos: str) -> Rendered:
    """Return prompt and completion as text, the completion and `eos` trained."""
    start = len(bos) + len(prompt)
    text = f"{bos}{prompt}{completion}{eos}"
    return Rendered(text, [(start, len(text))])


def plain_text(text: str, bos: str, eos: str) -> Rendered:
    """Return a text between `bos` and `eos`, all of it trained."""
    text = f"{bos}{text}{eos}"
    return Rendered(text, [(0, len(text))])


def render(
    template: Template,
    messages: list[Message],
    tools: list[Any] | None = None,
    supervise: Supervise = Supervise.assistant,
    untrained: frozenset[int] = frozenset(),
) -> Rendered:
    """Render a conversation with the spans that `supervise` asks for, each through its end-of-turn text, without turns in `untrained`.

    Raises BadRow where the template refuses the row or leaves a supervised turn out, and ConfigError where nothing marks
    the end of the last turn, since a model trained so would never stop.
    """
    if supervise is Supervise.all:
        text = fill(template, messages, tools)
        return Rendered(text, [(0, len(text))])
    text, marked = _fill_marked(template, messages, tools)
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [_turn(template, messages, tools, text, number) for number in (numbers[-1:] if supervise is Supervise.last else numbers)]
    if turns[-1].end is None:
        raise ConfigError(
            "data.template",
            template.name,
            "the chat template puts nothing after the last assistant turn, so the model would never learn to stop",
            "add {{ eos_token }} after the assistant's content in the template, or data.template=chatml",
        )
    last = numbers[-len(turns) :]
    turns = [turn for number, turn in zip(last, turns, strict=True) if number not in untrained]
    spans = [(turn.start, turn.text_end if turn.end is None else turn.end) for turn in turns]
    return Rendered(text, _merge_marked(marked, turns) if marked else spans)


def fill(template: Template, messages: list[Message], tools: list[Any] | None, add_generation_prompt: bool = False) -> str:
    """Return the template's rendering of a conversation; raises BadRow where it refuses, ConfigError where it is not valid Jinja."""
    return _render(template, messages, tools, add_generation_prompt=add_generation_prompt)[0]


def _fill_marked(template: Template, messages: list[Message], tools: list[Any] | None) -> tuple[str, list[Span]]:
    marked = GENERATION.search(template.jinja) is not None
    text, spans = _render(template, messages, tools, return_assistant_tokens_mask=marked)
    return text, spans


def _render(template: Template, messages: list[Message], tools: list[Any] | None, **options: bool) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template([messages], tools=tools, chat_template=template.jinja, **options, **template.variables)  # type: ignore
    except TemplateSyntaxError as error:
        raise ConfigError("data.template", template.name, f"is not valid Jinja: line {error.lineno}: {error.message}") from None
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise BadRow(f"is refused by the chat template: {error}") from None
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


def _turn(template: Template, messages: list[Message], tools: list[Any] | None, text: str, number: int) -> Turn:
    """Find assistant turn `number` in the rendering `text` of all messages."""
    try:
        start, text_end = _own_text(template, messages, tools, text, number)
    except BadRow:
        if not messages[number].get("tool_calls"):
            raise
        start, text_end = _own_text_of_call(template, messages, tools, text, number)
    if start >= text_end:
        raise BadRow(f"turn {number + 1} is left out by the chat template")
    return Turn(start, text_end, _turn_end(template, messages, tools, text, text_end, number))


def _own_text(template: Template, messages: list[Message], tools: list[Any] | None, text: str, number: int) -> Span:
    probe = _unused_character(text)
    probed = fill(template, _replaced(messages, number, {"role": "assistant", "content": probe}), tools)
    start, text_end, exact = _difference(text, probed, probe)
    if not exact or _has_thought(messages[number]):
        start = _behind_header(template, messages, tools, text, number, start)
    return start, text_end


def _difference(text: str, probed: str, probe: str) -> tuple[int, int, bool]:
    """Return start and end of what `text` has where `probed` has the probe, and whether the fronts agree up to the probe."""
    if probe not in probed:
        raise BadRow("has an assistant turn that the chat template leaves out")
    front, back = probed[: probed.index(probe)], probed[probed.rindex(probe) + 1 :]
    start = len(front) if text.startswith(front) else shared_length(text, front)
    shared = len(back) if text.endswith(back) else shared_length(text[::-1], back[::-1])
    return start, len(text) - shared, start == len(front)


def _has_thought(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in message.get("content", "")


def _behind_header(template: Template, messages: list[Message], tools: list[Any] | None, text: str, number: int, start: int) -> int:
    """Move `start` forward to where the generation prompt ends, so that an opening `<think>` of the row's own is trained."""
    try:
        before, prompted = (fill(template, messages[:number], tools, add_generation_prompt=prompt) for prompt in (False, True))
    except BadRow:
        return start
    header = prompted[shared_length(before, prompted) :]
    anchor = header.splitlines(keepends=True)[0] if header else ""
    at = text.rfind(anchor, 0, start) if anchor else -1
    return start if at < 0 else min(start, at + shared_length(header, text[at:]))


def _own_text_of_call(template: Template, messages: list[Message], tools: list[Any] | None, text: str, number: int) -> Span:
    """Find a turn of tool calls where the template refuses a plain turn in its place.

    The turn is measured in the rendering that ends with it, and found in `text` by the name of its first function.
    """
    probe = _unused_character(text)
    call = messages[number]["tool_calls"][0]
    renamed = {**call, "function": {**call["function"], "name": probe}}
    named = {**messages[number], "tool_calls": [renamed, *messages[number]["tool_calls"][1:]]}
    ending = messages[: number + 1]
    short = fill(template, ending, tools)
    start, text_end, _ = _difference(
        short, fill(template, _replaced(ending, number, {"role": "assistant", "content": probe}), tools), probe
    )
    name_short, _, _ = _difference(short, fill(template, _replaced(ending, number, named), tools), probe)
    name_full, _, _ = _difference(text, fill(template, _replaced(messages, number, named), tools), probe)
    found = name_full - (name_short - start)
    if text[found : found + text_end - start] != short[start:text_end]:
        raise BadRow(f"turn {number + 1} cannot be told apart in the chat template's rendering")
    return found, found + text_end - start


def _turn_end(template: Template, messages: list[Message], tools: list[Any] | None, text: str, text_end: int, number: int) -> int | None:
    """Return where the end-of-turn text after a turn ends: the first token of the tokenizer's own, else the first line.

    A token counts only where it also follows when the turn is the last one: what opens the next turn does not end this.
    """
    after = text[text_end:]
    own = after if number == len(messages) - 1 else _tail(template, messages[: number + 1], tools)
    found = _next_token(template, text, text_end)
    if found is not None and found.group() in text[found.start() : text_end] + own:
        return found.end()
    shared = after[: shared_length(after, own)]
    line = shared.lstrip().split("\n")[0].rstrip()
    is_whole = "\n" in shared.lstrip() or len(shared) in (len(after), len(own))
    return text_end + shared.index(line) + len(line) if line and is_whole else None


def _tail(template: Template, messages: list[Message], tools: list[Any] | None) -> str:
    text = fill(template, messages, tools)
    probe = _unused_character(text)
    probed = fill(template, [*messages[:-1], {"role": "assistant", "content": probe}], tools)
    return text[_difference(text, probed, probe)[1] :]


def _next_token(template: Template, text: str, text_end: int) -> re.Match[str] | None:
    """Return the first token that ends after `text_end` with only blanks between; it may begin before it."""
    if template.tokens is None:
        return None
    for found in template.tokens.finditer(text, max(0, text_end - 64)):
        if found.end() > text_end:
            return found if not text[text_end : found.start()].strip() else None
    return None


def _merge_marked(marked: list[Span], turns: list[Turn]) -> list[Span]:
    """Return the template's own `generation` spans within the turns, made longer where they stop short of the end of turn."""
    spans = []
    for turn in turns:
        last = turn.text_end if turn.end is None else turn.end
        for start, end in marked:
            if start < last and end > turn.start:
                spans.append((start, max(end, last) if end >= turn.text_end else end))
    return spans


def _replaced(messages: list[Message], number: int, message: Message) -> list[Message]:
    return [*messages[:number], message, *messages[number + 1 :]]


def shared_length(one: str, other: str) -> int:
    """Return how many characters two strings have in common at the front."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[low:middle], low) else (low, middle - 1)
    return low


def _unused_character(text: str) -> str:
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
