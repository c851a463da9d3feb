"""RUN_DIR/checkpoints: folders step-NNNNNN, each complete or absent; which are whole, whose they are, and which are kept. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trainers.config.schema import CheckpointConfig
from trainers.rundir.files import sha256
from trainers.rundir.paths import CHECKPOINTS, MANIFEST


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:06d}"


def number_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder of them, complete or not, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()), key=number_of)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest: `progress`, `run`, `attempt`, `eval_loss`, and each file's `sizes` and `sha256`."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return manifest


def why_incomplete(path: Path) -> str:
    """Say what a checkpoint lacks: its manifest, or a file of it at its size; nothing where it is complete."""
    if not (path / MANIFEST).is_file():
        return "it has no manifest.json"
    try:
        sizes = read_manifest(path)["sizes"]
    except (ValueError, KeyError, OSError) as error:
        return f"its manifest.json cannot be read ({error!r})"
    wrong = [name for name, size in sizes.items() if not (path / name).is_file() or (path / name).stat().st_size != size]
    return f"{wrong[0]} is missing or has another size" if wrong else ""


def why_not_of(run: str, path: Path) -> str:
    """Say why a folder is not a complete checkpoint of the run with that id; nothing where it is."""
    if why := why_incomplete(path):
        return why
    manifest = read_manifest(path)
    if manifest.get("run", "") != run:
        return "it is another run's"
    step = manifest["progress"]["step"]
    return "" if path.name == name_of(step) else f"it is the checkpoint of step {step} under another name"


def why_damaged(path: Path, share: slice) -> str:
    """Say which of a share of a checkpoint's files holds other bytes than were written; nothing where none does."""
    try:
        hashes: dict[str, str] = read_manifest(path)["sha256"]
        wrong = [name for name in sorted(hashes)[share] if sha256(path / name) != hashes[name]]
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read ({error!r})"
    return f"{wrong[0]} holds other bytes than were written" if wrong else ""


def kept(complete: list[Path], config: CheckpointConfig) -> set[Path]:
    """Return those of complete checkpoints, oldest first, that stay: the last, every so many steps, and the best held-out losses."""
    stay = set(complete[-config.keep_last :])
    if config.keep_every is not None:
        stay |= {path for path in complete if number_of(path) % config.keep_every == 0}
    return stay | set(list(best_first(complete))[: config.keep_best])


def best_first(complete: list[Path]) -> dict[Path, float]:
    """Return those of complete checkpoints that have a held-out loss, with it, the lowest first and of equal ones the newest."""
    losses = {path: loss for path in complete if (loss := read_manifest(path).get("eval_loss")) is not None}
    return dict(sorted(losses.items(), key=lambda item: (item[1], -number_of(item[0]))))


def is_lowest(losses: list[float]) -> bool:
    """Tell whether the last loss is the lowest; one that is not finite is not, and hides none."""
    return math.isfinite(losses[-1]) and losses[-1] <= min(filter(math.isfinite, losses))


def is_of_newer(staging: Path, attempt: int) -> bool:
    """Tell whether a folder that is being written belongs to a newer attempt, by its name."""
    number = staging.name.partition(".attempt-")[2].partition(".")[0]
    return number.isdigit() and int(number) > attempt


def newest_step(run_dir: Path) -> int:
    """Return the highest step that has a checkpoint's folder, 0 where there is none."""
    return max(map(number_of, steps(run_dir / CHECKPOINTS)), default=0)
