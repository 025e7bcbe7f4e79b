"""Tasks of the benchmarks: each scores a model on what a reader returned, and returns measures."""
