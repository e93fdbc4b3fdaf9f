"""Records on the host: their specs, and the check that what was read has the spec it should."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from .._types import Batch, Spec, escaped, flat_fields, spec_text, type_text
from ..errors import DataraxError, EmptySourceError, FieldTypeError, ReadError
from ._values import as_array, hold, need_held_type

T = TypeVar("T")

TRIES = 16
"""The most records that are read to find the spec. They are spread evenly over the source, so that
a damaged beginning does not make the source unreadable."""


def held_spec(look: Callable[[], Spec]) -> Spec:
    """A spec in the types that JAX holds; a `FieldTypeError` names a field that it cannot."""
    with jax.ensure_compile_time_eval():  # `look` may run user code in JAX while we trace
        stored = look()
    if not jax.tree.leaves(stored):
        raise EmptySourceError(text="Records must have at least one field, but these have none.")
    for name, x in flat_fields(stored, escaped).items():
        # A bare `hasattr(x, "shape")` would accept `np.float32` and dtypes, which have one too.
        if not isinstance(getattr(x, "shape", None), tuple) or not hasattr(x, "dtype"):
            raise FieldTypeError(
                name,
                f"has {x!r} as its spec, which must be its shape and type: "
                "jax.ShapeDtypeStruct(shape, dtype).",
            )
    return jax.tree.map(
        lambda name, x: jax.ShapeDtypeStruct(x.shape, need_held_type(name, x.dtype)),
        _named(stored),
        stored,
    )


class Unfit(ValueError):
    """Rows that do not have the spec of their source; reading them again would not help."""

    way_out = (
        "All records of a source have the same fields, shapes and types: make them so where they "
        "are read."
    )


def read_error(
    source: str, file: str, record: int | None, error: Exception, **how: Any
) -> ReadError:
    """The `ReadError` for an `error` while reading; `how` may set its `way_out` and `retry`."""
    if isinstance(error, Unfit):
        how = {"way_out": error.way_out, "retry": False}
        return ReadError(source, file, record, str(error), **how)
    return ReadError(source, file, record, f"{type(error).__name__}: {error}", **how)


def conform(batch: Batch, stored: Spec, held: Spec, records: np.ndarray) -> Batch:
    """A batch of the `stored` spec, cast to the `held` one; raises if it has another spec."""
    if _needs_nothing(batch, stored, held, len(records)):
        return batch
    if not isinstance(batch, dict):
        raise Unfit(f"it is of type {type(batch).__name__}, and not a dict of arrays")
    found, wanted, targets = (flat_fields(x, escaped) for x in (batch, stored, held))
    if found.keys() != wanted.keys():
        raise Unfit(f"it has the fields {list(found)}, and not {list(wanted)}")
    fields = {}
    for name, x in found.items():
        shape = (len(records), *wanted[name].shape)
        kind = getattr(x, "shape", None), getattr(x, "dtype", None)
        if kind != (shape, wanted[name].dtype):
            known = kind[0] is not None and kind[1] is not None  # NumPy says float64 == None
            came = spec_text({name: x}) if known else f"{name} {type(x).__name__}"
            other = jax.ShapeDtypeStruct(shape, wanted[name].dtype)
            if known and x.shape[:1] == shape[:1]:  # only the row differs: show the row
                x, other = (jax.ShapeDtypeStruct(y.shape[1:], y.dtype) for y in (x, other))
                came = spec_text({name: x})
            raise Unfit(f"it has {came}, and not {spec_text({name: other})}")
        fields[name] = hold(name, np.asarray(as_array(name, x)), targets[name].dtype, records)
    return jax.tree.map(fields.__getitem__, _named(stored))


def _needs_nothing(batch: Batch, stored: Spec, held: Spec, count: int) -> bool:
    """Whether `conform` would return the batch unchanged; the fast path, which builds no names."""
    leaves, structure = jax.tree.flatten(batch)
    wanted, other = jax.tree.flatten(stored)
    return structure == other and all(
        type(x) is np.ndarray  # a subclass may carry a mask
        and x.shape == (count, *w.shape)
        and x.dtype == w.dtype == target.dtype
        for x, w, target in zip(leaves, wanted, jax.tree.leaves(held), strict=True)
    )


def copier(stored: Spec, held: Spec) -> Callable[[Any], Any]:
    """A function that copies a record of the `stored` spec whose values fit the `held` one.

    It returns None for any other record, which the caller then passes through `stack` and
    `conform`. Those take ten times as long.
    """
    wanted, structure = jax.tree.flatten(stored)
    kinds = [
        (x.shape, x.dtype, to.dtype) for x, to in zip(wanted, jax.tree.leaves(held), strict=True)
    ]

    def copied(record: Any) -> Any:
        leaves, other = jax.tree.flatten(record)
        if other != structure:
            return None
        copies = []
        for x, (shape, dtype, target) in zip(leaves, kinds, strict=True):
            plain = type(x) is np.ndarray or isinstance(x, np.number | np.bool_)
            if plain and x.shape == shape and x.dtype == dtype == target:
                copies.append(np.array(x))
            elif type(x) is int and shape == () and dtype == np.int64:
                bounds = np.iinfo(target)
                if not bounds.min <= x <= bounds.max:
                    return None
                copies.append(np.asarray(x, dtype))
            else:
                return None
        return jax.tree.unflatten(structure, copies)

    return copied


def first_readable(read: Callable[[int], T], length: int) -> T:
    """`read(i)` for the first of up to `TRIES` records `i` that can be read.

    A damaged record, or one with a value that JAX cannot hold, does not end the search.
    """
    errors = []
    for record in np.unique(np.linspace(0, max(length - 1, 0), TRIES).astype(int)).tolist():
        try:
            return read(record)
        except Exception as error:
            if isinstance(error, DataraxError) and not isinstance(error, FieldTypeError):
                raise  # it concerns the whole source
            errors.append(error)
    raise errors[0]


def spec_of(record: Any) -> Spec:
    """The spec of a record, a (nested) dict of arrays and numbers."""
    for name, x in flat_fields(record, escaped).items():
        if isinstance(x, str | bytes) or as_array(name, x).dtype == object:
            raise FieldTypeError(
                name,
                f"holds {type(x).__name__}, which JAX cannot hold. "
                "Encode it as numbers, or leave it out.",
            )

    def spec(x: Any) -> jax.ShapeDtypeStruct:
        native = np.asarray(x).dtype.newbyteorder("=")  # `stack` returns native byte order
        return jax.ShapeDtypeStruct(np.shape(x), native)

    return jax.tree.map(spec, record)


def stack(records: list[Any]) -> Batch:
    """A batch of single records, which must have the same fields, shapes and types."""
    structure, fields = jax.tree.structure(records[0]), list(flat_fields(records[0], escaped))
    columns: list[list[Any]] = [[] for _ in fields]
    for record in records:
        leaves, other = jax.tree.flatten(record)
        if other != structure:
            raise ValueError(
                f"it has the fields {list(flat_fields(record))}, "
                f"and not {list(flat_fields(records[0]))}"
            )
        for field, column, x in zip(fields, columns, leaves, strict=True):
            column.append(x if type(x) is np.ndarray else np.asarray(as_array(field, x)))
            if column[-1].dtype != column[0].dtype or column[-1].shape != column[0].shape:
                raise ValueError(
                    f"it has a row {type_text(column[-1])} beside {type_text(column[0])}"
                )
    return jax.tree.unflatten(structure, [np.stack(column) for column in columns])


def _named(tree: Any) -> Any:
    """The tree with each leaf replaced by its name."""
    return jax.tree.unflatten(jax.tree.structure(tree), list(flat_fields(tree, escaped)))
