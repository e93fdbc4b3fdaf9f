"""Operators: stages written for one element and mapped over the rows of a batch."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from .._keys import BaseKey, base_words
from .._types import Batch, KeyLike, expect


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Element:
    """One row of a batch: `data` maps field names to values without the row axis."""

    data: dict[str, Any]

    def update_data(self, fields: Mapping[str, Any]) -> "Element":
        """An element with these fields replaced or added, the others kept."""
        return Element({**self.data, **fields})


class OperatorModule(nnx.Module):
    """A stage with one method to write: `apply(element, key) -> element`, for a single row.

    `key` is a key of that row's (seed, epoch, record), or None if the operator is not
    stochastic. The seed is that of `rngs` if given, else the pipeline's: the stream `stream_name`
    if there is one, else "default".
    """

    stochastic: bool = False
    stream_name: str | None = None
    base: BaseKey | None = None

    def __init__(
        self,
        *,
        stochastic: bool = False,
        stream_name: str | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        self.stochastic = stochastic
        self.stream_name = stream_name
        own = rngs if stochastic else None
        self.base = None if own is None else BaseKey(base_words(own, stream_name))

    @abc.abstractmethod
    def apply(self, element: Element, key: KeyLike | None) -> Element:
        """The element that comes out for the one that goes in."""

    def __call__(self, batch: Batch, *, keys: Key[Array, " b"] | None = None) -> Batch:
        if keys is None:
            return jax.vmap(lambda data: self._one(data, None))(batch)
        return jax.vmap(self._one)(batch, keys)

    def _one(self, data: dict[str, Any], key: KeyLike | None) -> dict[str, Any]:
        element = self.apply(Element(data), key)
        if not isinstance(element, Element):
            raise TypeError(
                "An operator must return an element, as from element.update_data({...}), "
                f"got {type(element).__name__}."
            )
        return element.data


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementOperatorConfig:
    """Whether an operator draws random numbers, and from which stream of its `Rngs`."""

    stochastic: bool = False
    stream_name: str | None = None


class ElementOperator(OperatorModule):
    """An operator made from a function `fn(element, key) -> element`."""

    def __init__(
        self,
        config: ElementOperatorConfig,
        *,
        fn: Callable[[Element, KeyLike | None], Element],
        rngs: nnx.Rngs | None = None,
    ):
        expect("config", config, ElementOperatorConfig)
        super().__init__(stochastic=config.stochastic, stream_name=config.stream_name, rngs=rngs)
        self.config = config
        self.fn = fn

    def apply(self, element: Element, key: KeyLike | None) -> Element:
        return self.fn(element, key)
