"""NNX objects that a function reaches without being given them.

Compiled code would hold their values as constants: what the user changes later would not be seen,
what the function changes would be lost, and gradients would be zero. So they are refused.
"""

import collections
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
    return sorted(set(_reached(function, DEPTH, {id(function)})))


def _reached(function: Any, depth: int, seen: set[Any]) -> Iterator[str]:
    """What a callable holds: bound or default arguments, closed-over values, globals it loads."""
    used = frozenset[str]()
    if inspect.isfunction(function):
        used = frozenset(name for code in _codes(function) for name in code.co_names)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        held = [*_closure(function), *_globals(function), *(("a default", x) for x in defaults)]
    elif inspect.ismethod(function):
        whole = function.__func__
        if inspect.isfunction(whole):
            used = frozenset(name for code in _codes(whole) for name in code.co_names)
        held = [("self", function.__self__), (function.__name__, whole)]
    elif isinstance(function, functools.partial):
        given = (function.func, *function.args, *function.keywords.values())
        held = [("an argument of functools.partial", x) for x in given]
        # Which of their attributes the function reads is not known from its own names.
        held += [(f"an argument's {name}", v) for x in given for name, v in _plain_attributes(x)]
    elif hasattr(function, "__wrapped__"):
        held = [(getattr(function, "__name__", "a function"), function.__wrapped__)]
    else:
        held = [(f"attribute {name}", x) for name, x in _attributes(function)]
    for name, x in held:
        yield from _named(name, x, used, depth - 1, seen)


def _named(name: str, x: Any, used: frozenset[str], depth: int, seen: set[Any]) -> Iterator[str]:
    """The NNX objects at `x`; of an object's attributes those count whose names are `used`."""
    if isinstance(x, nnx.Pytree | nnx.Variable):
        yield name
    elif depth > 0 and (id(x), used) not in seen:
        seen.add((id(x), used))
        if isinstance(x, collections.UserDict | collections.UserList):
            x = x.data
        if isinstance(x, list | tuple | set | frozenset | dict):
            for inner in x.values() if isinstance(x, dict) else x:
                yield from _named(name, inner, used, depth - 1, seen)
        elif isinstance(x, types.ModuleType):  # not what its functions hold: that has no end
            found = {attribute: vars(x).get(attribute) for attribute in used}
            yield from (f"{name}.{k}" for k, v in found.items() if isinstance(v, _OBJECTS))
        elif callable(x) and not isinstance(x, type):
            yield from _reached(x, depth, seen)
        elif hasattr(x, "__dict__"):
            for attribute in used:
                inner = inspect.getattr_static(x, attribute, None)
                if inspect.isfunction(inner) and not isinstance(x, type):
                    inner = types.MethodType(inner, x)
                yield from _named(f"{name}.{attribute}", inner, used, depth - 1, seen)


_OBJECTS = nnx.Pytree | nnx.Variable


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """What an object of the user's holds; a library's functions and types are no such thing."""
    plain = isinstance(x, nnx.Pytree | types.ModuleType | type) or not hasattr(x, "__dict__")
    return [] if plain else list(vars(x).items())


def _plain_attributes(x: Any) -> list[tuple[str, Any]]:
    return [] if callable(x) else _attributes(x)


def _codes(function: types.FunctionType) -> list[types.CodeType]:
    """The code of a function, and of those that stand in it."""
    codes = [function.__code__]
    for code in codes:
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return codes


def _closure(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that the function's code loads, and those of functions of the same module."""
    for code in _codes(function):
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "LOAD_GLOBAL" and name in function.__globals__:
                x = function.__globals__[name]
                if getattr(x, "__globals__", function.__globals__) is function.__globals__:
                    yield name, x
