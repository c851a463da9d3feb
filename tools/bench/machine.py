"""Words for what a benchmark ran on: versions and GPUs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess


def versions(*packages: str) -> str:
    """Return Python's version and those of packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gpu_words(name: str) -> str:
    """Return the GPUs of this machine by number, name and driver."""
    import torch

    line = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(line, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return f"{torch.cuda.device_count()} x {name}, driver {driver}"
