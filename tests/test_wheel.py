"""What is installed works without a checkout: `fulltune` in an empty folder, with presets of one's own beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import tools
from launcher import presets
from tools.__main__ import TOOLS

ROOT = presets.CONF.parent
HELPERS = {"__main__", "command", "commands", "markdown", "page"}
FEW = ["train.steps=4", "train.global_batch=4", "train.microbatch=2", "launch.processes=1", "log.wandb=disabled", "optim.warmup_steps=0"]


def test_every_tool_can_be_called_by_its_name() -> None:
    [folder] = tools.__path__
    there = {path.stem for path in Path(folder).iterdir() if path.suffix == ".py" or (path / "__main__.py").is_file()}
    assert there - HELPERS - {"__init__"} == set(TOOLS)


def test_presets_beside_are_found_and_never_replace_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert presets.own(None) == []
    (tmp_path / "conf" / "db").mkdir(parents=True)
    assert presets.own(None) == [], "the presets of another program"
    for name in ("mine", "lora"):
        (tmp_path / "conf" / "peft").mkdir(exist_ok=True)
        (tmp_path / "conf" / "peft" / f"{name}.yaml").write_text("method: lora\n")
    folders = [presets.CONF, *presets.own(None)]
    found = {file.stem: file.parent for file in presets.files("peft", folders)}
    assert (found["mine"], found["lora"]) == (tmp_path / "conf" / "peft", presets.CONF / "peft")
    assert presets.hidden(None) == [tmp_path / "conf" / "peft" / "lora.yaml"]
    monkeypatch.chdir(ROOT)
    assert presets.own(None) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks, so that nothing that lies about is in it."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, timeout=60, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*line, str(folder / "source")], timeout=180, check=True)
    [made] = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_a_wheel_holds_the_presets_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(file.relative_to(ROOT)) for file in presets.CONF.rglob("*.yaml")}
    assert ours <= names
    assert {
        "tools/compare/page.css",
        "tools/evaluate/judge.txt",
        "tools/synthesise/prompts/ko/seeds.jsonl",
        "launcher/plugins/hydra_plugins/fulltune.py",
    } <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"launcher", "trainers", "tools", "conf"}


@pytest.mark.slow
def test_an_installed_fulltune_trains_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], timeout=120, check=True)
    python, command = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "fulltune"
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # what an index would give; a checkout is none of it
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    subprocess.run(install, timeout=180, check=True)
    home = tmp_path / "home"
    for name in ("trainers", "tools", "launcher"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text("raise SystemExit('this folder is not fulltune')\n")
    (home / "conf" / "exp").mkdir(parents=True)
    (home / "conf" / "exp" / "short.yaml").write_text("# @package _global_\n# A short run of ours.\ntrain:\n  steps: 3\n")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FULLTUNE"))}

    def call(*words: str, code: int = 0) -> str:
        line = [str(command), *words]
        environment = variables | {"FULLTUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    call("+exp=quickstart_base", *FEW)
    text = call("+exp=quickstart", *FEW, "run_dir=runs/tuned")
    assert str(ROOT) not in text
    assert (home / "runs" / "tuned" / "export" / "model.safetensors").is_file()
    assert "A short run of ours." in call("--help")
    assert "steps: 3" in call("+exp=short", "model.id=runs/tuned/export", "data=python_docs", "mode=dry_run")
    assert "done" in call("runs", "runs")
    assert "usage: fulltune runs" in call("runs", "--help")
    assert "did you mean compare?" in call("compar", code=2)
    assert "does not fit" not in call("+exp=quickstart", *FEW, "mode=plan")
