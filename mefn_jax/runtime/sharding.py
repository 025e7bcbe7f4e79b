"""The mesh and what lies where: the batch is split over the devices, parameters as `RULES` say."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mefn_jax.errors import ConfigError, reason

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # what the batch is split over

# Where a parameter lies, by the first regex that is found in its path; a parameter that none fits is an error. The
# axes are those of its last dimensions, so that arrays stacked by layers need no rules of their own.
RULES = (
    (r"^(matcher|loss)/", ()),
    (r"/(bias|scale|mean|var)$", ()),
    (r"/(query|key|value|mlp_in)/kernel$", ("fsdp", "tensor")),
    (r"/(attention/out|mlp_out)/kernel$", ("tensor", "fsdp")),
    (r"/embedding$", ("tensor", "fsdp")),
    (r"/(positions|class|class_position)$", ()),
    (r"/kernel$", ("fsdp",)),
)


def make_mesh(sizes=None, devices=None) -> Mesh:
    """A mesh of the axes `AXES` over all devices of all processes, or over `devices`.

    `sizes` gives each axis's (a mapping, one of them perhaps -1: what is left); None puts all on `data`. Several slices
    of TPUs are joined along `data`, so that only its traffic goes between them. Raises ConfigError if the sizes do not
    multiply to the number of devices, or if `tensor` would span hosts.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(sizes or {"data": -1}, len(devices))
    # Of GPUs, this attribute says the host.
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices if d.platform == "tpu"}) or 1
    if shape[0] % slices:
        raise ConfigError(f"mesh.data={shape[0]} is not a multiple of the {slices} slices")
    try:
        if slices > 1:
            inner = (shape[0] // slices, *shape[1:])
            arranged = mesh_utils.create_hybrid_device_mesh(
                inner, (slices, 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as e:
        raise ConfigError(f"mesh: {shape} cannot be laid over these devices ({reason(e)})") from e
    for row in arranged.reshape(-1, shape[2]):
        if len({d.process_index for d in row}) > 1:
            raise ConfigError(f"mesh.tensor={shape[2]} would span hosts here, which have to read the same rows then")
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(sizes, devices: int) -> tuple[int, int, int]:
    """The sizes of `AXES` for so many devices. Raises ConfigError, as `make_mesh`."""
    given = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    described = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, given, strict=True))
    if given.count(-1) > 1 or any(size < 1 and size != -1 for size in given):
        raise ConfigError(f"{described}: give numbers of at least 1, and -1 (what is left) once at most")
    known = math.prod(size for size in given if size != -1)
    if devices % known or (-1 not in given and known != devices):
        raise ConfigError(f"{described}: these do not multiply to the {devices} devices")
    return tuple(devices // known if size == -1 else size for size in given)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the axes of the batch; `tensor` has copies."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain_to_batch(x):
    """`x (B, ...)`, pinned to be split by rows in a step on a mesh (`use_abstract_mesh`). Without it, XLA
    splits a tower's states by channels where parameters are split over `fsdp`, and sends several times as much."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def param_shardings(mesh: Mesh, tree):
    """Shardings for a tree of parameters, or of parameters in anything like an optimiser's state, by `RULES`.

    An axis is left out where it does not divide the dimension. Raises ValueError naming a path that no rule fits.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def param_spec(path: str, shape: tuple[int, ...], sizes) -> PartitionSpec:
    """The PartitionSpec of one parameter `path` on a mesh with these `sizes` of its axes; of a path with more in front
    (an optimiser's state) likewise."""
    if not shape:
        return PartitionSpec()
    path = re.sub(r"^.*?(?=\b(image|text|matcher|loss)/)", "", path)
    axes = next((axes for regex, axes in RULES if re.search(regex, path)), None)
    if axes is None:
        raise ValueError(f"no rule of mefn_jax/sharding.py says where {path} {shape} lies; add one to RULES")
    axes = axes[-len(shape) :] if len(axes) > len(shape) else axes
    used = [
        axis if sizes[axis] > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True)
    ]
    if not any(used):
        return PartitionSpec()
    return PartitionSpec(*(None,) * (len(shape) - len(axes)), *used)


def shard_params(mesh: Mesh, tree):
    """A tree of parameters, the same on every process, laid out on the mesh."""
    return jax.device_put(tree, param_shardings(mesh, tree))


def abstract_params(mesh: Mesh, shapes):
    """A tree of shapes with the shardings of `laid_out`, as a checkpoint is restored into, or a step compiled for."""
    where = param_shardings(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def from_local_rows(mesh: Mesh, batch):
    """This process's rows of a batch (a tree of arrays) as part of global arrays split by rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def from_full_copy(sharding: NamedSharding, batch):
    """A batch (a tree of arrays) that every process has whole, as global arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` this process's devices hold, ascending: what it has to give to `put_rows`."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def describe_mesh(mesh: Mesh) -> str:
    """The axes and their sizes, in words."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def check_divides(batch_size: int, parts: int, mesh: Mesh) -> None:
    """Raises ConfigError if a batch cannot be split over the mesh, and each device's rows into the encoders' parts."""
    if batch_size % mesh.size or batch_size % (batch_shards(mesh) * parts):
        cut = f", times train.grad_cache_chunks={parts}" if parts > 1 else ""
        raise ConfigError(
            f"train.batch_size={batch_size} is not a multiple of the {mesh.size} devices{cut}; choose one that is"
        )
