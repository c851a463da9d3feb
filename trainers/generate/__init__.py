"""What asks a model for text: prompts in; ids with log-probabilities, or text, out."""
