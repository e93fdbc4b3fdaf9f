"""What a traced program shows of itself before it is compiled."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ._stages import scoped

CACHED_BYTES, MISS_BYTES = 2**24, 2**10
"""A row that is picked from an array of more than so many bytes, which no cache may hold, weighs so
many more: what could have been written while it was waited for."""


def callers(jaxpr: Any, outer: str | None) -> Iterator[str | None]:
    """The nodes whose operations call the host, those of inner programs included."""
    for equation, programs in _equations(jaxpr):
        # Under the name of `jax.debug.print` stands no callback, but its effect.
        calls = "callback" in equation.primitive.name or "debug" in equation.primitive.name
        if calls or programs:
            node = scoped(str(equation.source_info.name_stack)) or outer
            if calls:
                yield node
            for inner in programs:
                yield from callers(inner, node)


def weight(jaxpr: Any) -> int:
    """Bytes of all arrays that are made, those of one turn of each loop, and what stands for rows
    that no cache holds."""
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
    """What a program holds, those in it included; scalars are written into its operations."""
    yield from getattr(jaxpr, "consts", ())
    for equation, programs in _equations(jaxpr):
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for inner in programs:
            yield from constants(inner)


def _bytes(avals: Iterable[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in avals if hasattr(x, "dtype"))


def _equations(jaxpr: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The operations of a program, and the programs that each runs: branches, a loop's body."""
    for equation in jaxpr.eqns:
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        yield equation, [x for x in leaves if hasattr(x, "eqns")]
