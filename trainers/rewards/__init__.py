"""What an answer is worth: rewards by name, opened once, for `tools.select` and reinforcement learning alike."""
