"""What is told of a preparation: a bar while it runs, and its report in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from trainers.config.errors import plural
from trainers.data.parts import KINDS

SHOWN = 5
MOST_FILES = 8


def summary(report: dict[str, Any], reused: bool = False) -> str:
    """Return a report as text for people; `reused` is of data that were prepared before."""
    pace = f"{report['seconds']:.1f} s ({report['rows_per_second']:,.0f} rows/s)"
    how = f", from the cache, where it is since {report['prepared_at']} (prepared in {pace})" if reused else f" in {pace}"
    lines = [f"data {report['fingerprint']}: layout {report['layout']}, {plural(report['rows'], 'row')}{how}", *_files_in_words(report)]
    if of := report.get("stream"):
        each, window = plural(of["shard_rows"], "row"), plural(of["window_shards"], "shard")
        lines.append(f"  stream  this is the first shard; more of {each} are prepared while training, and {window} shuffled together")
    for name, split in report["splits"].items():
        lengths = ", ".join(f"{key} {value:,}" for key, value in split["lengths"].items())
        what = plural(split["pairs"], "pair") if "pairs" in split else plural(split["documents"], "document")
        lines.append(
            f"  {name:5} {what} in {plural(split['rows'], 'row')} (filled {split['efficiency']:.2%}), "
            f"{plural(split['tokens'], 'token')}, {split['supervised_tokens']:,} supervised; document lengths {lengths}"
        )
        if "wanted" in split:
            lines.append(f"        {split['wanted']:,} answers are wanted, {split['documents'] - split['wanted']:,} are not")
        if weights := split.get("weights"):
            lines.append(f"        weights from {weights['min']:.4g} to {weights['max']:.4g}, {weights['mean']:.4g} in the mean")
    if report.get("equal"):
        lines.append(f"  equal {plural(report['equal'], 'pair')} of a ranked list with one score or one text, which are left out")
    lines += glance_in_words(report)
    lost = report["supervised_lost"] / report["supervised_before"]
    lines.append(
        f"  lost  {report['supervised_lost']:,} supervised tokens ({lost:.2%}): rows truncated {report['truncated']:,}, "
        f"dropped {report['dropped']:,}, split {report['split']:,}, bad {report['bad']:,}, also in eval {report['overlap']:,}"
    )
    if report.get("stops"):
        lines.append(f"  stops at {', '.join(f'{token} ({number})' for token, number in report['stops'].items())}")
    for kind, counts in report.get("template_leaves_out", {}).items():
        lines.append(f"  left out by the chat template: {KINDS[kind]} in {counts['missing']:,} of {counts['rows']:,} rows that have some")
    if report.get("labels"):
        counts = [f"{name} {' + '.join(f'{count:,}' for count in of.values())}" for name, of in report["labels"].items()]
        lines.append(f"  labels  {plural(len(counts), 'class')} ({' + '.join(report['splits'])}): {_few(counts)}")
    if teacher := report.get("teacher"):
        lines.append(f"  teacher  {teacher['name']}: its {plural(teacher['k'], 'likeliest token')} at each label ({teacher['folder']})")
    if report.get("unread"):
        lines.append(f"  unread  fields that nothing here reads: {', '.join(report['unread'])}")
    return "\n".join(lines)


MOST_OPENING, MOST_COPIES, MOST_LONG, MOST_LEAKED = 0.3, 0.05, 0.4, 0.01
"""Shares above which data are likely not what they were meant to be: one opening, copies, texts over data.seq_len, leaked documents."""


def glance_in_words(report: dict[str, Any]) -> list[str]:
    """Return three lines on the rows, or one a source of a mixture, and one on what held-out documents share with trained ones."""
    lines = []
    if seen := report.get("glance"):
        lines = [f"  {name:8}{words}" for name, words in zip(("copies", "openings", "long"), _seen(seen), strict=True)]
    for name, one in report.get("sources", {}).items():
        if seen := one.get("glance"):
            lines.append(f"  of {name}: {'; '.join(_seen(seen))}")
    if leaked := report.get("leakage"):
        lines.append(f"  leakage {leaked_words(leaked)}")
    return lines


def leaked_words(leaked: dict[str, Any]) -> str:
    """Say what held-out documents share with trained ones."""
    same = f"{leaked['text']:,} have the text of a trained one, {leaked['near']:,} nearly (similarity of {leaked['similarity']:g} or more)"
    return f"of {plural(leaked['documents'], 'held-out document')} {same}, {leaked['prompt']:,} the first prompt of one"


def is_leaky(leaked: dict[str, Any]) -> bool:
    """Tell whether more held-out documents are trained than may be chance."""
    return bool(leaked["any"] > MOST_LEAKED * leaked["documents"])


def _seen(seen: dict[str, Any]) -> tuple[str, str, str]:
    first = next(iter(seen["openings"]), None)
    begun = (
        f"{_share(first['answers'], seen['answers'])} of {plural(seen['answers'], 'answer')} begin with '{first['text']}'" if first else ""
    )
    copies = f"{_share(seen['copies'], seen['documents'])} of {plural(seen['documents'], 'document')} have the text of another"
    prompts = f"{_share(seen['same_prompt'], seen['documents'])} the first prompt of another"
    return (
        f"{copies}, {prompts}",
        begun or "no answers",
        f"{_share(seen['long'], seen['texts'])} of {plural(seen['texts'], 'text')} over data.seq_len",
    )


def _share(count: int, total: int) -> str:
    return f"{count / max(1, total):.1%}"


def warnings(report: dict[str, Any]) -> list[str]:
    """Return what is likely to be wrong with the rows, and the remedy."""
    lines = [
        f"data.mix.{name}: {line}" for name, one in report.get("sources", {}).items() for line in warnings({"glance": one.get("glance")})
    ]
    if seen := report.get("glance"):
        copies, opening, long = _seen(seen)
        first = next(iter(seen["openings"]), {"answers": 0})
        if seen["copies"] > MOST_COPIES * seen["documents"]:
            lines.append(f"{copies}: python -m tools.curate removes duplicates")
        if first["answers"] > MOST_OPENING * max(seen["answers"], MOST_FILES):
            lines.append(f"{opening}: the model will begin so too")
        if seen["long"] > MOST_LONG * seen["texts"]:
            lines.append(f"{long}: a longer data.seq_len, or shorter texts")
    leaked = report.get("leakage")
    if leaked and is_leaky(leaked):
        lines.append(f"leakage: {leaked_words(leaked)}; the held-out loss says too little: python -m tools.curate, with `split`")
    return lines


def _files_in_words(report: dict[str, Any]) -> list[str]:
    """Return a line for each of the first files that were read, and one for those that were left out."""
    files = list(report["files"].items())
    lines = [f"  read  {name}: {plural(count, 'row')}" for name, count in files[:MOST_FILES]]
    if rest := files[MOST_FILES:]:
        lines.append(
            f"  read  {plural(len(rest), 'more file')}: {plural(sum(count for _, count in rest), 'row')}; all are in manifest.json"
        )
    others = [f"{reason}: {_few(names)}" for reason, names in report["left_out"].items()]
    return [*lines, *([f"  left out  {'; '.join(others)}"] if others else [])]


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


class bar_of:  # noqa: N801 - used like a function
    """Draw a bar of the rows done on stderr while the block runs, if asked to."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __enter__(self) -> Callable[[int], None]:
        if not self.shown:
            return lambda rows: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("preparing data"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
        self.bar = Progress(*columns, console=Console(stderr=True))
        self.bar.start()
        task = self.bar.add_task("rows", total=None)
        return lambda rows: partial(self.bar.advance, task)(rows)

    def __exit__(self, *error: object) -> None:
        if self.shown:
            self.bar.stop()
