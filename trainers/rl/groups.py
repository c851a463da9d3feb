"""Answers to the same prompt with their rewards: which teach something, what is told of them, and the table that a step trains on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.config.choices import Advantage, ObjectiveName
from trainers.config.schema import ObjectiveConfig, RunConfig
from trainers.data.table import save_table
from trainers.generate.request import LENGTH, Answer
from trainers.objectives.advantage import advantages, same_rewards
from trainers.objectives.base import ADVANTAGE, REWARD, SAMPLED_LOGPS
from trainers.rl.prompts import table_of
from trainers.rl.turns import Conversation

ANSWERS = "answers.jsonl"
"""In a rollout's folder: each answer's text, rewards and where it comes from, in the order of the table's documents."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The answers to one prompt."""

    position: int
    """Of the prompt in the run's stream of prompts."""
    number: int
    """Of the prompt among all."""
    ids: list[int]
    """The prompt's."""
    answers: list[Answer]
    texts: list[str]
    rewards: NDArray[np.float64]
    """(G,): totals, NaN where an answer has none."""
    parts: dict[str, NDArray[np.float64]]
    reasons: dict[str, list[str]]

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """Return which answers were cut at the longest length, (G,)."""
        return np.array([answer.finish == LENGTH for answer in self.answers])


def teaches(group: Group, objective: ObjectiveConfig) -> bool:
    """Tell whether an update can come of a group: its rewards differ, or are compared with those of other groups or a critic's values."""
    if objective.name is ObjectiveName.ppo or objective.advantage is Advantage.reinforce_pp:
        return not bool(np.isnan(group.rewards).all())
    return not bool(same_rewards(group.rewards[None])[0])


def figures_of(groups: Sequence[Group], pass_reward: float) -> dict[str, float]:
    """Return what is told of answers: means over those that have a reward, and shares of all."""
    rewards = np.concatenate([group.rewards for group in groups])
    lengths = [len(answer.ids or ()) for group in groups for answer in group.answers]
    found = {"reward": _mean(rewards), "pass@1": float((rewards >= pass_reward).sum() / len(rewards))}
    found |= {"truncated": float(np.concatenate([group.is_cut for group in groups]).mean()), "answer_tokens": float(np.mean(lengths))}
    found |= {"unrewarded": float(np.isnan(rewards).mean())}
    turns = [answer.turns for group in groups for answer in group.answers if isinstance(answer, Conversation)]
    found |= {"turns": float(np.mean(turns))} if turns else {}
    return found | {f"reward/{name}": _mean(np.concatenate([group.parts[name] for group in groups])) for name in groups[0].parts}


def why_unrewarded(groups: Sequence[Group]) -> str:
    """Return why no answer has a reward, in the words of most of them; empty where one has."""
    if not np.isnan(np.concatenate([group.rewards for group in groups])).all():
        return ""
    found = Counter(
        f"reward/{name}: {reason}"
        for group in groups
        for name, values in group.parts.items()
        for reason, is_missing in zip(group.reasons[name], np.isnan(values), strict=True)
        if is_missing
    )
    [(reason, count)] = found.most_common(1)
    return f"{reason} ({count} times)"


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def save_groups(groups: Sequence[Group], config: RunConfig, folder: Path) -> None:
    """Write the groups of all steps of a rollout as a table with signals, and what is known of each answer next to it."""
    steps = config.rl.steps_per_rollout
    each = len(groups) // steps
    of_steps = [np.stack([group.rewards for group in groups[at * each : (at + 1) * each]]) for at in range(steps)]
    rewards = np.nan_to_num(np.concatenate(of_steps))
    worth = None
    if config.objective.name is not ObjectiveName.ppo:  # whose advantages are made of what its critic says
        worth = np.concatenate([advantages(part, config.objective.advantage) for part in of_steps])
    documents, labels, logps = list[list[int]](), list[list[bool]](), list[float]()
    for group in groups:
        for answer, is_cut, reward in zip(group.answers, group.is_cut, group.rewards, strict=True):
            ids, sampled = document_of(group.ids, answer)
            documents.append(ids)
            is_trained = not np.isnan(reward) and not (is_cut and config.rl.mask_truncated)
            labels.append(sampled if is_trained else [False] * len(ids))
            logps += answer.logps or [] if is_trained else []
    told = {REWARD: rewards} if worth is None else {ADVANTAGE: worth}
    signals = {name: values.reshape(-1).astype(np.float32) for name, values in told.items()}
    signals[SAMPLED_LOGPS] = np.array(logps, np.float32)[:, None]
    save_table(table_of(documents, labels, signals), folder)
    with (folder / ANSWERS).open("w", encoding="utf-8") as file:
        for number, group in enumerate(groups):
            for sample in range(len(group.answers)):
                advantage = {} if worth is None else {"advantage": float(worth[number][sample])}
                file.write(json.dumps(_told(group, sample) | advantage, ensure_ascii=False) + "\n")


def document_of(prompt: list[int], answer: Answer) -> tuple[list[int], list[bool]]:
    """Return all tokens of a prompt with an answer, or of a conversation, and which of them were sampled."""
    if isinstance(answer, Conversation):
        return answer.document, answer.sampled
    ids = answer.ids or []
    return prompt + ids, [False] * len(prompt) + [True] * len(ids)


def _told(group: Group, sample: int) -> dict[str, Any]:
    """Return what is known of an answer, as JSON has it."""
    reasons = {name: texts[sample] for name, texts in group.reasons.items() if texts[sample]}
    numbers = {"reward": group.rewards[sample]} | {f"reward/{name}": values[sample] for name, values in group.parts.items()}
    told = {"prompt": group.number, "position": group.position, "sample": sample, "answer": group.texts[sample]}
    answer = group.answers[sample]
    told |= {"finish": answer.finish, "tokens": len(answer.ids or ())}
    if isinstance(answer, Conversation):
        told |= {"ended": answer.ended, "turns": answer.turns, "messages": answer.messages}
    return (
        told | {name: None if np.isnan(value) else float(value) for name, value in numbers.items()} | ({"why": reasons} if reasons else {})
    )
