"""What a task of reasoning-gym says an answer is worth, in a process of its own: python -m trainers.rewards.tasks.

It makes the task of each row again, and asks it. It reads {"task", "question", "answer"} a line from stdin, and says {"reward"} or
{"failure"}.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from trainers.config.errors import ConfigError
from trainers.data.reasoning import answer_of
from trainers.data.tasks import TASK, make_task
from trainers.rewards.asked import Asked, serve
from trainers.rewards.shapes import NoReward, Row

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
"""How reasoning-gym's own prompts ask for the answer."""
KEPT = 64
"""Tasks with their settings that are kept open."""


def main() -> None:
    """Score until stdin ends."""

    @lru_cache(KEPT)
    def opened(name: str, settings: str, rows: int, seed: int) -> Any:
        return make_task(name, json.loads(settings), rows, seed)

    def reward_of(asked: dict[str, Any]) -> float:
        task = asked["task"]
        made = opened(task["name"], json.dumps(task["settings"]), task["rows"], task["seed"])
        entry = made[task["index"]]
        if entry["question"] != asked["question"]:
            raise NoReward("this version of reasoning-gym makes another question of the row's task")
        return float(made.score_answer(asked["answer"], entry))

    serve(reward_of, lambda asked, error: f"{asked['task'].get('name')} raises {type(error).__name__}: {str(error)[:80]}")


class Tasks(Asked):
    """From 0 to 1, as the row's task says. An answer in <answer> tags is what they hold; else it is all after the reasoning."""

    module, what = "trainers.rewards.tasks", "reasoning-gym"

    def __init__(self, timeout_s: float) -> None:
        """Raise ConfigError where reasoning-gym is not installed."""
        if find_spec("reasoning_gym") is None:
            raise ConfigError("reward", "task", "needs the package reasoning-gym", "pip install 'fulltune[tasks]'")
        super().__init__(timeout_s)

    def __call__(self, row: Row) -> float:
        """Return an answer's reward; raises NoReward."""
        of = row["row"]
        if not isinstance(of, dict) or not isinstance(of.get(TASK), dict):
            raise NoReward(f"the row has no `{TASK}`: its rows are those of data=reasoning_gym")
        answer = answer_of(str(row["answer"]))
        tagged = TAGGED.findall(answer)
        return self.ask({"task": of[TASK], "question": of.get("question"), "answer": (tagged[-1] if tagged else answer).strip()})


if __name__ == "__main__":
    main()
