"""What is asked of a model, how it draws its answer, and what comes back. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainers.config.errors import ConfigError

STOP, LENGTH = "stop", "length"
"""Why an answer has ended: at a token that ends it, or at the longest answer or the model's last position."""

NO_ROOM = "the prompt leaves no room for an answer"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Limits count after the temperature: first `top_k`, then `top_p` of what is left."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that is kept, of the likeliest tokens."""
    top_k: int = 0
    """Tokens that are kept; 0 keeps all."""
    max_new_tokens: int = 256
    tempered: bool = False
    """Log-probabilities are of the softmax of logits / temperature, as RL trains on them, and not of the model itself."""

    def __post_init__(self) -> None:
        """Raise ConfigError for what cannot be."""
        checks = {
            "temperature": (self.temperature, self.temperature >= 0, "must be 0 or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "top_k": (self.top_k, self.top_k >= 0, "must be 0 or more"),
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens > 0, "must be greater than 0"),
        }
        for name, (value, is_valid, reason) in checks.items():
            if not is_valid:
                raise ConfigError(f"--{name.replace('_', '-')}", value, reason)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer that is asked for."""

    key: int
    """Its number, which no other request has."""
    seed: int
    """Of its own draws alone."""
    ids: list[int] = field(default_factory=list)
    """The rendered prompt; empty where a server renders `messages`."""
    messages: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request."""

    key: int
    ids: list[int] | None = None
    """The answer's, through the token that ended it; None where a server gives text alone."""
    logps: list[float] | None = None
    """The log-probability of each, in nats, under the model itself: before temperature, top_k and top_p; see `Sampling.tempered`."""
    text: str | None = None
    """What a server says; None where `ids` are to be decoded."""
    finish: str = ""
    """STOP or LENGTH, or a server's own word."""
    failure: str = ""
    """Why there is no answer; empty where there is one."""
    attempts: int = 1
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the answer, as a server counts them; None where it says nothing."""
