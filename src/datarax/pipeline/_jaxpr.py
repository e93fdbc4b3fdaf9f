"""What the jaxpr of a program tells before it is compiled."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ._stages import scoped

CACHED_BYTES, MISS_BYTES = 2**24, 2**10
"""Each row gathered from an array of more than `CACHED_BYTES`, which does not fit into a cache,
counts `MISS_BYTES` more: what could have been written while waiting for it."""


def callers(jaxpr: Any, outer: str | None) -> Iterator[str | None]:
    """The nodes whose operations call back to the host, inner jaxprs included."""
    for equation, programs in _equations(jaxpr):
        # The primitive of `jax.debug.print` is not named a callback.
        calls = "callback" in equation.primitive.name or "debug" in equation.primitive.name
        if calls or programs:
            node = scoped(str(equation.source_info.name_stack)) or outer
            if calls:
                yield node
            for inner in programs:
                yield from callers(inner, node)


def weight(jaxpr: Any) -> int:
    """Bytes of all arrays that a program makes, of a loop those of one iteration, and `MISS_BYTES`
    for each gathered row that no cache holds."""
    total, made = 0, []
    for equation, programs in _equations(jaxpr):
        total += sum(map(weight, programs))
        if not programs:
            made += [x.aval for x in equation.outvars]
        gathers = equation.primitive.name == "gather"
        if gathers and _bytes([equation.invars[0].aval]) > CACHED_BYTES:
            row = max(math.prod(equation.params["slice_sizes"]), 1)
            total += equation.outvars[0].aval.size // row * MISS_BYTES
    return total + _bytes(made)


def constants(jaxpr: Any) -> Iterator[Any]:
    """The constants of a program and of its inner jaxprs, scalar literals included."""
    yield from getattr(jaxpr, "consts", ())
    for equation, programs in _equations(jaxpr):
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for inner in programs:
            yield from constants(inner)


def _bytes(avals: Iterable[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in avals if hasattr(x, "dtype"))


def _equations(jaxpr: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The equations of a jaxpr, each with its inner jaxprs: branches, the body of a loop."""
    for equation in jaxpr.eqns:
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        yield equation, [x for x in leaves if hasattr(x, "eqns")]
