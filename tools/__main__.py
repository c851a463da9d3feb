"""The command `fulltune`: the launcher, and each tool by its name.

fulltune +exp=quickstart     as python -m launcher +exp=quickstart
fulltune runs runs           as python -m tools.runs runs
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from launcher.__main__ import main as launch
from trainers.rundir.ending import Exit

TOOLS = {
    "bench": "how fast what is here runs, and whether it is right",
    "chaos": "run with injected faults, and see what is lost",
    "chat": "talk to a trained model",
    "compare": "runs side by side, as a table and as a page",
    "curate": "make rows ready for training: duplicates, personal data, quality, splits",
    "data_report": "the quality of rows at a glance, before training",
    "doctor": "try the GPUs and links of a job's nodes",
    "evaluate": "measure a trained model",
    "export": "make a model of a checkpoint",
    "gate": "hold a run against rules, and write a model card",
    "logprobs": "what a teacher says of a run's rows",
    "merge": "merge an adapter into its base",
    "rates": "the learning rate of every experiment and preset",
    "reference": "every setting",
    "runs": "the runs in a folder, and how they are",
    "sample": "ask a model for n answers of each prompt",
    "select": "the best of several answers by rewards, and pairs of them",
    "show_batch": "what a run trains on, token by token",
    "structure": "what the code's structure costs; in a checkout",
    "synthesise": "write rows with a model: instructions, answers, paraphrases and more",
}
"""What can be called, and what for."""


def main() -> int:
    """Call what the first word names; returns its exit code."""
    os.environ["PYTHONSAFEPATH"] = "1"  # a folder called tools or trainers in the working directory is not ours
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    name = first.replace("-", "_")
    if name in TOOLS:
        sys.argv = [f"fulltune {first}", *sys.argv[2:]]
        package = importlib.import_module(f"tools.{name}")
        called = importlib.import_module(f"tools.{name}.__main__") if hasattr(package, "__path__") else package
        code: int = called.main()
        return code
    if first.isidentifier():
        meant = difflib.get_close_matches(name, TOOLS, 1)
        print(f"error: there is no tool `{first}`" + (f"; did you mean {meant[0]}?" if meant else ""), file=sys.stderr)
        print("\n".join(f"  fulltune {tool:<11} {what}" for tool, what in TOOLS.items()), file=sys.stderr)
        return Exit.bad_input
    return launch()


if __name__ == "__main__":
    sys.exit(main())
