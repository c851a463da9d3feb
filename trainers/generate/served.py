"""Answers of a server: text of any OpenAI-compatible endpoint, or ids with log-probabilities of one that takes ids, such as vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainers.generate.endpoint import NOT_ASKED, Endpoint, Server, ask_all
from trainers.generate.request import Answer, Request, Sampling


def ask(
    requests: Sequence[Request],
    sampling: Sampling,
    server: Server,
    took: Callable[[Answer], None],
    more: Mapping[str, Any] | None = None,
    positions: int | None = None,
    look: Callable[[], None] | None = None,
) -> None:
    """Ask for all answers; `took` gets each in the calling thread as soon as it is there, a failure too, but not what was not asked.

    A request with `ids` is asked as they are, at /completions, and answered in ids; one with messages at /chat/completions, in text.
    `more` is in each body; an answer ends at the model's last of `positions`; `look` is called now and then, and may raise.
    Raises httpx.InvalidURL, and whatever `took` and `look` do.
    """

    async def one(endpoint: Endpoint, request: Request) -> None:
        if endpoint.down.is_set():
            return
        path, read = ("completions", read_ids) if request.ids else ("chat/completions", read_text)
        found, failure, attempts = await endpoint.ask(path, _body(request, sampling, server, positions) | dict(more or {}), read)
        took(Answer(key=request.key, failure=failure or NOT_ASKED, attempts=attempts) if found is None else _of(request, found, attempts))

    ask_all(requests, server, one, look)


def _body(request: Request, sampling: Sampling, server: Server, positions: int | None) -> dict[str, Any]:
    room = sampling.max_new_tokens if positions is None else min(sampling.max_new_tokens, positions - len(request.ids))
    asked: dict[str, Any] = {"model": server.model, "max_tokens": room, "seed": request.seed}
    asked |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    asked |= {"top_k": sampling.top_k} if sampling.top_k else {}  # not OpenAI's: other servers have it
    if request.ids:
        return asked | {"prompt": request.ids, "logprobs": 1, "return_token_ids": True}
    return asked | {"messages": request.messages}


def read_text(reply: Any) -> dict[str, Any] | None:
    """Return text, finish and usage of a chat completion, None where it has no text; an empty text is one."""
    choice = reply["choices"][0]
    text, finish = choice["message"]["content"], str(choice.get("finish_reason") or "")
    return {"text": text, "finish": finish, "usage": read_usage(reply)} if isinstance(text, str) else None


def read_usage(reply: dict[str, Any]) -> tuple[int, int] | None:
    """Return the tokens of prompt and answer that a reply says, None where it says none."""
    usage = reply.get("usage")
    prompt, answer = (usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens"))
    return (prompt, answer) if isinstance(prompt, int) and isinstance(answer, int) else None


def read_ids(reply: Any) -> dict[str, Any] | None:
    """Return ids, log-probabilities, text and finish of a completion, None where it has not one log-probability for each id."""
    choice = reply["choices"][0]
    ids, logps = list(map(int, choice["token_ids"])), list(map(float, choice["logprobs"]["token_logprobs"]))
    finish = str(choice.get("finish_reason") or "")
    return {"ids": ids, "logps": logps, "finish": finish} if len(ids) == len(logps) else None


def _of(request: Request, found: dict[str, Any], attempts: int) -> Answer:
    return Answer(key=request.key, attempts=attempts, **found)
