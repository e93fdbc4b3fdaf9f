"""NNX objects that a function uses without being given them.

Compiled code would hold their values as constants: what the user changes later would not be seen,
what the function changes would be lost, and gradients would be zero. So they are refused.

A function that loads an NNX object by its name uses it. Of an object that has one among other
things, say a trainer with a model, a function may use the rest: it uses the model if a value of
that is a constant of the traced program. So it is not seen where such a value becomes a number of
Python or an array of NumPy before the program meets it.
"""

import collections
import contextlib
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from .._variables import iter_graph

FIRST, MOST = 1_000, 10_000
"""How many elements of a container are looked at, and how many objects in all, the nearest first: a
vocabulary of millions costs no time."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.ndarray, jax.Array)
"""What holds no other object."""

LIBRARIES = {"jax", "jaxlib", "numpy", "flax", "optax", "equinox", "datarax", "builtins"}
"""Whose code loads no object of the user's by name."""


def captured(function: Callable[..., Any], constants: Iterable[Any] = ()) -> list[str]:
    """The names under which `function` uses NNX objects; `constants` are those of its program."""
    held = {id(x) for x in constants if isinstance(x, jax.Array)}
    return sorted({
        path or "step_fn"
        for path, x, loaded in _reached(function, bool(held))
        if any(loaded or id(value) in held for value in _values(x))
    })  # fmt: skip


def reached(function: Callable[..., Any]) -> list[str]:
    """The names of all NNX objects that `function` comes to: it may use them or not."""
    return sorted({path or "step_fn" for path, x, _ in _reached(function, True) if _values(x)})


def own(x: Any, name: str, default: Any = None) -> Any:
    """`getattr`, but not from a `__getattr__` of the user's: that may make it up, or raise."""
    made_up = hasattr(type(x), "__getattr__") and inspect.getattr_static(x, name, None) is None
    return default if made_up else getattr(x, name, default)


class _Found(NamedTuple):
    """An object, and how the function comes to it: `loaded` by name, or through other objects."""

    path: str
    x: Any
    loaded: bool


def _reached(function: Any, through: bool) -> Iterator[_Found]:
    """The NNX objects that a function comes to by name, or `through` any objects, nearest first."""
    looked, seen, left = [_Found("", function, True)], {id(function)}, MOST
    for found in looked:
        if isinstance(found.x, nnx.Pytree | nnx.Variable):
            yield found
            continue
        for part in itertools.islice(_parts(found), left):
            left -= 1
            if (
                (part.loaded or through)
                and not isinstance(part.x, PLAIN)
                and id(part.x) not in seen
            ):
                seen.add(id(part.x))
                looked.append(part)


def _values(x: Any) -> list[Any]:
    """The values that an NNX object holds."""
    leaves = [x] if isinstance(x, nnx.Variable) else [leaf for _, leaf in iter_graph(x)]
    raw = [leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for leaf in leaves]
    return jax.tree.leaves(raw)


def _parts(found: _Found) -> Iterator[_Found]:
    """What an object holds or, if it is a function, loads. None of the user's code is run."""
    path, x, loaded = found
    if isinstance(x, types.MethodType):
        yield _Found(path, x.__func__, loaded)
        yield _Found("self", x.__self__, loaded)
    elif isinstance(x, functools.partial):
        yield _Found(path, x.func, loaded)
        names = itertools.chain(_parameters(x.func), itertools.repeat("args"))
        for name, value in (*zip(names, x.args, strict=False), *x.keywords.items()):
            yield _Found(name, value, loaded)
    elif (wrapped := own(x, "__wrapped__")) is not None:  # what wraps it may be a library's
        yield _Found(path, wrapped, loaded)
    elif isinstance(x, types.FunctionType):
        for name, value in _names_of(x):
            yield _Found(name, value, loaded and "." not in name)
    elif isinstance(elements := _builtin(x), dict | list | tuple | set | frozenset):
        path = path or "self"
        for key, value in _items(elements):
            yield _Found(path if key is None else f"{path}[{key!r}]", value, False)
    if not isinstance(x, types.FunctionType | types.ModuleType):
        for name, value in _attributes(x):
            yield _Found(f"{path or 'self'}.{name}", value, False)


def _names_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What stands for the names in a function's code that are none of its own variables."""
    code, known = function.__code__, function.__globals__
    defaults = function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(reversed(positional), reversed(defaults), strict=False)
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    if _package(function) in LIBRARIES:
        return
    codes = [code]
    for each in codes:
        codes += [x for x in each.co_consts if isinstance(x, types.CodeType)]
        for step in dis.get_instructions(each):
            if step.opname != "LOAD_GLOBAL" or step.argval not in known:
                continue
            name, value = step.argval, known[step.argval]
            if isinstance(value, types.ModuleType):
                read = vars(value).keys() & each.co_names  # these are all attributes in the code
                yield from ((f"{name}.{x}", vars(value)[x]) for x in read)
            else:
                yield name, value


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of one that is written in C
        return []


def _attributes(x: Any) -> Iterator[tuple[str, Any]]:
    """What is stored in an object, and in its class if that is the user's."""
    with contextlib.suppress(AttributeError, TypeError):
        yield from object.__getattribute__(x, "__dict__").items()
    if isinstance(x, type):
        return
    for kind in type(x).__mro__:
        for name, value in vars(kind).items() if _package(kind) not in LIBRARIES else ():
            if isinstance(value, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # a slot that is empty
                    yield name, value.__get__(x)
            else:
                yield name, value


def _items(elements: Any) -> Iterator[tuple[Any, Any]]:
    """The first elements of a container with their keys, None where it has none."""
    if isinstance(elements, dict):
        pairs: Any = dict.items(elements)
    elif isinstance(elements, list | tuple):
        pairs = enumerate(elements)
    else:
        pairs = zip(itertools.repeat(None), elements, strict=False)
    return itertools.islice(pairs, FIRST)


def _builtin(x: Any) -> Any:
    return x.data if isinstance(x, collections.UserDict | collections.UserList) else x


def _package(x: Any) -> str:
    return str(getattr(x, "__module__", "")).partition(".")[0]
