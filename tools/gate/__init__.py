"""Whether a model passes: `python -m tools.gate --help`."""
