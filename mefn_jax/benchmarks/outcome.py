"""What a task returns: the measures of a model on a benchmark, and what they were computed from."""

import dataclasses

from mefn_jax.benchmarks.measures import Measure


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Measures of a model on a benchmark.

    Attributes:
        measures: the cells of the table.
        units: G, how many units are resampled for intervals.
        unit: what the units are, such as "images".
        digest: the digest of the images, captions and cases; only outcomes of the same digest are compared.
        protocol: sizes and choices by name, as they are printed and stored.
        notes: sentences about this result, for the terminal.
        numbers: further numbers by name, without intervals, for `metrics.json`.
    """

    measures: list[Measure]
    units: int
    unit: str
    digest: str
    protocol: dict
    notes: list[str] = dataclasses.field(default_factory=list)
    numbers: dict = dataclasses.field(default_factory=dict)
