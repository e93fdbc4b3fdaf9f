"""Values on their way into JAX: held as they are, or refused by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import FieldTypeError


def held_type(dtype: np.dtype) -> np.dtype | None:
    """The type that JAX holds values of `dtype` in; None if it holds none of them."""
    try:
        target = np.dtype(jax.dtypes.canonicalize_dtype(np.dtype(dtype).newbyteorder("=")))
        # The only test of a type that knows all of JAX's.
        jax.eval_shape(lambda: jnp.empty(0, target))
    except TypeError:
        return None
    return target


def need_held_type(field: str, dtype: np.dtype) -> np.dtype:
    """`held_type`, or the error that names the field."""
    target = held_type(dtype)
    if target is None:
        raise FieldTypeError(
            field,
            f"has type {dtype}, which JAX cannot hold. Encode it as numbers, or leave it out.",
        )
    return target


def as_array(field: str, values: Any) -> jax.Array | np.ndarray:
    """Lists and what else stands for an array as one; what would lose something is refused."""
    if isinstance(values, np.ma.MaskedArray):
        raise FieldTypeError(field, "is a masked array. Fill it, and give the mask as a field.")
    if isinstance(values, jax.Array):
        return values
    try:
        return np.asarray(values)
    except ValueError as error:
        which = _unequal(values) or str(error).rstrip(". ")
        raise FieldTypeError(
            field, f"has rows of different shapes: {which}. Pad or crop them to one."
        ) from None


def _unequal(values: Any) -> str | None:
    """Which rows differ, unless it is within a row."""
    try:
        shapes = [np.shape(row) for row in values]
    except (TypeError, ValueError):
        return None
    row = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    return None if row is None else f"row 0 has {shapes[0]} and row {row} {shapes[row]}"


def hold(
    field: str, values: np.ndarray, target: np.dtype, records: np.ndarray | None = None
) -> np.ndarray:
    """Values in their `held_type`; only float precision may be lost, never a magnitude.

    `records` says which record each row is, where that is not its place.
    """
    if values.dtype == target:
        return values
    with np.errstate(over="ignore"):
        held = values.astype(target)
    if np.issubdtype(target, np.integer):
        lost = held != values
    else:
        lost = np.isinf(held) & np.isfinite(values)
    if lost.any():
        row = np.argwhere(lost)[0][0]
        record = int(row if records is None else records[row])
        raise FieldTypeError(
            field,
            f"has type {values.dtype} and JAX would hold it as {target}, but record {record} does "
            "not fit. Convert it yourself, or turn on jax_enable_x64.",
        )
    return held


def as_record(value: Any, fields: Sequence[str] | None) -> dict[str, Any]:
    """A record as a dict of arrays and numbers, whatever form it came in."""
    if isinstance(value, Mapping):
        chosen = value if fields is None else {name: value[name] for name in fields}
        return {
            str(k): as_record(x, None) if isinstance(x, Mapping) else _as_field(str(k), x)
            for k, x in chosen.items()
        }
    if isinstance(value, tuple):
        parts, what = value, f"a tuple of {len(value)}"
        names = fields or tuple(map(str, range(len(value))))
    else:
        parts, what, names = (value,), "a single value", fields or ("data",)
    if len(names) != len(parts):
        raise FieldTypeError(",".join(names), f"cannot name the parts of a record: it is {what}.")
    return {name: _as_field(name, x) for name, x in zip(names, parts, strict=True)}


def _as_field(name: str, value: Any) -> Any:
    """A field of a record: to JAX a list would be one field for each item, and None none at all."""
    if value is None:
        raise FieldTypeError(name, "is None, which JAX cannot hold. Fill it, or leave it out.")
    if isinstance(value, list | tuple | np.ma.MaskedArray):
        return as_array(name, value)
    return value
