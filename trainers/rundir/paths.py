"""Names in a run directory, which users and tools rely on. No torch."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"
"""The frozen settings: the only input of a rank."""
PLAN, PLAN_PICTURE = "plan.json", "plan.svg"
MANIFEST = "manifest.json"
"""Where the run comes from: command, code, packages, machine, data, base."""
DIFF = "code.diff"
STATUS = "status.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
RANKS = "ranks"
"""What each rank does, a file a rank, while it runs."""
LOGS = "logs"
"""A folder an attempt, attempt-N."""
PREFLIGHT = "preflight.json"
"""In an attempt's folder: what each rank measured of its node before the weights were read."""
DEEPSPEED = "deepspeed.json"
"""What DeepSpeed received, with ZeRO-3."""
CHECKPOINTS = "checkpoints"
EXPORT = "export"
EVALUATION = "evaluation"
REFERENCE = "reference"
"""What the model that training began with says of each answer, for objectives that compare with it."""
ROLLOUTS = "rollouts"
"""objective=grpo or ppo: a folder step-NNNNNN of the answers that were given for a step, and what generators open, `weights`."""
ABOUT = "about.json"
"""In a rollout's folder: which weights gave it, where the next one's prompts begin, and what metrics.jsonl says of its answers."""
SLURM_RECORD, SLURM = "slurm.json", "slurm"
"""The job's id, and what submitit writes."""
PROFILE = "profile"
"""With train.profile: a trace and a table an attempt, attempt-N.json.gz and attempt-N.txt."""
CODE = "code"
"""A copy of the code, with launch.snapshot."""
STOP, SAVE_NOW = "stop", "save_now"
"""Files by which users ask a run for something."""


def attempt_folder(run_dir: Path, number: int) -> Path:
    """Return the log folder of an attempt."""
    return run_dir / LOGS / f"attempt-{number}"


def log_file(folder: Path, rank: int) -> Path:
    """Return a rank's log in an attempt's folder."""
    return folder / f"rank-{rank}.log"
