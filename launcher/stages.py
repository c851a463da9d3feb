"""A pipeline as its file and the command line give it: stages in order, each with commands, a run and commands after it."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher.fields import names_at
from launcher.origin import shown
from launcher.presets import CONF, files, groups, own
from trainers.config.errors import ConfigError, did_you_mean
from trainers.rundir import paths
from trainers.rundir.files import try_json

GROUP = "pipeline"
RECORD = "pipeline.json"
"""In a pipeline's directory: its stages, and what of each is done."""
TOOLS = ("compare", "evaluate", "gate", "merge", "sample", "select")
"""Tools that a stage may call."""
OUT = ("--out", "--pairs", "--html", "--csv", "--markdown")
"""Options of these that name what they write."""
MADE_OF_TWO = "merge"
"""The tool whose last word that is not an option's is the model directory that it writes."""
ALONE = ("--no-probe", "--trust-remote-code")
"""Its options without a value."""
KEYS = ("name", "before", "run", "after")
OURS = ("run_dir", "mode", "exp", "name")
"""Settings that a command line may not give to all stages at once; the first two are the pipeline's own."""
PLACES = ("dir", "conf", "model", "stage", "values")
"""Names in braces that mean no earlier stage."""
FOLDERS = ("slurm", "code")
"""What a pipeline on SLURM has in its directory, next to its runs."""
NAME = re.compile(r"\{([A-Za-z_]\w*)\}")
PLAIN = re.compile(r"[\w./:+@-]*")
"""Values that Hydra takes without quotes."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage; words in braces are still in its texts, those of `values` excepted."""

    name: str
    before: list[str] = field(default_factory=list)
    """Commands, each a tool's name and its words, that are done before the run."""
    run: list[str] = field(default_factory=list)
    """Overrides of the run; empty for a stage of commands alone."""
    after: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {"name": self.name, "before": self.before, "run": self.run, "after": self.after}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Stages in order, and where their runs are."""

    name: str
    file: Path
    folder: Path
    stages: list[Stage]
    mode: str = "run"

    def place(self, stage: Stage) -> str:
        """Return which stage of how many one is, in words."""
        return f"stage {self.stages.index(stage) + 1} of {len(self.stages)}, {stage.name}"

    def setting(self, stage: Stage, key: str) -> str:
        """Return what a setting of a stage is called in an error."""
        return f"{shown(self.file)}: {stage.name}.{key}"


def read(overrides: Sequence[str], config_dir: str | None = None) -> Pipeline:
    """Return the pipeline that a command line names, with what it changes; raises ConfigError that names file, stage and key."""
    given = {"run_dir": "", "mode": "run"}
    rest = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key.lstrip("+") == GROUP:
            given[GROUP] = value
        elif key in ("run_dir", "mode"):
            given[key] = value.strip("\"'")
        else:
            rest.append(text)
    file = _file(given[GROUP], config_dir)
    content = _content(file)
    values = {name: str(value) for name, value in _mapping(file, content, "values").items()}
    stages = [_stage(file, number, item) for number, item in enumerate(content["stages"])]
    _require_names([stage.name for stage in stages], file, values)
    of_all, of_one = _dealt(rest, stages, values)
    every = _words(file, content, "every")
    _require_no_model(of_all, stages, "model.id")
    _require_no_model(every, stages, f"{shown(file)}: every")
    known = {name: f"{{{name}}}" for name in (*PLACES, *(stage.name for stage in stages))} | values
    made = []
    for stage in stages:
        run = _merged([*every, *stage.run, *of_all, *of_one[stage.name]]) if stage.run else []
        place = f"{shown(file)}: {stage.name}"
        filled = {"run": [filled_override(text, known, f"{place}.run") for text in run]}
        for key in ("before", "after"):
            filled[key] = [filled_command(text, known, values, f"{place}.{key}") for text in getattr(stage, key)]
        made.append(Stage(name=stage.name, **filled))
    if given["mode"] not in (modes := ("run", "plan", "dry_run")):
        raise ConfigError("mode", given["mode"], "is not a mode", f"of {', '.join(modes)}")
    folder = Path(given["run_dir"] or f"runs/{file.stem}").expanduser().absolute()
    return Pipeline(name=file.stem, file=file, folder=folder, stages=made, mode=given["mode"])


def read_record(folder: Path) -> dict[str, Any]:
    """Return what a pipeline's directory says of its stages; empty where it is not the directory of one."""
    found = try_json(folder / RECORD)
    return found if isinstance(found.get("stages"), list) and isinstance(found.get("state"), dict) else {}


def stages_of(record: Mapping[str, Any]) -> list[Stage]:
    """Return the stages that a pipeline's directory names."""
    return [Stage(**{key: item.get(key, []) for key in KEYS}) for item in record["stages"]]


def names_of(stages: Sequence[Stage], stage: Stage, folder: Path) -> dict[str, str]:
    """Return what the names in braces of a stage's texts mean, with the pipeline in `folder`."""
    before = stages[: stages.index(stage)]
    names = {other.name: str(folder / other.name) for other in before}
    names |= {"dir": str(folder), "conf": str(CONF), "stage": str(folder / stage.name)}
    models = [str(folder / other.name / paths.EXPORT) for other in before if other.run]
    return names | ({"model": models[-1]} if models else {})


def fill(text: str, names: Mapping[str, str], setting: str) -> str:
    """Return a text with each name in braces replaced; raises ConfigError for one that means nothing here."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in names:
            raise ConfigError(
                setting, text, f"nothing is called {match[0]} here", did_you_mean(match[1], names) or f"of {', '.join(names)}"
            )
        return names[match[1]]

    return NAME.sub(value, text)


def filled_override(text: str, names: Mapping[str, str], setting: str) -> str:
    """Return an override with its names in braces replaced, quoted where a path needs that."""
    key, equals, value = text.partition("=")
    made = fill(value, names, setting)
    if made != value and not PLAIN.fullmatch(made) and made[:1] not in "[{'\"":
        made = '"' + made.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{key}{equals}{made}"


def filled_command(text: str, names: Mapping[str, str], values: Mapping[str, str], setting: str) -> str:
    """Return a command with its names in braces replaced, as a shell would read it.

    A value in quotes, and one that is an existing path, is one word; any other may be several, such as options of a sampler.
    """

    def word(match: re.Match[str]) -> str:
        value = fill(match[0], names, setting)
        quote = _quote_at(text, match.start())
        if quote == "'":
            return value.replace("'", "'\"'\"'")
        if quote == '"':
            return value.replace("\\", "\\\\").replace('"', '\\"')
        return shlex.quote(value) if match[1] in values and value and _exists(value) else value

    made = NAME.sub(word, text)
    _words_of(made, setting)
    return made


def _quote_at(text: str, end: int) -> str:
    """Return the quote that is open at a place of a command; empty outside quotes."""
    quote, escaped = "", False
    for letter in text[:end]:
        if escaped:
            escaped = False
        elif letter == "\\" and quote != "'":
            escaped = True
        elif letter in "\"'" and quote in ("", letter):
            quote = "" if quote else letter
    return quote


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except OSError:  # longer than any path
        return False


def _words_of(command: str, setting: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(setting, command, f"cannot be read: {error}", "quotes in pairs, or the path of a file that is there") from error


def key_of(override: str) -> str:
    """Return what an override sets."""
    return override.partition("=")[0].lstrip("+~")


def command_words(command: str, names: Mapping[str, str], setting: str) -> list[str]:
    """Return a command's words: the tool's name first; a path with spaces stays one word."""
    return [fill(word, names, setting) for word in _words_of(command, setting)]


def outputs(words: Sequence[str]) -> list[str]:
    """Return what a command writes, as far as others may read it."""
    found = [value for option, value in itertools.pairwise(words) if option in OUT]
    found += [word.partition("=")[2] for word in words if word.partition("=")[0] in OUT]
    if words[0] == MADE_OF_TWO:
        found += [word for before, word in itertools.pairwise(words) if not word.startswith("--") and not _takes_a_value(before)][-1:]
    return found


def _takes_a_value(word: str) -> bool:
    """Tell an option of `merge` whose value is the next word; options may be cut short, as argparse has it."""
    return word.startswith("--") and "=" not in word and not any(option.startswith(word) for option in ALONE)


def _file(name: str, config_dir: str | None) -> Path:
    found = {file.stem: file for file in files(GROUP, [CONF, *own(config_dir)])}
    if name not in found:
        raise ConfigError(GROUP, name, f"there is no conf/{GROUP}/{name}.yaml", did_you_mean(name, found) or f"of {', '.join(found)}")
    return found[name]


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(GROUP, shown(file), f"cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list) or not content["stages"]:
        raise ConfigError(
            GROUP, shown(file), "has no list of `stages`", "stages: with a `name` and a `run` each, as docs/pipelines.md has it"
        )
    _require_keys(content, ("values", "every", "stages"), shown(file))
    return content


def _stage(file: Path, number: int, item: object) -> Stage:
    place = f"{shown(file)}: stages[{number}]"
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise ConfigError(place, item, "a stage is a mapping with a `name`", "- name: sft")
    place = f"{shown(file)}: {item['name']}"
    _require_keys(item, KEYS, place)
    stage = Stage(name=item["name"], **{key: _words(file, item, key, item["name"]) for key in KEYS[1:]})
    if not (stage.before or stage.run or stage.after):
        raise ConfigError(place, "", "has nothing to do", f"a `run`, or a command of {', '.join(TOOLS)}")
    for key in ("before", "after"):
        for command in getattr(stage, key):
            _require_tool(command, f"{place}.{key}")
    for text in stage.run:
        if key_of(text) in OURS[:2] or key_of(text).startswith(("hydra.", "hydra/")):
            raise ConfigError(
                f"{place}.run", text, "a stage's run has its place and its time from the pipeline", f"leave out {key_of(text)}"
            )
    return stage


def _require_tool(command: str, setting: str) -> None:
    words = _words_of(command, setting)
    if not words or words[0] not in TOOLS:
        tool = words[0] if words else ""
        raise ConfigError(
            setting, command, f"`{tool}` is not a tool that a stage calls", did_you_mean(tool, TOOLS) or f"of {', '.join(TOOLS)}"
        )


def _words(file: Path, item: Mapping[str, Any], key: str, stage: str = "") -> list[str]:
    found = item.get(key) or []
    place = f"{shown(file)}: {stage}{'.' if stage else ''}{key}"
    if not isinstance(found, list):
        raise ConfigError(place, found, "must be a list of texts", f"{key}: [TEXT, ...]")
    for text in found:
        if not isinstance(text, str):
            raise ConfigError(place, text, "is not a text", "quotes around it")
    if key in ("run", "every") and (wrong := [text for text in found if "=" not in text]):
        raise ConfigError(place, wrong[0], "sets nothing", "FIELD=VALUE, GROUP=PRESET or +exp=NAME")
    return found


def _mapping(file: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(value, str | int | float) for value in found.values()):
        raise ConfigError(f"{shown(file)}: {key}", found, "must be names with one value each", f"{key}: {{prompts: prompts.jsonl}}")
    return found


def _require_keys(item: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in item:
        if key not in known:
            raise ConfigError(
                f"{place}.{key}", item[key], "there is no such key", did_you_mean(str(key), known) or f"of {', '.join(known)}"
            )


def _require_names(names: Sequence[str], file: Path, values: Mapping[str, str]) -> None:
    """Refuse names of stages that a folder, a name in braces or an override could not tell apart."""
    taken = {*PLACES, *FOLDERS, *groups(), *names_at(""), *values}
    for number, name in enumerate(names):
        if not re.fullmatch(r"[a-z]\w*", name) or name in taken:
            reason = "is not a valid name of a stage: small letters, digits and _, and no setting, group, value or place of that name"
            raise ConfigError(f"{shown(file)}: stages", name, reason, f"name: {re.sub(r'[^a-z0-9_]', '_', name.lower())}_stage")
        if name in names[:number]:
            raise ConfigError(f"{shown(file)}: stages", name, "two stages have this name", f"name: {name}_{number + 1}")


def _dealt(texts: Sequence[str], stages: Sequence[Stage], values: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the overrides of all runs and those of each stage; sets what the command line says of `values`."""
    of_all: list[str] = []
    of_one: dict[str, list[str]] = {stage.name: [] for stage in stages}
    for text in texts:
        sign = text[: len(text) - len(text.lstrip("+~"))]
        head, dot, rest = text[len(sign) :].partition(".")
        if dot and "=" not in head and head in of_one:
            if not next(stage for stage in stages if stage.name == head).run:
                raise ConfigError(text.partition("=")[0], text.partition("=")[2], f"stage `{head}` has no run", "leave it out")
            of_one[head].append(sign + rest)
        elif dot and head == "values":
            name, _, value = rest.partition("=")
            if name not in values:
                known = did_you_mean(name, values) or f"of {', '.join(values)}" if values else "the pipeline has none"
                raise ConfigError(f"values.{name}", value, "the pipeline has no such value", known)
            values[name] = value
        elif key_of(text) in OURS or key_of(text).startswith(("hydra.", "hydra/")):
            remedy = f"{stages[0].name}.{key_of(text)}=VALUE for one stage" if key_of(text) == "exp" else f"leave out {key_of(text)}"
            raise ConfigError(key_of(text), text.partition("=")[2], "is not set for all stages of a pipeline at once", remedy)
        else:
            of_all.append(text)
    return of_all, of_one


def _require_no_model(overrides: Sequence[str], stages: Sequence[Stage], setting: str) -> None:
    """Refuse one model for all runs: none would then begin with what the one before it has learnt."""
    for text in overrides:
        if key_of(text) == "model.id":
            first = next((stage.name for stage in stages if stage.run), stages[0].name)
            reason = "every stage would begin with it, and none with the export of the one before"
            raise ConfigError(setting, text.partition("=")[2], reason, f"{first}.model.id={text.partition('=')[2] or 'VALUE'}")


def _merged(overrides: Sequence[str]) -> list[str]:
    """Return overrides of which the last of a key stays: Hydra refuses a group that is chosen twice."""
    last = {key_of(text): text for text in overrides}
    order = dict.fromkeys(key_of(text) for text in overrides)
    signs = {key_of(text): text[: len(text) - len(text.lstrip("+~"))] for text in reversed(overrides)}
    made = []
    for key in order:
        bare = last[key].lstrip("+~")
        own_sign = last[key][: len(last[key]) - len(bare)]
        made.append((own_sign or (signs[key] if signs[key] != "~" else "")) + bare)
    return made
