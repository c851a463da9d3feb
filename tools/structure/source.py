"""Read lengths, imports, cycles and layers from the source alone."""

from __future__ import annotations

import ast
import re
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("launcher", "trainers", "tools")
Edges = dict[str, set[str]]


@dataclass(frozen=True)
class Quantiles:
    """Lengths in lines, the docstring and blank lines included."""

    count: int
    total: int
    median: float
    p95: int
    max: int

    def __str__(self) -> str:
        return f"median {self.median:g}, p95 {self.p95}, max {self.max} lines ({self.count:,}, {self.total:,} lines together)"


@dataclass
class Imports:
    """Which of our modules each module imports: while it is imported itself, or within functions."""

    at_start: Edges = field(default_factory=dict)
    later: Edges = field(default_factory=dict)

    def all(self) -> Edges:
        """Return both kinds together."""
        return {name: self.at_start[name] | self.later[name] for name in self.at_start}


def files(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Return each module's file by its dotted name."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def quantiles(lengths: Sequence[int]) -> Quantiles:
    """Return median, 95th percentile and maximum."""
    ordered = sorted(lengths)
    at_95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Quantiles(count=len(ordered), total=sum(ordered), median=statistics.median(ordered), p95=at_95, max=ordered[-1])


def file_lengths(root: Path, packages: Iterable[str] = PACKAGES) -> Quantiles:
    """Return the quantiles of the files' lengths."""
    return quantiles([len(path.read_text(encoding="utf-8").splitlines()) for path in files(root, packages).values()])


def functions(root: Path, packages: Iterable[str] = PACKAGES) -> Iterator[tuple[str, int]]:
    """Yield each function and method as FILE:LINE NAME with its length, those inside of others too; decorators do not count."""
    for path in files(root, packages).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def imports(root: Path, packages: Iterable[str] = PACKAGES) -> Imports:
    """Return the imports among our modules; those under TYPE_CHECKING are never executed, and left out."""
    modules, found = files(root, packages), Imports()
    for name, path in modules.items():
        at_start: set[str] = set()
        later: set[str] = set()
        _collect(ast.parse(path.read_text(encoding="utf-8")), modules.keys(), at_start, later)
        found.at_start[name], found.later[name] = at_start - {name}, later - at_start - {name}
    return found


def _collect(node: ast.AST, modules: Iterable[str], here: set[str], in_functions: set[str]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            here.update(alias.name for alias in child.names if alias.name in modules)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            submodules = names & set(modules)
            here.update(submodules)
            if submodules != names and child.module in modules:
                here.add(child.module)
        _collect(child, modules, in_functions if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else here, in_functions)


def cycles(edges: Edges) -> list[list[str]]:
    """Return the strongly connected components of more than one module, each sorted (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in sorted(edges.get(name, ())):
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            at = stack.index(name)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(edges):
        if name not in number:
            visit(name)
    return sorted(found)


def upward(root: Path, edges: Edges) -> list[str]:
    """Return the imports that go up, or across to a sibling that is to stay apart, in the layers of pyproject.toml."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    found = []
    for contract in contracts:
        if contract["type"] == "layers":
            for container in contract.get("containers", [""]):
                places = _places(contract, container)
                found += [
                    f"{name} -> {other} ({contract['name']})"
                    for name, others in sorted(edges.items())
                    for other in sorted(others)
                    if _goes_up(places, name, other)
                ]
    return found


def _places(contract: dict[str, Any], container: str) -> dict[str, tuple[int, int]]:
    """Return each listed module's layer and its place within that; modules joined by `:` have one place."""
    places = {}
    for layer, text in enumerate(contract["layers"]):
        for place, name in enumerate(re.findall(r"[\w.]+", text)):
            apart = place if ":" not in text else 0
            places[f"{container}.{name}" if container else name] = (layer, apart)
    return places


def _goes_up(places: dict[str, tuple[int, int]], name: str, other: str) -> bool:
    """Tell whether an import breaks the layers: a smaller number is a higher layer."""
    mine, theirs = _place(places, name), _place(places, other)
    if mine is None or theirs is None or mine == theirs:
        return False
    return theirs[0] <= mine[0]


def _place(places: dict[str, tuple[int, int]], name: str) -> tuple[int, int] | None:
    """Return the place of a module or of the nearest package around it."""
    while name not in places and "." in name:
        name = name.rpartition(".")[0]
    return places.get(name)
