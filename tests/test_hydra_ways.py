"""Hydra's own ways next to ours: honoured, or refused by name before anything is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from launcher import sweep
from launcher.presets import CONF
from launcher.ways import OURS, require_ours, require_own_settings
from trainers.config.errors import ConfigError

ROOT = CONF.parent


@pytest.mark.parametrize(
    ("words", "path", "remedy"),
    [
        (["-m", "hydra/launcher=basic"], "hydra/launcher", "launch=slurm"),
        (["hydra/launcher=joblib"], "hydra/launcher", "launch=local"),
        (["-m", "hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs", "launch=local"),
        (["+hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs", "launch=local"),
        (["hydra.run.dir=out"], "hydra.run.dir", "run_dir=DIR"),
        (["-m", "hydra.sweep.subdir=x"], "hydra.sweep.subdir", "hydra.sweep.dir=DIR"),
        (["hydra.job.chdir=true"], "hydra.job.chdir", "run_dir=DIR"),
        (["++hydra.output_subdir=.hydra"], "hydra.output_subdir", "run_dir=DIR"),
        (["hydra.job.name=x"], "hydra.job.name", "name=NAME"),
        (["hydra/job_logging=default"], "hydra/job_logging", "leave out"),
        (["-m", 'hydra.sweeper.params={optim.lr: "1e-4,2e-4"}'], "hydra.sweeper.params", "-m optim.lr=1e-4,2e-4"),
        (["-m", "+hydra.sweeper.params.optim.lr=3"], "hydra.sweeper.params.optim.lr", "-m FIELD=A,B"),
        (["+exp=a", "+exp=b"], "exp", "+exp=a"),
        (["exp=a", "+exp=b"], "exp", "+exp=a"),
        (["+exp=[a,b]"], "exp", "+exp=a"),
        (["-m", "+exp=a,b", "+exp=c"], "exp", "+exp=a,b"),
        (["-cn", "nothere", "+exp=a"], "--config-name", "+exp=NAME"),
        (["--config-path", "/tmp", "+exp=a"], "--config-path", "--config-dir DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_be_dropped_is_refused_by_name(words: list[str], path: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        require_ours(get_args_parser().parse_args(words))
    assert refused.value.path == path
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "+exp=a,b", "hydra.sweep.dir=x"],
        ["+exp=a", "~exp=b"],
        ["hydra.mode=MULTIRUN", "hydra.verbose=true"],
        ["-m", "hydra/sweeper=other", "hydra.sweeper.params={lr: 1}", "hydra.sweeper.max_batch_size=4"],
        ["hydra.searchpath=[file:///tmp]", "hydra_like=1"],
    ],
    ids=" ".join,
)
def test_what_is_honoured_is_let_through(words: list[str]) -> None:
    require_ours(get_args_parser().parse_args(words))


@pytest.mark.parametrize("path", OURS)
def test_a_file_that_replaces_what_is_ours_is_refused(path: str) -> None:
    def settings(**changed: object) -> object:
        made = OmegaConf.create({})
        for name, (_, value) in OURS.items():
            OmegaConf.update(made, name, changed.get(name, value))
        return made

    require_own_settings(settings())
    with pytest.raises(ConfigError, match=OURS[path][0]):
        require_own_settings(settings(**{path: "other"}))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-m", "hydra/launcher=basic", "seed=1,2"], "`hydra/launcher` = 'basic'"),
        (["-m", "data.path=[a,b],c"], "`data.path`: must be text, or null"),
        (["-m", "seed=1,-2", "hydra.sweep.dir=sweep"], "`seed`"),
        (["hydra.run.dir=made"], "`hydra.run.dir` = 'made'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refused_command_says_one_thing_and_leaves_nothing(words: list[str], says: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "launcher", *words, "+exp=quickstart_base"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_refused_sweep_leaves_the_record_of_the_points_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a new one nothing, not even the folders above it."""
    monkeypatch.setattr(sweep, "before", [])
    known, new = tmp_path / "known", tmp_path / "a" / "b" / "new"
    (known / "seed=1").mkdir(parents=True)
    (known / sweep.RECORD).write_text("first")
    sweep.look(known)
    sweep.look(new)
    for folder in (known, new):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / sweep.RECORD).write_text("refused")
    sweep.forget()
    assert (known / sweep.RECORD).read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["known"]
