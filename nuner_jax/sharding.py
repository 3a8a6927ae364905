"""The device mesh, parameters placed by regex rules, and host batches made into global arrays.

The mesh has three axes: `data` (batch rows), `fsdp` (batch rows, and parameters split so that each device
holds a part of them) and `tensor` (attention heads and MLP columns split). Batches are split over the first
two; every parameter's place follows from the first rule whose regex is found in its path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nuner_jax.errors import NunerError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, or of those given; one axis may be -1, and takes what the others leave.

    Raises:
      NunerError: the product of the axes is not the number of devices.
    """
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    open_axes = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    bad = [axis for axis, size in shape.items() if size == 0 or size < -1]
    if bad or len(open_axes) > 1 or count % fixed or (not open_axes and fixed != count):
        raise NunerError(
            f"config.mesh: {shape} does not fit {count} device(s) of kind {devices[0].device_kind!r}; "
            "each axis is at least 1 (one may be -1: the rest), and their product is the number of devices: "
            f"{' or '.join(map(str, _fitting(shape, count)))} would fit"
        )
    for axis in open_axes:
        shape[axis] = count // fixed
    sizes = tuple(shape[axis] for axis in AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:  # a torus cannot be cut into any shape
        raise NunerError(
            f"config.mesh: {shape} does not fit the wiring of {count} devices of kind {devices[0].device_kind!r}: "
            f"{str(error).partition('. ')[0]}"
        ) from error


def _fitting(wanted: dict[str, int], devices: int) -> list[dict[str, int]]:
    """The (at most three) shapes of so many devices that are nearest to the wanted one: fewest axes changed, least."""
    divisors = [n for n in range(devices, 0, -1) if devices % n == 0]
    pairs = [(data, fsdp) for data in divisors for fsdp in divisors if devices // data % fsdp == 0]
    shapes = [dict(zip(AXES, (data, fsdp, devices // (data * fsdp)), strict=True)) for data, fsdp in pairs]

    def distance(shape: dict[str, int]) -> tuple[int, float]:
        changed = [
            abs(math.log(shape[axis] / size)) for axis, size in wanted.items() if size > 0 and size != shape[axis]
        ]
        return len(changed), sum(changed)

    return sorted(shapes, key=distance)[:3]


def local_mesh() -> Mesh:
    """A mesh of this process's devices, all along `data`: for what one process computes alone."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices), 1, 1), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`; axis 0 is the micro-batch, axis 1 the rows."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `BATCH_AXES`, everything else whole: where the activations [rows, ...] of a step belong."""
    return NamedSharding(mesh, P(BATCH_AXES))


def head_sharding(mesh: Mesh) -> NamedSharding:
    """Attention heads [rows, tokens, heads, ...]: rows over `BATCH_AXES`, heads over `tensor`, as parameters are."""
    return NamedSharding(mesh, P(BATCH_AXES, None, "tensor"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def tree_paths(tree) -> dict[str, object]:
    """The leaves of any pytree by their "/"-joined path, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tree_shardings(mesh: Mesh, abstract_tree, rules: Sequence[tuple[str, Sequence]]):
    """A `NamedSharding` for every leaf of a tree of shapes, by the first rule that matches its path.

    Optimizer moments carry their parameter's path as a suffix, so that the same rules place them.

    Args:
      mesh: the mesh.
      abstract_tree: pytree of `jax.ShapeDtypeStruct` (or arrays).
      rules: pairs (regex, partition), e.g. ("qkv/kernel$", ["fsdp", None, "tensor", None]); a leaf that no
        rule matches is replicated.

    Raises:
      NunerError: a leaf's dimension is not divisible by the mesh axis that a rule gives it, or ranks differ.
    """
    paths = tree_paths(abstract_tree)
    shardings = [NamedSharding(mesh, _partition(path, leaf.shape, mesh, rules)) for path, leaf in paths.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract_tree), shardings)


def with_shardings(mesh: Mesh, abstract_tree, rules: Sequence[tuple[str, Sequence]]):
    """A tree of shapes, each leaf with the sharding that `tree_shardings` gives it."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_tree,
        tree_shardings(mesh, abstract_tree, rules),
    )


def _partition(path: str, shape: tuple[int, ...], mesh: Mesh, rules) -> P:
    for pattern, axes in rules:
        if not re.search(pattern, path):
            continue
        if len(axes) != len(shape):
            raise NunerError(f"config.mesh.rules: {pattern!r} gives {list(axes)} to {path}, whose shape is {shape}")
        for dimension, axis in zip(shape, axes, strict=True):
            parts = math.prod(mesh.shape[a] for a in ([axis] if isinstance(axis, str) else axis or []))
            if dimension % parts:
                raise NunerError(
                    f"config.mesh: {path} of shape {shape} cannot be split into {parts} along {axis!r} "
                    f"(rule {pattern!r}); choose a mesh whose axes divide it"
                )
        return P(*(axis if axis is None or isinstance(axis, str) else tuple(axis) for axis in axes))
    return P()


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold (axis 1 of a [1, rows] array), ascending int64.

    They need not be neighbours: a mesh orders its devices by how they are wired, not by their process.
    """
    places = sharding.addressable_devices_indices_map((1, rows)).values()
    return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in places]))


def to_global(sharding: NamedSharding, local_batch: dict[str, np.ndarray], rows: dict[str, int]):
    """Global arrays [A, rows, ...] of which this process gives its own rows.

    Args:
      sharding: `batch_sharding(mesh)`.
      local_batch: name -> array [A, local rows, ...], the rows in the order of `local_rows`.
      rows: name -> number of rows of the whole batch.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, value, (value.shape[0], rows[name], *value.shape[2:]))
        for name, value in local_batch.items()
    }
