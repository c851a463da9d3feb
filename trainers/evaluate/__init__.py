"""Evaluation of a model after training: losses, answers, scores, a judge."""
