"""A teacher that is served: prompts go as token ids to an OpenAI-compatible endpoint, which gives their log-probabilities."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from typing import Any

import httpx
import numpy as np

from tools.command import Refused
from tools.logprobs.shards import Failed, Found, Ints
from trainers.cache import content_key
from trainers.data.table import TokenTable

Place = dict[int, float]
"""Of one token of a prompt: log-probabilities by id."""
SMALLEST_REST = 2.0**-24
"""Of the tokens that an endpoint does not name, where its float32 numbers say that there is nothing left."""
LONGEST_WAIT_S = 30.0


class Served:
    """A model of an endpoint, known by its name alone."""

    may_change = True

    def __init__(self, options: argparse.Namespace, num_ids: int) -> None:
        """Find the model; raises Refused and Failed."""
        self.options, self.num_ids, self.url = options, num_ids, options.endpoint.rstrip("/")
        self.name = options.endpoint_model or self._only_model()
        self.key = content_key("served", self.name, num_ids)
        self.echoes: bool | None = None
        """How it gives log-probabilities of a prompt; None before it was asked."""

    def ask(self, table: TokenTable, documents: Ints) -> Found:
        """Return what it says at the labels of these documents, in their order."""
        places = [place for document in asyncio.run(self._ask_all(table, documents)) for place in document]
        return _as_arrays(places, self.options.top_k, self.num_ids, self.name)

    async def _ask_all(self, table: TokenTable, documents: Ints) -> list[list[Place]]:
        limit = asyncio.Semaphore(self.options.at_once)
        async with httpx.AsyncClient(headers=_headers(), timeout=self.options.timeout, limits=httpx.Limits(max_connections=None)) as client:
            if self.echoes is None:
                self.echoes = await self._find_way(client, table, int(documents[0]))

            async def one(document: int) -> list[Place]:
                async with limit:
                    return await self._ask(client, table, document)

            tasks = [asyncio.create_task(one(int(document))) for document in documents]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def _find_way(self, client: httpx.AsyncClient, table: TokenTable, document: int) -> bool:
        """Tell whether it gives log-probabilities with `echo`, and not with `prompt_logprobs`; raises Refused where with neither."""
        ids = table.tokens[table.offsets[document] : table.offsets[document + 1]].tolist()
        said = []
        for echoes in (False, True):
            try:
                _places(await self._post(client, self._body(ids, echoes)), ids, echoes)
                return echoes
            except Refused as error:
                said.append(str(error))
        raise Refused(f"{self.url} gives no log-probabilities of a prompt by ids. {'; '.join(dict.fromkeys(said))}")

    async def _ask(self, client: httpx.AsyncClient, table: TokenTable, document: int) -> list[Place]:
        start, end = int(table.offsets[document]), int(table.offsets[document + 1])
        ids, labels = table.tokens[start:end].tolist(), np.flatnonzero(table.supervised[start:end])
        places = _places(await self._post(client, self._body(ids, bool(self.echoes))), ids, bool(self.echoes))
        return [places[label] for label in labels]

    def _body(self, ids: list[int], echoes: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        if echoes:
            return body | {"echo": True, "logprobs": self.options.top_k, "return_tokens_as_token_ids": True}
        return body | {"prompt_logprobs": self.options.top_k}

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """Ask until there is an answer; raises Refused where it says no, Failed where it says nothing."""
        url = f"{self.url}/completions"
        for attempt in range(1, self.options.attempts + 1):
            try:
                response = await client.post(url, json=body)
            except httpx.HTTPError as error:
                why = f"{url} does not answer: {error or type(error).__name__}"
            else:
                if response.is_success:
                    return _json(response, url)
                why = f"{url} answers with HTTP {response.status_code}: {response.text.strip()[:300]}"
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise Refused(why)
            if attempt < self.options.attempts:
                await asyncio.sleep(min(2.0 ** (attempt - 2), LONGEST_WAIT_S))
        raise Failed(f"{why} ({self.options.attempts} attempts). What was written is kept, and the same command continues from there")

    def _only_model(self) -> str:
        url = f"{self.url}/models"
        try:
            response = httpx.get(url, headers=_headers(), timeout=self.options.timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(f"{url} does not answer: {error}") from error
        listed = _json(response, url).get("data") if response.is_success else None
        names = [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one] if isinstance(listed, list) else []
        if len(names) != 1:
            said = f"lists {', '.join(names)}" if names else f"lists no models (HTTP {response.status_code})"
            raise Refused(f"{url} {said}: name one with --endpoint-model")
        return names[0]


def _json(response: httpx.Response, url: str) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Refused(f"{url} does not answer in JSON: {response.text.strip()[:100]}")
    return answer


def _headers() -> dict[str, str]:
    key = os.environ.get("FULLTUNE_TEACHER_KEY", os.environ.get("OPENAI_API_KEY", "")).strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def _places(answer: dict[str, Any], ids: list[int], echoes: bool) -> list[Place]:
    """Return the log-probabilities at each token of a prompt; raises Refused where the answer has none, or of other tokens."""
    try:
        choice = answer["choices"][0]
        given = choice["logprobs"]["top_logprobs"] if echoes else choice.get("prompt_logprobs") or answer["prompt_logprobs"]
        read = _read_echoed if echoes else _read_prompt
        places = [{} if place is None else read(place) for place in given[: len(ids)]]
    except (LookupError, TypeError, AttributeError):
        raise Refused(f"the answer has no {'echoed logprobs' if echoes else 'prompt_logprobs'}") from None
    except ValueError:
        raise Refused("the answer names tokens by their text, from which no ids follow (`return_tokens_as_token_ids`)") from None
    if len(places) != len(ids):
        raise Refused(f"the answer has log-probabilities of {len(places)} tokens, and {len(ids)} were sent")
    if not echoes and any(token not in place for token, place in zip(ids[1:], places[1:], strict=True)):
        raise Refused("the answer's log-probabilities are of other tokens than were sent")
    return places


def _read_prompt(place: dict[str, Any]) -> Place:
    return {int(token): float(value["logprob"]) for token, value in place.items()}


def _read_echoed(place: dict[str, Any]) -> Place:
    return {int(token.removeprefix("token_id:")): float(value) for token, value in place.items()}


def _as_arrays(places: list[Place], k: int, num_ids: int, name: str) -> Found:
    """Return the k likeliest tokens at each place, and what their probabilities leave for all others."""
    ids, logps = np.zeros((len(places), k), np.int32), np.zeros((len(places), k + 1), np.float32)
    for row, place in enumerate(places):
        best = sorted(((value, token) for token, value in place.items() if token < num_ids), key=lambda one: (-one[0], one[1]))[:k]
        if len(best) < k:
            raise Refused(f"{name} gives {len(best)} tokens at a place, and --top-k is {k}: a smaller one, or more from the server")
        ids[row] = [token for _, token in best]
        values = [value for value, _ in best]
        left = 1.0 - math.fsum(map(math.exp, values))
        logps[row] = [*values, -math.inf if k == num_ids else math.log(max(left, SMALLEST_REST))]
    return ids, logps
