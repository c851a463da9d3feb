"""Adapters merged into the model they belong to."""
