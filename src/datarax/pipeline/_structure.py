"""The structure of NNX objects, apart from their values: the key that programs are cached by.

Pipelines of equal structure share what is compiled. It is kept as long as one of them lives, and
for the last few structures longer, if that keeps nothing of the user's alive.
"""

import collections
import dataclasses
import enum
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from flax import nnx

from ..sources._mixture import MixReader
from ..sources._reader import Reader


class Structure:
    """An NNX graph without its values. It is hashed once; by identity if it is not hashable.

    `canonical` makes equal structures one object. To Python 1, 1.0 and True are equal, but they
    compile to different programs; so the types of static attributes are part of the key.
    """

    def __init__(self, graphdef: Any, arrays: Mapping[int, str]):
        self.programs: dict[Any, Any] = {}  # see `cached_per_structure`
        self.graphdef = graphdef
        self.arrays = arrays  # arrays that are held without a Variable: their names by index
        static = [x.value for _, x in graphdef.attributes if isinstance(x, nnx.graph.Static)]
        self._types = tuple(map(types_of, static))
        try:
            self._hash = hash((graphdef, self._types))
        except TypeError:  # a static attribute is not hashable: nothing is shared
            self._hash = None
        self.lasts = self._hash is not None and all(map(_lasts, static))

    def __hash__(self) -> int:
        return object.__hash__(self) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Structure) or None in (self._hash, other._hash):
            return False
        return self._types == other._types and self.graphdef == other.graphdef


LIGHT = (bool, int, float, complex, np.number, str, bytes, type, np.dtype, np.ufunc)
LIGHT = (*LIGHT, enum.Enum, BuiltinFunctionType, ModuleType, type(None))
"""Types of objects that hold no arrays, or that live as long as the process."""

UNCHANGING = (FunctionType, jax.Array, eqx.Module, *LIGHT)
"""Types of objects that do not change in place."""


def _lasts(static: Any, depth: int = 8) -> bool:
    """Whether programs with this static attribute are kept for a later pipeline.

    False if that kept alive an object of the user's that is equal to itself alone: no later
    pipeline could share the program, and the object may hold large arrays.
    """
    if isinstance(static, LIGHT):
        return True
    if isinstance(static, tuple | frozenset):
        return all(_is_light(x, depth) for x in static)
    if isinstance(static, MixReader):  # equal to another whose readers are equal
        return all(map(_lasts, static.readers))
    if isinstance(static, Reader):
        return type(static).__eq__ is not object.__eq__
    if isinstance(static, FunctionType):
        defaults = static.__defaults__ or (), (static.__kwdefaults__ or {}).values()
        try:
            outside = [x.cell_contents for x in static.__closure__ or ()]
        except ValueError:  # a closure variable that is not assigned yet
            return False
        return all(_is_light(x, depth) for x in chain(outside, *defaults))
    wrapped = inspect.getattr_static(static, "__wrapped__", None)
    if callable(wrapped):  # by `jax.jit`, say
        return _is_light(wrapped, depth)
    if dataclasses.is_dataclass(static):  # the static part of an Equinox module, say
        return all(
            _is_light(getattr(static, x.name, None), depth) for x in dataclasses.fields(static)
        )
    return not (callable(static) or type(static).__eq__ is object.__eq__)


def _is_light(x: Any, depth: int) -> bool:
    if depth < 0:
        return False
    if isinstance(x, tuple | frozenset):
        return all(_is_light(item, depth - 1) for item in x)
    return isinstance(x, LIGHT) or (callable(x) and _lasts(x, depth - 1))


class ById:
    """Makes an object a key that compares by identity. It keeps the object alive, so that no other
    can get its id."""

    def __init__(self, held: Any):
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.held is other.held


class FunctionKey:
    """A user's function as a key, compared as `types_of` says: most by identity, methods and some
    dataclasses by value. `trainer.step` is a new object at every access, equal to the last one."""

    def __init__(self, function: Callable[..., Any]):
        self.held, self._key = function, _key_of(function)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionKey) and self._key == other._key


def _key_of(function: Callable[..., Any]) -> Any:
    """A partial, or a method of an Equinox module that holds arrays, is compared by its parts: it
    may be a new object at every access. Not so where a part can change in place, since the program
    would keep what it was."""
    key = types_of(function), function
    try:
        hash(key)
    except TypeError:
        key = ById(function)
    if isinstance(function, functools.partial | eqx.Partial):
        whole, args, names = function.func, function.args, sorted(function.keywords)
        parts = len(args), *args, *names, *map(function.keywords.get, names)
    elif isinstance(key, ById) and (method := getattr(function, "__func__", None)) is not None:
        whole, parts = method, (getattr(function, "__self__", None),)
    else:
        return key
    if not all(isinstance(x, UNCHANGING) for x in parts):
        return key
    values = ((types_of(x), x) if isinstance(x, LIGHT) else ById(x) for x in parts)
    return _key_of(whole), *values


def types_of(static: Any) -> Any:
    """A key that differs for static attributes which Python calls equal but which compile to
    different programs.

    The `__eq__` of a callable may ignore what it computes with. It is trusted only for methods, and
    for dataclasses that compare all fields; other callables are compared by identity.
    """
    if isinstance(static, FunctionType):  # the most frequent case
        return ById(static)
    if isinstance(static, bool | int | float | complex | np.generic):  # 0.0 == -0.0, too
        return type(static), repr(static)
    if isinstance(static, tuple | frozenset):
        return type(static), *map(types_of, static)
    if dataclasses.is_dataclass(static) and not isinstance(static, type):
        fields = dataclasses.fields(static)
        if not callable(static) or all(x.compare for x in fields):
            values = [getattr(static, x.name, None) for x in fields if x.compare]
            return type(static), *map(types_of, values)
    if callable(static) and not isinstance(static, MethodType):
        return ById(static)
    return type(static)


_STRUCTURES: weakref.WeakKeyDictionary[Structure, weakref.ref[Structure]]
# Weak keys and weak values: key and value are the same object.
_STRUCTURES = weakref.WeakKeyDictionary()
_RECENT: collections.deque[Structure] = collections.deque(maxlen=8)
_LOCK = threading.Lock()


def canonical(structure: Structure) -> Structure:
    """The one object that stands for all structures equal to this one."""
    with _LOCK:
        known = _STRUCTURES.get(structure)
        found = known and known()
        if found is None:
            found = structure
            _STRUCTURES[found] = weakref.ref(found)
        if found.lasts:
            _RECENT.append(found)
        return found


P = TypeVar("P")


def cached_per_structure(most: int) -> Callable[[Callable[..., P]], Callable[..., P]]:
    """An LRU cache of `most` results for each structure, stored in the structure itself.

    It holds its keys: the id of a function that was freed could otherwise hit the entry of another.
    """

    def decorate(make: Callable[..., P]) -> Callable[..., P]:
        @functools.wraps(make)
        def find(structure: Structure, *args: Any) -> P:
            with _LOCK:
                programs = structure.programs.setdefault(make, collections.OrderedDict())
                if (known := programs.get(args)) is not None:
                    programs.move_to_end(args)
                    return known
            made = make(structure, *args)
            with _LOCK:
                programs[args] = made
                while len(programs) > most:
                    programs.popitem(last=False)
            return made

        return find

    return decorate
