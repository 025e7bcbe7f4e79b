"""The mesh and what lies where: the batch is split over all devices, parameters are on each."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mefn_jax.errors import ConfigError


def make_mesh() -> Mesh:
    """A mesh of one axis, `data`, over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_rows(mesh: Mesh, batch):
    """This process's rows of a batch (a tree of arrays) as part of global arrays split by rows."""
    sharding = by_rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def from_first(make: Callable[[], str]) -> str:
    """The text that `make` gives on process 0, on every process."""
    text = np.frombuffer((make() if jax.process_index() == 0 else "").encode(), np.uint8)
    if jax.process_count() == 1:
        return text.tobytes().decode()
    length = int(multihost_utils.broadcast_one_to_all(np.int64(len(text))))
    text = np.resize(text, length) if len(text) else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes().decode()


def check_divides(option: str, size: int, mesh: Mesh) -> None:
    """Raises ConfigError if a batch of `size` cannot be split over the mesh."""
    if size % mesh.size:
        raise ConfigError(f"{option}={size} is not a multiple of the {mesh.size} devices; choose one that is")
