"""Numbers of the code's structure."""
