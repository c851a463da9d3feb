"""Faults of every kind planted into rows with a seed, and what a curation made of them.

python tests/planted.py FILE... --out DIR    plants them into clean rows, curates, and prints precision and recall by kind

The files are curated first, so that what is planted is all that is wrong with them.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.curate.__main__ import main as curate

Row = dict[str, Any]
CONFIG = Path(__file__).parents[1] / "conf" / "curate" / "default.yaml"
PER_KIND = 12


def answer(row: Row) -> tuple[Any, str]:
    """Return the object and key that hold a row's last answer; of a pair, the chosen one."""
    for key in ("output", "answer", "completion", "text"):
        if isinstance(row.get(key), str):
            return row, key
    turns = row.get("chosen") or row.get("completion") or row["messages"]
    return (row, "chosen") if isinstance(turns, str) else (next(turn for turn in reversed(turns) if turn["role"] == "assistant"), "content")


def prompt(row: Row) -> tuple[Any, str]:
    for key in ("instruction", "question", "prompt", "text"):
        if isinstance(row.get(key), str):
            return row, key
    return next(turn for turn in row.get("prompt") or row["messages"] if turn["role"] == "user"), "content"


def with_answer(row: Row, change: Callable[[str], str]) -> Row:
    row = copy.deepcopy(row)
    held, key = answer(row)
    held[key] = change(held[key])
    return row


def said(row: Row) -> str:
    held, key = answer(row)
    return held[key]


def without_one_word(row: Row, rng: random.Random) -> Row | None:
    words = said(row).split(" ")
    if len(said(row)) < 120 or len(words) < 12:
        return None
    at = rng.randrange(3, len(words) - 3)
    return with_answer(row, lambda text: " ".join(words[:at] + words[at + 1 :])) if words[at].strip() else None


def runs(row: Row) -> set[str]:
    """The shingles of a row, by plain Python."""
    text = " ".join(json.dumps(row, ensure_ascii=False).casefold().split())
    return {text[at : at + 5] for at in range(len(text) - 4)}


def misread(text: str) -> str | None:
    """UTF-8 read as Windows-1252 with Latin-1 in its gaps."""
    read = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())
    return None if read == text else read


def spoilt(change: Callable[[str], str | None]) -> Callable[[Row, random.Random], Row | None]:
    def plant(row: Row, rng: random.Random) -> Row | None:
        changed = change(said(row))
        return None if changed in (None, said(row)) else with_answer(row, lambda _: changed)

    return plant


def shouted(row: Row, rng: random.Random) -> Row:
    return with_answer(row, lambda text: text.upper().replace(" ", "  ") + " ")


def between_words(*parts: str) -> Callable[[str], str | None]:
    return lambda text: parts[0].join(text.split(" ", 2)) if text.count(" ") > 2 else None


INSERTED: dict[str, tuple[str, Callable[[Row, random.Random], Any]]] = {
    "not JSON": ("schema", lambda row, rng: json.dumps(row)[:-3]),
    "not an object": ("schema", lambda row, rng: ["a", "list"]),
    "other layout": ("schema", lambda row, rng: {"text": "words"} if "text" not in row else {"question": "q", "answer": "a"}),
    "empty answer": ("schema", lambda row, rng: with_answer(row, lambda text: " ")),
    "answer of another type": ("schema", lambda row, rng: with_answer(row, lambda text: 17)),
    "half a surrogate pair": ("schema", lambda row, rng: json.dumps(with_answer(row, lambda text: f"{text} \ud83d"))),
    "exact": ("exact", shouted),
    "near": ("near", without_one_word),
}
"""By kind: the step that must remove the row, and what makes one of a clean row."""
REPLACED: dict[str, Callable[[Row, random.Random], Row | None]] = {
    "decomposed": spoilt(lambda text: unicodedata.normalize("NFD", text)),
    "no-break spaces": spoilt(between_words("\u00a0")),
    "carriage returns": spoilt(lambda text: text.replace("\n", "\r\n")),
    "misread": spoilt(misread),
    "control characters": spoilt(between_words(" \x07")),
    "no width": spoilt(between_words("\u200b ")),
}
"""By kind: what spoils a row, and normalisation must bring back."""
IDENTIFIERS = {
    "email": ["ada.lovelace@example.org", "kim+news@mail.co.kr"],
    "phone": [
        "+82 10-1234-5678",
        "010-9876-5432",
        "02-345-6789",
        "(415) 555-2671",
        "+44 20 7946 0958",
        "020 7946 0958",
        "04 63 53 61 70",
        "001-415-555-2671x12",
    ],
    "resident": ["900101-1234568"],
    "business": ["124-81-00998", "220-81-62517"],
    "passport": ["L898902C36UTO7408122F1204159ZE184226B<<<<<10"],
    "card": ["4111 1111 1111 1111", "5555555555554444", "378282246310005"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000"],
    "ip": ["93.184.216.34", "2606:4700:4700::1111"],
    "mac": ["3c:22:fb:01:aa:9e"],
    "key": ["AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "hf_" + "Abcd1" * 7],
}
"""Published examples: of ISO 13616, ICAO Doc 9303, card networks, company registers."""
DECOYS = [
    "4111 1111 1111 1112",
    "124-81-00999",
    "GB82 WEST 1234 5698 7654 33",
    "900101-1234567",
    "192.168.0.1",
    "1600-1500=100",
    "12:30:45",
]
DECOYS += ["std::map<int>", "version 1.2.3.4", "3.14159265", "user@localhost", "2024-01-15", "1,234,567,890", "sk-learn", "a1b2c3d4"]
DECOYS += ["7.1.4.34", "01 02 03 04 05 06 07", "05-12-2023 14", "doi.org/10.1016/0020-0190(76)90049-1", "0123456789ab", "0123456789"]
"""They only look like personal data."""


def with_identifier(kind: str) -> Callable[[Row, random.Random], Row]:
    return lambda row, rng: with_answer(row, lambda text: f"{text}\nIt is {rng.choice(IDENTIFIERS[kind])} indeed, 0.")


def masked(kind: str, row: Row) -> Row:
    return with_answer(row, lambda text: f"{text}\nIt is [{kind.upper()}_1] indeed, 0.")


def repeated(row: Row, rng: random.Random) -> Row:
    return with_answer(row, lambda text: f"{' '.join(text.split()[:8])}, {rng.random()} so. " * 20 + "So.")


def cut(row: Row, rng: random.Random) -> Row | None:
    return with_answer(row, lambda text: f"{text[:400]} and the") if len(said(row)) > 250 else None


REPLACED |= {f"personal: {kind}": with_identifier(kind) for kind in IDENTIFIERS}
SPOILT: dict[str, tuple[str, Callable[[Row, random.Random], Row | None]]] = {
    "repeats": (
        "repetition",
        lambda row, rng: with_answer(row, lambda text: f"{' '.join(text.split()[:8])}, {rng.random()} so. " * 20 + "So."),
    ),
    "cut": ("truncated", cut),
    "open code": ("truncated", lambda row, rng: with_answer(row, lambda text: f"{text}\n```python\nprint({rng.random()})")),
    "refuses": ("refusals", lambda row, rng: with_answer(row, lambda text: f"I'm sorry, but I can't help with that. {text}")),
    "opening": ("boilerplate", lambda row, rng: with_answer(row, lambda text: f"As an AI language model, I say: {text}")),
    "wrong JSON": ("syntax", lambda row, rng: with_answer(row, lambda text: f"{text}\n```json\n{{'a': {rng.random()}}}\n```\nSo.")),
    "wrong Python": ("syntax", lambda row, rng: with_answer(row, lambda text: f"{text}\n```python\nif {rng.random()}\n```\nSo.")),
}
"""By kind: the step that must remove the row, and what spoils it so that nothing brings it back."""


@dataclass
class Planted:
    """What was planted into files."""

    kinds: dict[tuple[str, int], str] = field(default_factory=dict)
    """By file and line."""
    originals: dict[tuple[str, int], Row] = field(default_factory=dict)
    """What a spoilt row was."""
    steps: dict[str, str] = field(default_factory=dict)
    clean: dict[str, list[bytes]] = field(default_factory=dict)
    """By file: the lines that must come out, to the byte."""


def plant(files: list[Path], out: Path, seed: int, per_kind: int = PER_KIND) -> Planted:
    """Write each file with faults into `out`, at places that the seed decides."""
    planted = Planted(
        steps={kind: step for kind, (step, _) in INSERTED.items()}
        | {
            **{kind: "personal" if kind.startswith("personal") else "normalise" for kind in REPLACED},
            **{kind: step for kind, (step, _) in SPOILT.items()},
        }
    )
    out.mkdir(parents=True)
    for file in files:
        rng = random.Random(f"{seed}:{file.name}")
        lines = file.read_bytes().splitlines()
        free = list(range(len(lines)))
        rng.shuffle(free)
        spoil(lines, free, rng, per_kind, planted, out / file.name)
    return planted


def spoil(lines: list[bytes], free: list[int], rng: random.Random, per_kind: int, planted: Planted, file: Path) -> None:
    rows = [json.loads(line) for line in lines]
    replaced: dict[int, tuple[str, Row]] = {}
    inserted: dict[int, list[tuple[str, Any]]] = {}
    for kind, make in (REPLACED | {kind: make for kind, (_, make) in SPOILT.items()}).items():
        for at, row in chosen(free, rows, make, rng, per_kind):
            replaced[at] = (kind, row)
    for decoy, at in zip(DECOYS, free[-len(DECOYS) :], strict=False):
        free.remove(at)
        rows[at] = with_answer(rows[at], lambda text, decoy=decoy: f"{text}\nIt is {decoy} indeed, 0.")
        lines[at] = json.dumps(rows[at], ensure_ascii=False).encode()
    for kind, (_, make) in INSERTED.items():
        for at, row in chosen(free, rows, make, rng, per_kind, like=kind == "near"):
            inserted.setdefault(rng.randrange(at, len(rows)), []).append((kind, row))
    written: list[bytes] = []
    expected = {at: masked(kind[10:], rows[at]) for at, (kind, _) in replaced.items() if kind.startswith("personal")}
    clean = {at: json.dumps(expected[at], ensure_ascii=False).encode() if at in expected else line for at, line in enumerate(lines)}
    planted.clean[file.name] = [line for at, line in clean.items() if at not in replaced or replaced[at][0] not in SPOILT]
    for at, line in enumerate(lines):
        if at in replaced:
            kind, row = replaced[at]
            planted.kinds[str(file), len(written) + 1] = kind
            planted.originals[str(file), len(written) + 1] = expected.get(at, rows[at])
            line = json.dumps(row, ensure_ascii=False).encode()
        written.append(line)
        for kind, row in inserted.get(at, []):
            planted.kinds[str(file), len(written) + 1] = kind
            written.append((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode())
    file.write_bytes(b"\n".join(written) + b"\n")


def chosen(
    free: list[int], rows: list[Row], make: Callable[..., Any], rng: random.Random, count: int, like: bool = False
) -> list[tuple[int, Any]]:
    """Take rows that nothing was done to, and that the fault can be planted into."""
    found = []
    for at in list(free):
        row = make(rows[at], rng)
        if row is None or (like and len(runs(rows[at]) & runs(row)) < 0.9 * len(runs(rows[at]) | runs(row))):
            continue
        free.remove(at)
        found.append((at, row))
        if len(found) == count:
            break
    return found


@dataclass
class Score:
    """Of a kind of fault."""

    planted: int = 0
    found: int = 0
    by_another_step: int = 0
    restored: int = 0


def score(planted: Planted, out: Path) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Return what was found of each kind, and what was taken or changed and was not planted."""
    scores = {kind: Score() for kind in planted.steps}
    for kind in planted.kinds.values():
        scores[kind].planted += 1
    wrong = []
    for name in ("removed", "changed"):
        for line in (out / f"{name}.jsonl").read_text("utf-8").splitlines():
            note = json.loads(line)
            kind = planted.kinds.get((note["file"], note["line"]))
            if kind is None:
                wrong.append(note)
            elif note["step"] != planted.steps[kind]:
                scores[kind].by_another_step += 1
            else:
                scores[kind].found += 1
                scores[kind].restored += note.get("after") == planted.originals.get((note["file"], note["line"]), 0)
    return scores, wrong


def report(scores: dict[str, Score], wrong: list[dict[str, Any]]) -> str:
    lines = [f"{'kind':<26}{'planted':>8}{'found':>8}{'other':>8}{'restored':>10}"]
    lines += [
        f"{kind:<26}{found.planted:>8}{found.found:>8}{found.by_another_step:>8}{found.restored:>10}" for kind, found in scores.items()
    ]
    found, planted = sum(one.found for one in scores.values()), sum(one.planted for one in scores.values())
    lines.append(f"recall {found / planted:.4f}, precision {found / (found + len(wrong)):.4f}: {len(wrong)} rows touched without a fault")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-kind", type=int, default=PER_KIND)
    options = parser.parse_args()
    curate([str(CONFIG), *map(str, options.files), "--out", str(options.out / "clean"), "--quiet"])
    files = sorted((options.out / "clean" / "rows").glob("*.jsonl"))
    planted = plant(files, options.out / "planted", options.seed, options.per_kind)
    curate([str(CONFIG), *(str(options.out / "planted" / file.name) for file in files), "--out", str(options.out / "found"), "--quiet"])
    print(report(*score(planted, options.out / "found")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
