"""Runs side by side: full fine-tuning against parameter-efficient methods, flagged where they are not comparable."""
