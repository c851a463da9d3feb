"""Merge adapters into the model they belong to: `python -m tools.merge --help`."""
