"""Who writes: a model of this machine, opened once for all rounds, or a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tools.synthesise.config import Model
from trainers.cache import content_key
from trainers.config.errors import ConfigError
from trainers.config.schema import ModelConfig, RunConfig
from trainers.config.secrets import masked
from trainers.data.formats import Message
from trainers.generate import prompts
from trainers.generate.endpoint import REFUSALS, Server, check
from trainers.generate.local import Local
from trainers.generate.models import is_url, named
from trainers.generate.prompts import Prompt
from trainers.generate.request import STOP, Answer, Request, Sampling
from trainers.generate.served import ask

Took = Callable[[Answer], None]
NO_ROOM = "the prompt leaves no room for an answer"


class Writer:
    """What both kinds have: a name, a key of its weights, and a tokenizer where it is known."""

    name: str
    key: str
    tokenizer: Any = None
    encoder_decoder: bool = False
    """Prompts are what an encoder reads."""
    final: Sequence[str] = ()
    """Failures that are the request's own: the same request would fail again."""

    def request(self, turns: Sequence[Message], number: int, seed: int) -> Request:
        """Return what is asked: ids where the tokenizer is known, else messages; raises ConfigError."""
        messages = list(turns)
        if self.tokenizer is None:
            return Request(key=number, seed=seed, messages=messages)
        prompt = Prompt(messages, None, "", {"prompt": ""}, self.name, number)
        return Request(key=number, seed=seed, ids=prompts.rendered(prompt, self.tokenizer, self.encoder_decoder))

    def ask(self, requests: Sequence[Request], sampling: Sampling, took: Took) -> None:
        """Ask for all answers; `took` gets each as soon as it is there."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started."""

    def text(self, answer: Answer, whole: bool) -> str:
        """Return an answer's text without the token that ended it; `whole` keeps special tokens in it."""
        if answer.ids is None:
            return answer.text or ""
        ids = answer.ids[:-1] if answer.finish == STOP else answer.ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=not whole))


class Opened(Writer):
    """A model of this machine or the hub."""

    final = (NO_ROOM,)

    def __init__(self, settings: Model) -> None:
        """Find its files; raises ConfigError."""
        from trainers.data.tokenizer import load_tokenizer, tokenizer_hash
        from trainers.generate.subject import Subject, kind_of

        self.settings, self.name = settings, str(settings.path)
        self.model = named(self.name)
        self.tokenizer = load_tokenizer(self.model.config)
        subject = Subject(config=self.model.config, folder=self.model.folder)
        self.encoder_decoder = self.model.config.model.encoder_decoder
        rendering = [tokenizer_hash(self.tokenizer), str(self.tokenizer.chat_template), *(["source"] if self.encoder_decoder else [])]
        self.key = content_key("local", subject.fingerprint, *rendering, settings.dtype, kind_of(settings.device))
        self.local: Local | None = None

    def ask(self, requests: Sequence[Request], sampling: Sampling, took: Took) -> None:
        """Open the model where it is not, and ask it; raises ConfigError and Broken."""
        if self.local is None:
            machine: dict[str, Any] = {name: getattr(self.settings, name) for name in ("batch", "dtype", "device")}
            local = Local(self.model.config, self.model.folder, timeout_s=self.settings.silence_s, setting="model.batch", **machine)
            self.local = local.__enter__()
        self.local.ask(requests, sampling, took)

    def close(self) -> None:
        """End its process."""
        if self.local is not None:
            self.local.close()


class Served(Writer):
    """A model of a server, known by its name alone."""

    final = REFUSALS

    def __init__(self, settings: Model) -> None:
        """Load its tokenizer where one is given; raises ConfigError."""
        self.name = masked(f"{settings.name} at {settings.path}")
        at = {"timeout_s": settings.timeout_s, "attempts": settings.attempts, "at_once": settings.at_once}
        self.server = Server(url=str(settings.path), model=str(settings.name), refusals_are_replies=True, **at)  # type: ignore[arg-type]
        self.key = content_key("served", settings.path, settings.name, settings.tokenizer)
        if settings.tokenizer:
            from trainers.data.tokenizer import load_tokenizer

            self.tokenizer = load_tokenizer(RunConfig(model=ModelConfig(id=settings.tokenizer)))

    def ask(self, requests: Sequence[Request], sampling: Sampling, took: Took) -> None:
        """Ask it; raises ConfigError where nothing answers there."""
        if reason := check(self.server):
            raise ConfigError("model.path", self.server.url, reason, "an OpenAI-compatible endpoint up to its version")
        ask(requests, sampling, self.server, took)


def writer_of(settings: Model) -> Writer:
    """Return who writes; raises ConfigError with the setting's name."""
    try:
        return Served(settings) if is_url(str(settings.path)) else Opened(settings)
    except ConfigError as error:
        path = "model.path" if error.path == "MODEL" else error.path
        raise ConfigError(path, error.value, error.reason, error.remedy) from None
