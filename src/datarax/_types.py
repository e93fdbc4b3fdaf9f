"""The nouns of the house, with their axes.

Axes: `b` rows of a batch, `n` records of a source.
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
"""An array of JAX, or of NumPy where the host computes."""

Batch: TypeAlias = dict[str, Any]
"""Arrays by field name, rows on axis 0; nested dicts are allowed."""

Words: TypeAlias = UInt32[AnyArray, "2"]
"""The two words of a threefry key."""

KeyLike: TypeAlias = Key[Array, ""] | UInt32[AnyArray, "2"]
"""A key as users have it: typed, or its two words."""

RowWords: TypeAlias = UInt32[AnyArray, "b 2"]

Scalar: TypeAlias = UInt[Array, ""]
Offsets: TypeAlias = UInt[Array, " b"]

Turns: TypeAlias = UInt[AnyArray, " b"]
"""How many epochs after the first of a batch each row stands."""

Records: TypeAlias = UInt[Array, " b"]
Mask: TypeAlias = Bool[Array, " b"]

Spec: TypeAlias = dict[str, Any]
"""A batch with `jax.ShapeDtypeStruct` in the place of arrays."""


class Cursor(NamedTuple):
    """Where a pipeline stands: the next row is row `offset` of epoch `epoch`.

    Plain integers on the host, scalars of `_order.word(length)` inside a compiled program.
    """

    epoch: Any
    offset: Any


class Signed(type(nnx.Module)):
    """Modules that show `help` and editors the parameters of `__init__`, and not `*args`."""

    @property
    def __signature__(cls) -> inspect.Signature:
        own = inspect.signature(cls.__init__)
        return own.replace(parameters=list(own.parameters.values())[1:])


def integer(value: Any, otherwise: int) -> int:
    """The integer that `value` is; `otherwise` for anything else, `True` included."""
    try:
        return otherwise if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return otherwise


def expect(name: str, value: Any, kind: type) -> None:
    """Raises unless the argument `name` is of that kind."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be of type {kind.__name__}, got {type(value).__name__}.")


def names(option: str, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that an option lists; a single one would be read letter by letter."""
    if given is None:
        return None
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"`{option}` is a list of names, got {given!r}.")
    if len(set(given)) < len(given) or not given:
        # One of two with one name would be lost, and a batch of none has no rows.
        raise ValueError(f"`{option}` names at least one, and none of them twice, got {given!r}.")
    return tuple(given)


def namespace(*arrays: Any) -> Any:
    """NumPy if it alone can compute with these arrays, else JAX's namespace of the same names."""
    return np if all(isinstance(x, np.ndarray) for x in arrays) else jnp


def is_traced(x: Any) -> bool:
    """Whether a value stands for one that is not there yet, inside a trace of JAX's."""
    return isinstance(x, Tracer)


def flat_fields(tree: Any, text: Callable[[str], str] = str) -> dict[str, Any]:
    """The leaves of a batch by dotted field name: `{"a": {"b": x}}` gives `{"a.b": x}`.

    What is no dict is a leaf, a list too, which is no batch of its items. With `escaped` as the
    `text` of a step, no two of them have one name.
    """
    flatten = jax.tree_util.tree_flatten_with_path
    leaves, _ = flatten(tree, is_leaf=lambda x: not isinstance(x, dict))
    return {".".join(text(str(k.key)) for k in path): leaf for path, leaf in leaves}


def escaped(name: str) -> str:
    """A field's name in a dotted path: a dot of its own is no step of the path."""
    return name.replace("\\", "\\\\").replace(".", "\\.")


def spec_text(spec: Any) -> str:
    """A spec for people: `image float32[16,32,32,3], label int32[16]`."""
    return ", ".join(field_texts(spec))


def type_text(x: Any) -> str:
    """What an array is, for people: `float32[16,2]`."""
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


FIELDS_SHOWN = 32
"""The most fields of a spec that people are shown: a table may have thousands."""


def field_texts(spec: Any) -> list[str]:
    """The fields of a spec for people, one by one, and after the first few how many more."""
    fields = flat_fields(spec)
    texts = [
        f"{name} {type_text(leaf)}"
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        else f"{name} {type(leaf).__name__}"
        for name, leaf in itertools.islice(fields.items(), FIELDS_SHOWN)
    ]
    more = len(fields) - len(texts)
    return [*texts, f"and {more} more"] if more else texts
