"""Commands of their own: each is `python -m tools.NAME --help`."""
