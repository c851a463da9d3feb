"""Every setting and what it may be; nothing here imports torch."""
