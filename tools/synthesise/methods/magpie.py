"""An aligned model writes the user's turn itself (Xu et al. 2024, arXiv 2406.08464).

The model gets what its chat template writes before a user's content, and continues it. Where the template itself would end that turn, or
begin another, the text is cut. The prompt then goes back in the usual way, and the model answers it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tools.synthesise.methods.answers import Row, user
from tools.synthesise.work import Reply, Work
from trainers.config.errors import ConfigError
from trainers.data.ends import written_tokens
from trainers.data.formats import BadRow, Message
from trainers.data.template import Template, fill, template_of
from trainers.generate.request import LENGTH

MARK = "fulltunemark"
"""What a template is filled with, to see what it writes around a user's content."""


def magpie(work: Work) -> list[Row]:
    """Return rows until there are so many, or until rounds give nothing new; raises ConfigError for a template that does not serve."""
    tokenizer = work.writer.tokenizer
    template = template_of(tokenizer, "chat template")
    if template is None:
        raise ConfigError("model.path", work.settings.model.path, "has no chat template", "a model that was trained on conversations")
    opening: list[Message] = [{"role": "system", "content": work.of.system}] if work.of.system else []
    header = Header(template, tokenizer)
    work.planned = (work.settings.rows or 1) * 2 * work.of.turns
    rows: list[Row] = []
    idle = 0
    while not work.is_full(rows) and idle < work.of.idle:
        made = _round(work, header, opening)
        idle = 0 if made else idle + 1
        rows += made
    return rows[: work.settings.rows]


class Header:
    """What a template writes before a user's content, and what ends that."""

    def __init__(self, template: Template, tokenizer: Any) -> None:
        """Take the template."""
        self.template, self.tokenizer, self.tokens = template, tokenizer, written_tokens(template)

    def around(self, turns: Sequence[Message]) -> tuple[str, str]:
        """Return what comes before and after the content of a user's turn that follows some turns; raises ConfigError."""
        try:
            text = fill(self.template, [*turns, *user(MARK)], None, add_generation_prompt=True)
        except BadRow as error:
            raise ConfigError("magpie.turns", len(turns), f"a conversation {error}", "magpie.turns=1 without magpie.system") from None
        before, found, after = text.rpartition(MARK)
        if not found or MARK in before:
            reason = "the chat template does not write a user's content once"
            raise ConfigError("model.path", self.template.name, reason, "another model, or data.template of its run")
        return before, after

    def ids(self, turns: Sequence[Message]) -> list[int]:
        """Return the ids that the model continues with a user's content."""
        before = self.around(turns)[0].rstrip(" ")  # a blank belongs to the word that follows
        return list(map(int, self.tokenizer.encode(before, add_special_tokens=False)))

    def content(self, turns: Sequence[Message], reply: Reply) -> str | None:
        """Return the user's content that a reply begins with, None where it was cut before its end."""
        ends = [end for end in (first_mark(self.around(turns)[1], self.template.tokens), *self.tokens) if end]
        places = [at for end in ends if (at := reply.text.find(end)) >= 0]
        if not places and reply.finish == LENGTH:
            return None
        return reply.text[: min(places, default=len(reply.text))].strip()


def first_mark(after: str, tokens: re.Pattern[str] | None) -> str:
    """Return what shows that a user's content is over: the first token or word that the template writes after it."""
    text = after.strip()
    if tokens is not None and (found := tokens.match(text)):
        return found[0]
    return text.split()[0] if text else ""


def _round(work: Work, header: Header, opening: list[Message]) -> list[Row]:
    """Return the rows of a round, turn by turn; a conversation ends where a turn is removed, and stays if it has one."""
    live: list[list[Message]] = [list(opening) for _ in range(work.of.round)]
    replies: list[list[Reply]] = [[] for _ in live]
    going = list(range(len(live)))
    for turn in range(work.of.turns):
        begun = work.ask([header.ids(live[at]) for at in going], f"turns of the user, {turn + 1}", whole=True)
        asked = [(at, reply, text) for at, reply in zip(going, begun, strict=True) if (text := _content(work, header, live[at], reply))]
        said = work.ask([[*live[at], *user(text)] for at, _, text in asked], "answers")
        going = []
        for (at, begins, text), reply in zip(asked, said, strict=True):
            if work.passes(text, reply):
                live[at] += [*user(text), {"role": "assistant", "content": reply.text.strip()}]
                replies[at] += [begins, reply]
                going.append(at)
    ended = [at for at, turns in enumerate(live) if len(turns) > len(opening)]
    return [{"messages": live[at], "from": work.origin(*replies[at], turns=len(replies[at]) // 2)} for at in ended]


def _content(work: Work, header: Header, turns: list[Message], reply: Reply) -> str:
    """Return a user's content that passes the filters; "" and a count where it does not."""
    if reply.failure:
        work.remove("instruction: failed")
        return ""
    text = header.content(turns, reply)
    if text is None:
        work.remove("instruction: cut")
        return ""
    return text if work.takes(text) else ""
