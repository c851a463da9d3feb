"""Rows made ready for training: faults, duplicates, personal data, quality, contamination, balance and splits."""
