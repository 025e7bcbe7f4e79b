"""Reader of a split of the model's own data set, or of the one in `--data_dir`."""

from mefn_jax.benchmarks.request import Request
from mefn_jax.data.split import Split
from mefn_jax.evaluation.gallery import open_split
from mefn_jax.evaluation.run import Gallery


def read(request: Request) -> Split:
    """Opens the split. Raises DataError or ConfigError as `gallery.open_split` does."""
    return open_split(request.evaluator, Gallery(request.data_dir, request.split)).split
