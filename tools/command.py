"""The command line of a tool: its parser, and how it ends."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from trainers.config.errors import ConfigError
from trainers.processes import never_fail
from trainers.rundir.ending import Exit


class Refused(Exception):
    """What was asked for cannot be done: says why and what can."""


def called_as(name: str) -> str:
    """Return what a tool is called by on this command line: `fulltune NAME`, or `python -m tools.NAME`."""
    return sys.argv[0] if sys.argv[0].startswith("fulltune ") else f"python -m tools.{name}"


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a tool, whose help is the module's docstring. From here on nothing that is printed fails."""
    never_fail()
    return argparse.ArgumentParser(prog=called_as(name), description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def ended(
    work: Callable[[], int | None], stopped: Callable[[], str] = lambda: "stopped", failures: tuple[type[Exception], ...] = ()
) -> int:
    """Do the work of a tool and return its exit code: the work's own, or one for how it was ended, which is said on stderr.

    2 for ConfigError and Refused, 1 for `failures`, 130 for Ctrl-C and SIGTERM, of which `stopped` says what was left.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: nothing half-written stays
    try:
        return work() or Exit.done
    except KeyboardInterrupt:
        print(stopped(), file=sys.stderr)
        return Exit.interrupted
    except (ConfigError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.bad_input
    except failures as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.failed
