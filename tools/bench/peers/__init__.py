"""Other trainers next to ours: the same model, rows, tokens and precision."""
