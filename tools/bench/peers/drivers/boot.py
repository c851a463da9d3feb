"""Run a peer's driver: `python boot.py ROOT PEER ORDER` in the peer's environment, ROOT being this checkout."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Import the driver from ROOT, which the peer does not see, and train as ordered."""
    root, peer, order = sys.argv[1:]
    sys.path[0] = root
    driver = importlib.import_module(f"tools.bench.peers.drivers.{peer}")
    del sys.path[0]
    driver.train(json.loads(Path(order).read_text()))


if __name__ == "__main__":
    main()
