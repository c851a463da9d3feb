"""A run that learns from its own answers: prompts, what gives the answers, the weights that it has, and a step's rollouts as a file."""
