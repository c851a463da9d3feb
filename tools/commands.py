"""The commands of a pipeline, read by their tools' own parsers before any of them runs: a wrong word of the last is found at once.

Reads a JSON list of {"setting", "command", "words"} from standard input. Exit codes: 0 all can be, 2 the first that cannot is on standard
output as JSON, as ConfigError takes it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any, NoReturn

from tools.command import Refused
from trainers.config.errors import ConfigError
from trainers.rundir.ending import Exit

PACKAGES = ("compare", "evaluate", "gate", "merge", "select")
"""Tools whose command line is in a __main__ of their own."""


def main() -> int:
    """Read the commands; returns the exit code."""
    for asked in json.load(sys.stdin):
        try:
            require(asked["words"])
        except (ConfigError, Refused) as error:
            reason = str(error).partition("\n")[0]
            remedy = error.remedy if isinstance(error, ConfigError) else ""
            print(json.dumps({"path": asked["setting"], "value": asked["command"], "reason": reason, "remedy": remedy}))
            return Exit.bad_input
    return Exit.done


def require(words: list[str]) -> None:
    """Raise ConfigError or Refused where a tool would refuse these words, its name first."""
    name = words[0]
    module: Any = importlib.import_module(f"tools.{name}.__main__" if name in PACKAGES else f"tools.{name}")
    parser: argparse.ArgumentParser = module.make_parser()

    def refuse(message: str) -> NoReturn:
        raise Refused(message)

    setattr(parser, "error", refuse)  # noqa: B010 - argparse would print its usage and end the process
    options = parser.parse_intermixed_args(words[1:]) if name == "merge" else parser.parse_args(words[1:])
    module.require(options)


if __name__ == "__main__":
    sys.exit(main())
