"""Readers of the benchmarks' published files, one module for each format."""
