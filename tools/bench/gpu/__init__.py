"""`python -m tools.bench gpu`: one GPU in under half an hour, the most valuable first. `rows` says what, `worker` measures."""
