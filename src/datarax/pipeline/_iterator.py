"""`step` and `for`: batches handed out one at a time, under one lock and one cursor."""

import collections
import threading
import weakref
from collections.abc import Iterator, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .._rows import advance, host_where, settle, span
from .._types import Batch, Cursor, is_traced
from ..errors import StageError
from ..sources._base import length_of
from ._binding import Binding, Changes, Values, has_tracer, merge
from ._core import batch_program, draw, order_program

if TYPE_CHECKING:
    from ._pipeline import Pipeline

BINDINGS = 8
"""How many sets of `modules` a pipeline remembers."""

AHEAD = 8
"""Batches that `for` computes in one call of compiled code, and then hands out one by one."""

AHEAD_BYTES = 64 * 2**20
"""The most that batches computed ahead may weigh together."""

AHEAD_COMPILE = 0.5
"""Seconds: a batch that takes longer to compile is not worth compiling `AHEAD` times over."""

PATIENCE = 2
"""Batches handed out one at a time before any is computed ahead, so that the first comes early."""


class Runtime:
    """What a live pipeline needs to hand out batches fast; nothing that a copy of it would miss.

    All of it is derived from the pipeline's attributes, and checked against them at every batch.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._bindings: dict[tuple[int, ...], tuple[list[weakref.ref], Binding]] = {}
        self._bound: Binding | None = None
        self._seen: Values = []
        self._traced = False
        self._orders: dict[int, tuple[Any, Any]] = {}
        self._known: tuple[Any, Cursor] | None = None
        self._ahead: collections.deque[tuple[Batch, Changes]] = collections.deque()
        self._patience = self._next_patience = PATIENCE

    def bind(self, pipeline: "Pipeline", modules: Sequence[Any] = ()) -> Binding:
        """The leaves of the pipeline and `modules`, bound anew if an attribute has changed."""
        roots = (pipeline, *modules)
        place = tuple(map(id, roots))
        if place in self._bindings:
            refs, binding = self._bindings[place]
            same = all(ref() is x for ref, x in zip(refs, roots, strict=True))
            if same and binding.is_current():
                return binding
        binding = Binding(roots)
        try:
            refs = [weakref.ref(x) for x in roots]
        except TypeError:  # a tuple, say: it cannot be told from a later one at the same address
            return binding
        self._bindings.pop(place, None)
        if len(self._bindings) >= BINDINGS:
            del self._bindings[next(iter(self._bindings))]
        self._bindings[place] = refs, binding
        for ref in modules and refs[1:]:
            weakref.finalize(ref(), self._bindings.pop, place, None)
        return binding

    def cursor(self, pipeline: "Pipeline") -> Cursor:
        """Epoch and offset, as integers unless the user is tracing. Waits for a running `scan`."""
        raw = pipeline.position.get_raw_value()
        if self._known is None or self._known[0] is not raw:
            if is_traced(raw):
                return Cursor(raw[0], raw[1])
            self._known = raw, Cursor(*map(int, np.asarray(raw)))
        return self._known[1]

    def settled(self, pipeline: "Pipeline") -> Cursor:
        """The cursor from which the next batch really starts."""
        where = host_where if not self._traced else jnp.where
        return settle(self.cursor(pipeline), *_cut(pipeline), where)

    def take(self, pipeline: "Pipeline", size: int, epochs: int, following: int = 0) -> Batch:
        """The next batch, of `size` rows over at most `epochs` epochs. Call it under the lock.

        `following` batches of that size are left in the epoch: they may be computed along with
        it. What is computed ahead counts only as long as no value of the pipeline has changed, so
        it can never be seen.
        """
        position = pipeline.position
        # Fails here, before anything is computed, in a trace that the pipeline is no argument of.
        position.set_raw_value(position.get_raw_value())

        binding = self.bind(pipeline)
        values = binding.read()
        if binding is not self._bound or not _same(values, self._seen):
            self._bound, self._seen, self._traced = binding, values, has_tracer(values)
            self._orders.clear()
            self._discard()

        start = self.settled(pipeline)
        if not self._ahead:
            self._compute(binding, values, start.epoch, size, epochs, following)
        batch, after = self._ahead.popleft()
        binding.write(after)
        for i, value in after.items():
            self._seen[i] = value
        if not self._traced:
            moved = advance(start, size, *_cut(pipeline)[1:], host_where)
            self._known = position.get_raw_value(), moved
        return batch

    def _compute(
        self, binding: Binding, values: Values, epoch: Any, size: int, epochs: int, following: int
    ) -> None:
        """Fills `_ahead` with the next batch, or with several if that has proved worth it."""
        order = self._order(binding, values, epoch, epochs)
        single = batch_program(binding.structure, size, epochs, 1)
        self._patience -= 1
        if (
            self._patience < 0
            and following >= AHEAD - 1
            and not self._traced
            and single.seconds < AHEAD_COMPILE
            and single.bytes * AHEAD <= AHEAD_BYTES
            and not single.calls_host
        ):
            self._next_patience = PATIENCE
            self._ahead.extend(batch_program(binding.structure, size, epochs, AHEAD)(values, order))
            return
        try:
            [first] = single(values, order)
            single.wait(first)
        except jax.errors.JaxRuntimeError as error:
            _name_the_stage(binding, values, order, size, epochs, error)
            raise
        self._ahead.append(first)

    def _discard(self) -> None:
        """Forgets what was computed ahead, and waits longer before the next try."""
        if self._ahead:
            self._ahead.clear()
            self._patience = self._next_patience = min(2 * self._next_patience, 64)

    def _order(self, binding: Binding, values: Values, epoch: Any, epochs: int) -> Any:
        known, order = self._orders.get(epochs, (None, None))
        if self._traced or known != epoch:
            epoch_word = jnp.asarray(epoch, values[binding.position].dtype)
            order = order_program(binding.structure, epochs)(values, epoch_word)
            if not self._traced:
                self._orders[epochs] = epoch, order
        return order


class BatchIterator(Iterator[Batch]):
    """The batches left in the epoch that the cursor is in when this is made.

    It has no position of its own: each batch goes to one of the iterators over a pipeline.
    """

    def __init__(self, pipeline: "Pipeline"):
        self._pipeline = pipeline
        self._epoch = pipeline.runtime.settled(pipeline).epoch
        if is_traced(self._epoch):
            raise TypeError(
                "Inside a traced function the end of an epoch is not known. "
                "Use `step()` there, or `scan(step_fn, length)`."
            )
        self._ended = False

    def __next__(self) -> Batch:
        pipeline, runtime = self._pipeline, self._pipeline.runtime
        with runtime.lock:
            cursor = runtime.settled(pipeline)
            self._ended = self._ended or cursor.epoch != self._epoch
            if self._ended:
                raise StopIteration
            size, length, last_batch = _cut(pipeline)
            if length is None:
                return runtime.take(pipeline, size, 1, AHEAD)
            left = length - cursor.offset
            if last_batch == "keep":
                size = min(size, left)
            return runtime.take(pipeline, size, 1, left // size - 1)


def step(pipeline: "Pipeline") -> Batch:
    """The next `batch_size` rows, across epochs where the policy lets them."""
    with pipeline.runtime.lock:
        size, length, last_batch = _cut(pipeline)
        return pipeline.runtime.take(pipeline, size, span(size, length, last_batch))


def _cut(pipeline: "Pipeline") -> tuple[int, int | None, Any]:
    return pipeline.batch_size, length_of(pipeline.source), pipeline.last_batch


def _same(now: Values, then: Values) -> bool:
    return len(now) == len(then) and all(map(is_, now, then))


def _name_the_stage(
    binding: Binding,
    values: Values,
    order: Any,
    size: int,
    epochs: int,
    error: Exception,
) -> None:
    """Raises a `StageError` if a stage fails again when the batch is run stage by stage."""
    copy, *_ = merge(binding.structure, values)
    try:
        draw(copy, order, size, epochs)
    except StageError as named:
        raise named from error
    except Exception:
        return
