"""What is written and how: a method and its settings, read from YAML and from KEY=VALUE on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tools.curate.config import Diversity, settings_of
from trainers.config.errors import ConfigError, did_you_mean

LANGUAGES = ("en", "ko")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Who writes, and how tokens are drawn."""

    path: str | None = None
    """A run, a model directory, a hub id, or a server up to its version, such as http://host:8000/v1."""
    name: str | None = None
    """The server's model."""
    tokenizer: str | None = None
    """Of the server's model: prompts go as ids then, and tokens are counted here."""
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 512
    batch: int = 16
    """Answers at once of a model of this machine; changes no answer."""
    dtype: str = "float32"
    device: str = "auto"
    silence_s: float | None = None
    """Seconds without an answer after which a model of this machine is ended."""
    at_once: int = 16
    """Requests in flight to a server."""
    timeout_s: float = 120.0
    attempts: int = 5


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Prices, in any currency; they change no row."""

    prompt: float = 0.0
    """Of 1,000 tokens that are sent."""
    answer: float = 0.0
    """Of 1,000 tokens that come back."""
    currency: str = "USD"
    most: float | None = None
    """The command stops once so much is spent; with a larger value it continues."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What removes a row. An instruction is the last turn of the user."""

    instruction_least: int = 10
    """Characters."""
    instruction_most: int = 4000
    answer_least: int = 1
    answer_most: int = 20_000
    similar: float = 1.0
    """Largest ROUGE-L with any instruction that is there, exclusive; 1 removes only copies."""
    words: list[str] = field(default_factory=list)
    """Instructions with such a word are removed: what a model that reads text alone cannot do."""
    cut: bool = True
    """Remove texts that were cut at the longest length."""
    refusals: bool = True
    """Remove answers that begin as English and Korean refusals do."""
    repetition: float = 0.5
    """Largest share of runs of five words that have been there before, in answers of forty words or more."""
    truncated: bool = True
    """Remove answers that end in a block of code, with a comma, or with a word that something must follow."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Rows are scored on five criteria, 1 to 5, by a model at an endpoint; its key is read from FULLTUNE_JUDGE_KEY."""

    url: str = ""
    model: str = ""
    least: float = 3.0
    """Rows whose mean is lower go, and rows without a score."""
    at_once: int = 8
    timeout_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """New tasks from seed tasks (Wang et al. 2022, arXiv 2212.10560)."""

    examples: int = 3
    """Tasks that a prompt shows: two of the seeds, one that was written, as far as there are some."""
    tasks: int = 8
    """That a prompt asks for."""
    round: int = 16
    """Prompts of a round; filters look at a round together."""
    idle: int = 5
    """Rounds in a row without a new row after which the command ends with what there is."""


@dataclass(frozen=True, kw_only=True)
class EvolInstruct:
    """Instructions that become harder round by round (Xu et al. 2023, arXiv 2304.12244)."""

    rounds: int = 3
    operations: list[str] = field(default_factory=lambda: ["constraints", "deepen", "concretise", "reasoning", "input", "breadth"])
    """Which of them an instruction takes is drawn by the seed."""
    compare: bool = True
    """Ask whether both instructions are equal; equal ones are eliminated."""
    originals: bool = True
    """Answer the instructions of the source too."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of a teacher to the prompts of the source."""

    n: int = 1
    """Answers of each prompt."""
    system: str | None = None
    """What the teacher is told first; not in the rows."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Questions and answers from documents; each answer quotes the document, word for word."""

    characters: int = 2000
    """Longest passage; passages end where paragraphs or lines do."""
    questions: int = 3
    """Of each passage."""
    context: bool = False
    """Put the passage before the question in the row."""


@dataclass(frozen=True, kw_only=True)
class Paraphrase:
    """Other words for the last turn of the user; the row's answer stays."""

    copies: int = 2
    most: float = 0.9
    """Largest ROUGE-L with the original, and with the other copies, exclusive."""
    numbers: bool = True
    """Numbers must be those of the original."""
    originals: bool = True
    """Write the rows of the source too."""


@dataclass(frozen=True, kw_only=True)
class BackTranslation:
    """The last turn of the user, translated and translated back; the row's answer stays."""

    languages: list[str] = field(default_factory=lambda: ["German", "Japanese"])
    """One copy by way of each."""
    most: float = 0.9
    numbers: bool = True
    originals: bool = True


@dataclass(frozen=True, kw_only=True)
class Magpie:
    """An aligned model writes the user's turn itself, after its template's own header (Xu et al. 2024, arXiv 2406.08464)."""

    turns: int = 1
    """Turns of the user in a row."""
    system: str | None = None
    """In the rows too."""
    round: int = 32
    idle: int = 5


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Questions on the leaves of a tree of topics, for coverage; with personas, as these would ask them (arXiv 2406.20094)."""

    breadth: int = 5
    """Subtopics of a topic."""
    depth: int = 2
    """Levels below the topics of the source."""
    personas: int = 0
    """People that are described for each leaf; 0 asks without."""
    questions: int = 4
    """Of each leaf, or of each persona."""


@dataclass(frozen=True, kw_only=True)
class Critique:
    """Answers criticised and revised against written principles (Bai et al. 2022, arXiv 2212.08073)."""

    rounds: int = 1
    principles: str | None = None
    """A file with a principle a line; None takes those that come with fulltune."""
    initial: str = "model"
    """The answer that is criticised: the model's, or the row's."""
    pairs: bool = False
    """Write pairs of the revision and the first answer, for objective=dpo."""


@dataclass(frozen=True, kw_only=True)
class Safety:
    """Refusals of harmful requests, and as many answers to harmless ones that look like them."""

    requests: int = 4
    """Of each kind and category."""
    categories: str | None = None
    """A file with a category a line; None takes those that come with fulltune."""


@dataclass(frozen=True, kw_only=True)
class Raft:
    """Questions among documents of which one answers them (Zhang et al. 2024, arXiv 2403.10131)."""

    characters: int = 2000
    questions: int = 3
    """Of each passage."""
    distractors: int = 4
    """Passages of a row that do not answer it: those nearest to the question by BM25."""
    without: float = 0.2
    """Share of the rows without the passage that answers, and with one distractor more."""
    absent: str = "answer"
    """What such a row answers: the plain answer, or say_so, that the documents do not tell."""
    levels: bool = False
    """For evaluation: each question becomes rows with 0 to `distractors` distractors, the nearest ones, and the passage in each."""


METHODS: dict[str, type[Any]] = {
    "self_instruct": SelfInstruct,
    "evol_instruct": EvolInstruct,
    "answers": Answers,
    "documents": Documents,
    "paraphrase": Paraphrase,
    "back_translation": BackTranslation,
    "magpie": Magpie,
    "tree": Tree,
    "critique": Critique,
    "safety": Safety,
    "raft": Raft,
}
SECTIONS: dict[str, type[Any]] = {"model": Model, "cost": Cost, "filters": Filters, "judge": Judge, "diversity": Diversity}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a command."""

    method: str = ""
    source: str | None = None
    """Rows, documents, topics or seed tasks: a file, a directory or a hub data set."""
    split: str = "train"
    rows: int | None = None
    """Most rows that are written; methods without a source end there."""
    language: str = "en"
    """Of the prompts, and so of the rows: en or ko."""
    prompts: str | None = None
    """A folder of prompts of one's own; files that it lacks are ours."""
    seed: int = 0
    model: Model = Model()
    cost: Cost = Cost()
    filters: Filters = Filters()
    judge: Judge | None = None
    diversity: Diversity | None = None
    of_method: Any = None
    """The settings of the method, an instance of METHODS[method]."""

    def known(self) -> dict[str, Any]:
        """Return what decides the rows, as plain values."""
        found = dataclasses.asdict(self)
        for name in ("batch", "silence_s", "at_once", "timeout_s", "attempts"):
            del found["model"][name]
        del found["cost"]
        return found


PLAIN = [item.name for item in dataclasses.fields(Settings) if item.name not in (*SECTIONS, "of_method")]


def read_settings(file: Path, overrides: Sequence[str]) -> Settings:
    """Return the settings of a file with the overrides in it; raises ConfigError with key and remedy."""
    try:
        found = yaml.safe_load(file.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        remedy = "conf/synthesise/self_instruct.yaml is one"
        raise ConfigError("CONFIG", str(file), f"cannot be read: {' '.join(str(error).split())}", remedy) from None
    if not isinstance(found, dict):
        raise ConfigError("CONFIG", str(file), "holds no settings", "method: self_instruct")
    for word in overrides:
        _put(found, word)
    method = found.get("method")
    if method not in METHODS:
        remedy = did_you_mean(str(method), METHODS) or f"methods are {', '.join(METHODS)}"
        raise ConfigError("method", method, "is not a method", remedy)
    names = [*PLAIN, *SECTIONS, method]
    for name in found:
        if name in METHODS and name != method:
            raise ConfigError(name, found[name], f"holds settings of another method than {method}", f"{method}, or method: {name}")
        if name not in names:
            remedy = did_you_mean(str(name), names) or f"settings are {', '.join(names)}"
            raise ConfigError(str(name), found[name], "is not a setting", remedy)
    plain: Settings = settings_of(Settings, "", {name: value for name, value in found.items() if name in PLAIN})
    given = {name: settings_of(kind, name, found[name]) for name, kind in SECTIONS.items() if found.get(name) not in (None, False)}
    of_method = settings_of(METHODS[method], method, found.get(method) or True)
    return dataclasses.replace(plain, **given, of_method=of_method)


def _put(found: dict[str, Any], word: str) -> None:
    """Put an override such as model.name=NAME where it belongs; raises ConfigError."""
    path, equals, text = word.partition("=")
    *sections, name = path.split(".")
    if not equals or not name:
        raise ConfigError("SETTING", word, "is not KEY=VALUE", "model.path=runs/mine")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    for section in sections:
        inner = found.get(section)
        found[section] = inner if isinstance(inner, dict) else {}
        found = found[section]
    found[name] = value
