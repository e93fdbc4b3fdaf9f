"""Operators: stages that are written for one element and mapped over the rows of a batch."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from .._keys import BaseKey, base_words
from .._modules import Watched
from .._types import Batch, KeyLike, Signed, expect
from .._variables import with_variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Element:
    """One row of a batch: `data` maps field names to arrays without the row axis."""

    data: dict[str, Any]

    def update_data(self, fields: Mapping[str, Any]) -> "Element":
        """A new element with these fields replaced or added, and the others kept."""
        return Element({**self.data, **fields})


class OperatorModule(Watched, metaclass=Signed):
    """A stage with one method to write: `apply(element, key) -> element`, for a single row.

    Args:
        stochastic: whether `apply` gets a key, which depends on the seed, the stage's name, the
            epoch and the record alone. Otherwise it gets None.
        stream_name: the stream of `rngs` that gives the seed; "default" if `rngs` lacks it.
        rngs: the seed. Without it the operator uses the pipeline's seed.

    Example:
        ```python
        class Flip(OperatorModule):
            def apply(self, element, key):
                image = element.data["image"]  # shape (height, width, channels)
                flipped = jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
                return element.update_data({"image": flipped})

        pipeline = Pipeline(
            source=source, stages=[Flip(stochastic=True)], batch_size=32, rngs=nnx.Rngs(0)
        )
        ```
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
        """Returns the new element. It is traced under `jax.vmap`, so write it in `jax.numpy`."""

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
                + (" Is its `return` missing?" if element is None else "")
            )
        return element.data


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementOperatorConfig:
    """Whether an `ElementOperator` draws random numbers, and from which seed.

    Args:
        stochastic: whether the function gets a key; otherwise it gets None.
        stream_name: the stream of the `Rngs` that gives the seed; "default" if they lack it.
    """

    stochastic: bool = False
    stream_name: str | None = None


class ElementOperator(OperatorModule):
    """A stage made from a function of a single record.

    Args:
        config: whether the function draws random numbers.
        fn: `fn(element, key) -> element`, traced under `jax.vmap`. `element.data` is a dict of
            arrays without the row axis; return `element.update_data({...})`. `fn` may be an NNX or
            Equinox module, or a method of an NNX module; its arrays become the operator's.
        rngs: the seed. Without it the operator uses the pipeline's seed.

    Example:
        ```python
        def jitter(element, key):
            x = element.data["x"]
            return element.update_data({"x": x + 0.1 * jax.random.normal(key, x.shape)})

        stage = ElementOperator(ElementOperatorConfig(stochastic=True), fn=jitter)
        ```
    """

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

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, with_variables(value) if name == "fn" else value)

    def apply(self, element: Element, key: KeyLike | None) -> Element:
        return self.fn(element, key)
