"""Rows from files, the hub or Python's own documentation to packed tokens, and from those to the microbatches of a step."""
