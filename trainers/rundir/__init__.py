"""The run directory: its files, who may write them, and how they are read."""
