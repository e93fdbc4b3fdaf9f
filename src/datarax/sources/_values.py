"""Conversion of user values to arrays that JAX holds; a lossy one is refused by field name."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import FieldTypeError


def held_type(dtype: np.dtype) -> np.dtype | None:
    """The type in which JAX holds values of `dtype`; None if it cannot."""
    try:
        target = np.dtype(jax.dtypes.canonicalize_dtype(np.dtype(dtype).newbyteorder("=")))
    except TypeError:
        return None
    return target if _is_held(target) else None


@functools.lru_cache
def _is_held(target: np.dtype) -> bool:
    try:
        # No public list has all of JAX's types, bfloat16 and the float8 ones among them.
        jax.eval_shape(lambda: jnp.empty(0, target))
    except TypeError:
        return False
    return True


def need_held_type(field: str, dtype: np.dtype) -> np.dtype:
    """`held_type`, or a `FieldTypeError` that names the field."""
    target = held_type(dtype)
    if target is None:
        what = f"has type {dtype}, which JAX cannot hold. Encode it as numbers, or leave it out."
        if np.dtype(dtype).type is np.void and np.dtype(dtype).names is None:
            # A `.npy` file stores bfloat16 as void bytes.
            what = (
                f"has type {dtype}, bytes of a type whose name is lost, such as bfloat16. Store it "
                "as float32, or `x.view(np.uint16)` to be viewed back in a stage."
            )
        raise FieldTypeError(field, what)
    return target


PLAIN = frozenset((bool, int, float, complex, str, bytes, np.ndarray))
"""Types whose `np.asarray` loses nothing; NumPy's scalars are such types, too."""

BY_NAME = "Give them by name, as {name: table[name] for name in names}."


def is_table(value: Any) -> bool:
    """Whether it is a table of pandas, polars or pyarrow; imports none of them."""
    exchanged = hasattr(value, "__arrow_c_stream__") or hasattr(value, "__dataframe__")
    return exchanged and hasattr(value, "columns")  # a single column has no `columns`


def as_array(field: str, values: Any) -> jax.Array | np.ndarray:
    """Lists, tables' columns and other array-likes as an array; a lossy conversion is refused."""
    if isinstance(values, jax.Array):
        return values
    _check_whole(field, values)
    try:
        array = np.asarray(values)
    except ValueError as error:
        which = _unequal(values) or str(error).rstrip(". ")
        raise FieldTypeError(
            field, f"has rows of different shapes: {which}. Pad or crop them to one."
        ) from None
    if isinstance(values, list | tuple) and array.dtype.kind == "f" and array.size:
        return _exact(field, values, array)
    if array.dtype == object and array.ndim:
        raise _no_numbers(field, array)
    return array


def _check_whole(field: str, values: Any) -> None:
    """Raises where `np.asarray` would silently lose something, such as nulls or a mask."""
    if _is_plain(type(values)):
        return
    if isinstance(values, list | tuple):
        if not all(map(_is_plain, set(map(type, values)))):
            for value in values:
                _check_whole(field, value)
    elif isinstance(values, np.ma.MaskedArray):
        raise FieldTypeError(field, "is a masked array. Fill it, and give the mask as a field.")
    elif is_table(values):
        raise FieldTypeError(
            field,
            f"is a {type(values).__name__}, whose columns would become one array. {BY_NAME}",
        )
    elif _has_nulls(values):
        raise FieldTypeError(field, "has nulls, for which JAX has no value. Fill or drop them.")


def _is_plain(kind: type) -> bool:
    return kind in PLAIN or issubclass(kind, np.generic)


def _has_nulls(values: Any) -> bool:
    """Whether a column of Arrow, polars or pandas has nulls; NumPy would turn them into NaN."""
    if hasattr(values, "null_count"):
        count = values.null_count
        return bool(count() if callable(count) else count)
    # A pandas column of a NumPy dtype has no nulls: its NaN is a float.
    own = isinstance(getattr(values, "dtype", None), np.dtype)
    return hasattr(values, "isna") and not own and bool(np.any(values.isna()))


def _exact(field: str, values: Any, floats: np.ndarray) -> np.ndarray:
    """The float array that NumPy made of lists, as integers again if the lists hold only integers.

    NumPy makes floats of integers from 2**63 on if smaller ones stand beside them.
    """
    kinds = _kinds(values)
    if not kinds <= INTEGERS:
        if kinds & INTEGERS:
            _check_integers(field, values, floats)
        return floats
    integers = np.asarray(values, object)  # some need a uint64, others a signed type
    if (integers < 0).any():
        raise FieldTypeError(
            field,
            "has integers below 0 and others from 2**63 on, which no type holds together. Give "
            "the high and the low bits as two fields.",
        )
    return integers.astype(np.uint64)


def _check_integers(field: str, values: Any, floats: np.ndarray) -> None:
    """Raises if an integer beside floats would be rounded."""
    target = need_held_type(field, floats.dtype)
    # Floats hold all integers below `whole`. An item equal to it may be `whole + 1`, rounded.
    whole = 2.0 ** (np.finfo(target).nmant + 1)
    for place in np.argwhere(np.abs(floats) >= whole):
        value = functools.reduce(lambda x, i: x[i], place, values)
        if np.asarray(value).dtype.kind in INTEGERS and int(target.type(value)) != int(value):
            raise FieldTypeError(
                field,
                f"has the integer {value} beside floats, and as {target} it would be rounded. Give "
                "integers and floats as two fields.",
            )


INTEGERS = frozenset("biu")
"""The `dtype.kind`s of integers and booleans."""


def _kinds(values: Any) -> set[str]:
    """The `dtype.kind`s of the items of (nested) lists."""
    if not isinstance(values, list | tuple):
        return {np.asarray(values).dtype.kind}
    types = set(map(type, values))
    if all(x in (bool, int, float) or issubclass(x, np.generic) for x in types):
        return {np.dtype(x).kind for x in types}
    return set().union(*map(_kinds, values))


def _no_numbers(field: str, array: np.ndarray) -> FieldTypeError:
    """The error for an object array; names the type of the first item that is not a number."""
    others = (x for x in array.flat if not isinstance(x, bool | int | float | complex))
    kinds = ("None" if x is None else f"a {type(x).__name__}" for x in others)
    what = "".join(f", for {kind} in it" for kind in itertools.islice(kinds, 1))
    return FieldTypeError(
        field,
        f"has type object{what}, which JAX cannot hold. Encode it as numbers, or leave it out.",
    )


def _unequal(values: Any) -> str | None:
    """A text that names two rows of different shapes; None if a row is ragged itself."""
    try:
        shapes = [np.shape(row) for row in values]
    except (TypeError, ValueError):
        return None
    row = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    return None if row is None else f"row 0 has {shapes[0]} and row {row} {shapes[row]}"


def hold(
    field: str, values: np.ndarray, target: np.dtype, records: np.ndarray | None = None
) -> np.ndarray:
    """Values cast to `target`, their `held_type`; raises if an integer or a range would be lost.

    Floats may be rounded. `records` gives the record of each row, by default its index.
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
    """A record given as a dict, a tuple or a single value, as a dict of arrays and numbers."""
    if isinstance(value, Mapping):
        chosen = value if fields is None else {name: _chosen(value, name) for name in fields}
        return {
            field_name(k): as_record(x, None) if isinstance(x, Mapping) else _as_field(k, x)
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


def _chosen(record: Mapping[str, Any], name: str) -> Any:
    try:
        return record[name]
    except KeyError:
        if name in record:
            raise
        raise KeyError(f"{name!r} is not among the fields of the record, {list(record)}") from None


def field_name(name: Any) -> str:
    """The name, which must be a string: the keys 0 and "0" would become one field."""
    if not isinstance(name, str):
        raise FieldTypeError(str(name), f"must have a string as its name, got {name!r}.")
    return name


def _as_field(name: str, value: Any) -> Any:
    """A field of a record. Lists become arrays, since JAX would take a list for a tree of fields;
    None is refused, since JAX would drop it."""
    if value is None:
        raise FieldTypeError(name, "is None, which JAX cannot hold. Fill it, or leave it out.")
    if _is_plain(type(value)):
        return value
    array = as_array(name, value)
    if isinstance(array, np.ndarray) and array.dtype == object:
        raise _no_numbers(name, array)
    return array
