"""NNX objects as a flat list of values, read without traversing the graph.

Splitting an NNX graph costs 0.3 to 1 ms. A `Binding` does it once. Afterwards it compares the
identity of every Variable's value, and of the attributes that may have been assigned since (see
`_modules`), which takes microseconds. `values[i]` belongs to `binding.variables[i]`, or is an array
that an attribute holds without a Variable.
"""

import inspect
from collections.abc import Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, not_
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.core import Tracer

from .._modules import ASSIGNED, SEES_GRAPH_WRITES, Fixed, Watched
from .._settings import trace
from .._types import type_text
from .._variables import flatten, iter_graph
from ._structure import Structure, canonical

Values: TypeAlias = list[Any]
"""The value of every leaf, in NNX's order."""

Changes: TypeAlias = dict[int, Any]
"""New values by their index. The indices are part of a compiled program's output tree."""


END = object()
"""Marks the end of a row of attributes."""


class Attributes:
    """The attributes of NNX objects, compared by identity in one pass in C."""

    def __init__(self, nodes: Iterable[Any]):
        rows = [x if isinstance(x, list) else _attributes(x) for x in nodes]
        rows = [dict.values(x) if isinstance(x, dict) else x for x in rows if x is not None]
        self.rows = [*rows, [END]] if rows else []
        self._seen = list(chain.from_iterable(self.rows))

    def are_same(self) -> bool:
        """Whether every attribute still is the object it was."""
        # An attribute more or less shifts `END`.
        return all(map(is_, chain.from_iterable(self.rows), self._seen))


class Binding:
    """The leaves of `roots` in NNX's order. `roots[0]` is a pipeline, its cursor the leaf at
    `cursor_index`."""

    def __init__(self, roots: tuple[Any, ...]):
        # First, so that an assignment by another thread meanwhile shows as a change.
        self._assigned = ASSIGNED[0]
        nodes = [x for _, x in iter_graph(roots) if not isinstance(x, Fixed)]
        watched = [isinstance(x, Watched) and SEES_GRAPH_WRITES for x in nodes]
        self._watched = Attributes(compress(nodes, watched))
        self._attributes = Attributes(compress(nodes, map(not_, watched)))
        graphdef, flat = flatten(roots)
        leaves = list(flat.leaves)
        self.variables = {i: x for i, x in enumerate(leaves) if isinstance(x, nnx.Variable)}
        paths = [tuple(map(str, path)) for path in flat.paths]
        self._arrays = [(i, x) for i, x in enumerate(leaves) if i not in self.variables]
        names = {i: ".".join(paths[i]) for i, _ in self._arrays}
        self.structure = canonical(Structure(graphdef, names))
        self._in_variables = [i in self.variables for i in range(len(leaves))]
        self._variables = list(self.variables.values())
        self.cursor_index = paths.index(("0", "_cursor_state"))
        self._cursor = self.variables[self.cursor_index]
        self.is_cursor_shared = any(x is self._cursor for _, x in iter_graph(roots[1:]))
        self._trace = trace()
        self._settable: set[int] = set()
        self.foreseen: Any = None
        """The cut that `Runtime.foresee` has checked last."""

    def is_current(self) -> bool:
        """Whether the graph has the attributes it was bound with, in the trace it was bound in."""
        return self._trace == trace() and self._has_its_attributes()

    def is_unchanged(self, values: Values) -> bool:
        """Whether the graph is as it was bound and holds these values. The caller has checked that
        the open trace is the same.
        """
        held = compress(values, self._in_variables) if self._arrays else values
        return all(map(is_, map(_RAW_VALUE, self._variables), held)) and self._has_its_attributes()

    def _has_its_attributes(self) -> bool:
        if self._attributes.rows and not self._attributes.are_same():
            return False
        if (assigned := ASSIGNED[0]) is not self._assigned:
            if not self._watched.are_same():
                return False
            self._assigned = assigned  # it was an attribute of another object
        return True

    def read(self) -> Values:
        """The value of every leaf, as it is now."""
        values = list(map(_RAW_VALUE, self._variables))
        for i, array in self._arrays:  # ascending, as `insert` requires
            values.insert(i, array)
        return values

    def leaves(self) -> Iterable[tuple[int, Any]]:
        """The Variables, and the arrays without one, by index."""
        return (*self.variables.items(), *self._arrays)

    def move(self, packed: Any) -> None:
        """Moves the cursor, which is all that most batches change."""
        if self.cursor_index in self._settable:
            _SET_RAW_VALUE(self._cursor, packed)
        else:
            self.write({self.cursor_index: packed}, self.read())

    def write(self, changes: Changes, before: Values) -> None:
        """Writes new values to their Variables: all of them or, on an interrupt, none."""
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


# `set_raw_value` takes 2 us, `get_raw_value` a Python call; both end in access to a slot.
_SLOT = vars(nnx.Variable).get("_raw_value")
if inspect.ismemberdescriptor(_SLOT):
    _RAW_VALUE, _SET_RAW_VALUE = attrgetter("_raw_value"), _SLOT.__set__
else:
    _RAW_VALUE, _SET_RAW_VALUE = nnx.Variable.get_raw_value, nnx.Variable.set_raw_value


def _attributes(node: Any) -> dict[Any, Any] | None:
    """The attributes of a node that user code can assign to, by name."""
    if isinstance(node, dict):
        return node
    if isinstance(node, nnx.Variable):  # it forwards attributes to its value
        return None
    # An NNX object or another pytree, such as a dataclass. Static objects are compared by identity.
    tree = isinstance(node, nnx.Pytree) or is_container(node)
    found = getattr(node, "__dict__", None) if tree else None
    return found if isinstance(found, dict) else None


def merge(structure: Structure, values: Sequence[Any]) -> Any:
    """A copy of the bound objects that holds `values`, for use inside a trace.

    A Variable may hold a container, which a stage may write to in place; so containers are copied.
    """
    copied = [jax.tree.map(lambda leaf: leaf, x) if is_container(x) else x for x in values]
    return nnx.graph.unflatten(structure.graphdef, copied)


def is_container(value: Any) -> bool:
    """Whether the value of a Variable is a dict, a list or another tree of arrays."""
    return value is not None and not jax.tree_util.all_leaves([value])


def is_same(value: Any, old: Any) -> bool:
    """Whether a value, or every leaf of a container, is the same object as before."""
    if value is old or not is_container(old):
        return value is old
    (new, tree), (before, was) = jax.tree.flatten(value), jax.tree.flatten(old)
    return tree == was and all(map(is_, new, before))


def changes(structure: Structure, roots: Any, before: Sequence[Any]) -> Changes:
    """The values of `roots` that have changed since `merge`. Raises for other changes of the graph,
    and for a value of another type or shape."""
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
    """The Variable at `path` was given a value of another type or shape."""

    def __init__(self, path: tuple[Any, ...], within: str, was: str, is_now: str):
        self.path = path
        super().__init__(
            "a Variable must keep its type and shape while batches are made, but "
            f"`{_path_text(path)}{within}` was {was} and became {is_now}; let it begin as what it "
            "becomes"
        )


def type_change(before: Any, after: Any) -> tuple[str, str, str] | None:
    """The path in a tree of arrays where a type or shape has changed, and the two types.

    A weak type may change: Python's numbers adopt the type of what they meet.
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
    """A path in a pipeline, or in the `modules` of a scan, as the user writes it."""
    root, *rest = path
    if root == 0:
        return ".".join(map(str, rest[1:] if rest[0] == "_nodes" else rest))
    return ".".join(map(str, (f"modules[{root - 1}]", *rest)))


def _first_changed(was: Any, now: Any) -> str:
    """The path of the first attribute that differs between two versions of the same objects."""
    old, new = (
        {path: _attributes(x) or {} for path, x in iter_graph(roots)} for roots in (was, now)
    )
    for path, attributes in new.items():
        before = old.get(path, {})
        for name in (*attributes, *(x for x in before if x not in attributes)):
            pair = attributes.get(name, END), before.get(name, END)
            # Nodes of the graph come up under paths of their own.
            nodes = all(isinstance(x, nnx.Pytree | nnx.Variable) for x in pair)
            if not (nodes or str(name).startswith("_pytree__") or _equal(*pair)):
                return _path_text((*path, name))
    return "one"


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # arrays have no truth value; `changes` compares them as leaves
        return True


def has_tracer(values: Sequence[Any]) -> bool:
    """Whether any value belongs to a trace that the user has opened."""
    kinds = set(map(type, jax.tree.leaves(list(values))))  # few kinds, however many values
    return any(issubclass(kind, Tracer) for kind in kinds)
