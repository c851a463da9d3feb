"""A teacher that is served: prompts go as token ids to an OpenAI-compatible endpoint, which gives their log-probabilities."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import numpy as np

from tools.command import Refused
from tools.logprobs.shards import Failed, Found, Ints
from trainers.cache import content_key
from trainers.config.errors import plural
from trainers.data.table import TokenTable
from trainers.generate.endpoint import GARBAGE, TIMEOUT, UNREACHABLE, Endpoint, Server, ask_all, is_refusal, once

Place = dict[int, float]
"""Of one token of a prompt: log-probabilities by id."""
SMALLEST_REST = 2.0**-24
"""Of the tokens that an endpoint does not name, where its float32 numbers say that there is nothing left."""


class Served:
    """A model of an endpoint, known by its name alone."""

    may_change = True

    def __init__(self, options: argparse.Namespace, num_ids: int) -> None:
        """Find the model; raises Refused and Failed."""
        self.options, self.num_ids, self.url = options, num_ids, options.endpoint.rstrip("/")
        asked = {"timeout_s": options.timeout, "attempts": options.attempts, "at_once": options.at_once, "backoff_s": 0.5}
        self.server = Server(url=self.url, model="", key_name="FULLTUNE_TEACHER_KEY", **asked)
        self.name = options.endpoint_model or self._only_model()
        self.key = content_key("served", self.name, num_ids)
        self.echoes: bool | None = None
        """How it gives log-probabilities of a prompt; None before it was asked."""

    def ask(self, table: TokenTable, documents: Ints) -> Found:
        """Return what it says at the labels of these documents, in their order."""
        if self.echoes is None:
            [self.echoes] = ask_all([int(documents[0])], self.server, partial(self._find_way, table))
        numbers = [int(document) for document in documents]
        found = dict(ask_all(numbers, self.server, partial(self._ask, table)))
        places = [place for document in numbers for place in found[document]]
        return _as_arrays(places, self.options.top_k, self.num_ids, self.name)

    async def _find_way(self, table: TokenTable, endpoint: Endpoint, document: int) -> bool:
        """Tell whether it gives log-probabilities with `echo`, and not with `prompt_logprobs`; raises Refused where with neither."""
        ids = table.tokens[table.offsets[document] : table.offsets[document + 1]].tolist()
        said = []
        for echoes in (False, True):
            try:
                await self._post(endpoint, ids, echoes)
                return echoes
            except Refused as error:
                said.append(str(error))
        raise Refused(f"{self.url} gives no log-probabilities of a prompt by ids. {'; '.join(dict.fromkeys(said))}")

    async def _ask(self, table: TokenTable, endpoint: Endpoint, document: int) -> tuple[int, list[Place]]:
        start, end = int(table.offsets[document]), int(table.offsets[document + 1])
        ids, labels = table.tokens[start:end].tolist(), np.flatnonzero(table.supervised[start:end])
        places = await self._post(endpoint, ids, bool(self.echoes))
        return document, [places[label] for label in labels]

    def _body(self, ids: list[int], echoes: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        if echoes:
            return body | {"echo": True, "logprobs": self.options.top_k, "return_tokens_as_token_ids": True}
        return body | {"prompt_logprobs": self.options.top_k}

    async def _post(self, endpoint: Endpoint, ids: list[int], echoes: bool) -> list[Place]:
        """Return the log-probabilities at each token; raises Refused where it says no, Failed where it says nothing."""
        found, failure, attempts = await endpoint.ask("completions", self._body(ids, echoes), lambda reply: _places(reply, ids, echoes))
        if found is not None:
            return found
        url = self.server.at("completions")
        if is_refusal(failure):
            raise Refused(f"{url} answers with {failure}: {endpoint.said}")
        why = {TIMEOUT: "does not answer in time", UNREACHABLE: "does not answer", GARBAGE: "does not answer in JSON"}
        words = why.get(failure, f"answers with {failure}: {endpoint.said}")
        raise Failed(f"{url} {words} ({plural(attempts, 'attempt')}). What was written is kept, and the same command continues from there")

    def _only_model(self) -> str:
        reply, failure = once(self.server, "models")
        listed = reply.get("data") if isinstance(reply, dict) else None
        if failure and not listed:
            raise Failed(failure)
        names = [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one] if isinstance(listed, list) else []
        if len(names) != 1:
            said = f"lists {', '.join(names)}" if names else "lists no models"
            raise Refused(f"{self.server.at('models')} {said}: name one with --endpoint-model")
        return names[0]


def _places(answer: Any, ids: list[int], echoes: bool) -> list[Place]:
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
