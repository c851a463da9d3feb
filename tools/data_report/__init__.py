"""The quality of rows at a glance."""
