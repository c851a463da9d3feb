"""Where presets are: those that come with fulltune, and one's own in ./conf or in --config-dir."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"
"""In a checkout, and next to the installed packages."""


def groups() -> list[str]:
    """Return the names of the groups of presets that a command line chooses from."""
    return sorted(
        path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("exp", "gate", "curate", "synthesise", "pipeline")
    )


def beside() -> Path | None:
    """Return ./conf where it has presets of one's own: a folder of one of our groups. None in a checkout."""
    folder = Path.cwd() / "conf"
    if folder.is_dir() and not folder.samefile(CONF) and any((folder / group).is_dir() for group in ("exp", *groups())):
        return folder
    return None


def own(config_dir: str | None) -> list[Path]:
    """Return the folders of one's own presets, in the order in which they are looked through, after ours."""
    given = Path(config_dir).resolve() if config_dir is not None and Path(config_dir).is_dir() else None
    return [folder for folder in (beside(), given) if folder is not None]


def files(group: str, folders: Iterable[Path]) -> list[Path]:
    """Return the presets of a group, by name: of several with one name the first is the one that is taken."""
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted((folder / group).glob("*.yaml")):
            found.setdefault(file.stem, file)
    return [found[name] for name in sorted(found)]


def hidden(config_dir: str | None) -> list[Path]:
    """Return those of one's own presets that are never taken, as one of ours has their name."""
    return [file for folder in own(config_dir) for file in sorted(folder.glob("*/*.yaml")) if (CONF / file.relative_to(folder)).is_file()]
