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
HOW_A_JUDGE_IS_ASKED = ("url", "at_once", "timeout_s")
"""Settings that change no reply: where an endpoint has moved or is slow, a curation continues with others."""


@dataclass(frozen=True)
class Job:
    """A curation: its settings and input files, and the names that these have in --out."""

    settings: Settings
    files: tuple[str, ...]
    names: tuple[str, ...]

    def key(self) -> str:
        """Return what identifies the curation by its content."""
        evaluation = self.settings.decontaminate.files if self.settings.decontaminate else []
        quality = self.settings.quality
        personal = self.settings.personal
        models = [quality.model if quality and quality.by == "reward" else None, personal.names if personal else None]
        model = [file for folder in models if folder is not None for file in sorted(Path(folder).glob("*"))]
        settings = dataclasses.asdict(self.settings)
        for name in HOW_A_JUDGE_IS_ASKED if quality else ():
            del settings["quality"][name]
        read = [*map(Path, (*self.files, *evaluation)), *(file for file in model if file.is_file())]
        about = [VERSION, settings, self.files, [digest(file) for file in read]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
