"""The orders of a pipeline's epochs, computed once per epoch and passed to the programs."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .._keys import SOURCE, node_key
from .._mesh import placed
from .._order import Order, Permutation, StoredOrder, Stretch, SwapOrNot
from .._settings import transferring
from .._types import Cursor
from ..sources._base import EagerSourceBase, length_of, order_of
from ..sources._iterable import StreamSource
from ._binding import Values, merge
from ._core import CUTS, order_at
from ._program import Program
from ._structure import Structure, cached_per_structure

if TYPE_CHECKING:
    from ._pipeline import Pipeline

STRETCH = 2**13
"""How many rows have their order computed in one call: the rounds of the shuffle have a fixed
cost."""

STRETCHES = 32
"""How many programs for stretches of orders are kept, shared by all pipelines."""

EPOCHS = 16
"""Epochs in a row whose round keys are computed in one call, which takes hardly longer than one."""

SPAN = 4
"""The most epochs that one batch may touch for their keys to be computed on the host."""


class Orders:
    """The orders of the epochs under a pipeline's source and keys. If these change, make another.

    Most orders are fixed by a few words an epoch. NumPy computes those on the host, so that no
    program has to be compiled before the first batch.
    """

    def __init__(self, pipeline: "Pipeline", structure: Structure, kind: Any):
        source, base = pipeline.source, pipeline._words_of(pipeline.source)
        self._structure, self._kind = structure, kind
        self._length, self._sharding = length_of(source), pipeline.sharding
        self._count: Callable[[np.ndarray, int], Any] | None = None
        # With a sharding, words from the host would have to be copied to every device, which takes
        # longer than computing them there. A stream uses its words on the host.
        if isinstance(source, StreamSource) or (self._sharding is None and _is_words(source)):
            with transferring():
                key = None if base is None else node_key(np.asarray(base), SOURCE)
            self._count = functools.partial(order_of, source, key)
        self._ahead: tuple[int, int, Any] = 0, 0, None  # first epoch, how many, their orders
        self._known: dict[int, tuple[int, Any]] = {}  # by span: the last epoch and its order
        self._stretch: tuple[Any, int, int, Any] = None, 0, 0, None

    def at(self, values: Values, epoch: int, span: int) -> Any:
        """The order of `span` epochs from `epoch` on; their keys if the source has no `order`."""
        known, order = self._known.get(span, (None, None))
        if known != epoch:
            counted = self._count is not None and span <= SPAN
            order = self._counted(epoch, span) if counted else self._computed(values, epoch, span)
            self._known[span] = epoch, order
        return order

    def _counted(self, epoch: int, span: int) -> Any:
        assert self._count is not None
        first, count, orders = self._ahead
        if not first <= epoch <= first + count - span:
            # A consumer that went on from one epoch to the next will do so again.
            count = EPOCHS if first <= epoch <= first + count else span
            orders = self._count(np.asarray(epoch, self._kind), count)
            self._ahead = first, count, orders = epoch, count, orders
        here = slice(epoch - first, epoch - first + span)
        if isinstance(orders, SwapOrNot):
            return jax.tree.map(lambda x: x[:, here], orders)
        return orders[here] if isinstance(orders, np.ndarray) else orders

    def _computed(self, values: Values, epoch: int, span: int) -> Any:
        order = order_program(self._structure, span)(values, self._kind.type(epoch))
        if isinstance(order, Permutation) and (sharding := self._sharding) is not None:
            order = jax.tree.map(lambda x: placed(x, sharding), order)
        return order

    def along(self, values: Values, start: Cursor, rows: int, span: int) -> Any:
        """The order for `rows` rows from `start` on: if possible with their records computed."""
        order = self.at(values, start.epoch, span)
        computed = isinstance(order, Order) and not isinstance(order, StoredOrder | Permutation)
        length = self._length or 0
        if not computed or span > 1 or start.offset + rows > length:
            return order
        whose, first, end, stretch = self._stretch
        if whose is not order or not first <= start.offset <= end - rows:
            most = min(max(STRETCH, rows), length)
            program = stretch_program(jax.tree.structure(order), most)
            stretch = program(order, self._kind.type(start.offset))
            self._stretch = order, start.offset, start.offset + most, stretch
        return stretch


def _is_words(source: Any) -> bool:
    """Whether an order of the source is fixed by a few words an epoch."""
    if not isinstance(source, EagerSourceBase):
        return True
    return type(source).order is EagerSourceBase.order and isinstance(source.shuffle, bool)


@cached_per_structure(CUTS)
def order_program(structure: Structure, epochs: int) -> Program:
    """`order_at`, compiled."""

    def run(values: Values, epoch: Any) -> Any:
        return order_at(merge(structure, values)[0], jnp.asarray(epoch), epochs)

    return Program(run)


@functools.lru_cache(STRETCHES)
def stretch_program(kind: Any, count: int) -> Program:
    """A program that computes `count` places in a row of an order. `kind` is its tree structure."""
    del kind  # part of the cache key, so that the cache bounds the number of compiled programs

    def run(order: Order, start: Any) -> Stretch:
        return Stretch(order, jnp.asarray(start), count)

    return Program(run)
