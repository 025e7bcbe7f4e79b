"""Published benchmarks of retrieval: readers of their files, the tasks that they set, and their results.

`registry.py` is the table of the benchmarks, by name. A reader turns published files into what a task takes, and a task
scores a model on it and returns measures. A measure keeps what it was computed from, so that it has an interval and can
be compared with another model's on the same resamples.
"""
