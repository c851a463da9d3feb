"""A model card from a run's own records: data, method, metrics, limits, in the form that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tools.evaluate.intervals import Estimate
from tools.evaluate.record import Evaluation, accuracy_apart, loss_apart, rightness_apart, score_apart, task_metric
from tools.gate.rules import Check
from tools.markdown import cell_of, without_folders
from trainers.config.choices import ObjectiveName
from trainers.config.derived import SCORED, Peak, loss_words, peak_lr
from trainers.config.errors import plural
from trainers.config.schema import plain, read
from trainers.rundir import paths
from trainers.rundir.files import try_json

MARK = "<!-- made by python -m tools.gate -->"


def write_card(run: Path, ours: Evaluation, theirs: Evaluation | None, checks: list[Check], rules: Path) -> Path:
    """Write RUN/export/README.md, or RUN/evaluation/README.md where somebody has put another one there; return its path."""
    file = run / paths.EXPORT / "README.md"
    if file.exists() and MARK not in file.read_text("utf-8", "replace"):
        file = run / paths.EVALUATION / "README.md"
    staging = file.with_name(".README.md.tmp")
    staging.write_text(card(run, ours, theirs, checks, rules), "utf-8")
    staging.rename(file)
    return file


def card(run: Path, ours: Evaluation, theirs: Evaluation | None, checks: list[Check], rules: Path) -> str:
    """Return the card's text, with the metadata that the hub reads in front."""
    settings = read(run / paths.CONFIG)
    config, manifest, summary = plain(settings), try_json(run / paths.MANIFEST), try_json(run / paths.SUMMARY)
    is_adapter = (run / paths.EXPORT / "adapter_config.json").is_file()
    base, data = config["model"]["id"], config["data"]
    metadata: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if settings.objective.name in SCORED else "text-generation",
        "tags": ["fulltune", config["peft"]["method"] if is_adapter else "full-fine-tuning"],
    }
    metadata |= {"base_model": base} if base and not Path(base).is_absolute() else {}
    metadata |= {"datasets": [data["path"]]} if data["path"] and not Path(data["path"]).is_absolute() else {}
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        MARK,
        f"# {config['name']}" + ("" if run.resolve().name == config["name"] else f": {run.resolve().name}"),
        _model(base, is_adapter, summary, settings.objective.name in SCORED),
        "## Data\n\n" + _lines(_data(data, manifest)),
        "## Training\n\n" + _lines(_training(config, summary, peak_lr(settings.optim, settings.peft))),
        "## Metrics\n\n" + _figures(ours, theirs),
        f"## Gate\n\nHeld against `{rules.name}`, and passed:\n\n" + _lines([f"{check.rule}: {check.words}" for check in checks]),
        "## Limits\n\n" + _lines(_limits(ours, theirs)),
        "## Made by\n\n" + _lines(_made_by(manifest)),
    ]
    return "\n\n".join(parts) + "\n"


def _lines(items: list[str]) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def _model(base: str | None, is_adapter: bool, summary: dict[str, Any], gives_scores: bool) -> str:
    name = without_folders(base.removesuffix("/export")) if base else None
    whole, trained = summary.get("parameters") or 0, summary.get("trainable_parameters") or 0
    if is_adapter:
        return f"A PEFT adapter of {trained:,} parameters for `{name}`."
    began = f"fine-tuned from `{name}`" if name else "trained from random weights"
    kind = "A sequence classification model" if gives_scores else "A causal language model"
    return f"{kind} of {whole:,} parameters, {began}; {trained:,} were trained."


def _data(data: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    report = manifest.get("data", {})
    splits = report.get("splits", {})
    lines = [f"rows: `{without_folders(data['path']) if data['path'] else data['source']}`, layout {report.get('layout')}"]
    for name, split in splits.items():
        lines.append(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['supervised_tokens']:,} supervised")
    lines.append(f"lost to length: {report.get('supervised_lost', 0):,} of {report.get('supervised_before', 0):,} supervised tokens")
    return [
        *lines,
        f"fingerprint {report.get('fingerprint')}, chat template {report.get('template_hash')}, tokenizer {report.get('tokenizer_hash')}",
    ]


def _training(config: dict[str, Any], summary: dict[str, Any], peak: Peak) -> list[str]:
    optim, train, peft = config["optim"], config["train"], config["peft"]
    lines = [
        f"method: {peft['method'] if peft['method'] != 'none' else 'full fine-tuning'}",
        f"{summary.get('steps') or 0:,} steps of {train['global_batch']} rows, {summary.get('tokens') or 0:,} supervised tokens",
        *_exported(summary, loss_words(ObjectiveName(config["objective"]["name"]), config["objective"].get("label_smoothing") or 0.0)),
        f"{optim['name']}, peak learning rate {peak.value:g}, {optim['schedule']}",
        f"compute in {train['precision']}, {config['engine']['name']}, {plural(summary.get('world_size') or 0, 'rank')}, "
        f"seed {config['seed']}",
    ]
    if summary.get("gpu_hours") is not None:
        lines.append(f"{summary['gpu_hours']:.3g} GPU-hours")
    return lines


def _exported(summary: dict[str, Any], words: str) -> list[str]:
    """Name the step that is exported, with its held-out loss, which `words` call, where it is not the last."""
    step, loss = summary.get("export_step"), summary.get("eval_loss_after")
    if step in (None, summary.get("steps")) or loss is None:
        return []
    return [f"exported: step {step:,}, of the lowest held-out {words}, {loss:.4f}{' nats a token' if words == 'loss' else ''}"]


def _figures(ours: Evaluation, theirs: Evaluation | None) -> str:
    metric = task_metric(ours)
    rows: list[tuple[str, Estimate | None, Estimate | None, Estimate | None]] = []
    for part, words in (("held_out", "held-out loss, nats a token"), ("general", "loss on general text, nats a token")):
        apart = loss_apart(ours, theirs, part) if theirs else None
        rows.append((words, theirs.loss(part) if theirs else None, ours.loss(part), apart))
    if metric:
        rows.append(
            (metric, theirs.score(metric) if theirs else None, ours.score(metric), score_apart(ours, theirs, metric) if theirs else None)
        )
    rows += _pairs(ours, theirs)
    rows.append(("accuracy", theirs.rightness() if theirs else None, ours.rightness(), rightness_apart(ours, theirs) if theirs else None))
    if ours.classes is not None:
        rows += [("macro F1", None, ours.classes.macro_f1(), None), ("calibration error", None, ours.classes.calibration_error(), None)]
    rows.append(("answers that end", theirs.share("finished") if theirs else None, ours.share("finished"), None))
    lines = ["| | base | this model | difference |", "|---|---|---|---|"]
    lines += [f"| {cell_of(name)} | {_estimate(base)} | {_estimate(own)} | {_estimate(apart)} |" for name, base, own, apart in rows if own]
    return "\n".join([*lines, "", "In brackets: 95 % intervals over the documents."])


def _pairs(ours: Evaluation, theirs: Evaluation | None) -> list[tuple[str, Estimate | None, Estimate | None, Estimate | None]]:
    """Return the lines of pairs of answers: rewards that only this model has are compared with nothing."""
    if ours.pairs is None:
        return []
    is_same = theirs is not None and theirs.pairs is not None and (theirs.pairs.rewards is None) == (ours.pairs.rewards is None)
    lines = []
    for bucket, words in (("all", ""), ("longer", ", the preferred answer longer"), ("shorter", ", the preferred answer shorter")):
        base = theirs.accuracy(bucket) if theirs is not None and is_same else None
        apart = accuracy_apart(ours, theirs, bucket) if theirs is not None else None
        lines.append((f"preference accuracy{words}", base, ours.accuracy(bucket), apart))
    return lines


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    ends = "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    return f"{estimate.value:.4g}{ends}"


def _limits(ours: Evaluation, theirs: Evaluation | None) -> list[str]:
    """Say what the metrics do not."""
    documents = ours.documents.get("held_out") or ours.documents.get("classes") or ours.documents.get("pairs", [])
    lines = [f"Measured on {len(documents)} held-out documents of the training data's own kind, and on nothing else."]
    lines.append(f"{len(ours.answers)} answers were scored." if ours.answers else "No answer was scored.")
    if theirs is None or loss_apart(ours, theirs, "general") is None:
        lines.append("What the model has forgotten of its base was not measured.")
    refused, repeated = ours.share("refused"), ours.mean("repetition")
    if refused is not None and repeated is not None:
        lines.append(f"{refused.value:.1%} of the answers are refusals; {repeated:.1%} of their 4-grams are repetitions.")
    return [
        *lines,
        "One seed of training: another may come out differently.",
        "The base's own limits, biases and licence hold for this model too.",
    ]


def _made_by(manifest: dict[str, Any]) -> list[str]:
    packages = manifest.get("packages", {})
    shown = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "deepspeed") if name in packages)
    command = " ".join(["python", *[str(word) for word in manifest.get("command", [])[1:]]])
    code = manifest.get("code", {})
    changed = ", with uncommitted changes" if code.get("diff_sha256") or code.get("untracked") else ""
    return [f"`{command}`", f"code: {code.get('git_sha') or 'unknown'}{changed}", shown]
