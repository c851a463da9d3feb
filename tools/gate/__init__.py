"""Whether a model may go on: `python -m tools.gate --help`."""
