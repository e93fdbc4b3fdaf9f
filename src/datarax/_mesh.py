"""Places the rows of batches on the devices of a mesh (spec MESH)."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._keys import BaseKey
from ._settings import transferring
from ._types import is_traced
from ._variables import iter_graph
from ._xla import weak_zeros
from .errors import ShardingError


class OwnRows(NamedTuple):
    """The indices of some `rows` of a batch, ascending. The batch has `of` rows in all."""

    rows: np.ndarray
    of: int


Own: TypeAlias = OwnRows | None
"""The rows of a batch that lie on devices of this process; None if all rows do."""


def check_sharding(sharding: Any, batch_size: int) -> None:
    """Raises `ShardingError` unless `sharding` can hold batches of `batch_size` rows (MESH-004).

    It must be a `NamedSharding` over Auto axes of a mesh, in the default memory of its devices,
    some of which belong to this process. It must split axis 0 alone, into equal parts.
    """
    if not isinstance(sharding, NamedSharding):
        raise ShardingError(
            'must be a NamedSharding, such as NamedSharding(mesh, PartitionSpec("data")), '
            f"got {sharding!r}"
        )
    spec, mesh = sharding.spec, sharding.mesh
    if any(names is not None for names in spec[1:]) or PartitionSpec.UNCONSTRAINED in spec:
        raise ShardingError(f"must split the rows of a batch, axis 0, and no other, got {spec}")
    if not isinstance(mesh, Mesh):
        raise ShardingError(f"needs a mesh of devices, got {mesh}")
    if not sharding.addressable_devices:
        raise ShardingError("is over devices of other processes alone; build no pipeline here")
    if AxisType.Explicit in mesh.axis_types or AxisType.Manual in mesh.axis_types:
        raise ShardingError(
            f"needs a mesh whose axes are all Auto, got {mesh.axis_types}: make it with "
            "jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))"
        )
    if batch_size % (parts := _parts(sharding)):
        raise ShardingError(
            f"splits a batch into {parts} equal parts, but a `batch_size` of {batch_size}, which "
            "counts the rows on all devices, is no multiple of that"
        )
    if sharding.memory_kind not in (None, (kind := _default_memory(mesh))):
        raise ShardingError(f"can only be over memory of the kind {kind!r}, got {sharding!r}")


def _default_memory(mesh: Mesh) -> str:
    return mesh.devices.flat[0].default_memory().kind


def _parts(sharding: NamedSharding) -> int:
    """How many parts the rows are split into; each part may lie on several devices."""
    names = sharding.spec[0] if len(sharding.spec) else None
    names = names if isinstance(names, tuple) else (names,) if names else ()
    return math.prod(sharding.mesh.shape[name] for name in names)


@functools.lru_cache
def _row_sharding(sharding: NamedSharding, rows: int, axis: int) -> NamedSharding:
    """The sharding of an array with `rows` rows on `axis` (MESH-002).

    It splits the rows like those of a batch if they divide evenly, else it replicates the array.
    """
    evenly = rows % _parts(sharding) == 0
    spec = PartitionSpec(*[None] * axis, *sharding.spec[:1]) if evenly else PartitionSpec()
    return NamedSharding(sharding.mesh, spec)


def check_mesh(sharding: NamedSharding | None) -> None:
    """Raises `ShardingError` if JAX cannot trace a program over the mesh of `sharding` now.

    While `jax.set_mesh` has set a mesh with Explicit axes, JAX traces no program over another.
    """
    if sharding is not None and AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ShardingError(
            "has a mesh of its own, which no program can run over while `jax.set_mesh` has set one "
            "with Explicit axes. Use the pipeline outside of that, or build it without `sharding` "
            "and place each batch with `jax.sharding.reshard`"
        )


def split(tree: Any, sharding: NamedSharding) -> Any:
    """Constrains the arrays of a traced batch to lie as `sharding` splits their rows."""

    def one(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, _row_sharding(sharding, x.shape[0], 0))

    return jax.tree.map(one, tree)


@functools.lru_cache
def own_rows(sharding: NamedSharding, rows: int) -> Own:
    """Which rows of a batch of `rows` rows lie on devices of this process."""
    own = np.zeros(rows, bool)
    for index in _row_sharding(sharding, rows, 0).addressable_devices_indices_map((rows,)).values():
        own[index] = True
    return None if own.all() else OwnRows(np.flatnonzero(own), rows)


def assemble(x: np.ndarray, sharding: NamedSharding, own: Own, axis: int) -> jax.Array:
    """The global array of which `x` holds this process's `own` rows on `axis`.

    If `own` is None, `x` holds all rows. No data is sent between processes.
    """
    rows = x.shape[axis] if own is None else own.of
    shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])

    def part(index: Any) -> np.ndarray:
        first, end, _ = index[axis].indices(rows)
        here = first if own is None else int(np.searchsorted(own.rows, first))
        return x[(*index[:axis], slice(here, here + end - first))]

    return jax.make_array_from_callback(shape, _row_sharding(sharding, rows, axis), part)


def everywhere(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`x` replicated over the devices of the mesh. Every process must pass equal values."""
    with transferring():
        # Not `device_put`, which would compare the values of all processes.
        return jax.make_array_from_callback(x.shape, _replicated(sharding), lambda _: x)


def _replicated(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec())


def placed(x: Any, sharding: NamedSharding) -> Any:
    """`x` replicated over the devices of the mesh; `x` itself if it lies there, split or not.

    Raises `ShardingError` if it is split over other devices.
    """
    if not _is_elsewhere(x, sharding):
        return x
    if not x.is_fully_replicated:
        asked, found = (_ids_text(_devices(y)) for y in (sharding, x.sharding))
        raise ShardingError(
            f"is over the devices {asked}, but an array of shape {x.shape} that the pipeline holds "
            f"is split over {found}: put it on the same devices, in the same order"
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    if x.weak_type:  # `make_array_from_callback` would lose it
        weak = weak_zeros(x.shape, x.dtype)
        if weak is not None:
            value = weak.at[...].set(np.asarray(x))
            return jax.jit(lambda x: x, out_shardings=_replicated(sharding))(value)
    return everywhere(x.addressable_data(0), sharding)


def place_held(module: Any, sharding: NamedSharding) -> None:
    """Replicates the arrays that a module holds over the devices of the mesh, once.

    Otherwise XLA would copy them for each program that reads them. A `BaseKey` stays on the host.
    """
    for part, name, value in _held(module):
        if not any(_is_elsewhere(x, sharding) for x in jax.tree.leaves(value)):
            continue
        new = jax.tree.map(lambda x: placed(x, sharding), value)
        if isinstance(part, nnx.Variable):
            part.set_raw_value(new)
        else:
            setattr(part, name, new)


def check_beside(values: Iterable[tuple[str, Any]], sharding: NamedSharding) -> None:
    """Raises `ShardingError` for an array that JAX will not move to the devices of the mesh.

    `values` are with the names that the user knows them by.
    """
    for name, x in values:
        if _is_elsewhere(x, sharding) and x.committed:
            asked, has = (_ids_text(_devices(y)) for y in (sharding, x.sharding))
            raise ShardingError(
                f"is over the devices {asked}, but `{name}` was put on {has}: put it on the mesh "
                "first, with `jax.device_put(x, NamedSharding(mesh, PartitionSpec()))` where all "
                "devices are to hold it"
            )


def is_placed(module: Any, sharding: NamedSharding) -> bool:
    """Whether `place_held` would change nothing."""
    return are_placed([value for _, _, value in _held(module)], sharding)


def are_placed(values: Any, sharding: NamedSharding) -> bool:
    """Whether all concrete arrays in `values` lie on the devices of the mesh."""
    return not any(_is_elsewhere(x, sharding) for x in jax.tree.leaves(values))


def _held(module: Any) -> list[tuple[Any, str, Any]]:
    """`(owner, attribute, value)` of each Variable but a `BaseKey`, and of each array attribute.

    For a Variable the owner is the Variable itself, and `attribute` is "".
    """
    found: list[tuple[Any, str, Any]] = []
    for _, part in iter_graph(module):
        if isinstance(part, nnx.Variable):
            if not isinstance(part, BaseKey):
                found.append((part, "", part.get_raw_value()))
        elif isinstance(part, nnx.Pytree):
            found += [(part, k, x) for k, x in vars(part).items() if isinstance(x, jax.Array)]
    return found


def _is_elsewhere(x: Any, sharding: NamedSharding) -> bool:
    if not isinstance(x, jax.Array) or is_traced(x):
        return False
    return _devices(x.sharding) != _devices(sharding)


def _devices(sharding: Any) -> list[Any]:
    """The devices of a sharding. All arrays of a program must have them in the same order."""
    if isinstance(sharding, NamedSharding):
        assert isinstance(sharding.mesh, Mesh)  # no array lies on an abstract mesh
        return list(sharding.mesh.devices.flat)
    return sorted(sharding.device_set, key=lambda device: device.id)


def _ids_text(devices: list[Any]) -> str:
    return ", ".join(str(device.id) for device in devices)


def differs(words: np.ndarray, sharding: NamedSharding) -> np.ndarray:
    """For each word, whether its value differs between the processes of the mesh.

    Collective: every process must call it with equally many words.
    """
    mesh = sharding.mesh
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.size, len(words))
    table = jax.make_array_from_callback(shape, each, lambda _: words[None])
    ends = jax.jit(lambda x: (x.min(0), x.max(0)), out_shardings=_replicated(sharding))
    least, most = map(np.asarray, ends(table))
    return least != most


def to_numpy(x: Any) -> np.ndarray:
    """The whole array. Collective if the processes hold different parts: all must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental.multihost_utils import process_allgather

        x = process_allgather(x, tiled=True)
    return np.asarray(x)


def spans_processes(sharding: NamedSharding | None) -> bool:
    """Whether some devices of the mesh belong to another process."""
    return sharding is not None and not sharding.is_fully_addressable
