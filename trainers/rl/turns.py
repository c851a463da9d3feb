"""Conversations in tokens: what the model has sampled stays as it was, and the turns between are what the chat template writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainers.config.errors import ConfigError
from trainers.data.ends import stop_ids
from trainers.data.formats import BadRow, Message
from trainers.data.template import Template, fill, template_of
from trainers.generate.request import LENGTH, STOP, Answer

MARK = "fulltune-5f0c2b7e"
"""In place of an answer in a rendering, of which only what follows it is read: no tool that is written before it has this."""


@dataclass(frozen=True, kw_only=True)
class Conversation(Answer):
    """A conversation of a model with an environment.

    `ids` and `logps` are of all tokens that the model has sampled, `text` is its last turn.
    """

    last_ids: list[int] = field(default_factory=list)
    """The tokens of its last turn."""
    document: list[int] = field(default_factory=list)
    """All tokens, from the first of the prompt to the last that was sampled."""
    sampled: list[bool] = field(default_factory=list)
    """Which of them the model has sampled."""
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    """Of the model."""
    reward: float = 0.0
    """The sum of the environment's."""
    ended: str = ""
    """By what: `done` by the environment, a limit of `turns` or `tokens`, `cut` in the model's last turn; or `failed`."""
    fault: str = ""
    """How the environment has failed; there is no reward then."""

    @property
    def last(self) -> int:
        """Return the number of the model's last turn among the messages; of all of them without one."""
        found = [at for at, message in enumerate(self.messages) if message["role"] == "assistant"]
        return found[-1] if found and self.turns else len(self.messages)


class Turns:
    """What a chat template writes between two turns of the model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, environment: str) -> None:
        """Raise ConfigError where the template is missing, or no one token ends a turn."""
        self.tokenizer, template = tokenizer, template_of(tokenizer, "chat template")
        if template is None:
            reason = "needs a conversation's turns, and the tokenizer has no chat template"
            raise ConfigError("rl.environment", environment, reason, "data.template=chatml")
        self.template: Template = template
        self.stops = stop_ids(tokenizer)
        try:
            self.between([{"role": "user", "content": "Hello."}])
        except BadRow as error:
            raise ConfigError(
                "rl.environment", environment, f"needs turns after the model's, and {error}", "data.template=chatml"
            ) from None

    def begin(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the ids of what the model is asked with; raises BadRow where the template refuses it."""
        return self._ids(fill(self.template, list(messages), tools, add_generation_prompt=True))

    def between(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Return the ids from after the token that ends a turn of the model, through these turns, to where it writes again.

        Raises BadRow where the template refuses them.
        """
        asked: list[Message] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": MARK}, *messages]
        text = fill(self.template, asked, tools, add_generation_prompt=True)
        ids = self._ids(text[text.index(MARK) + len(MARK) :])
        end = next((at for at, one in enumerate(ids) if one in self.stops), None)
        if end is None or str(self.tokenizer.decode(ids[:end])).strip():
            raise BadRow("the chat template ends a turn with no token of its own")
        return ids[end + 1 :]

    def _ids(self, text: str) -> list[int]:
        return list(map(int, self.tokenizer.encode(text, add_special_tokens=False)))

    def words(self, answer: Answer) -> str:
        """Return a turn of the model as text."""
        return words_of(answer, self.tokenizer)


def words_of(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return an answer in words, without the token that ended it."""
    ids = answer.ids or []
    return str(tokenizer.decode(ids[:-1] if answer.finish == STOP else ids, skip_special_tokens=True))


@dataclass
class Talk:
    """A conversation that is being held."""

    key: int
    place: tuple[Any, ...]
    """What its seeds are of."""
    ids: list[int]
    sampled: list[bool]
    messages: list[Message]
    tools: list[Any] | None = None
    """The row's, which the template writes."""
    last_ids: list[int] = field(default_factory=list)
    """Of the model's last turn."""
    logps: list[float] = field(default_factory=list)
    turns: int = 0
    reward: float = 0.0
    ended: str = ""
    fault: str = ""

    def take(self, answer: Answer, text: str) -> None:
        """Take a turn of the model."""
        ids = answer.ids or []
        self.ids, self.sampled, self.logps = self.ids + ids, self.sampled + [True] * len(ids), self.logps + (answer.logps or [])
        self.messages, self.turns = [*self.messages, {"role": "assistant", "content": text}], self.turns + 1
        self.last_ids = ids
        self.ended = "cut" if answer.finish == LENGTH else ""

    def hear(self, messages: Sequence[Message], ids: list[int]) -> None:
        """Take turns of the environment."""
        self.messages = [*self.messages, *messages]
        self.ids, self.sampled = self.ids + ids, self.sampled + [False] * len(ids)

    def fail(self, fault: str) -> None:
        """End without a reward."""
        self.ended, self.fault = "failed", fault

    def whole(self) -> Conversation:
        """Return what it has come to; tokens of the environment after the model's last turn are left out."""
        last = max((at for at, is_sampled in enumerate(self.sampled, 1) if is_sampled), default=len(self.ids))
        says = [str(message["content"]) for message in self.messages if message["role"] == "assistant"]
        return Conversation(
            key=self.key,
            ids=[one for one, is_sampled in zip(self.ids, self.sampled, strict=True) if is_sampled],
            logps=self.logps,
            text=says[-1] if self.turns else "",
            last_ids=self.last_ids,
            finish=STOP if self.ended in ("done", "failed") else LENGTH,
            document=self.ids[:last],
            sampled=self.sampled[:last],
            messages=self.messages,
            turns=self.turns,
            reward=self.reward,
            ended=self.ended,
            fault=self.fault,
        )
