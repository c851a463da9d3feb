"""The comparison as a report in W&B: its text and tables, and panels of its runs. The only part of it that needs a network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

ANSWER_S = 10
"""Longest time that W&B may take to say who we are."""
LIMIT_S = 24.0
"""Longest time for all of a report."""
TITLE_CHARACTERS = 128
MOST_RUNS = 100
"""Runs that a panel shows; W&B shows ten by default."""


class NoReport(Exception):
    """No report was written; the message says why, and what would help."""


def write_report(entity: str | None, project: str, run_ids: Sequence[str], markdown: str, title: str) -> str:
    """Write a report on these runs to W&B, and return its URL.

    The panels show each of these runs.
    Raises NoReport within LIMIT_S where W&B cannot be reached or refuses, and never prompts for a key.
    """
    if not run_ids:
        raise NoReport("a W&B report needs runs that W&B has: none of these has an id (log.wandb=disabled?)")
    answers: queue.SimpleQueue[str | NoReport] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(_write(entity, project, run_ids, markdown, title))
        except NoReport as error:
            answers.put(error)
        except Exception as error:  # whatever W&B raises, the comparison is valid
            answers.put(
                NoReport(f"W&B has not taken the report ({_said(error)}): it needs a network, and a key that may write to {project}")
            )

    threading.Thread(target=work, name="wandb-report", daemon=True).start()
    try:
        answer = answers.get(timeout=LIMIT_S)
    except queue.Empty:
        raise NoReport(f"W&B has not taken the report within {LIMIT_S:.0f} s: it needs a network") from None
    if isinstance(answer, NoReport):
        raise answer
    return answer


def _write(entity: str | None, project: str, run_ids: Sequence[str], markdown: str, title: str) -> str:
    reports, entity = _reports(), _entity(entity)
    try:
        runs = _runs(reports, entity, project, run_ids)
        blocks = [
            reports.H1(text="Comparison"),
            reports.MarkdownBlock(text=markdown),
            reports.H1(text="Runs"),
            reports.PanelGrid(runsets=[runs], panels=_panels(reports)),
        ]
        report = reports.Report(entity=entity, project=project, title=title[:TITLE_CHARACTERS], width="fluid", blocks=blocks)
        report.save()
        return str(report.url)
    except ValueError as error:
        if "not found" not in str(error):
            raise
        raise NoReport(f"W&B has no project {entity}/{project}: `wandb sync RUN_DIR/wandb` sends the runs") from error


def _reports() -> Any:
    try:
        import wandb_workspaces.reports.v2 as reports
    except Exception as error:  # not there, or not of this version of wandb
        raise NoReport(f"a W&B report needs wandb-workspaces ({_said(error)}): pip install wandb-workspaces") from error
    return reports


def _entity(entity: str | None) -> str:
    """Return the entity, or the one that the key is for. Raise NoReport where there is no key, or W&B does not take it."""
    import wandb

    url = wandb.setup(settings=wandb.Settings(silent=True, login_timeout=1)).settings.base_url
    try:
        api = wandb.Api(timeout=ANSWER_S)  # which asks W&B whether it takes the key
        found = entity or api.default_entity
    except wandb.errors.UsageError as error:
        raise NoReport(f"there is no key for W&B at {url}: run `wandb login`, or set WANDB_API_KEY") from error
    except wandb.errors.AuthenticationError as error:
        remedy = "it needs a network, and a key: `wandb login --relogin`"
        raise NoReport(f"W&B at {url} does not answer, or refuses the key ({_said(error)}): {remedy}") from error
    if not found:
        raise NoReport("this key of W&B has no default entity: set log.entity")
    return str(found)


def _runs(reports: Any, entity: str, project: str, run_ids: Sequence[str]) -> Any:
    return reports.Runset(entity=entity, project=project, name="Compared", filters=f"ID in {list(run_ids)!r}")


def _panels(reports: Any) -> list[Any]:
    places = [reports.Layout(x=x, y=y, w=12, h=8) for y in (0, 8) for x in (0, 12)]
    lines = {"eval_loss": "Held-out loss", "loss": "Loss", "tokens_per_second": "Tokens per second"}
    panels = [
        reports.LinePlot(title=title, x="tokens", y=[key], max_runs_to_show=MOST_RUNS, layout=place)
        for (key, title), place in zip(lines.items(), places, strict=False)
    ]
    peak = reports.BarPlot(
        title="Peak of device memory in bytes", metrics=["device_bytes_peak"], max_runs_to_show=MOST_RUNS, layout=places[-1]
    )
    return [*panels, peak]


def _said(error: Exception) -> str:
    """Return an error in one line."""
    if "did not respond in time" in str(error):  # of which wandb says that its own service process is busy
        return "no answer"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
