"""A field of the data on the device, shared with NumPy where that is possible at all."""

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
"""Bytes: a smaller array is copied, so that the shapes that programs are compiled for do not depend
on where it happens to lie."""


class Column(Fixed):
    """The rows of one field: `take(records)` and `take_range(start, size)`.

    NumPy puts large arrays 16 bytes behind a multiple of `ALIGNMENT`, so that XLA would copy each
    of them. Such an array is held flat, from the aligned address before it on. The items in front
    of the first row are in the same memory page, and never read.
    """

    def __init__(self, values: jax.Array | np.ndarray, *, copy: bool = False):
        self.shape = values.shape
        if isinstance(values, jax.Array):
            self.data = SourceData(jnp.array(values, copy=True) if copy else values)
        elif not copy and _is_shareable(values):
            self.data = SourceData(jax.device_put(_from_aligned(np.ascontiguousarray(values))))
        else:
            # `jnp.asarray` would compile a program for each shape, and JAX keep it for ever.
            self.data = SourceData(jax.device_put(_own(values) if copy or on_cpu() else values))

    def take(self, records: Records) -> Shaped[Array, "b ..."]:
        """The rows `records`, all of which must exist."""
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
        """The rows from `start` on, all of which must exist."""
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
        """What a pickle holds: the rows, not what lies in front of them in this process."""
        state = super().__getstate__()
        if (rows := self.rows()) is not self.data.get_raw_value():
            state["data"] = SourceData(jax.device_put(_own(np.asarray(rows))))
        return state

    def rows(self) -> jax.Array | np.ndarray:
        """All rows, and nothing in front of them."""
        data = self.data.get_raw_value()
        if data.shape == self.shape:
            return data
        return np.asarray(data)[data.size - math.prod(self.shape) :].reshape(self.shape)


def spread(source: Any, sharding: NamedSharding) -> Any:
    """The source with what it holds on every device of the mesh.

    That is another one if need be, so that the one given serves whoever else uses it.
    """
    if is_placed(source, sharding):
        return source
    twin = nnx.clone(source)
    for _, column in iter_graph(twin):
        if isinstance(column, Column) and isinstance(rows := column.rows(), np.ndarray):
            # What lies in front of the rows is another length in each process.
            column.data.set_raw_value(everywhere(rows, sharding))
    place_held(twin, sharding)
    return twin


def _own(values: np.ndarray) -> np.ndarray:
    """A private copy, which JAX on a CPU need not copy once more."""
    rows = aligned(values.nbytes).view(values.dtype).reshape(values.shape)
    rows[...] = values
    return rows


def _is_shareable(values: np.ndarray) -> bool:
    """Whether holding the array flat saves a copy, and its items can be counted in 32 bits."""
    return (
        on_cpu()
        and values.nbytes >= WORTH_SHARING
        and values.size < 2**32 - ALIGNMENT
        and ALIGNMENT % values.itemsize == 0
        and values.ctypes.data % values.itemsize == 0
    )


def _from_aligned(values: np.ndarray) -> np.ndarray:
    """The array flat, and before it the items from the last aligned address on."""
    before = values.ctypes.data % ALIGNMENT
    if before == 0 and values.ndim == 1:
        return values
    memory = np.asarray(_Memory(values, values.ctypes.data - before, values.nbytes + before))
    return memory.view(values.dtype)


class _Memory:
    """Bytes for NumPy to look at, read-only, and the array that keeps them there."""

    def __init__(self, owner: Any, address: int, count: int):
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (count,),
            "data": (address, True),
        }
