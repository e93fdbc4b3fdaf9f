"""A field of the data on the device, shared with NumPy where that is possible at all."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Shaped, UInt

from .._types import Records, Scalar
from ._base import SourceData

ALIGNMENT = 64
"""Bytes: XLA's CPU client shares memory that starts at a multiple of this, and copies any other."""


class Column(nnx.Module):
    """The rows of one field: `take(records)` and `take_range(start, size)`.

    NumPy puts large arrays 16 bytes behind a multiple of `ALIGNMENT`, so that XLA would copy each
    of them. Such an array is held flat, from the aligned address before it on: `skip` counts the
    items in front of the first row. They are in the same memory page, and never read.
    """

    def __init__(self, values: jax.Array | np.ndarray, *, copy: bool = False):
        self.row = values.shape[1:]
        self.skip = None
        if copy:
            self.data = SourceData(jnp.array(values, copy=True))
        elif isinstance(values, np.ndarray) and _is_shareable(values):
            self.skip, shared = _from_aligned(np.ascontiguousarray(values))
            self.data = SourceData(jax.device_put(shared))
        else:
            self.data = SourceData(jnp.asarray(values))

    def take(self, records: Records) -> Shaped[Array, "b ..."]:
        """The rows `records`, all of which must exist."""
        data = self.data.get_raw_value()
        if self.skip is None:
            return data.at[records].get(mode="promise_in_bounds")
        rows = jax.lax.gather(
            data,
            self._first_item(records)[:, None],
            jax.lax.GatherDimensionNumbers((1,), (), (0,)),
            (math.prod(self.row),),
            mode="promise_in_bounds",
        )
        return rows.reshape(records.shape + self.row)

    def take_range(self, start: Scalar, size: int) -> Shaped[Array, "b ..."]:
        """The rows from `start` on, all of which must exist."""
        data = self.data.get_raw_value()
        if self.skip is None:
            return jax.lax.dynamic_slice_in_dim(data, start, size)
        items = size * math.prod(self.row)
        rows = jax.lax.dynamic_slice_in_dim(data, self._first_item(start), items)
        return rows.reshape((size, *self.row))

    def _first_item(self, record: UInt[Array, "..."]) -> UInt[Array, "..."]:
        word = record.dtype.type
        assert self.skip is not None
        return record * word(math.prod(self.row)) + word(self.skip)


def _is_shareable(values: np.ndarray) -> bool:
    """Whether holding the array flat saves a copy, and its items can be counted in 32 bits."""
    return (
        jax.default_backend() == "cpu"
        and 0 < values.size < 2**32 - ALIGNMENT
        and ALIGNMENT % values.itemsize == 0
        and values.flags.aligned
    )


def _from_aligned(values: np.ndarray) -> tuple[int, np.ndarray]:
    """How many items lie between the last aligned address and the array, and all from there on."""
    before = values.ctypes.data % ALIGNMENT
    memory = np.asarray(_Memory(values, values.ctypes.data - before, values.nbytes + before))
    return before // values.itemsize, memory.view(values.dtype)


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
