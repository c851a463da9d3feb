"""The best of several answers by rewards, as rows to train on: `python -m tools.select --help`."""
