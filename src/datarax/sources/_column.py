"""`Column`: one field on the device. On a CPU it shares the memory of a NumPy array."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Shaped, UInt

from .._host_memory import ALIGNMENT, aligned
from .._mesh import everywhere, is_placed, place_held
from .._modules import Fixed
from .._rows import gathered_sharding, take
from .._settings import on_cpu
from .._types import Records, Scalar
from .._variables import iter_graph
from ._base import SourceData

WORTH_SHARING = 2**20
"""Bytes from which a NumPy array is shared. The shape of a shared array depends on its address, and
a new shape causes a retrace, so smaller arrays are copied instead."""


class Column(Fixed):
    """The rows of one field: `take(records)` and `take_range(start, size)`.

    XLA's CPU client copies arrays that do not start at a multiple of `ALIGNMENT`, and NumPy puts
    large arrays 16 bytes behind one. So a shared array is held flat and starts at the aligned
    address before it. The items in front of the first row are in the same memory page, which is
    therefore mapped, and are never read.
    """

    def __init__(self, values: jax.Array | np.ndarray, *, copy: bool = False):
        self.shape = values.shape
        if isinstance(values, jax.Array):
            self.data = SourceData(jnp.array(values, copy=True) if copy else values)
        elif not copy and _is_shareable(values):
            self.data = SourceData(jax.device_put(_from_aligned(np.ascontiguousarray(values))))
        else:
            # `jnp.asarray` would compile a program for each shape, which JAX never frees.
            self.data = SourceData(jax.device_put(_own(values) if copy or on_cpu() else values))

    def take(self, records: Records) -> Shaped[Array, "b ..."]:
        """The rows `records`; an index out of range is undefined behaviour."""
        data, row = self.data.get_raw_value(), self.shape[1:]
        if data.shape == self.shape:
            return take(data, records)
        rows = jax.lax.gather(
            data,
            self._first_item(records)[:, None],
            jax.lax.GatherDimensionNumbers((1,), (), (0,)),
            (math.prod(row),),
            mode="promise_in_bounds",
        )
        return rows.reshape(records.shape + row)

    def take_range(self, start: Scalar, size: int) -> Shaped[Array, "b ..."]:
        """The rows `start` to `start + size - 1`, all of which must exist."""
        data, row = self.data.get_raw_value(), self.shape[1:]
        if gathered_sharding(data) is not None:
            return take(data, start + jnp.arange(size, dtype=start.dtype))
        if data.shape == self.shape:
            return jax.lax.dynamic_slice_in_dim(data, start, size)
        items = size * math.prod(row)
        rows = jax.lax.dynamic_slice_in_dim(data, self._first_item(start), items)
        return rows.reshape((size, *row))

    def _first_item(self, record: UInt[Array, "..."]) -> UInt[Array, "..."]:
        word = record.dtype.type
        in_front = self.data.get_raw_value().size - math.prod(self.shape)
        return record * word(math.prod(self.shape[1:])) + word(in_front)

    def __getstate__(self) -> dict[str, Any]:
        """The rows, without the items in front of them, which are this process's memory."""
        state = super().__getstate__()
        if (rows := self.rows()) is not self.data.get_raw_value():
            state["data"] = SourceData(jax.device_put(_own(np.asarray(rows))))
        return state

    def rows(self) -> jax.Array | np.ndarray:
        """All rows, without the items in front of them."""
        data = self.data.get_raw_value()
        if data.shape == self.shape:
            return data
        return np.asarray(data)[data.size - math.prod(self.shape) :].reshape(self.shape)


def spread(source: Any, sharding: NamedSharding) -> Any:
    """The source with its arrays replicated on every device of the mesh.

    Returns a clone if the arrays have to move, since other pipelines may use the source.
    """
    if is_placed(source, sharding):
        return source
    twin = nnx.clone(source)
    for _, column in iter_graph(twin):
        if isinstance(column, Column) and isinstance(rows := column.rows(), np.ndarray):
            # The number of items in front of the rows differs between processes.
            column.data.set_raw_value(everywhere(rows, sharding))
    place_held(twin, sharding)
    return twin


def _own(values: np.ndarray) -> np.ndarray:
    """A private copy, aligned so that JAX on a CPU can share it."""
    rows = aligned(values.nbytes).view(values.dtype).reshape(values.shape)
    rows[...] = values
    return rows


def _is_shareable(values: np.ndarray) -> bool:
    """Whether JAX can share the array, and 32-bit indices can count its items."""
    return (
        on_cpu()
        and values.nbytes >= WORTH_SHARING
        and values.size < 2**32 - ALIGNMENT
        and ALIGNMENT % values.itemsize == 0
        and values.ctypes.data % values.itemsize == 0
    )


def _from_aligned(values: np.ndarray) -> np.ndarray:
    """The array, flat, with the items between the last aligned address and its start in front."""
    before = values.ctypes.data % ALIGNMENT
    if before == 0 and values.ndim == 1:
        return values
    memory = np.asarray(_Memory(values, values.ctypes.data - before, values.nbytes + before))
    return memory.view(values.dtype)


class _Memory:
    """A read-only view of `count` bytes at `address`, which keeps `owner` alive."""

    def __init__(self, owner: Any, address: int, count: int):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (count,),
            "data": (address, True),
        }
