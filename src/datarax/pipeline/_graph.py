"""Nodes and edges, checked once: the plan that a batch follows."""

import dataclasses
import graphlib
import heapq
from collections.abc import Mapping, Sequence

from .._keys import SOURCE, node_number
from ..errors import (
    CycleError,
    EdgesWithoutNodeError,
    MissingEdgesError,
    NodeNameError,
    NoNodesError,
    PredecessorsTypeError,
    SelfLoopError,
    UnknownPredecessorError,
    UnknownSinkError,
    UnusedNodeError,
)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes in execution order, each with its predecessors in the order it is called with.

    `sink` is the node whose output is the batch; without nodes it is the source itself.
    """

    predecessors: tuple[tuple[str, tuple[str, ...]], ...]
    sink: str

    @classmethod
    def chain(cls, names: Sequence[str]) -> "Graph":
        """Each node reads the one before, the first the source."""
        check_names(names)
        before = (SOURCE, *names)
        return cls(tuple((n, (p,)) for n, p in zip(names, before, strict=False)), before[-1])

    @classmethod
    def from_edges(
        cls, names: Sequence[str], edges: Mapping[str, Sequence[str]], sink: str
    ) -> "Graph":
        """A graph from what the user declared, or the error that says what is wrong with it."""
        if not names:
            raise NoNodesError()
        check_names(names)
        for name in edges:
            if name not in names:
                raise EdgesWithoutNodeError(name, names)
        for name in names:
            if name not in edges:
                raise MissingEdgesError(name)
            if isinstance(edges[name], str) or not isinstance(edges[name], Sequence):
                raise PredecessorsTypeError(name, edges[name])
            for predecessor in edges[name]:
                if predecessor == name:
                    raise SelfLoopError(name)
                if predecessor != SOURCE and predecessor not in names:
                    raise UnknownPredecessorError(name, predecessor, names)
        if sink not in names:
            raise UnknownSinkError(sink, names)

        reads = {name: tuple(edges[name]) or (SOURCE,) for name in names}
        order = _topological(reads)
        used = {sink}
        for name in reversed(order):
            if name in used:
                used.update(reads[name])
        for name in names:
            if name not in used:
                raise UnusedNodeError(name, sink)
        return cls(tuple((name, reads[name]) for name in order), sink)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.predecessors)

    def reads(self, name: str) -> tuple[str, ...]:
        """The predecessors of a node; those of a subclass's own `__call__` are the source alone."""
        return dict(self.predecessors).get(name, (SOURCE,))


def check_names(names: Sequence[object]) -> None:
    """Raises for an invalid name of a node, and for two names that would get the same keys."""
    numbers = {node_number(SOURCE): SOURCE}
    for name in names:
        if not isinstance(name, str) or not name or name == SOURCE or name.startswith("_"):
            raise NodeNameError(name)
        try:
            number = node_number(name)
        except UnicodeEncodeError as error:
            raise NodeNameError(name) from error
        if (other := numbers.setdefault(number, name)) != name:
            raise NodeNameError(name, other)


def _topological(reads: Mapping[str, Sequence[str]]) -> list[str]:
    """The nodes in topological order; among those that could come next, in declared order."""
    declared = {name: i for i, name in enumerate(reads)}
    sorter = graphlib.TopologicalSorter(
        {name: [p for p in before if p != SOURCE] for name, before in reads.items()}
    )
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][:-1]
        first = min(range(len(circle)), key=lambda i: declared[circle[i]])
        raise CycleError([*circle[first:], *circle[:first], circle[first]]) from None
    order: list[str] = []
    ready: list[int] = []
    names = list(reads)
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, declared[name])
        order.append(names[heapq.heappop(ready)])
        sorter.done(order[-1])
    return order
