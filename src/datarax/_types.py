"""The types that all modules share, checks of arguments, and texts that show arrays to users.

In shapes, `b` is the number of rows of a batch.
"""

import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Key, UInt, UInt32

AnyArray: TypeAlias = Array | np.ndarray
"""A JAX array, or a NumPy array in what also runs on the host."""

Batch: TypeAlias = dict[str, Any]
"""Arrays by field name, rows on axis 0; nested dicts are allowed."""

Words: TypeAlias = UInt32[AnyArray, "2"]
"""The two words of a threefry key."""

KeyLike: TypeAlias = Key[Array, ""] | UInt32[AnyArray, "2"]
"""A key as users pass it: typed, or its two words."""

RowWords: TypeAlias = UInt32[AnyArray, "b 2"]
"""A threefry key per row."""

Scalar: TypeAlias = UInt[Array, ""]
Offsets: TypeAlias = UInt[Array, " b"]

Turns: TypeAlias = UInt[AnyArray, " b"]
"""The epoch of each row, counted from the first epoch that an `Order` or a batch spans."""

Records: TypeAlias = UInt[Array, " b"]
Mask: TypeAlias = Bool[Array, " b"]

Spec: TypeAlias = dict[str, Any]
"""A batch with a `jax.ShapeDtypeStruct` in place of each array."""


class Cursor(NamedTuple):
    """The position of a pipeline: its next row is the one at `offset` in epoch `epoch`.

    Python integers on the host, scalars of dtype `_order.word(length)` in a compiled program.
    """

    epoch: Any
    offset: Any


class Signed(type(nnx.Module)):
    """Metaclass of modules whose signature is that of `__init__`, for `help` and editors.

    The metaclass of `nnx.Module` would show `*args, **kwargs`.
    """

    @property
    def __signature__(cls) -> inspect.Signature:
        own = inspect.signature(cls.__init__)
        return own.replace(parameters=list(own.parameters.values())[1:])


def integer(value: Any, otherwise: int) -> int:
    """`value` as an `int` if it is an integer, else `otherwise`; a `bool` is no integer."""
    try:
        return otherwise if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return otherwise


def expect(name: str, value: Any, kind: type) -> None:
    """Raises `TypeError` unless `value`, the argument `name`, is a `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be of type {kind.__name__}, got {type(value).__name__}.")


def names(option: str, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that were `given` for an option, as a tuple; None if that is None.

    Raises `TypeError` for a single string, which would be read letter by letter, and `ValueError`
    for no names or duplicates.
    """
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"`{option}` is a list of names, got {given!r}.")
    if len(set(given)) < len(given) or not given:
        # Of two fields with one name, a batch would keep one; a batch of no fields has no rows.
        raise ValueError(f"`{option}` names at least one, and none of them twice, got {given!r}.")
    return tuple(given)


def namespace(*arrays: Any) -> Any:
    """`numpy` if all of these are NumPy arrays, else `jax.numpy`."""
    return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp


def is_traced(x: Any) -> bool:
    return isinstance(x, Tracer)


def flat_fields(tree: Any, text: Callable[[str], str] = str) -> dict[str, Any]:
    """The leaves of a batch by dotted field name: `{"a": {"b": x}}` gives `{"a.b": x}`.

    Anything but a dict is a leaf, even a list. `text` maps each key of a path to its text. Pass
    `escaped` to make all names distinct: `{"a.b": x}` has the same name otherwise.
    """
    flatten = jax.tree_util.tree_flatten_with_path
    leaves, _ = flatten(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {".".join(text(str(k.key)) for k in path): leaf for path, leaf in leaves}


def escaped(name: str) -> str:
    """Escapes the dots in a field's name, which would otherwise separate names in a path."""
    return name.replace("\\", "\\\\").replace(".", "\\.")


def spec_text(spec: Any) -> str:
    """A spec for messages: `image float32[16,32,32,3], label int32[16]`."""
    return ", ".join(field_texts(spec))


def type_text(x: Any) -> str:
    """The dtype and shape of an array, for messages: `float32[16,2]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


FIELDS_SHOWN = 32
"""The most fields of a spec that a message shows: a table can have thousands."""


def field_texts(spec: Any) -> list[str]:
    """One text per field of a spec. After `FIELDS_SHOWN` fields, a last text counts the others."""
    fields = flat_fields(spec)
    texts = [
        f"{name} {type_text(leaf)}"
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        else f"{name} {type(leaf).__name__}"
        for name, leaf in itertools.islice(fields.items(), FIELDS_SHOWN)
    ]
    more = len(fields) - len(texts)
    return [*texts, f"and {more} more"] if more else texts
