"""`step` and `for`: batches handed out one at a time, under one lock and one cursor."""

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
from ._binding import Binding, Values, has_tracer, merge
from ._core import batch_program, draw, order_program

if TYPE_CHECKING:
    from ._pipeline import Pipeline

BINDINGS = 8
"""How many sets of `modules` a pipeline remembers."""


class Runtime:
    """What a live pipeline needs to hand out batches fast; nothing that a copy of it would miss.

    All of it is derived from the pipeline's attributes, and checked against them at every batch.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._bindings: dict[tuple[int, ...], tuple[list[weakref.ref], Binding]] = {}
        self._seen: Values = []
        self._traced = False
        self._orders: dict[int, tuple[Any, Any]] = {}
        self._known: tuple[Any, Cursor] | None = None

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

    def take(self, pipeline: "Pipeline", size: int, epochs: int) -> Batch:
        """The next batch, of `size` rows over at most `epochs` epochs. Call it under the lock."""
        position = pipeline.position
        # Fails here, before anything is computed, in a trace that the pipeline is no argument of.
        position.set_raw_value(position.get_raw_value())

        binding = self.bind(pipeline)
        values = binding.read()
        if not _same(values, self._seen):
            self._seen, self._traced = values, has_tracer(values)
            self._orders.clear()

        start = self.settled(pipeline)
        order = self._order(binding, values, start.epoch, epochs)
        program = batch_program(binding.graphdef, size, epochs, 1)
        try:
            [(batch, after)] = program(values, order)
            program.wait(batch)
        except jax.errors.JaxRuntimeError as error:
            _name_the_stage(binding, values, order, size, epochs, error)
            raise
        binding.write(after)
        for i, value in after.items():
            self._seen[i] = value
        if not self._traced:
            moved = advance(start, size, *_cut(pipeline)[1:], host_where)
            self._known = position.get_raw_value(), moved
        return batch

    def _order(self, binding: Binding, values: Values, epoch: Any, epochs: int) -> Any:
        known, order = self._orders.get(epochs, (None, None))
        if self._traced or known != epoch:
            epoch_word = jnp.asarray(epoch, values[binding.position].dtype)
            order = order_program(binding.graphdef, epochs)(values, epoch_word)
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
            size, length = pipeline.batch_size, length_of(pipeline.source)
            if length is not None and pipeline.last_batch == "keep":
                size = min(size, length - cursor.offset)
            return runtime.take(pipeline, size, 1)


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
    copy, *_ = merge(binding.graphdef, values)
    try:
        draw(copy, order, size, epochs)
    except StageError as named:
        raise named from error
    except Exception:
        return
