"""What NNX objects are apart from their values, and the programs compiled for that."""

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

import numpy as np
from flax import nnx

from ..sources._reader import Reader


class Structure:
    """What NNX objects are apart from their values: hashed once, and by identity if need be.

    Equal structures are one object, see `canonical`. Python calls 1, 1.0 and True equal, a
    compiled program does not, so the types of static attributes count too.
    """

    def __init__(self, graphdef: Any, arrays: Mapping[int, str]):
        self.programs: dict[Any, Any] = {}  # see `cached_per_structure`
        self.graphdef = graphdef
        self.arrays = arrays  # what is no Variable: its index and its name
        static = [x.value for _, x in graphdef.attributes if isinstance(x, nnx.graph.Static)]
        self._types = tuple(map(types_of, static))
        try:
            self._hash = hash((graphdef, self._types))
        except TypeError:  # a static attribute cannot be hashed: nothing is shared
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


LIGHT = (bool, int, float, complex, str, bytes, type, np.dtype, np.ufunc)
LIGHT = (*LIGHT, enum.Enum, BuiltinFunctionType, ModuleType, type(None))
"""What holds no arrays, or is kept by whoever made it."""


def _lasts(static: Any, depth: int = 8) -> bool:
    """Whether what is compiled for this static attribute is kept a while for another pipeline.

    Not where that keeps objects of the user's alive, which nothing but themselves is ever equal to.
    """
    if isinstance(static, LIGHT):
        return True
    if isinstance(static, tuple | frozenset):
        return all(_is_light(x, depth) for x in static)
    if isinstance(static, Reader):
        return static.lasting
    if isinstance(static, FunctionType):
        defaults = static.__defaults__ or (), (static.__kwdefaults__ or {}).values()
        try:
            outside = [x.cell_contents for x in static.__closure__ or ()]
        except ValueError:  # nothing is there yet
            return False
        return all(_is_light(x, depth) for x in chain(outside, *defaults))
    wrapped = inspect.getattr_static(static, "__wrapped__", None)
    if callable(wrapped):  # compiled, say
        return _is_light(wrapped, depth)
    if dataclasses.is_dataclass(static):  # what is left of an Equinox module without its arrays
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
    """An object as a key: equal to itself alone, which lives as long as this."""

    def __init__(self, held: Any):
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.held is other.held


def types_of(static: Any) -> Any:
    """A static attribute as what tells equal values of different types apart.

    Of a callable the equality may leave out what it computes with. Only that of a method, and of a
    dataclass of which all fields count, is taken for that of the function.
    """
    if isinstance(static, FunctionType):  # nearly always
        return ById(static)
    if isinstance(static, bool | int | float | complex | np.generic):  # 0.0 equals -0.0, too
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
# Keys and values are the same objects: a dictionary with weak values would keep its keys alive.
_STRUCTURES = weakref.WeakKeyDictionary()
_RECENT: collections.deque[Structure] = collections.deque(maxlen=8)
_LOCK = threading.Lock()


def canonical(structure: Structure) -> Structure:
    """The one object that stands for all structures equal to this one.

    It lives, and all that was compiled for it, as long as a pipeline has it; the last few longer.
    """
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
    """Keeps what a function of a structure and more makes: the `most` last used for each structure.

    The arguments are kept along, so that a dead function's identity can never be mistaken.
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
