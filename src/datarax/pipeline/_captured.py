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


def _reached(function: Any, depth: int, seen: set[int]) -> Iterator[str]:
    """What a callable holds: bound or default arguments, closed-over values, globals it loads."""
    if inspect.isfunction(function):
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        held = [*_closure(function), *_globals(function), *(("a default", x) for x in defaults)]
    elif inspect.ismethod(function):
        held = [("self", function.__self__), (function.__name__, function.__func__)]
    elif isinstance(function, functools.partial):
        given = (function.func, *function.args, *function.keywords.values())
        held = [("an argument of functools.partial", x) for x in given]
    elif hasattr(function, "__wrapped__"):
        held = [(getattr(function, "__name__", "a function"), function.__wrapped__)]
    else:
        held = [(f"attribute {name}", x) for name, x in _attributes(function)]
    for name, x in held:
        yield from _named(name, x, depth - 1, seen)
    yield from _read(function, depth - 1, set())


def _read(function: Any, depth: int, seen: set[Any]) -> Iterator[str]:
    """The NNX objects that code reads as attributes of what it closes over or loads, or of `self`.

    Only what is read counts: of a trainer with a model, a function may use the learning rate. The
    methods that are called on such an object are read as well.
    """
    method = inspect.ismethod(function)
    whole = function.__func__ if method else function
    if not inspect.isfunction(whole) or depth < 1 or whole.__code__ in seen:
        return
    seen.add(whole.__code__)
    known = dict(_closure(whole))
    if method and whole.__code__.co_varnames:
        known[whole.__code__.co_varnames[0]] = function.__self__
    for code in _codes(whole):
        path, x = "", _NOTHING
        for step in dis.get_instructions(code):
            name = _last_name(step.argval)
            if step.opname == "LOAD_GLOBAL":
                path, x = name, whole.__globals__.get(name, _NOTHING)
            elif step.opname.startswith(("LOAD_DEREF", "LOAD_FAST")):
                path, x = name, known.get(name, _NOTHING)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and x is not _NOTHING:
                path, x = f"{path}.{name}", _attribute(x, name)
                if isinstance(x, nnx.Pytree | nnx.Variable):
                    yield path
                    x = _NOTHING
                elif inspect.ismethod(x):
                    yield from _read(x, depth - 1, seen)
            else:
                x = _NOTHING


_NOTHING = object()


def _last_name(argument: Any) -> Any:
    """The name that an instruction loads last: some load two."""
    return argument[-1] if isinstance(argument, tuple) and argument else argument


def _attribute(x: Any, name: str) -> Any:
    """What `x.name` is, without running code of the user's; of NNX objects nothing."""
    if isinstance(x, nnx.Pytree):
        return _NOTHING
    found = inspect.getattr_static(x, name, _NOTHING)
    if name not in getattr(x, "__dict__", {}) and inspect.isfunction(found):
        return types.MethodType(found, x)
    return found


def _named(name: str, x: Any, depth: int, seen: set[int]) -> Iterator[str]:
    if isinstance(x, nnx.Pytree | nnx.Variable):
        yield name
    elif depth > 0 and id(x) not in seen:
        seen.add(id(x))
        if isinstance(x, collections.UserDict | collections.UserList):
            x = x.data
        if isinstance(x, list | tuple | set | frozenset | dict):
            for inner in x.values() if isinstance(x, dict) else x:
                yield from _named(name, inner, depth - 1, seen)
        elif name == "self":
            for attribute, inner in _attributes(x):
                yield from _named(f"self.{attribute}", inner, depth - 1, seen)
        elif callable(x) and not isinstance(x, type):
            yield from _reached(x, depth, seen)


def _attributes(x: Any) -> list[tuple[str, Any]]:
    """What an object of the user's holds; a library's functions and types are no such thing."""
    plain = isinstance(x, nnx.Pytree | types.ModuleType | type) or not hasattr(x, "__dict__")
    return [] if plain else list(vars(x).items())


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


def _codes(function: types.FunctionType) -> list[types.CodeType]:
    """The code of a function, and of those that stand in it."""
    codes = [function.__code__]
    for code in codes:
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return codes
