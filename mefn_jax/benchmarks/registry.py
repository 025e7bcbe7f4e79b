"""The benchmarks by name: reader, task, and where the files are published."""

from collections.abc import Callable
from typing import NamedTuple

from mefn_jax.benchmarks.readers import twins
from mefn_jax.benchmarks.tasks.choose import measure_cases


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        read: `read(request)` returns what the task takes.
        measure: `measure(scorer, items)` returns the Outcome of a model.
        published: where its files are published, and under which licence.
    """

    read: Callable
    measure: Callable
    published: str


BENCHMARKS = {
    "twins": Benchmark(twins.read, measure_cases, "the drawn scenes come with the project"),
}
