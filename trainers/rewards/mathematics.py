"""Whether two mathematical answers are the same, by math-verify, in a process of its own: python -m trainers.rewards.mathematics.

What math-verify hands to sympy may take for ever, and its own limits count what they end as different. So they are off, and who has started
this process ends it. It reads {"reference", "answer"} a line from stdin, and says {"reward"} or {"failure"}.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from trainers.config.errors import ConfigError
from trainers.data.reasoning import answer_of
from trainers.rewards.asked import Asked, serve
from trainers.rewards.shapes import NoReward, Row


def main() -> None:
    """Compare until stdin ends."""
    from math_verify import parse, verify

    read = partial(parse, parsing_timeout=None)

    def reward_of(asked: dict[str, Any]) -> float:
        if not (wanted := read(asked["reference"])):
            raise NoReward("the reference is not mathematics")
        return float(verify(wanted, read(asked["answer"]), timeout_seconds=None))

    serve(reward_of, lambda _, error: f"math-verify raises {type(error).__name__}")


class Mathematics(Asked):
    """1 where answer and reference are the same, else 0. A comparison that takes too long gives no reward."""

    module, what = "trainers.rewards.mathematics", "math-verify"

    def __init__(self, timeout_s: float) -> None:
        """Raise ConfigError where math-verify is not installed."""
        if find_spec("math_verify") is None:
            raise ConfigError("reward", "math", "needs the package math-verify", "pip install 'fulltune[math]'")
        super().__init__(timeout_s)

    def __call__(self, row: Row) -> float:
        """Return an answer's reward; raises NoReward."""
        if not str(row["reference"]).strip():
            raise NoReward("the row has no reference")
        return self.ask({"reference": answer_of(str(row["reference"])), "answer": answer_of(str(row["answer"]))})


if __name__ == "__main__":
    main()
