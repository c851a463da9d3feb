"""The oldest versions that pyproject.toml allows, for `make test-oldest`: a requirement a line.

python tests/oldest.py [PACKAGE ...]
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

LEFT_OUT = {"flash-attn", "lm-eval"}
"""Not installed for tests: the one is compiled on a machine with a GPU, the other asks for older packages than ours."""
LOWER = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*>=\s*(?P<version>[0-9][^,;\s]*)")


def oldest() -> dict[str, str]:
    """Return the lower bound of each dependency by its name, optional ones and those of the developers included."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    texts = [text for group in (project["dependencies"], *project["optional-dependencies"].values()) for text in group]
    bounds = [found for text in texts if (found := LOWER.match(text))]
    return {bound["name"]: bound["version"] for bound in bounds if bound["name"] not in LEFT_OUT}


if __name__ == "__main__":
    chosen = oldest()
    print(*(f"{name}=={chosen[name]}" for name in sys.argv[1:] or chosen), sep="\n")
