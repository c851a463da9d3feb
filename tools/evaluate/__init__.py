"""Measure runs that are done: `python -m tools.evaluate --help`."""
