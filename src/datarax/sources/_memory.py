"""A source whose records are in memory."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from .._modules import FixedBundle
from .._types import Batch, Records, Scalar, escaped, expect, flat_fields
from ..errors import EmptySourceError, FieldTypeError, UnequalLengthsError
from ._base import EagerSourceBase
from ._column import Column
from ._values import as_array, field_name, hold, need_held_type


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySourceConfig:
    """How a `MemorySource` orders and holds its data.

    Args:
        shuffle: False: stored order. True: a new random order for every epoch, in O(1) memory.
            "permutation": the order of `jax.random.permutation`, in O(n) memory.
        copy: copies the arrays, so that later writes to them do not reach the source (spec
            SRC-018).
    """

    shuffle: Literal[False, True, "permutation"] = False
    copy: bool = False

    def __post_init__(self):
        orders = (False, True, "permutation")
        if not isinstance(self.shuffle, bool | str) or self.shuffle not in orders:
            raise ValueError(f'`shuffle` is False, True or "permutation", got {self.shuffle!r}.')


class MemorySource(EagerSourceBase):
    """Records in memory.

    On a CPU, JAX shares the memory of large NumPy arrays. Otherwise the arrays are copied to the
    device once. 64-bit types become 32-bit ones unless `jax_enable_x64` is set.

    Args:
        config: the order, and whether to copy.
        data: records on axis 0, in one of these forms (spec SRC-017): a dict of arrays (nested
            dicts allowed); a list of dicts; a list of tuples, whose items become the fields "0",
            "1", ...; or one array, which becomes the field "data".
        rngs: the seed of the shuffle. Without it the source uses the pipeline's seed.

    Raises:
        FieldTypeError: a field that is not numeric, or with a value that its type in JAX cannot
            hold. Floats may be rounded.
        UnequalLengthsError: fields with different numbers of records.
        EmptySourceError: no records.
    """

    def __init__(self, config: MemorySourceConfig, data: Any, *, rngs: nnx.Rngs | None = None):
        expect("config", config, MemorySourceConfig)
        super().__init__(shuffle=config.shuffle, rngs=rngs)
        fields = _columns(data)
        columns = {name: _column(name, x) for name, x in flat_fields(fields, escaped).items()}
        lengths = {name: len(x) for name, x in columns.items()}
        if len(set(lengths.values())) > 1:
            raise UnequalLengthsError(lengths)
        if not lengths or 0 in lengths.values():
            raise EmptySourceError("`data`")
        self.config = config
        self.length = next(iter(lengths.values()))
        _, self.tree = _split(fields)
        self.data = FixedBundle(
            {name: Column(_fitting(name, x), copy=config.copy) for name, x in columns.items()}
        )

    def __len__(self) -> int:
        return self.length

    def gather(self, records: Records) -> Batch:
        return self._each(lambda column: column.take(records))

    def gather_range(self, start: Scalar, size: int) -> Batch:
        return self._each(lambda column: column.take_range(start, size))

    def _each(self, take: Callable[[Column], Any]) -> Batch:
        return jax.tree.unflatten(self.tree, [take(self.data.get(x)) for x in self.data.names])


def _split(fields: Any) -> tuple[list[Any], Any]:
    """The leaves of (nested) fields in the order of `flat_fields`, and their nesting."""
    return jax.tree.flatten(fields, is_leaf=lambda x: not isinstance(x, dict))


def _columns(data: Any) -> dict[str, Any]:
    """`data`, in any of the forms of `MemorySource`, as a (nested) dict of columns."""
    if isinstance(data, Mapping):
        return {
            field_name(k): _columns(v) if isinstance(v, Mapping) else v for k, v in data.items()
        }
    if isinstance(data, list) and data and isinstance(data[0], tuple):
        size = len(data[0])
        for i, row in enumerate(data):
            if not isinstance(row, tuple) or len(row) != size:
                raise FieldTypeError(
                    f"[{i}]", f"must be a tuple of {size} as the first record is, got {row!r}."
                )
        return {str(i): list(column) for i, column in enumerate(zip(*data, strict=True))}
    if isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        rows = [_split(_columns(row) if isinstance(row, Mapping) else row) for row in data]
        nesting = rows[0][1]
        for i, (_, found) in enumerate(rows):
            if found != nesting:
                raise FieldTypeError(
                    f"[{i}]",
                    "must be a dict with the fields of the first record, "
                    f"{list(flat_fields(_columns(data[0]), escaped))}, got {data[i]!r}.",
                )
        columns = zip(*(leaves for leaves, _ in rows), strict=True)
        return jax.tree.unflatten(nesting, map(list, columns))
    return {"data": data}


def _column(field: str, column: Any) -> Any:
    """The column as an array with one row a record."""
    if isinstance(column, tuple) and any(np.ndim(x) for x in column if hasattr(x, "shape")):
        # NumPy would stack arrays of one shape, and their number would become that of the records.
        raise FieldTypeError(
            field,
            f"is a tuple of {len(column)} arrays. Give each a name, in a dict of arrays; or for "
            "records one by one, a list.",
        )
    array = as_array(field, column)
    if array.ndim == 0:
        raise FieldTypeError(
            field, f"must be an array with one row a record, got {type(column).__name__}."
        )
    return array


def _fitting(field: str, column: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """The column in the type in which JAX holds it."""
    if isinstance(column, jax.Array):
        return column
    return hold(field, column, need_held_type(field, column.dtype))
