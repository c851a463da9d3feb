"""The code stays small to read: bounds on lengths, imports, and on what a run and a step execute (python -m tools.structure)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.structure import run, source

MOST_RUN_FILES, MOST_RUN_LINES = 116, 4500
MOST_STEP_FILES, MOST_STEP_LINES = 23, 400
"""On one rank; a slow machine adds a few. CONTRIBUTING.md says why these."""
MOST_SMALL_COLLECTIVES = 1
"""Of a steady step on two ranks, without those that move weights and gradients."""


def test_functions_are_short() -> None:
    lengths = source.quantiles([length for _, length in source.functions(run.ROOT)])
    assert lengths.count > 1000
    assert lengths.median <= 8
    assert lengths.p95 <= 25


def test_no_module_needs_itself() -> None:
    found = source.imports(run.ROOT)
    assert source.cycles(found.at_start) == []
    assert source.cycles(found.all()) == []


def test_no_import_goes_up() -> None:
    assert source.upward(run.ROOT, source.imports(run.ROOT).all()) == []


def test_no_test_imports_another() -> None:
    found = [
        file.name for file in (run.ROOT / "tests").glob("*.py") if re.search(r"^\s*(from|import) test_", file.read_text(), re.MULTILINE)
    ]
    assert found == []


def test_cycles_and_imports_that_go_up_are_found(tmp_path: Path) -> None:
    modules = {
        "a": "from pkg import b\n",
        "b": "def f():\n    import pkg.c\n",
        "c": "from typing import TYPE_CHECKING\nfrom pkg.a import x\nif TYPE_CHECKING:\n    from pkg import d\n",
        "d": "import pkg.a\n",
    }
    (tmp_path / "pkg").mkdir()
    for name, text in modules.items():
        (tmp_path / "pkg" / f"{name}.py").write_text(text)
    layers = '[[tool.importlinter.contracts]]\nname = "n"\ntype = "layers"\ncontainers = ["pkg"]\nlayers = ["a", "b | d", "c"]\n'
    (tmp_path / "pyproject.toml").write_text(layers)
    found = source.imports(tmp_path, ["pkg"])
    assert found.at_start == {"pkg.a": {"pkg.b"}, "pkg.b": set(), "pkg.c": {"pkg.a"}, "pkg.d": {"pkg.a"}}
    assert source.cycles(found.at_start) == []
    assert source.cycles(found.all()) == [["pkg.a", "pkg.b", "pkg.c"]]
    assert source.upward(tmp_path, found.all()) == ["pkg.c -> pkg.a (n)", "pkg.d -> pkg.a (n)"]


def test_a_run_and_a_step_pass_few_files_and_lines(tmp_path: Path) -> None:
    traced = run.trace(tmp_path, ranks=1)
    assert {"launcher/__main__.py", "trainers/__main__.py"} <= traced.by_file.keys()
    assert traced.run_files <= MOST_RUN_FILES
    assert traced.run_lines <= MOST_RUN_LINES
    assert 0 < traced.step_files <= MOST_STEP_FILES, traced.step_by_file
    assert 0 < traced.step_lines <= MOST_STEP_LINES, traced.step_by_file


@pytest.mark.slow
def test_a_step_has_few_small_collectives(tmp_path: Path) -> None:
    traced = run.trace(tmp_path, ranks=2)
    assert any(name.startswith("reduce_scatter") for name in traced.collectives)
    assert 0 < traced.small_collectives <= MOST_SMALL_COLLECTIVES, traced.collectives
