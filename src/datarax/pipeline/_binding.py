"""NNX objects as compiled code sees them: a flat list of values, read without a traversal.

Splitting an NNX graph costs 0.3 to 1 ms. A `Binding` does it once, and after that looks only at
what could have changed: the identity of every attribute and of every Variable's value.
"""

import collections
import dataclasses
import enum
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter, not_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from .._modules import ASSIGNED, SAYS_ALL, Fixed, Watched
from .._settings import trace
from .._types import type_text
from .._variables import flatten, iter_graph
from ..sources._mixture import MixReader
from ..sources._reader import Reader

Values: TypeAlias = list[Any]
"""The value of every leaf, in NNX's order."""

Changes: TypeAlias = dict[int, Any]
"""New values by their index in the list; the indices are part of a compiled program's output."""


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
    if isinstance(static, MixReader):
        return all(map(_lasts, static.readers))
    if isinstance(static, Reader):
        return type(static).__eq__ is not object.__eq__
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


END = object()
"""What stands behind the last attribute."""


class Attributes:
    """All that can be assigned to, in NNX objects: looked at as one row of objects, in C."""

    def __init__(self, nodes: Iterable[Any]):
        rows = [x if isinstance(x, list) else _attributes(x) for x in nodes]
        rows = [dict.values(x) if isinstance(x, dict) else x for x in rows if x is not None]
        self.rows = [*rows, [END]] if rows else []
        self._seen = list(chain.from_iterable(self.rows))

    def are_same(self) -> bool:
        """Whether every one still is the object that it was."""
        # `END` stands elsewhere if there is one more, or one less.
        return all(map(is_, chain.from_iterable(self.rows), self._seen))


class Binding:
    """The leaves of `roots`, in NNX's own order; that at `cursor_index` is the cursor."""

    def __init__(self, roots: tuple[Any, ...]):
        # Before the rest: what is assigned meanwhile then shows as a change.
        self._assigned = ASSIGNED[0]
        nodes = [x for _, x in iter_graph(roots) if not isinstance(x, Fixed)]
        watched = [isinstance(x, Watched) and SAYS_ALL for x in nodes]
        self._watched = Attributes(compress(nodes, watched))
        self._attributes = Attributes(compress(nodes, map(not_, watched)))
        graphdef, flat = flatten(roots)
        leaves = list(flat.leaves)
        self.variables = {i: x for i, x in enumerate(leaves) if isinstance(x, nnx.Variable)}
        paths = [tuple(map(str, path)) for path in flat.paths]
        self._arrays = [(i, x) for i, x in enumerate(leaves) if i not in self.variables]
        names = {i: ".".join(paths[i]) for i, _ in self._arrays}
        self.structure = canonical(Structure(graphdef, names))
        self._at_variables = _taker(list(self.variables))
        self._variables = list(self.variables.values())
        self.cursor_index = paths.index(("0", "_cursor_state"))
        self._cursor = self.variables[self.cursor_index]
        self.is_cursor_shared = any(x is self._cursor for _, x in iter_graph(roots[1:]))
        self._trace = trace()
        self._settable: set[int] = set()
        self.foreseen: Any = None
        """How the last batch is cut that was looked at beforehand, see `Runtime.foresee`."""

    def is_current(self) -> bool:
        """Whether the graph has the attributes it was bound with, in the trace that it was."""
        return self._trace == trace() and self._has_its_attributes()

    def is_unchanged(self, values: Values) -> bool:
        """Whether the graph is as it was bound, and holds these values. The trace has to be known
        as that in which it was bound.
        """
        held = self._at_variables(values) if self._arrays else values
        return all(map(is_, map(_RAW_VALUE, self._variables), held)) and self._has_its_attributes()

    def _has_its_attributes(self) -> bool:
        if self._attributes.rows and not self._attributes.are_same():
            return False
        if (assigned := ASSIGNED[0]) is not self._assigned:
            if not self._watched.are_same():
                return False
            self._assigned = assigned  # to an attribute of another object, as a rule
        return True

    def read(self) -> Values:
        """The value of every leaf, as it is now."""
        values = list(map(_RAW_VALUE, self._variables))
        for i, array in self._arrays:  # in ascending order, so that each finds its own
            values.insert(i, array)
        return values

    def leaves(self) -> Iterable[tuple[int, Any]]:
        """The Variables, and the arrays that are none, with their places."""
        return (*self.variables.items(), *self._arrays)

    def move(self, packed: Any) -> None:
        """Puts the cursor there. It is one step, and as a rule all that a batch changes."""
        if self.cursor_index in self._settable:
            _SET_RAW_VALUE(self._cursor, packed)
        else:
            self.write({self.cursor_index: packed}, self.read())

    def write(self, changes: Changes, before: Values) -> None:
        """Puts new values into the Variables they belong to: all, or on an interrupt none."""
        try:
            for i, value in changes.items():
                if i in self._settable:
                    _SET_RAW_VALUE(self.variables[i], value)
                else:
                    self.variables[i].set_raw_value(value)  # raises for one of another trace
                    self._settable.add(i)
        except BaseException:
            for i in changes:
                self.variables[i].set_raw_value(before[i])
            raise


def _taker(places: Sequence[int]) -> Callable[[Values], tuple[Any, ...]]:
    """What takes those of the values that stand at these places, as a tuple."""
    if len(places) == 1:  # `itemgetter` of one gives no tuple
        return lambda values: (values[places[0]],)
    return itemgetter(*places)


# To set a Variable takes 2 us, and to read it a call; what both come down to is a slot.
_SLOT = vars(nnx.Variable).get("_raw_value")
if inspect.ismemberdescriptor(_SLOT):
    _RAW_VALUE, _SET_RAW_VALUE = attrgetter("_raw_value"), _SLOT.__set__
else:
    _RAW_VALUE, _SET_RAW_VALUE = nnx.Variable.get_raw_value, nnx.Variable.set_raw_value


def _attributes(node: Any) -> dict[Any, Any] | None:
    """What of a node can be assigned to from outside, by name."""
    if isinstance(node, dict):
        return node
    if isinstance(node, nnx.Variable):  # which would answer with those of its value
        return None
    # Of NNX or another kind of tree, a dataclass say; what is static is no tree.
    tree = isinstance(node, nnx.Pytree) or is_container(node)
    found = getattr(node, "__dict__", None) if tree else None
    return found if isinstance(found, dict) else None


def merge(structure: Structure, values: Sequence[Any]) -> Any:
    """A copy of the bound objects that holds `values`: for use inside a trace.

    Containers are copied, since a Variable that holds one may be written to in its place.
    """
    copied = [jax.tree.map(lambda leaf: leaf, x) if is_container(x) else x for x in values]
    return nnx.graph.unflatten(structure.graphdef, copied)


def is_container(value: Any) -> bool:
    """Whether the value of a Variable is a dict, a list or another tree of arrays."""
    return value is not None and not jax.tree_util.all_leaves([value])


def is_same(value: Any, old: Any) -> bool:
    """Whether a value is the one it was; of a container, whether all that it holds is."""
    if value is old or not is_container(old):
        return value is old
    (new, tree), (before, was) = jax.tree.flatten(value), jax.tree.flatten(old)
    return tree == was and all(map(is_, new, before))


def changes(structure: Structure, roots: Any, before: Sequence[Any]) -> Changes:
    """Which values of `roots` are no longer those they were merged with."""
    now, after = flatten(roots, with_paths=False)
    if now != structure.graphdef:
        which = _first_changed(merge(structure, before), roots)
        raise TypeError(
            "no attribute of a module may be added, removed or assigned while a batch is made, but "
            f"`{which}` was; create it in `__init__`, keep what changes in an nnx.Variable, call "
            "`eval()` and `train()` before, and collect what a module sows with nnx.capture"
        )
    pairs = enumerate(zip(after, before, strict=True))
    found = {i: x for i, (x, old) in pairs if not is_same(x, old)}
    for index in found.keys() & structure.arrays.keys():
        raise TypeError(
            "what changes while a batch is made must be kept in an nnx.Variable, but the array "
            f"`{structure.arrays[index]}` was assigned"
        )
    for index, new in found.items():
        if change := type_change(before[index], new):
            raise VariableTypeError(tuple(flatten(roots)[1].paths[index]), *change)
    return found


class VariableTypeError(TypeError):
    """A Variable, at `path`, that is given a value of another type than it had."""

    def __init__(self, path: tuple[Any, ...], within: str, was: str, is_now: str):
        self.path = path
        super().__init__(
            "a Variable must keep its type and shape while batches are made, but "
            f"`{_path_text(path)}{within}` was {was} and became {is_now}; let it begin as what it "
            "becomes"
        )


def type_change(before: Any, after: Any) -> tuple[str, str, str] | None:
    """Where in a tree of arrays a type or shape has changed, what it was and what it became.

    A weak type may become another of that shape, as Python's numbers become what they meet.
    """
    was, now = jax.tree.structure(before), jax.tree.structure(after)
    if was != now:
        return "", _tree_text(before), _tree_text(after)
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        x, y = jax.typeof(old), jax.typeof(new)
        if x.shape != y.shape or (x.dtype != y.dtype and not x.weak_type):
            return jax.tree_util.keystr(path), type_text(x), type_text(y)
    return None


def _tree_text(tree: Any) -> str:
    leaves, structure = jax.tree.flatten(tree)
    if structure == jax.tree.structure(0):
        return type_text(jax.typeof(tree))
    return f"{len(leaves)} in {structure}"


def _path_text(path: Sequence[Any]) -> str:
    """Where in a pipeline, or in the `modules` of a scan, something is."""
    root, *rest = path
    if root == 0:
        return ".".join(map(str, rest[1:] if rest[0] == "_nodes" else rest))
    return ".".join(map(str, (f"modules[{root - 1}]", *rest)))


def _first_changed(was: Any, now: Any) -> str:
    """The path of an attribute that one of two versions of some objects has, or has otherwise."""
    old, new = (
        {path: _attributes(x) or {} for path, x in iter_graph(roots)} for roots in (was, now)
    )
    for path, attributes in new.items():
        before = old.get(path, {})
        for name in (*attributes, *(x for x in before if x not in attributes)):
            pair = attributes.get(name, END), before.get(name, END)
            nodes = all(isinstance(x, nnx.Pytree | nnx.Variable) for x in pair)  # looked at apart
            if not (nodes or str(name).startswith("_pytree__") or _equal(*pair)):
                return _path_text((*path, name))
    return "one"


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # arrays, say, which are compared elsewhere
        return True


def has_tracer(values: Sequence[Any]) -> bool:
    """Whether any value belongs to a trace that the user has opened."""
    kinds = set(map(type, jax.tree.leaves(list(values))))  # few, of however many values
    return any(issubclass(kind, Tracer) for kind in kinds)
