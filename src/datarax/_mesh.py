"""How the rows of a batch lie on the devices of a mesh (spec MESH)."""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .errors import ShardingError


def check_sharding(sharding: Any, batch_size: int) -> None:
    """Raises unless a `NamedSharding` splits rows, and them alone, into parts of equal size."""
    if not isinstance(sharding, NamedSharding):
        raise ShardingError(f"must be a NamedSharding, got {sharding!r}")
    spec, mesh = sharding.spec, sharding.mesh
    if any(names is not None for names in spec[1:]) or PartitionSpec.UNCONSTRAINED in spec:
        raise ShardingError(f"must split the rows of a batch, axis 0, and no other, got {spec}")
    if not isinstance(mesh, Mesh):
        raise ShardingError(f"needs a mesh of devices, got {mesh}")
    if AxisType.Explicit in mesh.axis_types or AxisType.Manual in mesh.axis_types:
        raise ShardingError(
            f"needs a mesh whose axes are all Auto, got {mesh.axis_types}: make it with "
            "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
        )
    if batch_size % (parts := _parts(sharding)):
        raise ShardingError(
            f"splits a batch into {parts} equal parts, but a `batch_size` of {batch_size} is no "
            f"multiple of that"
        )


def _parts(sharding: NamedSharding) -> int:
    """Into how many parts the rows are split; each may lie on several devices."""
    names = sharding.spec[0] if len(sharding.spec) else None
    names = names if isinstance(names, tuple) else (names,) if names else ()
    return math.prod(sharding.mesh.shape[name] for name in names)


@functools.lru_cache
def _lies(sharding: NamedSharding, rows: int, axis: int) -> NamedSharding:
    """How an array lies whose axis counts so many rows: whole on each device if they are not to be
    split evenly."""
    evenly = rows % _parts(sharding) == 0
    spec = PartitionSpec(*[None] * axis, *sharding.spec[:1]) if evenly else PartitionSpec()
    return NamedSharding(sharding.mesh, spec)


def split(tree: Any, sharding: NamedSharding) -> Any:
    """In a program: the same arrays, the rows on axis 0 of each lying as they are to."""

    def one(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, _lies(sharding, x.shape[0], 0))

    return jax.tree.map(one, tree)


@functools.lru_cache
def own_rows(sharding: NamedSharding, rows: int) -> np.ndarray | None:
    """Which of so many rows lie on devices of this process, in order; None if all of them do."""
    own = np.zeros(rows, bool)
    for place in _lies(sharding, rows, 0).addressable_devices_indices_map((rows,)).values():
        own[place] = True
    return None if own.all() else np.flatnonzero(own)


def assemble(x: np.ndarray, sharding: NamedSharding, rows: int, axis: int = 0) -> jax.Array:
    """The array of all processes that has so many rows on that axis.

    `x` has those of `own_rows`, or all, in order. Nothing is sent to another process.
    """
    shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
    own = own_rows(sharding, rows) if x.shape[axis] < rows else None

    def part(index: Any) -> np.ndarray:
        first, end, _ = index[axis].indices(rows)
        here = first if own is None else int(np.searchsorted(own, first))
        return x[(*index[:axis], slice(here, here + end - first))]

    return jax.make_array_from_callback(shape, _lies(sharding, rows, axis), part)


def everywhere(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A copy of the array on each device of the mesh; every process has the same `x`."""
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    # `device_put` would compare what the processes have.
    return jax.make_array_from_callback(x.shape, whole, lambda _: x)


def spans_processes(sharding: NamedSharding | None) -> bool:
    """Whether some of its devices are another process's."""
    return sharding is not None and not sharding.is_fully_addressable
