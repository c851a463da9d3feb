"""Each dependency has an upper bound, and the pinned versions are within the bounds."""

from __future__ import annotations

import tomllib

from command import ROOT
from oldest import oldest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NOT_PINNED = {"flash-attn", "lm-eval"}
"""Installed by hand: the one is compiled on a machine with a GPU, the other asks for older packages than the pins have."""
OURSELVES = "fulltune"
"""One group of optional packages within another."""


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for group in (project["dependencies"], *project["optional-dependencies"].values()) for text in group]
    return [requirement for requirement in found if requirement.name != OURSELVES]


def pins() -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def test_each_dependency_has_a_lower_and_an_upper_bound() -> None:
    for requirement in requirements():
        kinds = {specifier.operator for specifier in requirement.specifier}
        assert kinds & {">=", "=="}, f"{requirement}: from which version on does it work?"
        assert kinds & {"<", "<=", "=="}, f"{requirement}: the next version may break it unseen"


def test_the_pins_are_within_the_bounds() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in NOT_PINNED:
            continue
        (exact,) = pinned[name].specifier
        assert exact.operator == "=="
        assert exact.version in requirement.specifier, f"{requirement} does not allow the pinned {exact.version}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """What `make test-oldest` installs: each dependency but those that are installed by hand."""
    found = oldest()
    for requirement in requirements():
        if requirement.name not in NOT_PINNED:
            assert found[requirement.name] in requirement.specifier
            assert f">={found[requirement.name]}" in str(requirement)
    assert found.keys() & NOT_PINNED == set()
