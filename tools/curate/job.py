"""What a curation is about, and what identifies it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tools.curate.config import Settings
from trainers.data.sources import digest

VERSION = 2
"""Of what the steps do: what a curation has begun with another one is not continued."""


@dataclass(frozen=True)
class Job:
    """A curation: its settings and input files, and the names that these have in --out."""

    settings: Settings
    files: tuple[str, ...]
    names: tuple[str, ...]

    def key(self) -> str:
        """Return what identifies the curation by its content."""
        evaluation = self.settings.decontaminate.files if self.settings.decontaminate else []
        about = [VERSION, dataclasses.asdict(self.settings), self.files, [digest(Path(file)) for file in (*self.files, *evaluation)]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
