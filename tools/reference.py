"""Print every setting, preset and experiment as Markdown.

python -m tools.reference                 the text that `make docs` puts into docs/configuration.md
python -m tools.reference optim train     these groups alone

The text is read from the dataclasses and from conf/, so that it cannot be out of date.
Exit codes: 0 printed, 2 no such group.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_type_hints

from launcher.config import JobConfig
from launcher.fields import Field, all_fields, choices, expected, named_fields
from launcher.presets import CONF
from tools.command import parser_of
from tools.markdown import cell_of
from trainers.config.schema import plain

PAGE = "configuration.md"
MARKER = "<!-- the settings are put here by tools/reference.py -->"
RUN = "run"
"""The name that this page gives to the settings without a group."""
REWARD = "reward"
"""They are next to these."""


def main(arguments: list[str] | None = None) -> int:
    """Print the reference; returns the exit code."""
    parser = parser_of("reference", __doc__)
    parser.add_argument("groups", metavar="GROUP", nargs="*", help="print these groups alone: " + ", ".join(groups()))
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.groups if name not in groups()]:
        parser.error(f"{unknown[0]}: there is no such group; the groups are {', '.join(groups())}")
    print("\n\n".join([group(name) for name in options.groups]) if options.groups else reference())
    return 0


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the reference into its page; mkdocs calls this for each page that it builds (`hooks` in mkdocs.yml)."""
    return markdown.replace(MARKER, reference()) if page.file.src_uri == PAGE else markdown


def reference() -> str:
    """Return all presets, experiments and settings as Markdown."""
    return "\n\n".join([presets(), experiments(), pipelines(), *(group(name) for name in groups())])


def groups() -> list[str]:
    """Return the groups of settings in the order of the dataclasses."""
    return list(dict.fromkeys(_group_of(field) for field in all_fields().values()))


def group(name: str) -> str:
    """Return one group as a heading, its docstring and a table of its fields."""
    schema = JobConfig if name == RUN else get_type_hints(JobConfig)[name]
    doc = "Settings of the run itself." if name == RUN else inspect.cleandoc(schema.__doc__ or "")
    fields = [field for field in all_fields().values() if _group_of(field) == name]
    entries = [field for field in named_fields().values() if _group_of(field) == (REWARD if name == RUN else name)]
    rows = [_row(field) for field in (*fields, *entries)]
    return "\n".join([f"## {name}", "", doc, "", "| setting | default | values | meaning |", "|---|---|---|---|", *rows])


def _group_of(field: Field) -> str:
    return field.path.split(".")[0] if "." in field.path else RUN


def _row(field: Field) -> str:
    default = "null" if field.default is None else str(plain(field.default)).replace("True", "true").replace("False", "false") or '""'
    values = ", ".join(f"`{name}`" for name in choices(field.type)) or expected(field.type)
    return f"| `{field.path}` | `{default}` | {cell_of(values)} | {cell_of(field.doc)} |"


def presets() -> str:
    """Return the presets of each group with the first sentence of their files."""
    lines = ["## Presets", "", "| preset | what it sets |", "|---|---|"]
    folders = sorted(
        path for path in CONF.iterdir() if path.is_dir() and path.name not in ("exp", "gate", "curate", "synthesise", "pipeline")
    )
    lines += [f"| `{folder.name}={file.stem}` | {_about(file)} |" for folder in folders for file in sorted(folder.glob("*.yaml"))]
    return "\n".join(lines)


def experiments() -> str:
    """Return the experiments with the first sentence of their files."""
    lines = ["## Experiments", "", "| experiment | what it runs |", "|---|---|"]
    lines += [f"| `+exp={file.stem}` | {_about(file)} |" for file in sorted((CONF / "exp").glob("*.yaml"))]
    return "\n".join(lines)


def pipelines() -> str:
    """Return the pipelines with the first sentence of their files."""
    lines = ["## Pipelines", "", "| pipeline | what it runs |", "|---|---|"]
    lines += [f"| `+pipeline={file.stem}` | {_about(file)} |" for file in sorted((CONF / "pipeline").glob("*.yaml"))]
    return "\n".join(lines)


def _about(file: Path) -> str:
    """Return the comment at the top of a preset, up to the end of its first sentence."""
    lines = [line for line in file.read_text("utf-8").splitlines() if "@package" not in line]
    comments = []
    for line in lines:
        if not line.startswith("#") or line == "#":
            break
        comments.append(line[1:].strip())
    return cell_of(" ".join(comments).split(". ")[0].rstrip("."))


if __name__ == "__main__":
    raise SystemExit(main())
