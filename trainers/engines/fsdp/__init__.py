"""PyTorch's fully_shard (FSDP2): groups and state -> engine."""
