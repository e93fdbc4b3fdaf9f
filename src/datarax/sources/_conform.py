"""Records that were read on the host: what they look like, and whether they are what was said."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from .._types import Batch, Spec, escaped, flat_fields, spec_text
from ..errors import DataraxError, EmptySourceError, FieldTypeError, ReadError
from ._values import as_array, hold, need_held_type

T = TypeVar("T")

TRIES = 16
"""How many records, from the first to the last, are tried for one that shows what all look like."""


def held_spec(look: Callable[[], Spec]) -> Spec:
    """A spec in the types that JAX holds; a `FieldTypeError` names the field that it cannot."""
    with jax.ensure_compile_time_eval():  # the user's code may compute in JAX, in a trace of ours
        stored = look()
    if not jax.tree.leaves(stored):
        raise EmptySourceError("one whose records have no field")
    for name, x in flat_fields(stored, escaped).items():
        # `np.float32` and its dtype have a `shape`, too.
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
    """Rows that were read, and are not what the source has said that they are."""

    way_out = (
        "All records of a source have the same fields, shapes and types: make them so where they "
        "are read."
    )


def read_error(
    source: str, file: str, record: int | None, error: Exception, **how: Any
) -> ReadError:
    """What a source says of a record that could not be read; `how` is `way_out` and `retry`."""
    if isinstance(error, Unfit):  # it will be the same when it is read again
        how = {"way_out": error.way_out, "retry": False}
        return ReadError(source, file, record, str(error), **how)
    return ReadError(source, file, record, f"{type(error).__name__}: {error}", **how)


def conform(batch: Batch, stored: Spec, held: Spec, records: np.ndarray) -> Batch:
    """A batch of the `stored` spec in the types of the `held` one, or what is wrong with it."""
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
            known = kind[0] is not None and kind[1] is not None  # to NumPy float64 equals None
            came = spec_text({name: x}) if known else f"{name} {type(x).__name__}"
            other = jax.ShapeDtypeStruct(shape, wanted[name].dtype)
            if known and x.shape[:1] == shape[:1]:  # it is the records that are others
                x, other = (jax.ShapeDtypeStruct(y.shape[1:], y.dtype) for y in (x, other))
                came = spec_text({name: x})
            raise Unfit(f"it has {came}, and not {spec_text({name: other})}")
        fields[name] = hold(name, np.asarray(as_array(name, x)), targets[name].dtype, records)
    return jax.tree.map(fields.__getitem__, _named(stored))


def _needs_nothing(batch: Batch, stored: Spec, held: Spec, count: int) -> bool:
    """Whether a batch is already what `conform` makes of it, for which no names are needed."""
    leaves, structure = jax.tree.flatten(batch)
    wanted, other = jax.tree.flatten(stored)
    return structure == other and all(
        type(x) is np.ndarray  # and not one with a mask
        and x.shape == (count, *w.shape)
        and x.dtype == w.dtype == target.dtype
        for x, w, target in zip(leaves, wanted, jax.tree.leaves(held), strict=True)
    )


def copier(stored: Spec, held: Spec) -> Callable[[Any], Any]:
    """What copies a record of the `stored` spec whose values the `held` one can hold; None for one
    that has to be looked at more closely, which takes ten times as long."""
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
    """What is read of a record that can be, the first if that can: one that cannot, or that holds
    what JAX cannot, says nothing of others."""
    errors = []
    for record in np.unique(np.linspace(0, max(length - 1, 0), TRIES).astype(int)).tolist():
        try:
            return read(record)
        except Exception as error:
            if isinstance(error, DataraxError) and not isinstance(error, FieldTypeError):
                raise  # it is about all of them
            errors.append(error)
    raise errors[0]


def spec_of(record: Any) -> Spec:
    """Shape and type of a record given as a (nested) dict of arrays and numbers."""
    for name, x in flat_fields(record, escaped).items():
        if isinstance(x, str | bytes) or as_array(name, x).dtype == object:
            raise FieldTypeError(
                name,
                f"holds {type(x).__name__}, which JAX cannot hold. "
                "Encode it as numbers, or leave it out.",
            )

    def spec(x: Any) -> jax.ShapeDtypeStruct:
        native = np.asarray(x).dtype.newbyteorder("=")  # as `stack` makes it
        return jax.ShapeDtypeStruct(np.shape(x), native)

    return jax.tree.map(spec, record)


def stack(records: list[Any]) -> Batch:
    """Rows from single records, which must all be alike."""
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
                    f"it has a row {spec_text({'': column[-1]}).strip()} "
                    f"beside {spec_text({'': column[0]}).strip()}"
                )
    return jax.tree.unflatten(structure, [np.stack(column) for column in columns])


def _named(tree: Any) -> Any:
    """The names of the leaves in the place of the leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), list(flat_fields(tree, escaped)))
