"""Engines: the sharding of parameters, gradients and optimizer state, one file each."""
