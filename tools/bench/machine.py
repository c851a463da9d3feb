"""Words for what a benchmark ran on: versions and GPUs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time

from trainers import host
from trainers.units import in_bytes


def versions(*packages: str) -> str:
    """Return Python's version and those of packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)])


def cpu_words(*packages: str) -> str:
    """Return the date, a machine without GPU, and versions of packages."""
    date, memory = time.strftime("%Y-%m-%d"), in_bytes(host.memory_limit().bytes)
    return f"{date}, {host.cores()} cores, {memory} of memory, no GPU; {versions(*packages)}"


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
