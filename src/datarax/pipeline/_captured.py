"""NNX objects that a function reaches without being given them.

Compiled code would hold their values as constants: what the user changes later would not be seen,
what the function changes would be lost, and gradients would be zero. So they are refused.
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

DEPTH = 8
"""How many functions deep a captured object is looked for."""


def captured(function: Callable[..., Any]) -> list[str]:
    """The names under which `function` reaches NNX objects by itself."""
    return sorted(set(_reached(function, DEPTH, set())))


def _reached(function: Any, depth: int, seen: set[int]) -> Iterator[str]:
    if depth == 0 or id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, functools.partial):
        given = (function.func, *function.args, *function.keywords.values())
        for x in given:
            yield from _named("an argument of functools.partial", x, depth, seen)
    elif inspect.ismethod(function):
        yield from _named("self", function.__self__, depth, seen)
        yield from _reached(function.__func__, depth - 1, seen)
    elif inspect.isfunction(function):
        for name, x in (*_closure(function), *_globals(function)):
            yield from _named(name, x, depth, seen)
    elif hasattr(function, "__wrapped__"):
        yield from _reached(function.__wrapped__, depth - 1, seen)


def _named(name: str, x: Any, depth: int, seen: set[int]) -> Iterator[str]:
    if isinstance(x, nnx.Pytree | nnx.Variable):
        yield name
    elif callable(x) and not isinstance(x, type):
        yield from _reached(x, depth - 1, seen)


def _closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that the function's code loads, and those of functions of the same module."""
    codes = [function.__code__]
    for code in codes:
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL" and name in function.__globals__:
                x = function.__globals__[name]
                if getattr(x, "__globals__", function.__globals__) is function.__globals__:
                    yield name, x
