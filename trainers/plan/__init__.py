"""A run before it is started: what it needs and what it costs, from the real step on tensors without values."""
