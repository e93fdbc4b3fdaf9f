"""What the NNX modules of this library have in common."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from flax import nnx

ASSIGNED = [object()]
"""Another object after each assignment to an attribute of a `Watched` module."""


class Watched(nnx.Module):
    """A module that says when an attribute is assigned, so that nobody has to compare them all."""

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        finally:  # and not before: who looks meanwhile looks again
            ASSIGNED[0] = object()

    def __delattr__(self, name: str) -> None:
        try:
            super().__delattr__(name)
        finally:
            ASSIGNED[0] = object()

    def _graph_node_init(self, attributes: Iterable[tuple[Any, Any]]) -> None:
        """Called by NNX where it writes all of them back, as `nnx.jit` does."""
        try:
            super()._graph_node_init(attributes)
        finally:
            ASSIGNED[0] = object()


SAYS_ALL = hasattr(nnx.Module, "_graph_node_init")
"""Whether a `Watched` module says it all: the method is no public part of NNX."""


class Fixed(nnx.Module):
    """A module whose attributes are assigned once: nobody has to look whether one has changed."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            self.__delattr__(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"`{name}` cannot be replaced: build what it is a part of again.")


class Bundle(Watched):
    """Parts by name, any string being a name, in the order given.

    Each is an attribute, so NNX sees it at a readable path and may replace it.
    """

    def __init__(self, parts: Mapping[str, Any]):
        self.names = tuple(parts)
        for name, part in parts.items():
            self.put(name, part)

    def get(self, name: str) -> Any:
        return getattr(self, _attribute(name))

    def name_of(self, attribute: str) -> str:
        """The name of the part that is this attribute."""
        return next(name for name in self.names if _attribute(name) == attribute)

    def put(self, name: str, part: Any) -> None:
        attribute = _attribute(name)
        if attribute in vars(self):
            delattr(self, attribute)  # else NNX takes what comes for as static as what was there
        setattr(self, attribute, part)


class FixedBundle(Fixed, Bundle):
    """Parts of which none is replaced. Variables among them may get other values, as anywhere."""


def _attribute(name: str) -> str:
    """The name itself, unless the module has other plans for it."""
    free = name.isidentifier() and not name.startswith("_") and not hasattr(Bundle, name)
    return name if free and name != "names" else f"[{name}]"
