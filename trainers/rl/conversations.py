"""Answers that take several turns: the model and an environment write in turn, all conversations of a rollout at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trainers.config.schema import RlConfig, RunConfig
from trainers.data.formats import BadRow
from trainers.generate.request import Answer, Request, Sampling
from trainers.health.spikes import TrainingFailed
from trainers.rewards.score import Found
from trainers.rl.environment import Environments
from trainers.rl.generators import Generators, Interrupted
from trainers.rl.turns import Conversation, Talk, Turns
from trainers.world import World

Place = tuple[Any, ...]
NAME = "environment"
"""Of the part of the reward that the environment gives."""


class Conversations:
    """The environment's processes, on rank 0, and the conversations of a rollout."""

    def __init__(self, config: RunConfig, world: World, turns: Turns, environments: Environments | None) -> None:
        """Take what is open; `environments` are rank 0's."""
        self.rl: RlConfig = config.rl
        self.room = config.data.seq_len - config.rl.max_new_tokens
        self.world, self.turns, self.environments = world, turns, environments

    def hold(
        self,
        places: Sequence[tuple[Place, int, list[int]]],
        rows: Sequence[Mapping[str, Any]],
        seed_of: Callable[..., int],
        generators: Generators,
        sampling: Sampling | None,
    ) -> dict[int, Answer] | None:
        """Return a conversation of each place by its number, on rank 0; None where a rank was asked to stop. Collective.

        A place is what seeds are of, the last of it the answer's number, the row and the prompt's ids. A turn's seed is of the place and
        the turn, the first one's of the place alone. All answers to a prompt begin with one seed.
        """
        talks = self._locally(lambda: self._begin(places, rows, seed_of, generators.look))
        if talks is None:
            return None
        for turn in range(self.rl.max_turns):
            more = [turn] if turn else []
            asked = [Request(key=talk.key, seed=seed_of(*talk.place, *more), ids=talk.ids) for talk in talks if not talk.ended]
            requests = self.world.from_first(asked)
            if not requests:
                break
            answers = generators.ask(requests, sampling)
            if answers is None or self._locally(lambda: self._take(talks, answers, generators.look)) is None:  # noqa: B023 - called at once
                return None
        ended = self._locally(lambda: self._end(talks, generators.look))
        return None if ended is None else {talk.key: talk.whole() for talk in talks}

    def _locally(self, work: Callable[[], list[Talk]]) -> list[Talk] | None:
        """Return what rank 0 makes, nothing on others; None on all where it was asked to stop. Collective."""
        found: list[Talk] | None = []
        if self.world.rank == 0:
            try:
                found = work()
            except Interrupted:
                found = None
        return None if self.world.from_first(found is None) else found

    def _begin(self, places: Sequence[tuple[Place, int, list[int]]], rows: Any, seed_of: Any, look: Callable[[], None]) -> list[Talk]:
        """Begin all conversations: with the environment's own messages, or those of the row."""
        begun = [(rows[row]["prompt"], rows[row].get("tools")) for _, row, _ in places]
        talks = [Talk(key, place, ids, [False] * len(ids), *begun[key]) for key, (place, _, ids) in enumerate(places)]
        orders = [{"key": key, "row": rows[row], "seed": seed_of(*place[:-1])} for key, (place, row, _) in enumerate(places)]
        for talk, reply in zip(talks, self._asked(orders, look), strict=True):
            if "failure" in reply:
                talk.fail(reply["failure"])
            elif reply["messages"] is not None:
                self._open(talk, reply["messages"])
        return talks

    def _open(self, talk: Talk, messages: list[Any]) -> None:
        try:
            ids = self.turns.begin(messages, talk.tools)
        except BadRow as error:
            talk.fail(str(error))
            return
        talk.ids, talk.sampled, talk.messages = ids, [False] * len(ids), messages
        if not ids or len(ids) > self.room:
            talk.fail(f"begins with {len(ids)} tokens, and there is room for {self.room}")

    def _take(self, talks: list[Talk], answers: Mapping[int, Answer], look: Callable[[], None]) -> list[Talk]:
        """Take the model's turns, and what the environment makes of them; raises TrainingFailed where the model gave none."""
        require_answers(answers.values())
        held = [talk for talk in talks if talk.key in answers]
        for talk in held:
            answer = answers[talk.key]
            talk.take(answer, self.turns.words(answer))
        replies = self._asked([{"key": talk.key, "messages": talk.messages} for talk in held], look)
        for talk, reply in zip(held, replies, strict=True):
            if "failure" in reply:
                talk.fail(reply["failure"])
            else:
                self._hear(talk, reply)
        return talks

    def _hear(self, talk: Talk, reply: Mapping[str, Any]) -> None:
        """Add an environment's reply to a conversation, and end this where it is done or at a limit."""
        talk.reward += reply["reward"]
        if reply["done"] or talk.ended:
            talk.messages, talk.ended = [*talk.messages, *reply["messages"]], talk.ended or "done"
            return
        try:
            talk.hear(reply["messages"], self.turns.between(reply["messages"], talk.tools))
        except BadRow as error:
            talk.fail(str(error))
            return
        if talk.turns == self.rl.max_turns:
            talk.ended = "turns"
        elif len(talk.ids) > self.room:
            talk.ended = "tokens"

    def _end(self, talks: list[Talk], look: Callable[[], None]) -> list[Talk]:
        self._asked([{"key": talk.key} for talk in talks], look)
        return talks

    def _asked(self, orders: list[dict[str, Any]], look: Callable[[], None]) -> list[dict[str, Any]]:
        assert self.environments is not None
        return self.environments.ask(orders, look)

    def close(self) -> None:
        """End the environment's processes."""
        if self.environments is not None:
            self.environments.close()


def environments_of(rl: RlConfig) -> Environments | None:
    """Start the processes of a run's environment, where it has one; raises ConfigError where its class cannot be imported."""
    if rl.environment is None:
        return None
    return Environments(rl.environment, rl.environment_timeout_s, rl.environment_processes)


def require_answers(answers: Iterable[Answer]) -> None:
    """Raise TrainingFailed where a generator gave none."""
    if failed := next((answer.failure for answer in answers if answer.failure), ""):
        raise TrainingFailed(f"a prompt got no answer: {failed}")


def with_environment(found: Found, answers: Sequence[Answer]) -> Found:
    """Add what the environment gives conversations to their rewards; raises TrainingFailed where it has failed in all of them."""
    held = [answer for answer in answers if isinstance(answer, Conversation)]
    faults = [one.fault for one in held]
    if all(faults):
        raise TrainingFailed(f"the environment has failed in all of {len(faults)} conversations: it {Counter(faults).most_common(1)[0][0]}")
    own = np.array([math.nan if one.fault else one.reward for one in held])
    return Found(found.parts | {NAME: own}, found.reasons | {NAME: faults}, found.total + own)
