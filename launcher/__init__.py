"""The launcher: composes a typed config, freezes it into a run directory and starts ranks."""
