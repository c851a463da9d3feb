"""Text and tokens of the ends: what ends a turn is one token that generation stops at, and no end is there twice."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config.choices import PeftMethod
from trainers.config.errors import ConfigError
from trainers.config.schema import RunConfig
from trainers.data import masks
from trainers.data.formats import BadRow, Message
from trainers.data.template import try_fill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELLO: list[Message] = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
MARKUP = re.compile(r"<[|｜]?[^\s<>|｜]{1,40}[|｜]?>|\[/?[A-Z_]+\]")
"""What templates write and tokenizers usually have as one token."""
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the end token, and the token after an assistant turn of the chat template."""
    found = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    template = masks.template_of(tokenizer, "chat template")
    if template is not None:
        with contextlib.suppress(ConfigError):
            found |= {last for last in _hello(tokenizer, template)[2:] if last is not None}
    return sorted(found)


def require_ends(tokenizer: PreTrainedTokenizerBase, template: masks.Template, can_grow: bool) -> None:
    """Raise ConfigError where a model trained with this template would not stop, or where the template itself begins a text twice.

    `can_grow` says whether the model may take new tokens.
    """
    try:
        text, end, last = _hello(tokenizer, template)
    except ConfigError as error:
        remedy = f"add {{{{ eos_token }}}} after the assistant's content, or {chat_remedy(tokenizer, can_grow)}" if error.remedy else ""
        raise ConfigError(error.path, error.value, error.reason, remedy) from None
    bos = str(tokenizer.bos_token or "")
    if bos and text.startswith(bos * 2):
        reason = f"writes `{bos}` twice at the start of a text"
        raise ConfigError("data.template", template.name, reason, f"take one out of the template, or {chat_remedy(tokenizer, can_grow)}")
    if text and last is None:
        count = len(tokenizer.encode(end, add_special_tokens=False))
        names = [name for name in dict.fromkeys([*MARKUP.findall(text), end]) if not _is_token(tokenizer, name)]
        reason = (
            f"a turn ends with `{end}`, which is {count} ordinary token{'s' * (count != 1)} of this tokenizer: "
            "generation would not stop at it"
        )
        raise ConfigError("data.template", template.name, reason, " or ".join([*_added(names, can_grow), *_plain(tokenizer)]))


def may_grow(config: RunConfig) -> bool:
    """Tell whether a run's model may take new tokens: adapters are loaded onto a base that has not grown."""
    return config.peft.method in (PeftMethod.none, PeftMethod.freeze)


def chat_remedy(tokenizer: PreTrainedTokenizerBase, can_grow: bool) -> str:
    """Return overrides that give this tokenizer a chat template that it has the tokens for."""
    missing = [name for name in CHATML_TOKENS if not _is_token(tokenizer, name)]
    chatml = [f"data.template=chatml {text}".strip() for text in (_added(missing, can_grow) if missing else [""])]
    return " or ".join([*chatml, *(_plain(tokenizer) if missing else [])]) or "a template for it"


def _added(names: list[str], can_grow: bool) -> list[str]:
    quoted = ",".join(f"'{name}'" for name in names)
    return [f'"model.add_tokens=[{quoted}]"'] if can_grow else []


def _plain(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return ["data.template=plain"] if tokenizer.eos_token is not None else []


def _hello(tokenizer: PreTrainedTokenizerBase, template: masks.Template) -> tuple[str, str, int | None]:
    """Return a greeting in the template, what ends its answer, and the token of that; ("", "", None) where the template refuses it.

    Raises ConfigError where nothing ends the answer.
    """
    rendered = None
    for turns in (HELLO, [{"role": "system", "content": "Hello."}, *HELLO]):
        with contextlib.suppress(BadRow):
            rendered = rendered or masks.render(template, turns)
    if rendered is None:
        return "", "", None
    end = rendered.spans[-1][1]
    last = tokenizer.encode(rendered.text[:end], add_special_tokens=False)[-1]
    closing = rendered.text[:end].rpartition("Hello.")[2].strip()
    token = str(tokenizer.convert_ids_to_tokens(last))
    return rendered.text, closing, int(last) if _is_token(tokenizer, token) and closing.endswith(token) else None


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Tell whether a text is cut out of any other as one token of its own."""
    return text in tokenizer.get_added_vocab() or text in tokenizer.all_special_tokens


def require_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ConfigError where two tokens have one id, or a token has not the id that the tokenizer's files give it."""
    seen: dict[int, str] = {}
    for token, number in tokenizer.get_vocab().items():
        if number in seen:
            reason = f"two tokens have the id {number}: `{seen[number]}` and `{token}`"
            raise ConfigError("model.tokenizer", name, reason, "mend tokenizer.json, or another model.tokenizer=DIR")
        seen[number] = token
    for number, token in _declared(tokenizer):
        if seen.get(number) != token:
            found = tokenizer.convert_tokens_to_ids(token)
            reason = f"its files give `{token}` the id {number}, and it is read as {found}: the model has learned another row"
            raise ConfigError("model.tokenizer", name, reason, "mend tokenizer.json, or another model.tokenizer=DIR")


def _declared(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str]]:
    """Yield id and text of each added token as tokenizer_config.json and a local tokenizer.json have them."""
    for number, token in (tokenizer.init_kwargs.get("added_tokens_decoder") or {}).items():
        yield int(number), str(token)
    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    if file.is_file():
        for token in json.loads(file.read_text("utf-8")).get("added_tokens") or []:
            yield int(token["id"]), str(token["content"])


def written_tokens(template: masks.Template) -> list[str]:
    """Return the tokens that a template writes around a greeting."""
    return sorted(set(template.tokens.findall(try_fill(template, HELLO, None) or ""))) if template.tokens is not None else []


def require_not_rendered(messages: list[Message], text: str, bos: str, opening: Collection[str]) -> None:
    """Raise BadRow where a row holds text that was rendered before, which the chat template renders again.

    `opening` are the tokens that the template itself writes.
    """
    for number, message in enumerate(messages, 1):
        content = str(message.get("content", "")).lstrip() if message["role"] != "assistant" else ""
        found = next((token for token in opening if content.startswith(token)), None)
        if found is not None:
            raise BadRow(f"turn {number} begins with `{found}`: it was rendered before, and the chat template renders it again")
    if bos and text.startswith(bos * 2):
        raise BadRow(f"begins with `{bos}` twice once the chat template has rendered it")
