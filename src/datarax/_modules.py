"""Base classes for the NNX modules of this library."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from flax import nnx

ASSIGNED = [object()]
"""Its item is replaced at every assignment to an attribute of any `Watched` module.

A reader that finds the same object as before knows that no such attribute was assigned.
"""


class Watched(nnx.Module):
    """A module that reports assignments in `ASSIGNED`, so that readers need not compare."""

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        finally:
            # Last: a reader in another thread that has compared before this must compare again.
            ASSIGNED[0] = object()

    def __delattr__(self, name: str) -> None:
        try:
            super().__delattr__(name)
        finally:
            ASSIGNED[0] = object()

    def _graph_node_init(self, attributes: Iterable[tuple[Any, Any]]) -> None:
        """NNX calls this to write all attributes back past `__setattr__`, as in `nnx.jit`."""
        try:
            super()._graph_node_init(attributes)
        finally:
            ASSIGNED[0] = object()


SEES_GRAPH_WRITES = hasattr(nnx.Module, "_graph_node_init")
"""Whether `Watched` reports every assignment.

The method is private to NNX. Without it, what `nnx.jit` writes back goes unreported, and readers
must compare all attributes.
"""


class Fixed(nnx.Module):
    """A module whose attributes are assigned once, so that no reader must compare them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            self.__delattr__(name)  # raises
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`{name}` cannot be replaced: build what it is a part of again.")


class Bundle(Watched):
    """Named parts, in the order given; any string is a name.

    Each part is an attribute, so NNX shows it under a readable path and can replace it.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self.names = tuple(parts)
        for name, part in parts.items():
            self.put(name, part)

    def get(self, name: str) -> Any:
        return getattr(self, _attribute(name))

    def name_of(self, attribute: str) -> str:
        """The name of the part that is kept in this attribute."""
        return next(name for name in self.names if _attribute(name) == attribute)

    def put(self, name: str, part: Any) -> None:
        attribute = _attribute(name)
        if attribute in vars(self):
            # Otherwise NNX treats the new part as static if the old one was, and vice versa.
            delattr(self, attribute)
        setattr(self, attribute, part)


class FixedBundle(Fixed, Bundle):
    """A `Bundle` whose parts cannot be replaced. The values of their Variables can."""


def _attribute(name: str) -> str:
    """The attribute for a part: its name, or `[name]` if that would hide another attribute."""
    free = name.isidentifier() and not name.startswith("_") and not hasattr(Bundle, name)
    return name if free and name != "names" else f"[{name}]"
