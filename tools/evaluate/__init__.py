"""Measure runs that are done: `python -m tools.evaluate --help`.

`__main__` reads the command line, `measurements` says what that asks for, and `workers` starts the processes that measure it: each is a
`worker`, which opens a `subject`, finds its rows (`sets`) and measures them (`measure`, `harness`). What comes of it goes to RUN/evaluation
(`record`), scored by `scores` and `intervals`, and by a `judge` whose `verdicts` are kept as they come.
"""
