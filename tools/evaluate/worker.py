"""Measure models, as one of several processes: python -m tools.evaluate.worker REQUEST.json RANK SIZE, which `workers` starts.

Each document's metrics are a line of a file that grows, in the folder of prepared data and under a key of all that decides them: what
is there is not measured again, by whichever process and in whichever run it was. What it does is said on stdout, a JSON object a line.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tools.evaluate.harness import benchmark
from tools.evaluate.measure import Ints, answers, classes, head_of, longest_first, losses, scores, wanted, with_prompt
from tools.evaluate.record import read_lines
from tools.evaluate.scores import repetition
from tools.evaluate.sets import EvalSet, answered, evenly, general, held_out
from trainers.cache import cache_root, content_key
from trainers.config.derived import DESIRABLE
from trainers.config.errors import ConfigError
from trainers.config.schema import parse
from trainers.data.loader import deal
from trainers.data.mismatched import longest_row, mismatched
from trainers.data.tokenizer import pad_id, tokenizer_hash
from trainers.generate.decode import stops_of
from trainers.generate.subject import Subject
from trainers.host import cores
from trainers.rundir.ending import Exit
from trainers.rundir.files import read_json, write_json

VERSION = 3
"""Of what is measured and how: raise it when either changes."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Documents of which one thing is measured, and where their metrics are kept."""

    name: str
    """`held_out` and `general` are losses, `pairs` those of both answers of pairs, `unpaired` those of answers that are wanted or not,
    `mismatched` those of their prompts with other answers, `classes` what a classifier says, `answers` are answers.
    """
    table: EvalSet
    documents: Ints
    folder: Path

    @property
    def is_unpaired(self) -> bool:
        """Tell answers that are wanted or not."""
        return DESIRABLE in self.table.table.signals

    def as_json(self) -> dict[str, Any]:
        """Return what whoever asks needs to read the metrics."""
        return {"folder": str(self.folder), "documents": self.documents.tolist(), "set": self.table.key}


def main(arguments: list[str]) -> int:
    """Measure this process's share of what is asked for; returns the exit code."""
    request, rank, size = json.loads(Path(arguments[0]).read_text("utf-8")), int(arguments[1]), int(arguments[2])
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(max(1, cores() // size))
    device = torch.device("cpu")
    if torch.cuda.is_available() and request["device"] != "cpu":
        device = torch.device("cuda", rank) if size > 1 else torch.device("cuda")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for number, asked in enumerate(request["subjects"]):
            subject = Subject(config=parse(asked["config"]), folder=Path(asked["folder"]) if asked["folder"] else None)
            measure_share(subject, number, request, device, rank, size)
    except ConfigError as error:
        say(error=error.parts())
        return Exit.bad_input
    except torch.cuda.OutOfMemoryError as error:
        say(failed=f"a GPU's memory is too small for the model with --batch {request['batch']}: {str(error).splitlines()[0]}")
        return Exit.failed
    return Exit.done


def say(**what: object) -> None:
    """Tell whoever has asked."""
    print(json.dumps(what), flush=True)


def measure_share(subject: Subject, number: int, request: dict[str, Any], device: torch.device, rank: int, size: int) -> None:
    """Measure a rank's share of a model's documents that nobody has measured."""
    tokenizer = subject.tokenizer
    parts = parts_of(subject, request["dtype"], device)
    if rank == 0:
        say(subject=number, weights=subject.fingerprint, files=subject.files, parts={part.name: part.as_json() for part in parts})
    left = _shares(parts, rank, size, request["batch"])
    benchmarks = _benchmarks_file(subject, request) if request["tasks"] and rank == 0 else None
    if benchmarks is not None and benchmarks.is_file():
        say(subject=number, lm_eval=read_json(benchmarks))
        benchmarks = None
    if not any(len(documents) for documents in left.values()) and benchmarks is None:
        return
    say(subject=number, opening=True)
    model = subject.open(getattr(torch, request["dtype"]), device)
    pad = pad_id(tokenizer)
    head = None if subject.gives_scores else head_of(model, request["batch"] * _longest(parts, left))
    for part in parts:
        documents = left[part.name]
        if part.name == "classes":
            found = classes(model, part.table.table, documents, request["batch"], subject.labels, part.table.labels)
        elif subject.gives_scores:
            found = scores(model, part.table.table, documents, request["batch"])
        elif part.name == "answers":
            stops = stops_of(model, tokenizer)
            longest = subject.config.evaluation.max_new_tokens
            found = answers(model, tokenizer, part.table.table, documents, request["batch"], longest, stops, pad)
            found = (_without_ids(row) for row in found)
        else:
            found = losses(model, part.table.table, documents, request["batch"], pad, head)
            found = wanted(found, part.table.table) if part.is_unpaired else found
        _keep(found, part, number, rank, request["batch"])
    if benchmarks is not None:
        figures = benchmark(model, tokenizer, request["tasks"], request["tasks_dir"], request["batch"])
        write_json(benchmarks, figures)
        say(subject=number, lm_eval=figures)


def _longest(parts: list[Part], left: dict[str, Ints]) -> int:
    """Return the tokens of the longest document whose loss is still to be measured; 0 where there is none."""
    measured = [part for part in parts if part.name != "answers" and len(left[part.name])]
    return max((int(np.diff(part.table.table.offsets)[left[part.name]].max()) for part in measured), default=0)


def _benchmarks_file(subject: Subject, request: dict[str, Any]) -> Path:
    """Return where a model's metrics of these tasks are kept."""
    own = sorted((file.name, file.read_text("utf-8")) for file in Path(request["tasks_dir"] or os.devnull).glob("*.yaml"))
    root = cache_root(subject.config.data.prepared_dir)
    root.mkdir(parents=True, exist_ok=True)
    return root / f"lm-eval-{content_key(*_key_of(subject, request['dtype']), sorted(request['tasks']), own)}.json"


def _key_of(subject: Subject, dtype: str) -> tuple[object, ...]:
    """Return what decides the metrics of any document: how it is measured, weights, tokenizer and type."""
    return VERSION, subject.fingerprint, tokenizer_hash(subject.tokenizer), dtype


def parts_of(subject: Subject, dtype: str, device: torch.device) -> list[Part]:
    """Return what is to be measured of a model: losses on held-out rows and on general text, and answers; raises ConfigError."""
    config, model = subject.config, _key_of(subject, dtype)
    root = cache_root(config.data.prepared_dir)
    held = held_out(config, subject.tokenizer, subject.labels)
    if subject.gives_scores:
        return [_part_of_scores(subject, held, root, model)]
    text = general(subject, device)
    parts, documents, folder = _of_answers(held, root, model)
    parts.append(Part(name="held_out", table=held, documents=documents, folder=folder))
    if text is not None:
        parts.append(Part(name="general", table=text, documents=text.documents, folder=_folder(root, *model, "loss", text.key)))
    written = answered(config, subject.tokenizer, held) if config.evaluation.rows else held
    asked = with_prompt(written.table, reported(written))
    if config.evaluation.rows and len(asked):
        documents = asked[evenly(len(asked), config.evaluation.rows)]
        folder = _folder(root, *model, "answers", written.key, config.evaluation.max_new_tokens)
        parts.append(Part(name="answers", table=written, documents=documents, folder=folder))
    return parts


def _part_of_scores(subject: Subject, held: EvalSet, root: Path, model: tuple[object, ...]) -> Part:
    """Return what is measured of a model with a head; raises ConfigError where the rows have nothing to hold its scores against."""
    if subject.labels:
        return Part(name="classes", table=held, documents=held.documents, folder=_folder(root, *model, "classes", held.key))
    if held.table.units is None:
        reason = "a reward model is measured by the order of pairs, and these rows are none"
        raise ConfigError("evaluation.path", subject.config.evaluation.path, reason, "--path FILE, rows with `chosen` and `rejected`")
    return Part(name="pairs", table=held, documents=held.documents, folder=_folder(root, *model, "scores", held.key))


def reported(rows: EvalSet) -> Ints:
    """Return the documents whose losses are reported: of pairs the preferred answers, of answers that are wanted or not the wanted ones."""
    if rows.table.units is not None:
        return rows.documents[::2]
    return rows.documents[np.array(rows.table.signals[DESIRABLE]) > 0] if DESIRABLE in rows.table.signals else rows.documents


def _of_answers(held: EvalSet, root: Path, model: tuple[object, ...]) -> tuple[list[Part], Ints, Path]:
    """Return what is measured of all held-out documents, those whose losses are reported, and where these are kept."""
    if held.table.units is not None:
        folder = _folder(root, *model, "loss", held.key)
        return [Part(name="pairs", table=held, documents=held.documents, folder=folder)], reported(held), folder
    if DESIRABLE not in held.table.signals:
        return [], reported(held), _folder(root, *model, "loss", held.key)
    folder = _folder(root, *model, "unpaired", held.key)
    parts = [Part(name="unpaired", table=held, documents=held.documents, folder=folder)]
    if held.table.partners is not None:
        other = EvalSet(table=mismatched(held.table, held.documents, longest_row(held.table)), documents=held.documents, key=held.key)
        parts.append(Part(name="mismatched", table=other, documents=other.documents, folder=_folder(root, *model, "mismatched", held.key)))
    return parts, reported(held), folder


def _folder(root: Path, *parts: object) -> Path:
    return root / f"evaluation-{content_key(*parts)}"


def _shares(parts: list[Part], rank: int, size: int, batch: int) -> dict[str, Ints]:
    """Return a rank's documents of each part that are still to be measured; one that several parts have is the first one's."""
    taken: dict[Path, set[int]] = {}
    left = {}
    for part in parts:
        left[part.name] = _share(part, taken.get(part.folder, set()), rank, size, batch)
        taken.setdefault(part.folder, set()).update(part.documents.tolist())
    return left


def _share(part: Part, taken: set[int], rank: int, size: int, batch: int) -> Ints:
    """Return a rank's documents that no file has, longest first; which are its own does not depend on what is there."""
    known = taken | {row["document"] for file in part.folder.glob("*.jsonl") for row in read_lines(file)}
    own = [rows for rows in deal(longest_first(part.table.table, part.documents), batch, rank, size) if len(rows)]
    return np.array([document for rows in own for document in rows.tolist() if document not in known], np.int64)


def _without_ids(row: dict[str, Any]) -> dict[str, Any]:
    ids = row.pop("ids")
    return row | {"tokens": len(ids), "repetition": repetition(ids)}


def _keep(found: Iterator[dict[str, Any]], part: Part, number: int, rank: int, batch: int) -> None:
    """Write each document's metrics to this process's own file as they come, and say how many there are by now."""
    part.folder.mkdir(parents=True, exist_ok=True)
    with (part.folder / f"{os.uname().nodename}-{secrets.token_hex(8)}.jsonl").open("x", encoding="utf-8") as file:
        for done, row in enumerate(found, 1):
            file.write(json.dumps(row) + "\n")
            if done % batch == 0:
                file.flush()
                say(subject=number, part=part.name, rank=rank, done=done)
        file.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
