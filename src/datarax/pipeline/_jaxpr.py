"""What a traced program shows of itself before it is compiled."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from ._stages import scoped

CACHED_BYTES, MISS_BYTES = 2**24, 2**10
"""A row that is picked from an array of more than so many bytes, which no cache may hold, weighs so
many more: what could have been written while it was waited for."""


def callers(jaxpr: Any, outer: str | None) -> Iterator[str | None]:
    """The nodes whose operations call the host, those of inner programs included."""
    for equation in jaxpr.eqns:
        node = scoped(str(equation.source_info.name_stack)) or outer
        # Under the name of `jax.debug.print` stands no callback, but its effect.
        if "callback" in equation.primitive.name or "debug" in equation.primitive.name:
            yield node
        for inner in _inner(equation):
            yield from callers(inner, node)


def weight(jaxpr: Any) -> int:
    """Bytes of all arrays that are made, those of one turn of each loop, and what stands for rows
    that no cache holds."""
    total = 0
    for equation in jaxpr.eqns:
        if inner := _inner(equation):
            total += sum(map(weight, inner))
        else:
            total += sum(_bytes(x.aval) for x in equation.outvars)
        if equation.primitive.name == "gather" and _bytes(equation.invars[0].aval) > CACHED_BYTES:
            row = max(math.prod(equation.params["slice_sizes"]), 1)
            total += equation.outvars[0].aval.size // row * MISS_BYTES
    return total


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0


def constants(jaxpr: Any) -> Iterator[Any]:
    """What a program holds, those in it included; scalars are written into its operations."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for inner in _inner(equation):
            yield from constants(inner)


def _inner(equation: Any) -> list[Any]:
    """The programs that an operation runs: branches, the body of a loop."""
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
    return [x for x in leaves if hasattr(x, "eqns")]
