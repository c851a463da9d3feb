"""What faults do to runs: `python -m tools.chaos --help`."""
