"""NNX objects that a function uses without being given them.

Compiled code would hold their values as constants. Later changes by the user would not be seen,
changes by the function would be lost, and gradients would be zero. So they are refused.

A function uses an NNX object if its code loads it by name. An object may hold one among other
things, as a trainer holds a model, and the function may use only the rest. It uses the model if one
of the model's values is a constant of the traced program. That check misses a value that is turned
into a Python number or a NumPy array before it meets the program, an array that is also held
outside of the model, and a value that an inner `jax.jit` has cached.
"""

import collections
import contextlib
import dis
import functools
import inspect
import itertools
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.errors import TraceContextError

from .._variables import iter_graph

FIRST, MOST = 1_000, 10_000
"""The most elements of a container, and the most objects in all, that are looked at, nearest first:
a vocabulary of millions must cost no time."""

NNX = (nnx.Pytree, nnx.Variable)
"""Types of objects whose values may change."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.ndarray)
"""Types of objects that hold no other object."""

LIBRARIES = {"jax", "jaxlib", "numpy", "flax", "optax", "equinox", "datarax", "builtins"}
"""Packages whose code loads no object of the user's by name."""


def captured(function: Callable[..., Any], constants: Iterable[Any] = ()) -> list[str]:
    """The names under which `function` uses NNX objects; `constants` are those of its program."""
    held = {id(x) for x in constants if isinstance(x, jax.Array)}
    found = list(_reached(function, bool(held)))
    # An array that is also reachable by itself may be what the function uses.
    held -= {id(x) for _, x, _ in found if isinstance(x, jax.Array)}
    return sorted({
        path or "step_fn"
        for path, x, loaded in found
        if isinstance(x, NNX) and (loaded or any(id(value) in held for value in _values(x)))
    })  # fmt: skip


def blamed(function: Callable[..., Any], error: Exception) -> list[str]:
    """The names under which `function` reaches the NNX object that Flax refuses to change since it
    belongs to another trace; none for any other error."""
    plain = type(error) is ValueError and "different trace level" in str(error)  # by `nnx.grad`
    if not plain and not isinstance(error, TraceContextError):
        return []
    # Flax's frames of the traceback hold the object; the user's may hold copies of it.
    frames = [x for link in _chain(error) for x, _ in traceback.walk_tb(link.__traceback__)]
    flax = (x for x in frames if x.f_globals.get("__name__", "").partition(".")[0] == "flax")
    held = {id(x) for frame in flax for x in frame.f_locals.values() if isinstance(x, NNX)}
    return sorted({
        path or "step_fn"
        for path, x, _ in (_reached(function, True) if held else ())
        if isinstance(x, NNX) and held & {id(x), *(id(part) for _, part in iter_graph(x))}
    })  # fmt: skip


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def reached(function: Callable[..., Any]) -> list[str]:
    """The names of all NNX objects that `function` comes to."""
    return sorted({
        path or "step_fn" for path, x, _ in _reached(function, True) if isinstance(x, NNX)
    })  # fmt: skip


def own(x: Any, name: str, default: Any = None) -> Any:
    """`getattr`, but without calling a `__getattr__` of the user's, which may return anything."""
    made_up = hasattr(type(x), "__getattr__") and inspect.getattr_static(x, name, None) is None
    return default if made_up else getattr(x, name, default)


class _Found(NamedTuple):
    """An object that a function reaches: `loaded` by name, or through another object."""

    path: str
    x: Any
    loaded: bool


def _reached(function: Any, through: bool) -> Iterator[_Found]:
    """The NNX objects and arrays that a function loads by name or, with `through`, reaches through
    other objects; nearest first."""
    looked, seen, left = [_Found("", function, True)], {id(function)}, MOST
    for found in looked:
        kind = type(found.x)  # `isinstance` may run the object's own code
        if issubclass(kind, (*NNX, jax.Array)):
            yield found
            continue
        try:
            parts = list(itertools.islice(_parts(found), left))
        except Exception:  # an object that refuses to be inspected
            continue
        left -= len(parts)
        for part in parts:
            known = issubclass(type(part.x), PLAIN) or id(part.x) in seen
            if (part.loaded or through) and not known:
                seen.add(id(part.x))
                looked.append(part)


def _variables(x: Any) -> list[Any]:
    """The Variables of an NNX object, and the arrays that it holds without one."""
    if isinstance(x, nnx.Variable):
        return [x]
    leaves = (leaf for _, leaf in iter_graph(x))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Variable | jax.Array | np.ndarray)]


def _values(x: Any) -> list[Any]:
    """The values that an NNX object holds."""
    held = _variables(x)
    return jax.tree.leaves([v.get_raw_value() if isinstance(v, nnx.Variable) else v for v in held])


def _parts(found: _Found) -> Iterator[_Found]:
    """What an object holds or, if it is a function, loads. Runs none of the user's code."""
    path, x, loaded = found
    kind, stored = type(x), _stored(x)
    if "__wrapped__" in stored:
        yield _Found(path, stored["__wrapped__"], loaded)
    if kind is types.MethodType:
        yield _Found(path, x.__func__, loaded)
        yield _Found("self", x.__self__, loaded)
    elif issubclass(kind, functools.partial):
        yield _Found(path, x.func, loaded)
        names = itertools.chain(_parameters(x.func), itertools.repeat("args"))
        for name, value in (*zip(names, x.args, strict=False), *x.keywords.items()):
            yield _Found(name, value, loaded)
    elif kind is types.FunctionType:
        for name, value in _names_of(x):
            yield _Found(name, value, loaded and "." not in name)
        return
    path = path or "self"
    for key, value in _items(x):
        yield _Found(path if key is None else f"{path}[{key!r}]", value, False)
    for name, value in (*stored.items(), *_of_class(x)):
        if name != "__wrapped__":
            yield _Found(f"{path}.{name}", value, False)


def _names_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The names in a function's code that are not its local variables, and their values."""
    code, known = function.__code__, function.__globals__
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(reversed(positional), reversed(defaults), strict=False)
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    if known.get("__name__", "").partition(".")[0] in LIBRARIES:
        return
    codes = [code]
    for each in codes:
        codes += [x for x in each.co_consts if isinstance(x, types.CodeType)]
        for step in dis.get_instructions(each):
            if step.opname != "LOAD_GLOBAL" or step.argval not in known:
                continue
            reads = [(step.argval, known[step.argval])]
            for name, value in reads:
                if type(value) is types.ModuleType:
                    read = vars(value).keys() & each.co_names  # superset of what it loads
                    others = [(f"{name}.{x}", vars(value)[x]) for x in read]
                    reads += [x for x in others if len(reads) + len(others) < FIRST]
                else:
                    yield name, value


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return []


def _stored(x: Any) -> dict[Any, Any]:
    """A copy of an object's `__dict__`, which another thread may change."""
    try:
        return dict(object.__getattribute__(x, "__dict__"))
    except (AttributeError, TypeError):
        return {}


def _of_class(x: Any) -> Iterator[tuple[str, Any]]:
    """The values in the slots of an object, and in its class if that is the user's."""
    if issubclass(type(x), type | types.ModuleType):
        return
    for kind in type(x).__mro__:
        for name, value in vars(kind).items() if _package(kind) not in LIBRARIES else ():
            if isinstance(value, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # an empty slot
                    yield name, value.__get__(x)
            else:
                yield name, value


def _items(x: Any) -> list[tuple[Any, Any]]:
    """The first elements of a container with their keys or indices; None for a set, say."""
    kinds: tuple[Any, ...] = (dict, list, tuple, set, frozenset, collections.deque)
    for kind in kinds:
        if issubclass(type(x), kind):
            # With the built-in's own method, not one that a subclass overrides, and in one call,
            # since another thread may change the container.
            if kind is dict:
                return list(itertools.islice(dict.items(x), FIRST))
            elements = list(itertools.islice(kind.__iter__(x), FIRST))
            indexed = kind in (list, tuple)
            return [(i if indexed else None, element) for i, element in enumerate(elements)]
    return []


def _package(x: Any) -> str:
    return str(getattr(x, "__module__", "")).partition(".")[0]
