"""Device mesh and sharding: the batch is split over the devices, parameters are split by `RULES`."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mefn_jax.errors import ConfigError, reason

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the axes that the batch is split over

# (regex, axes): the first regex found in a parameter's path gives the mesh axes of its last dimensions, so that arrays
# stacked over layers need no rules of their own. A parameter that no regex matches is an error.
RULES = (
    (r"^(matcher|hubness|loss)/", ()),
    (r"/(bias|scale|mean|var|layer_scale_[12])$", ()),
    (r"/down$", ()),
    (r"/up$", ("fsdp",)),
    (r"/(query|key|value|mlp_in|mlp_gate)/kernel$", ("fsdp", "tensor")),
    (r"/(attention/out|mlp_out)/kernel$", ("tensor", "fsdp")),
    (r"/embedding$", ("tensor", "fsdp")),
    (r"/(positions|class|class_position|registers|probe)$", ()),
    (r"/kernel$", ("fsdp",)),
)


def make_mesh(sizes=None, devices=None) -> Mesh:
    """Returns a mesh with the axes `MESH_AXES` over all devices of all processes, or over `devices`.

    `sizes` maps each axis to its size; one size may be -1, the remaining devices. None puts all devices on `data`.
    Several TPU slices are joined along `data`, so that only the traffic of `data` crosses slices. Raises ConfigError if
    the sizes do not multiply to the number of devices, or if `tensor` would span hosts.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(sizes or {"data": -1}, len(devices))
    # Only for TPUs: a GPU's `slice_index` is its host.
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices if device.platform == "tpu"}) or 1
    if shape[0] % slices:
        raise ConfigError(f"mesh.data={shape[0]} is not a multiple of the {slices} slices")
    try:
        if slices > 1:
            slice_shape = (shape[0] // slices, *shape[1:])
            grid = mesh_utils.create_hybrid_device_mesh(
                slice_shape, (slices, 1, 1), devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as e:
        raise ConfigError(f"mesh: {shape} cannot be laid over these devices ({reason(e)})") from e
    for row in grid.reshape(-1, shape[2]):
        if len({device.process_index for device in row}) > 1:
            raise ConfigError(
                f"mesh.tensor={shape[2]} spans several hosts, which would have to read the same rows; choose a smaller "
                "one"
            )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(sizes, devices: int) -> tuple[int, int, int]:
    """Returns the sizes of `MESH_AXES` for a number of devices. Raises ConfigError as `make_mesh` does."""
    requested = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    options = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, requested, strict=True))
    if requested.count(-1) > 1 or any(size < 1 and size != -1 for size in requested):
        raise ConfigError(f"{options}: give numbers of at least 1; one of them may be -1 (the remaining devices)")
    product = math.prod(size for size in requested if size != -1)
    if devices % product or (-1 not in requested and product != devices):
        raise ConfigError(f"{options}: these do not multiply to the {devices} devices")
    return tuple(devices // product if size == -1 else size for size in requested)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives every device a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the batch axes. Devices along `tensor` hold copies."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain_to_batch(x):
    """Constrains `x (B, ...)` to be split over the batch axes inside a step on a mesh (`use_abstract_mesh`); without a
    mesh, returns it unchanged. Without the constraint, XLA splits activations by channel where parameters use `fsdp`,
    and communicates several times as much."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def param_shardings(mesh: Mesh, tree):
    """Returns the shardings of a tree of parameters, or of a tree that contains parameters, such as an optimizer's
    state, by `RULES`.

    A dimension that an axis does not divide is not split over it. Raises ValueError naming a path that no rule matches.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, param_spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def param_spec(path: str, shape: tuple[int, ...], sizes) -> PartitionSpec:
    """Returns the PartitionSpec of the parameter at `path` on a mesh whose axes have these `sizes`. A prefix of the
    path, as in an optimizer's state, is ignored. Raises ValueError if no rule matches."""
    if not shape:
        return PartitionSpec()
    path = re.sub(r"^.*?(?=\b(image|text|matcher|hubness|loss)/)", "", path)
    axes = next((axes for regex, axes in RULES if re.search(regex, path)), None)
    if axes is None:
        raise ValueError(f"no rule shards {path} {shape}; add one to RULES in mefn_jax/runtime/sharding.py")
    axes = axes[-len(shape) :] if len(axes) > len(shape) else axes
    names = [
        axis if sizes[axis] > 1 and size % sizes[axis] == 0 else None
        for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True)
    ]
    if not any(names):
        return PartitionSpec()
    return PartitionSpec(*(None,) * (len(shape) - len(axes)), *names)


def shard_params(mesh: Mesh, tree):
    """Places a tree of parameters, equal on every process, on the mesh by `RULES`."""
    return jax.device_put(tree, param_shardings(mesh, tree))


def abstract_params(mesh: Mesh, shapes):
    """Returns a tree of shapes with the shardings of `param_shardings`, for restoring a checkpoint or compiling a
    step."""
    shardings = param_shardings(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def from_local_rows(mesh: Mesh, batch):
    """Returns global arrays, split by rows, from this process's rows of a batch (a tree of arrays)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def from_full_copy(sharding: NamedSharding, batch):
    """Returns global arrays from a batch (a tree of arrays) that every process holds in full."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch)


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Returns the indices of the rows of a batch of `size` that this process's devices hold, in ascending order. It has
    to pass these rows to `from_local_rows`."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[rows] for rows in slices]))


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def describe_mesh(mesh: Mesh) -> str:
    """Returns the axes and their sizes as text: "data 4, fsdp 2, tensor 1"."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def check_divides(batch_size: int, chunks: int, mesh: Mesh) -> None:
    """Raises ConfigError if the batch cannot be split over the mesh and each device's rows into `chunks` chunks."""
    if batch_size % mesh.size or batch_size % (batch_shards(mesh) * chunks):
        chunk_note = f", times train.grad_cache_chunks={chunks}" if chunks > 1 else ""
        raise ConfigError(
            f"train.batch_size={batch_size} is not a multiple of the {mesh.size} devices{chunk_note}; choose one that "
            "is"
        )
