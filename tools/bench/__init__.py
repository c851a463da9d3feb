"""Measure this checkout on this machine: one module a sub-command, `ranks` the processes that some of them start."""
