"""A copy of the code in the run directory, so that later edits do not reach a job that waits or is queued again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from launcher.job import ROOT
from trainers.config.errors import ConfigError
from trainers.rundir import paths


def take(run_dir: Path) -> Path:
    """Copy what git tracks, and what it does not ignore, to RUN_DIR/code once; returns that. Raises ConfigError outside a checkout."""
    code = run_dir / paths.CODE
    if code.is_dir():
        return code
    line = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(line, capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError("launch.snapshot", True, f"needs a git checkout: {error}", "launch.snapshot=false") from error
    staging = run_dir / ".code.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, staging / name)
    staging.rename(code)
    return code
