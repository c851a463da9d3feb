"""Pages: their links and anchors exist, the commands that they show are accepted, and every setting is in the reference."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT

from launcher import stages as pipelines
from launcher.compose import compose
from launcher.fields import all_fields
from tools import reference

os.environ["NO_MKDOCS_2_WARNING"] = "1"

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its code blocks, the generated settings included."""
    text = page.read_text("utf-8").replace(reference.MARKER, reference.reference())
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings have, as GitHub and mkdocs make them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(prose(page))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_exist(page: Path) -> None:
    links = ["".join(found) for found in LINK.findall(prose(page))]
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def commands(page: Path) -> list[list[str]]:
    """Return the words of each `python -m ...` in a page's code blocks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python -m ")]


def test_the_launchers_commands_on_all_pages_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is composed and checked as the launcher does, with the files that it names; of a sweep the first point."""
    for folder in ("runs/quickstart_base/export", "slurm", "curated/maths/rows", "curated/chats/rows"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "quickstart_base" / "export" / "config.json").write_text("{}")
    (tmp_path / "runs" / "quickstart_digits" / "export").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart_digits" / "export" / "config.json").write_text("{}")
    (tmp_path / "runs" / "llama8b_reward" / "export").mkdir(parents=True)
    (tmp_path / "runs" / "llama8b_reward" / "export" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (tmp_path / "slurm" / "env.sh").touch()
    for name in ("best", "chats", "held_out", "judged", "pairs", "problems", "rows", "tones"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "words"}\n')
    monkeypatch.chdir(tmp_path)
    shown = {tuple(words[1:]) for page in PAGES for words in commands(page) if words[0] == "launcher" and "--help" not in words}
    wrong = [words for words in shown if "optim.lrr=1e-4" in words]
    assert len(shown) > 15
    assert len(wrong) == 1, "one page shows an error"
    for words in shown:
        if any(word.startswith("+pipeline=") for word in words):
            assert pipelines.read(list(words)).stages
            continue
        overrides = [word.partition(",")[0] if "-m" in words else word for word in words if word != "-m"]
        if words in wrong:
            with pytest.raises(SystemExit):
                compose(overrides)
        else:
            compose(overrides)


def test_commands_on_all_pages_exist() -> None:
    names = {words[0] for page in PAGES for words in commands(page)}
    assert {"launcher", "tools.compare", "tools.merge"} <= names
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


def test_the_reference_has_every_setting_preset_and_experiment() -> None:
    text = reference.reference()
    assert [path for path in all_fields() if f"| `{path}` |" not in text] == []
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        name = {
            "exp": f"`+exp={file.stem}`",
            "pipeline": f"`+pipeline={file.stem}`",
            "gate": "",
            "curate": "",
            "synthesise": "",
            "conf": "",
        }.get(file.parent.name, f"`{file.parent.name}={file.stem}`")
        assert name in text
    assert reference.MARKER in (ROOT / "docs" / reference.PAGE).read_text("utf-8")


def test_the_reference_prints_groups_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["optim", "run"]) == 0
    said = capsys.readouterr().out
    assert "## optim" in said
    assert "| `seed` |" in said
    assert "## train" not in said
    with pytest.raises(SystemExit) as ended:
        reference.main(["optimm"])
    assert ended.value.code == 2
    assert "the groups are run, model, data" in capsys.readouterr().err


def test_pages_are_built_without_warnings(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "optim.warmup_steps" in (tmp_path / "configuration.html").read_text("utf-8")
    fetched = re.compile(r"(?:src|href)=\"https?://(?!squidfunk\.github\.io)")
    assert [page.name for page in tmp_path.rglob("*.html") if fetched.search(page.read_text("utf-8"))] == []
