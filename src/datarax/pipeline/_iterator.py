"""`step` and `for`: batches handed out one at a time, under the pipeline's lock and cursor."""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .._rows import Cut, batches_of_loop, check_within, pack, running_on, settle
from .._types import Batch, Cursor, is_traced
from . import _compute_ahead
from ._core import cutting
from ._meter import Bar

if TYPE_CHECKING:
    from ._pipeline import Pipeline


class BatchIterator(Iterator[Batch]):
    """The batches left in the epoch in which the cursor stands when the iterator is made.

    All iterators over a pipeline share its cursor: each batch goes to one of them.
    """

    def __init__(self, pipeline: "Pipeline"):
        self._pipeline, self._runtime = pipeline, pipeline._runtime
        with self._runtime.lock:
            self._runtime.look(pipeline)
            self._began = self._runtime.start
            self._epoch: int | None = self._began.epoch
            if is_traced(self._epoch):
                raise TypeError(
                    "Inside a traced function the end of an epoch is not known. "
                    "Use `step()` there, or `scan(step_fn, length)`."
                )
            self._runtime.foresee(pipeline)
        self._bar: Bar | None = None

    def __next__(self) -> Batch:
        runtime = self._runtime
        with runtime.lock:
            first = self._bar is None
            bar = self._bar or self._begin()
            if self._epoch is None:
                raise StopIteration
            binding = runtime.look(self._pipeline)
            if runtime.start.epoch == self._epoch and runtime.is_ready():
                batch = runtime.hand_over(self._pipeline, binding)
            else:
                batch = self._next(first)
            if not batch:
                self._epoch = None
                runtime.meter.end()
                bar.close()
                raise StopIteration
            runtime.meter.lap(1)
            if bar.shown:
                bar.update(1, runtime.meter)
            return batch

    def _begin(self) -> Bar:
        pipeline, runtime = self._pipeline, self._runtime
        if self._began == runtime.reads.pass_end:
            self._epoch = self._began.epoch + 1
        size, length, last_batch = cutting(pipeline)
        left = None if length is None else length - self._began.offset
        total = None if left is None else batches_of_loop(size, left, last_batch)
        self._bar = Bar(pipeline.progress, total, f"epoch {self._epoch}")
        if self._bar.shown:
            weakref.finalize(self, self._bar.close)  # if the loop is left before its end
        runtime.meter.begin()
        return self._bar

    def _next(self, first: bool) -> Batch | None:
        """The next batch of the epoch, None after its last.

        The end of a stream's pass is the same place as the start of the next epoch. A loop that
        begins there belongs to that epoch. Either the end is known (`reads.pass_end`), or the
        `first` request of the loop finds it.
        """
        pipeline, runtime = self._pipeline, self._runtime
        here = runtime.start
        at_start = here == runtime.reads.pass_end and here.epoch + 1 == self._epoch
        if here.epoch != self._epoch and not at_start:
            return None
        size, length, last_batch = cutting(pipeline)
        padded = last_batch == "pad"
        if length is None:
            cut = Cut(size, 1, padded)
            batch = runtime.take(pipeline, cut, _compute_ahead.AHEAD, loop=True)
            if batch is None and (at_start or (first and here == self._began)):
                self._epoch = runtime.start.epoch
                batch = runtime.take(pipeline, cut, _compute_ahead.AHEAD, loop=True)
            return batch
        left = length - runtime.start.offset
        if last_batch == "keep":
            size = min(size, left)
        return runtime.take(pipeline, Cut(size, 1, padded), left // size - 1, loop=True)


def step(pipeline: "Pipeline") -> Batch:
    """The next `batch_size` rows, which cross the end of an epoch if `last_batch` is "keep"."""
    runtime = pipeline._runtime
    with runtime.lock:
        binding = runtime.look(pipeline)
        if runtime.is_ready():
            return runtime.hand_over(pipeline, binding)
        size, length, last_batch = cutting(pipeline)
        offset = runtime.start.offset
        if length is not None and not is_traced(offset) and offset + size <= length:
            # Inside an epoch `step` cuts as `for` does, and can be computed ahead.
            cut, following = Cut(size, 1, last_batch == "pad"), (length - offset) // size - 1
        else:
            cut, following = running_on(size, length, last_batch), 0
        batch = runtime.take(pipeline, cut, following)
        assert batch is not None
        return batch


def move(pipeline: "Pipeline", epoch: int, offset: int) -> None:
    """Moves the cursor; under "drop" to the next epoch if no whole batch is left in this one."""
    size, length, last_batch = cutting(pipeline)
    check_within("epoch", epoch, 2**32)
    check_within("offset", offset, length or 2**32)
    target = settle(Cursor(int(epoch), int(offset)), size, length, last_batch)
    pipeline._cursor_state.claim()
    pipeline._cursor_state.set_raw_value(pack(target, length))
    pipeline._runtime.moved(pipeline, target)
