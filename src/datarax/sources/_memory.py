"""A source whose records are in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .._order import Shuffle
from .._rows import take
from .._types import Batch, Records, flat_fields
from ..errors import EmptySourceError, FieldTypeError, UnequalLengthsError
from ._base import EagerSourceBase, SourceData
from ._values import hold, need_held_type


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySourceConfig:
    """How a `MemorySource` orders and holds its data.

    `shuffle` is False (stored order), True (swap-or-not, O(1) memory) or "permutation"
    (`jax.random.permutation`, O(n) memory an epoch). `copy=True` takes a private copy, so that a
    later write to the arrays is not seen.
    """

    shuffle: Shuffle = False
    copy: bool = False

    def __post_init__(self):
        if not any(self.shuffle is x for x in (False, True)) and self.shuffle != "permutation":
            raise ValueError(f'`shuffle` is False, True or "permutation", got {self.shuffle!r}.')


class MemorySource(EagerSourceBase):
    """Records in memory: a dict of arrays (nested dicts allowed), a list of dicts, or one array.

    Axis 0 counts the records. One array becomes the field "data". NumPy arrays are shared with
    JAX where the backend can, and otherwise placed on the device once. 64-bit values are held in
    32 bits unless `jax.enable_x64`; those that do not fit are a `FieldTypeError`.
    """

    def __init__(self, config: MemorySourceConfig, data: Any, *, rngs: nnx.Rngs | None = None):
        super().__init__(shuffle=config.shuffle, rngs=rngs)
        fields = _columns(data)
        lengths = {name: _rows(name, x) for name, x in flat_fields(fields).items()}
        if len(set(lengths.values())) > 1:
            raise UnequalLengthsError(lengths)
        if not lengths or 0 in lengths.values():
            raise EmptySourceError()
        self.config = config
        self.length = next(iter(lengths.values()))
        named = jax.tree.unflatten(jax.tree.structure(fields), list(lengths))
        self.data = SourceData(
            jax.tree.map(lambda name, x: _hold(name, x, config.copy), named, fields)
        )

    def __len__(self) -> int:
        return self.length

    def gather(self, records: Records) -> Batch:
        return take(self.data.get_raw_value(), records)


def _columns(data: Any) -> dict[str, Any]:
    """Whatever was given, as a dict of columns (nested dicts allowed)."""
    if isinstance(data, Mapping):
        return {_name(k): _columns(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    if isinstance(data, list | tuple) and any(isinstance(row, Mapping) for row in data):
        rows = [_columns(row) if isinstance(row, Mapping) else row for row in data]
        first = jax.tree.structure(rows[0])
        for i, row in enumerate(rows):
            if jax.tree.structure(row) != first:
                raise FieldTypeError(
                    f"[{i}]",
                    "must be a dict with the fields of the first record, "
                    f"{list(flat_fields(rows[0]))}, got {row!r}.",
                )
        return jax.tree.map(lambda *column: np.stack([np.asarray(x) for x in column]), *rows)
    return {"data": data}


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise FieldTypeError(str(key), f"must have a string as its name, got {key!r}.")
    return key


def _rows(field: str, column: Any) -> int:
    shape = column.shape if hasattr(column, "shape") else np.shape(column)
    if not shape:
        raise FieldTypeError(
            field,
            f"must be an array with one row a record, got {type(column).__name__}.",
        )
    return shape[0]


def _hold(field: str, column: Any, copy: bool) -> jax.Array:
    """The column on the device, not a value changed; or an error that names the field."""
    if isinstance(column, jax.Array):
        return jnp.array(column, copy=True) if copy else column
    values = np.asarray(column)
    values = hold(field, values, need_held_type(field, values.dtype))
    return jnp.array(values, copy=True) if copy else jnp.asarray(values)
