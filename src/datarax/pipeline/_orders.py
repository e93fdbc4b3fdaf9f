"""The orders of a pipeline's epochs, made before the programs that take them are called."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .._keys import node_key
from .._mesh import placed
from .._order import Order, Permutation, StoredOrder, Stretch, SwapOrNot
from .._types import Cursor
from ..sources._base import NAME, EagerSourceBase, length_of
from ._binding import Structure, Values, kept, merge
from ._core import CUTS, Program, order_at

if TYPE_CHECKING:
    from ._pipeline import Pipeline

STRETCH = 2**13
"""Rows whose order is computed together: the rounds of a few cost as much as those of many."""

STRETCHES = 32
"""How many kinds of orders programs are kept for, whatever pipelines they are of."""

EPOCHS = 16
"""Epochs in a row whose orders are counted together: NumPy takes hardly longer than for one."""


class Orders:
    """The orders that the source and the keys of a pipeline give; if these change, make another.

    What fixes an order is as a rule a few words an epoch. They are counted on the host, in less
    time than it takes to call a program, and none has to be compiled before the first batch.
    """

    def __init__(self, pipeline: "Pipeline", structure: Structure, kind: Any):
        source, base = pipeline.source, pipeline._words_of(pipeline.source)
        self._structure, self._kind = structure, kind
        self._length, self._sharding = length_of(source), pipeline.sharding
        self._of: Callable[[np.ndarray], Order] | None = None
        # Over several devices each would have to be given the words, which takes longer.
        alone = pipeline.sharding is None
        if alone and isinstance(source, EagerSourceBase) and source.order_is_words:
            key = None if base is None else node_key(np.asarray(base), NAME)
            self._of = functools.partial(source.order, key)
        self._known: dict[int, tuple[int, Sequence[Any]]] = {}
        self._stretch: tuple[Any, int, int, Any] = None, 0, 0, None

    def at(self, values: Values, epoch: int, span: int) -> Any:
        """The order of `span` epochs from `epoch` on."""
        first, orders = self._known.get(span, (epoch, ()))
        if not 0 <= epoch - first < len(orders):
            first, orders = epoch, self._made(values, epoch, span)
            self._known[span] = first, orders
        return orders[epoch - first]

    def _made(self, values: Values, epoch: int, span: int) -> Sequence[Any]:
        number = self._kind.type(epoch)
        if self._of is not None:
            order = self._of(number + np.arange(EPOCHS + span - 1, dtype=self._kind))
            assert isinstance(order, StoredOrder | SwapOrNot)
            return [order.part(i, span) for i in range(EPOCHS)]
        order = order_program(self._structure, span)(values, number)
        if isinstance(order, Permutation) and (sharding := self._sharding) is not None:
            order = jax.tree.map(lambda x: placed(x, sharding), order)
        return [order]

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


@kept(CUTS)
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
