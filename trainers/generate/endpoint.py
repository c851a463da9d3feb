"""An endpoint that speaks OpenAI's protocol: how it is asked, again where that may help, and what is counted as which failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

TIMEOUT, UNREACHABLE, GARBAGE, NOT_ASKED = "timeout", "unreachable", "garbage", "not asked"
"""Failures, in addition to "HTTP 500" and its like."""
DOWN_AFTER = 10
"""Requests in a row without a reply, after which the endpoint is asked nothing more."""
REFUSALS = ("HTTP 400", "HTTP 413", "HTTP 422")
"""Failures that may be the request's own: the same request would fail again."""
LONGEST_WAIT_S = 60.0
"""Between two attempts. A server that wants a longer wait is not asked again."""
LOOK_S = 0.5
SAID = 300
"""First characters of what a server says to a request that it refuses."""

Of = TypeVar("Of")
Made = TypeVar("Made")
Read = TypeVar("Read")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Which model is asked where, and how. Its key is in the environment, so that nothing that shows a Server shows it."""

    url: str
    """Up to the version, such as http://host:8000/v1."""
    model: str
    timeout_s: float = 60.0
    """Of one request, from connecting to the last byte."""
    attempts: int = 3
    at_once: int = 8
    backoff_s: float = 1.0
    """Wait before the second attempt, doubled before each further one up to LONGEST_WAIT_S; the server's Retry-After where longer."""
    refusals_are_replies: bool = False
    """HTTP 400, 413 and 422 are about one request, and say nothing of the endpoint."""
    key_name: str = "FULLTUNE_ENDPOINT_KEY"
    """Environment variable of its key; without it OPENAI_API_KEY."""
    own_key: str = field(default="", repr=False)
    """Of a server that was started here. It is asked with this one alone, and without the environment's proxies."""

    def at(self, path: str) -> str:
        """Return the URL of one of its paths."""
        return f"{self.url.rstrip('/')}/{path}"

    def headers(self) -> dict[str, str]:
        """Return the header with the key. An empty variable keeps OpenAI's from an endpoint that is not theirs."""
        key = self.own_key or os.environ.get(self.key_name, os.environ.get("OPENAI_API_KEY", "")).strip()
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


class _Failed(Exception):
    """A request without an answer: its kind, and for how many seconds the server wants no other (inf: asking again is of no use)."""

    def __init__(self, kind: str, wait_s: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.wait_s = kind, wait_s


def is_refusal(failure: str) -> bool:
    """Tell a failure that the same request would meet again: HTTP 3xx and 4xx, but for those that say when to come back."""
    return failure.startswith(("HTTP 3", "HTTP 4")) and failure not in ("HTTP 408", "HTTP 429")


def check(server: Server) -> str:
    """Say why nothing can be asked there, by one request for its list of models, which it need not have; empty if it can."""
    url, reply = server.at("models"), _exchange(server, "models")
    if isinstance(reply, str):
        return reply
    if reply.status_code in (401, 403):
        return f"{url} refuses the key (HTTP {reply.status_code}): set {server.key_name}, or OPENAI_API_KEY, to one that it takes"
    return f"{url} answers with HTTP {reply.status_code}" if reply.status_code >= 500 else ""


def once(server: Server, path: str, body: dict[str, Any] | None = None) -> tuple[Any, str]:
    """Ask once, by GET without a body; return what a reply in JSON holds, else None, and why there is none, else an empty text."""
    reply = _exchange(server, path, body)
    if isinstance(reply, str):
        return None, reply
    if not reply.is_success:
        return None, f"{server.at(path)} answers with HTTP {reply.status_code}: {reply.text.strip()[:SAID]}"
    try:
        return reply.json(), ""
    except ValueError:
        return None, ""


def _exchange(server: Server, path: str, body: dict[str, Any] | None = None) -> httpx.Response | str:
    """Return a reply, or why there is none."""
    url, content = server.at(path), None if body is None else json.dumps(body)
    try:
        method = "GET" if body is None else "POST"
        how: dict[str, Any] = {"timeout": server.timeout_s, "trust_env": not server.own_key}
        return httpx.request(method, url, headers=server.headers(), content=content, **how)
    except httpx.TimeoutException:
        return f"{url} does not answer within {server.timeout_s:g} s"
    except httpx.ConnectError as error:
        return f"{url} is unreachable: {error}"
    except httpx.LocalProtocolError:  # its message quotes the header
        return "the endpoint's key has characters that no HTTP header may have"
    except (httpx.RequestError, httpx.InvalidURL) as error:
        return f"{url} cannot be asked: {error}"


def ask_all(
    todo: Sequence[Of], server: Server, one: Callable[[Endpoint, Of], Awaitable[Made]], look: Callable[[], None] | None = None
) -> list[Made]:
    """Return what `one` makes of each, `server.at_once` of them at a time, in any order; an error of one ends all at once.

    So does one of `look`, which is called now and then.
    """
    # Not threads: one that waits for a reply cannot be stopped, and Python would wait for it before it exits.
    return asyncio.run(_ask_all(todo, server, one, look))


@dataclass
class Endpoint:
    """The client, and whether anything answers there."""

    server: Server
    client: httpx.AsyncClient
    silent: int = 0
    """Requests in a row without a reply."""
    said: str = ""
    """What the last request that was refused was answered with."""
    down: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, path: str, body: dict[str, Any], read: Callable[[Any], Read | None]) -> tuple[Read | None, str, int]:
        """Ask until there is an answer that can be read; return it, or None and the last failure, and the number of attempts."""
        server, attempt, failure, may_ask = self.server, 0, "", True
        while may_ask:
            attempt += 1
            try:
                found = await self._request(path, body, read)
            except _Failed as failed:
                failure = failed.kind
                wait_s = max(failed.wait_s, min(server.backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S))
                is_last = attempt >= server.attempts or wait_s > LONGEST_WAIT_S
                self._count(failure, is_last)
                may_ask = not is_last and await self._wait(wait_s)
            else:
                self._count("")
                return found, "", attempt
        return None, failure, attempt

    async def _request(self, path: str, body: dict[str, Any], read: Callable[[Any], Read | None]) -> Read:
        """Ask once; return what is read of the reply, or raise _Failed."""
        try:
            async with asyncio.timeout(self.server.timeout_s):  # httpx's own begins anew with each byte
                # httpx would not escape, and half a surrogate pair, which JSON may hold, has no UTF-8
                response = await self.client.post(self.server.at(path), content=json.dumps(body))
        except (TimeoutError, httpx.TimeoutException):
            raise _Failed(TIMEOUT) from None
        except httpx.DecodingError:
            raise _Failed(GARBAGE) from None
        except httpx.RequestError:
            raise _Failed(UNREACHABLE) from None
        if not response.is_success:
            self.said = response.text.strip()[:SAID]
            failure = f"HTTP {response.status_code}"
            raise _Failed(failure, float("inf") if is_refusal(failure) else _retry_after_s(response))
        try:
            found = read(response.json())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = None
        if found is None:
            raise _Failed(GARBAGE)
        return found

    def _count(self, failure: str, is_last: bool = True) -> None:
        """Count a request. Garbage is a reply; who is told to wait a little is not refused, unless it is told so to the last."""
        if failure in ("", GARBAGE) or (self.server.refusals_are_replies and failure in REFUSALS):
            self.silent = 0
        elif failure != "HTTP 429" or is_last:
            self.silent += 1
        if self.silent >= DOWN_AFTER:
            self.down.set()

    async def _wait(self, seconds: float) -> bool:
        """Wait; tell whether the endpoint may still be asked."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.down.wait(), seconds)
        return not self.down.is_set()


async def _ask_all(
    todo: Sequence[Of], server: Server, one: Callable[[Endpoint, Of], Awaitable[Made]], look: Callable[[], None] | None
) -> list[Made]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=server.at_once)
    how: dict[str, Any] = {"timeout": server.timeout_s, "limits": limits, "trust_env": not server.own_key}
    async with httpx.AsyncClient(headers=server.headers(), **how) as client:
        endpoint, queue = Endpoint(server, client), iter(todo)

        async def work() -> list[Made]:  # the queue is shared by all workers
            return [await one(endpoint, of) for of in queue]

        workers = [asyncio.create_task(work()) for _ in range(min(server.at_once, len(todo)))]
        waiting = set(workers)
        try:
            while look is not None and waiting:
                done, waiting = await asyncio.wait(waiting, timeout=LOOK_S, return_when=asyncio.FIRST_EXCEPTION)
                look()
                waiting = set() if any(worker.exception() for worker in done) else waiting
            return [made for found in await asyncio.gather(*workers) for made in found]
        finally:
            for worker in workers:  # one has failed: else the others would take the closing of the client for the endpoint's doing
                worker.cancel()


def _retry_after_s(response: httpx.Response) -> float:
    """Return the seconds that Retry-After asks for, as a number or a date (RFC 9110, 10.2.3); 0 without one that can be read."""
    said = response.headers.get("Retry-After", "").strip()
    if said.replace(".", "", 1).isdecimal():
        return float(said)
    with contextlib.suppress(ValueError):
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    return 0.0
