"""The trainer: ranks that read one frozen config and run one loop."""
