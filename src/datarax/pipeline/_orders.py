"""The orders of a pipeline's epochs, made before the programs that take them are called."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .._keys import SOURCE, node_key
from .._mesh import placed
from .._order import Order, Permutation, StoredOrder, Stretch, SwapOrNot, keys_of
from .._settings import transferring
from .._types import Cursor, Words
from ..sources._base import EagerSourceBase, length_of
from ..sources._iterable import StreamSource
from ._binding import Values, merge
from ._core import CUTS, order_at
from ._program import Program
from ._structure import Structure, cached_per_structure

if TYPE_CHECKING:
    from ._pipeline import Pipeline

STRETCH = 2**13
"""Rows whose order is computed together: the rounds of a few cost as much as those of many."""

STRETCHES = 32
"""How many kinds of orders programs are kept for, whatever pipelines they are of."""

EPOCHS = 16
"""Epochs in a row whose orders are counted together: NumPy takes hardly longer than for one."""

SPAN = 4
"""The most epochs of one batch whose orders are counted on the host: more are better compiled."""


class Orders:
    """The orders that the source and the keys of a pipeline give; if these change, make another.

    What fixes an order is as a rule a few words an epoch. They are counted on the host, where no
    program has to be compiled for them before the first batch.
    """

    def __init__(self, pipeline: "Pipeline", structure: Structure, kind: Any):
        source, base = pipeline.source, pipeline._words_of(pipeline.source)
        self._structure, self._kind = structure, kind
        self._length, self._sharding = length_of(source), pipeline.sharding
        self._count: Callable[[np.ndarray], Any] | None = None
        # Over several devices each would have to be given the words, which takes longer. Those of a
        # stream stay on the host.
        if isinstance(source, StreamSource) or (self._sharding is None and _is_words(source)):
            with transferring():
                key = None if base is None else node_key(np.asarray(base), SOURCE)
            eager = isinstance(source, EagerSourceBase)
            how = source.order if eager else _keys_of
            self._count = functools.partial(how, key)
        self._ahead: tuple[int, int, Any] = 0, 0, None  # from which epoch on, how many, the orders
        self._known: dict[int, tuple[int, Any]] = {}  # by span, the epoch and the order
        self._stretch: tuple[Any, int, int, Any] = None, 0, 0, None

    def at(self, values: Values, epoch: int, span: int) -> Any:
        """The order of `span` epochs from `epoch` on; for one without an `order`, their keys."""
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
            # Who goes on from one epoch to the next will do so again.
            count = EPOCHS if first <= epoch <= first + count else span
            orders = self._count(self._kind.type(epoch) + np.arange(count, dtype=self._kind))
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
        """The same for so many rows from `start` on: computed, where that can be done at once."""
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
    """Whether its order takes no more than to count a few words an epoch."""
    if not isinstance(source, EagerSourceBase):
        return True
    return type(source).order is EagerSourceBase.order and isinstance(source.shuffle, bool)


def _keys_of(key: Words | None, epochs: np.ndarray) -> Any:
    return None if key is None else keys_of(key, epochs)


@cached_per_structure(CUTS)
def order_program(structure: Structure, epochs: int) -> Program:
    """`order_at`, compiled."""

    def run(values: Values, epoch: Any) -> Any:
        return order_at(merge(structure, values)[0], jnp.asarray(epoch), epochs)

    return Program(run)


@functools.lru_cache(STRETCHES)
def stretch_program(kind: Any, count: int) -> Program:
    """An order of that `kind`, the structure of a tree, computed for `count` places in a row."""
    del kind  # a program of its own for each, so that this many are kept at most

    def run(order: Order, start: Any) -> Stretch:
        return Stretch(order, jnp.asarray(start), count)

    return Program(run)
