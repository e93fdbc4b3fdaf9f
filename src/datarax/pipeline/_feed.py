"""Rows of a source on the host, read ahead of the device by threads."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from itertools import islice, repeat, takewhile
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._mesh import Own, assemble, own_rows
from .._order import Order, StoredOrder, word
from .._rows import Cut, LastBatch, Rows, advance, check_counted, starts_within
from .._types import Batch, Cursor, Spec
from .._xla import ALIGNMENT, ONE_THREAD, transferring
from ..errors import EmptySourceError, ReadError
from ..sources._base import Fetched
from ..sources._buffers import empty_rows
from ..sources._host import Reader
from ..sources._iterable import Stream, Windows
from ..sources._records import conform, stack
from ._threads import Outcome, Threads

BUFFER_BYTES = 64 * 2**20
"""The most that rows read ahead weigh together, unless a single chunk weighs more."""

CHUNK_BYTES = 8 * 2**20
"""What a thread reads in one go: to wake it costs as much as to read some hundred kilobytes."""

CHUNK_BATCHES, CHUNK_SECONDS = 8, 0.05
"""The most batches of a chunk for `for`, which come one by one; and how long reading several may
take, for none of them comes before all are read."""

FORGIVEN = 0.8
"""What a slow read still counts for at the next one: a stream that has paused may do so again."""

COPIED_FROM = 2**18
"""Bytes from which it costs more to copy rows than to place them on the device."""

KEPT, REST = 5e-3, 1e-3
"""Seconds for which a place is kept for who has waited and copied; a thread rests so long before it
looks again."""

BLOCK = 2**15
"""Records whose order is computed in one call."""

Failures: TypeAlias = Sequence[tuple[int, ReadError]]
"""Rows that are masked: their epochs, and why."""


class Fed(NamedTuple):
    """A batch as it was read, where it starts, and where the next one does.

    Without rows it is the end of a stream's pass. `first` is where its first row stands, if not at
    `start`: that may have been the end of a pass.
    """

    fetched: Fetched | None
    cut: Cut
    start: Cursor
    after: Cursor
    failures: Failures = ()
    first: Cursor | None = None


class Stack(NamedTuple):
    """Several batches with a leading axis, and their cursors, for a compiled loop over them."""

    fetched: Fetched
    starts: Cursor
    ends: Cursor
    after: Cursor
    failures: Failures


@dataclasses.dataclass(frozen=True)
class Supply:
    """Where rows come from and how they are cut. `order(epoch)` is for a source with a length, and
    for a stream that is shuffled in windows of so many records.

    `bare` says that no stage stands between reading and handing out, `on_cpu` that programs run on
    a CPU; `x64` is a setting of the thread that asks, and no other knows it. With a `sharding` the
    rows are placed as it says, and rows that lie on no device of this process are not read.
    """

    reader: Reader | Stream
    spec: Spec
    size: int
    length: int | None
    last_batch: LastBatch
    masks: bool
    bare: bool
    on_cpu: bool
    x64: bool
    sharding: NamedSharding | None
    order: Callable[[int], Any]
    window: int | None = None


class Feed:
    """Batches in the order of the stream, read before they are asked for.

    Asked for another place than the end of the last batch, it begins anew there. A read that
    fails fails the batch that it is for and no earlier one; asked again, it is tried again.
    """

    def __init__(self, supply: Supply, threads: int):
        self.supply = supply
        sequential = isinstance(supply.reader, Stream)
        self._at_once = 1 if sequential else threads
        self._lock, self._reading = threading.Lock(), 0  # for the number of reads, whoever reads
        # Among more threads than processors, who is woken to take a chunk may wait for as long as
        # it takes to copy some. So who waits copies, too, and one of the threads rests.
        copies = isinstance(supply.reader, Reader) and supply.reader.only_copies
        self._shares = copies and 1 < self._at_once >= processors()
        self._kept_until = -math.inf
        self._pending: collections.deque[tuple[_Chunk, Callable[[], Any]]] = collections.deque()
        self._records = _Records(supply.order, supply.length)
        self._windows = None
        if isinstance(supply.reader, Stream) and supply.window is not None:
            self._windows = Windows(supply.reader, supply.window, supply.order)
        self._queue: collections.deque[_Chunk] = collections.deque()
        self._ready: collections.deque[Fed] = collections.deque()
        self._asked: tuple[Cut, bool] | None = None
        self._failed: tuple[Cursor, BaseException] | None = None
        self._singly = 1
        self._seconds = 0.0  # what a batch takes to read, as far as is known
        leaves = jax.tree.leaves(supply.spec)
        row = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        self.batch_bytes = max(1, row * supply.size)
        self.count = min(max(CHUNK_BYTES // self.batch_bytes, 1), CHUNK_BATCHES)
        room = BUFFER_BYTES // (self.batch_bytes * self.count)
        self._depth = min(max(room, 1), 2 * threads + 2)
        self._threads = Threads(self._at_once, "datarax-read")

    def take(self, start: Cursor, cut: Cut, loop: bool, several: int) -> list[Fed]:
        """The next batch from `start` on, and of those read with it up to `several` in all.

        `loop` cuts what follows as `for` does; what comes along with the next batch every loop
        cuts alike. Call `handed_over` for each batch that is used.
        """
        if not (self._ready and self._asked == (cut, loop) and self._ready[0].start == start):
            self._ready.clear()
            chunk = self._next_chunk(start, cut, loop)
            try:
                self._ready.extend(self._result(chunk))
            except BaseException as error:
                self.forget()
                self._failed = None  # it is known now: asked again, the stream is read again
                # An interrupt is of who waits, unless a thread has met it and nobody else reads.
                read = not self._shares and chunk.outcome.known and error is chunk.outcome.error()
                if chunk.count == 1 or not (read or isinstance(error, Exception)):
                    raise
                self._singly = chunk.count  # so that the batches before the broken one come
                return self.take(start, cut, loop, several)
            self._asked = cut, loop
            self._singly = max(0, self._singly - chunk.count)
            self._top_up(chunk, loop)
        return [*islice(takewhile(self._is_inside, self._ready), several)] or [self._ready[0]]

    def _is_inside(self, fed: Fed) -> bool:
        """Whether the batch is a whole one of one epoch, and another can follow."""
        (epoch, _), after = fed.start, fed.after
        ends_inside = after.epoch == epoch or after == (epoch + 1, 0)
        return fed.cut.size == self.supply.size and ends_inside and after.epoch < 2**32

    def handed_over(self) -> None:
        """The first batch of the last `take` is used."""
        if self._ready:  # unless what was read ahead has been dropped since
            self._ready.popleft()

    def stacks(
        self, start: Cursor, cut: Cut, counts: Sequence[int]
    ) -> Generator[Stack, None, None]:
        """Chunks of so many batches, in the cut of `scan`; later ones are read meanwhile."""
        self.forget()
        depth = min(max(BUFFER_BYTES // (self.batch_bytes * max(counts)), 2), 4)
        queue: collections.deque[_Chunk] = collections.deque()
        waiting = collections.deque(counts)
        last = None
        try:
            while queue or waiting:
                while waiting and len(queue) < depth:
                    chunk = self._submit(start, cut, waiting.popleft(), False, last, stacked=True)
                    last, start = chunk, chunk.after or start
                    queue.append(chunk)
                yield self._result(queue.popleft())
        finally:
            self.forget()
            self._failed = None

    def forget(self) -> None:
        """Drops what was read ahead."""
        # Were the last to come first, an interrupt could leave chunks that nobody will read.
        self._queue.clear()
        self._ready.clear()
        self._pending.clear()

    def close(self) -> None:
        """Ends the threads, without waiting for them."""
        self.forget()
        self._threads.close()

    def _result(self, chunk: "_Chunk") -> Any:
        """What was read of a chunk, once it is read: here, if there is nothing else to do."""
        if chunk.outcome.known:
            return chunk.outcome.result()
        self._threads.check_open()
        try:
            while self._shares and not chunk.outcome.known:
                self._kept_until = -math.inf  # the place is taken now, or not needed
                if not self._read_next(self._at_once):
                    break
                self._kept_until = time.monotonic() + KEPT
            return chunk.outcome.result()
        finally:
            if self._shares:
                self._kept_until = time.monotonic() + KEPT

    def _read_in_thread(self) -> None:
        """Reads all that is pending, but leaves a place for who will wait for it in a moment."""
        while self._pending and not self._threads.closed:
            kept = time.monotonic() < self._kept_until
            try:
                rests = not self._read_next(self._at_once - kept)
            except BaseException as error:
                if isinstance(error, Exception):
                    raise
                continue  # no interrupt, since this thread gets none: who waits has been told
            if rests:
                time.sleep(REST)

    def _read_next(self, places: int) -> bool:
        """Reads the next chunk, if there is one and fewer than so many are being read."""
        counted = False
        try:
            with self._lock:
                if self._reading >= places:
                    return False
                try:
                    chunk, read = self._pending.popleft()
                except IndexError:
                    return False
                self._reading += 1
                counted = True  # no interrupt comes between the two
            started = time.perf_counter()
            try:
                found = read()
                each = (time.perf_counter() - started) / chunk.count
                self._seconds = max(each, FORGIVEN * self._seconds)
                chunk.outcome.tell(found)
            except BaseException as error:
                chunk.outcome.tell(error=error)
                if not isinstance(error, Exception):
                    raise
        finally:
            if counted:
                with self._lock:
                    self._reading -= 1
        return True

    def _next_chunk(self, start: Cursor, cut: Cut, loop: bool) -> "_Chunk":
        if self._queue and self._queue[0].begins(start, cut, loop):
            return self._queue.popleft()
        self.forget()
        return self._submit(start, cut, 1, loop)

    def _top_up(self, last: "_Chunk", loop: bool) -> None:
        """Asks for what follows the chunk that was just taken, as far as there is room."""
        supply, taken = self.supply, last.start
        while sum(chunk.count for chunk in self._queue) < self._depth * self.count:
            last = self._queue[-1] if self._queue else last
            slow = self._seconds * self.count > CHUNK_SECONDS
            cut, count = last.cut, 1 if self._singly or slow else self.count
            start = last.after
            if start is not None and taken is not None and supply.length is not None:
                # Whoever is at one epoch may want no other: a small source would be read many times
                # over. And rows that no cursor counts would fail those that are asked for.
                ends = start.epoch + 1 + max(count, count * cut.size // supply.length)
                if (self._queue and start.epoch > taken.epoch + 1) or ends >= 2**32:
                    break
            if start is not None and loop:
                assert supply.length is not None
                left = supply.length - start.offset
                keeps = supply.last_batch == "keep"
                cut = cut._replace(size=min(supply.size, left) if keeps else supply.size)
                count = min(count, max(1, left // cut.size))
            self._queue.append(self._submit(start, cut, count, loop, last))

    def _submit(
        self,
        start: Cursor | None,
        cut: Cut,
        count: int,
        loop: bool,
        before: "_Chunk | None" = None,
        *,
        stacked: bool = False,
    ) -> "_Chunk":
        if self.supply.length is None:
            earlier = None if before is None else before.outcome
            how = self._read_stream, start, earlier, cut, count, loop, stacked
            read = functools.partial(self._as_asked, *how)
            start, after = (start if earlier is None else None), None
        else:
            assert start is not None
            plan = self._plan(start, cut, count, stacked)
            read = functools.partial(self._as_asked, self._read_plan, plan, cut, stacked)
            start, after = plan.starts[0], plan.after
        chunk = _Chunk(start, cut, count, loop, after)
        self._pending.append((chunk, read))
        self._threads.submit(self._read_in_thread)
        return chunk

    def _stays(self, fetched: Fetched, count: int = 1) -> bool:
        """Whether all that a stage may ask for is left to who takes it, in `count` equal parts."""
        if self.supply.sharding is not None:
            return False
        wanted = jax.tree.leaves((fetched.batch, fetched.rows.mask))
        return self.supply.on_cpu and all(_is_readable(x, count) for x in wanted)

    def _placed(self, fetched: Sequence[Fetched], own: Own = None, axis: int = 0) -> list[Fetched]:
        """Batches on the device. For a CPU, what can be read in place is left to who takes it.

        What says which rows they have goes to the device if a stage asks for it.
        """
        wanted = [(batch, rows.mask) for batch, rows in fetched]
        if (sharding := self.supply.sharding) is not None:
            placed = jax.tree.map(lambda x: assemble(x, sharding, own, axis), wanted)
        elif self.supply.on_cpu:
            placed = jax.tree.map(lambda x: x if _is_readable(x) else jax.device_put(x), wanted)
        else:
            placed = jax.device_put(wanted)  # in one call, which costs less than one for each
        return [
            Fetched(batch, x.rows._replace(mask=mask))
            for x, (batch, mask) in zip(fetched, placed, strict=True)
        ]

    def _stack(
        self,
        whole: Fetched,
        own: Own,
        starts: list[Cursor],
        ends: list[Cursor],
        failures: Failures,
    ) -> Stack:
        count = len(starts)  # and no -1 for the rows: a field may have no items to count them by
        fetched = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), whole)
        kind = whole.rows.epoch.dtype
        before, behind = (
            Cursor(*(np.array(x, kind) for x in zip(*cursors, strict=True)))
            for cursors in (starts, ends)
        )
        (placed,) = self._placed([fetched], own, axis=1)
        return Stack(placed, before, behind, ends[-1], failures)

    def _as_asked(self, read: Callable[..., Any], *args: Any) -> Any:
        """`read`, in whatever thread, under the settings of whoever wants the rows."""
        with jax.enable_x64(self.supply.x64), transferring():
            return read(*args)

    # For sources with a length.

    def _plan(self, start: Cursor, cut: Cut, count: int, stacked: bool) -> "_Plan":
        """Which rows the batches from the settled `start` on have: `_rows.locate`, in numbers."""
        length, last_batch = self.supply.length, self.supply.last_batch
        assert length is not None
        epoch, offset = after = start
        kind, rows_in_all = word(length), cut.size * count
        masked = self.supply.masks or cut.padded
        if offset + rows_in_all <= length:
            starts = starts_within(epoch, offset, cut.size, count)
            after = advance(starts[-1], cut.size, length, last_batch)
            # Only what somebody asks for is made: with each array of some size NumPy lets another
            # thread have the interpreter, and waits to get it back.
            epochs, offsets = None, None
            if stacked or masked or not self.supply.bare:
                epochs = np.full(rows_in_all, epoch, kind)
                offsets = np.arange(offset, offset + rows_in_all, dtype=kind)
            rows = Rows(epochs, self._records.at(epoch, offset, rows_in_all), offsets, None)
            return _Plan(rows, np.ones(rows_in_all, bool) if masked else None, starts, after)
        starts = []
        for _ in range(count):
            starts.append(after)
            after = advance(after, cut.size, length, last_batch)
        check_counted(after, length)
        rows = Rows(*(np.zeros(rows_in_all, kind) for _ in range(3)), mask=None)
        inside = np.ones(rows_in_all, bool)
        for i, (epoch, offset) in enumerate(starts):
            at, end = i * cut.size, (i + 1) * cut.size
            while at < end:
                n = min(end - at, length - offset)
                rows.epoch[at : at + n] = epoch
                rows.offset[at : at + n] = np.arange(offset, offset + n, dtype=kind)
                rows.record[at : at + n] = self._records.at(epoch, offset, n)
                at += n
                if cut.padded and at < end:
                    # The keys of padded rows are those of the compiled program's.
                    rows.epoch[at:end], rows.record[at:end] = epoch, self._records.at(epoch, 0, 1)
                    inside[at:end], at = False, end
                epoch, offset = epoch + 1, 0
        return _Plan(rows, inside if masked else None, starts, after)

    def _read_plan(self, plan: "_Plan", cut: Cut, stacked: bool) -> Any:
        """Reads, and places on the device."""
        rows, inside, starts, after = plan
        reader, spec = self.supply.reader, self.supply.spec
        assert isinstance(reader, Reader)
        failures: list[list[tuple[int, ReadError]]] = [[] for _ in starts]
        sharding = self.supply.sharding
        own = None if sharding is None else own_rows(sharding, cut.size)
        here: Any = slice(None)
        if own is not None:
            here = (np.arange(0, len(rows.record), cut.size)[:, None] + own.rows).ravel()
        records = rows.record[here]
        if inside is None:
            batch = reader.rows(records, spec)
        else:
            batch, mask, errors = self._masked_rows(records, inside[here])
            holes = np.arange(len(inside))[here][inside[here] & ~mask].tolist()
            for row, error in zip(holes, errors, strict=True):
                failures[row // cut.size].append((int(rows.epoch[row]), error))
            rows = rows._replace(mask=mask)
        ends = [*starts[1:], after]
        if stacked:
            whole, broken = Fetched(batch, rows), [x for some in failures for x in some]
            return self._stack(whole, own, starts, ends, broken)
        if self.supply.bare:
            rows = rows._replace(record=None)  # no stage asks which they are
        whole = Fetched(batch, rows)
        batches = _cut(whole, len(starts))
        if not self._stays(whole, len(starts)):
            batches = self._placed(batches, own)
        return [Fed(*x) for x in zip(batches, repeat(cut), starts, ends, failures)]

    def _masked_rows(
        self, records: np.ndarray, inside: np.ndarray
    ) -> tuple[Batch, np.ndarray, list[ReadError]]:
        """`Reader.rows_and_holes` where only the rows `inside` exist."""
        reader, spec, wanted = self.supply.reader, self.supply.spec, records[inside]
        assert isinstance(reader, Reader)
        if not len(wanted):  # where all rows of this process are padding
            shapes = jax.tree.map(lambda x: empty_rows(0, x.shape, x.dtype), spec)
            batch, readable, errors = shapes, True, []
        elif self.supply.masks:
            batch, readable, errors = reader.rows_and_holes(wanted, spec)
        else:
            batch, readable, errors = reader.rows(wanted, spec), True, []
        if len(wanted) < len(inside):
            batch = jax.tree.map(lambda x: _spread(x, inside), batch)
        mask = inside.copy()
        mask[inside] = readable
        return batch, mask, errors

    # For streams.

    def _read_stream(
        self,
        start: Cursor | None,
        earlier: Outcome | None,
        cut: Cut,
        count: int,
        loop: bool,
        stacked: bool,
    ) -> Any:
        """Runs in the one thread of a stream; stops where a pass ends that a loop ends with, and
        before a batch that fails."""
        if earlier is not None:  # it is done: there is one thread, and it came first
            done = earlier.result()
            start = done.after if isinstance(done, Stack) else done[-1].after
        assert start is not None
        fed: list[Fed] = []
        while len(fed) < count and not (loop and fed and fed[-1].after.epoch != start.epoch):
            try:
                fed.append(self._next_of_stream(fed[-1].after if fed else start, cut, loop))
            except BaseException:
                if stacked or not fed:
                    raise
                break  # whoever wants what follows meets it again
        if not stacked:
            batches = [x.fetched for x in fed if x.fetched is not None]
            placed = iter(self._placed(batches))
            return [x._replace(fetched=x.fetched and next(placed)) for x in fed]
        whole = jax.tree.map(lambda *x: np.concatenate(x), *(x.fetched for x in fed))
        starts, ends = [x.first or x.start for x in fed], [x.after for x in fed]
        return self._stack(whole, None, starts, ends, ())

    def _next_of_stream(self, start: Cursor, cut: Cut, loop: bool) -> Fed:
        """The batch from `start` on. Its error is kept until it is known to who wants the batch:
        what has raised may, if it is begun again, go on as if nothing was amiss."""
        if self._failed is not None and self._failed[0] == start:
            raise self._failed[1]
        self._failed = None
        try:
            return self._read_of_stream(start, cut, loop)
        except BaseException as error:
            self._failed = start, error
            raise

    def _read_of_stream(self, start: Cursor, cut: Cut, loop: bool) -> Fed:
        stream, size, last_batch = self.supply.reader, self.supply.size, self.supply.last_batch
        assert isinstance(stream, Stream)
        at, found, places = start, [], []
        while len(found) < size:
            wanted = size - len(found)
            there = at.epoch, at.offset, wanted, self.supply.spec
            if self._windows is None:
                records = stream.read(*there)
                numbers = range(at.offset, at.offset + len(records))
            else:
                records, numbers = self._windows.read(*there)
            found += records
            places += [(at.epoch, n, at.offset + i) for i, n in enumerate(numbers)]
            at = Cursor(at.epoch, at.offset + len(records))
            if len(records) == wanted:
                break
            if at.offset == 0:
                again = ", which is begun anew for every epoch," if at.epoch else ""
                raise EmptySourceError(f"pass {at.epoch} over {stream.label}{again}")
            if last_batch == "drop" and at.offset < size:
                raise EmptySourceError.batch(stream.label, at.offset, size)
            at = Cursor(at.epoch + 1, 0)  # the pass has no more
            if last_batch == "drop":
                found, places = [], []
            if loop or (found and last_batch == "pad"):
                break
        if not found:
            return Fed(None, cut._replace(size=0), start, at)
        # A window may hold records behind the place that is reached.
        check_counted(Cursor(at.epoch, max(at.offset, *(n for _, n, _ in places))), None)
        epoch, record, offset = np.array(places, np.uint32).T
        batch = conform(stack(found), stream.stored_spec, self.supply.spec, record)
        rows = Rows(epoch, record, offset, None)
        if cut.padded:
            inside = np.arange(size) < len(found)
            batch = jax.tree.map(lambda x: _spread(x, inside), batch)
            epoch, record, offset = (_spread(x, inside) for x in (epoch, record, offset))
            rows = Rows(epoch, record, offset, inside)
        cut = cut._replace(size=len(rows.epoch))
        first = Cursor(places[0][0], places[0][2])
        return Fed(Fetched(batch, rows), cut, start, at, first=first)


class _Plan(NamedTuple):
    """The rows of some batches, which of them exist (None: all, and each is read or an error), and
    the cursors before each and after all.
    """

    rows: Rows
    inside: np.ndarray | None
    starts: list[Cursor]
    after: Cursor


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunk:
    """Batches that are read in one go. Where a stream's end is known once it is read."""

    start: Cursor | None
    cut: Cut
    count: int
    loop: bool
    after: Cursor | None
    outcome: Outcome = dataclasses.field(default_factory=Outcome)

    def begins(self, start: Cursor, cut: Cut, loop: bool) -> bool:
        """Whether its first batch is the one wanted now; what could not be read is not."""
        if (self.cut, self.loop) != (cut, loop):
            return False
        if self.start is not None:
            return self.start == start
        return self.outcome.error() is None and self.outcome.result()[0].start == start


def processors() -> int:
    """How many threads of this process can run at the same time."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Records:
    """Which records stand in any stretch of an epoch; their order is computed block by block."""

    def __init__(self, order: Callable[[int], Order], length: int | None):
        self._order, self._length = order, length
        self._orders: dict[int, Order] = {}
        self._blocks: dict[tuple[int, int], tuple[int, Any]] = {}

    def at(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """The records at `count` offsets from `offset` on, all of them in the epoch."""
        assert self._length is not None
        order = _kept(self._orders, epoch, lambda: self._order(epoch))
        parts, end = [], offset + count
        while offset < end:
            i = offset // BLOCK
            if (epoch, i) in self._blocks and (i + 1) * BLOCK < self._length:
                self._started(order, epoch, i + 1)  # it is computed while this one is used
            first, block = self._started(order, epoch, i)
            stop = min(end, (i + 1) * BLOCK)
            parts.append(np.asarray(block)[offset - first : stop - first])
            offset = stop
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _started(self, order: Order, epoch: int, i: int) -> tuple[int, Any]:
        """Where a block begins, and its records, which XLA may still be computing."""
        return _kept(self._blocks, (epoch, i), lambda: self._block(order, i))

    def _block(self, order: Order, i: int) -> tuple[int, Any]:
        assert self._length is not None
        kind = word(self._length)
        # The last block begins earlier, so that it is as long as the others: all share one program.
        count = min(BLOCK, self._length)
        first = min(i * BLOCK, self._length - count)
        if isinstance(order, StoredOrder):
            return first, np.arange(first, first + count, dtype=kind)
        with on_host(), transferring():
            return first, _records_of(order, kind.type(first), count)


@functools.partial(jax.jit, static_argnames="count", compiler_options=ONE_THREAD)
def _records_of(order: Order, start: Any, count: int) -> Any:
    return order.run(jnp.asarray(start), count)


def on_host() -> Any:
    """Computes on the CPU: a read must not wait behind what an accelerator has in its queue."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave the CPU alone
        return contextlib.nullcontext()


def stack_counts(length: int, batch_bytes: int) -> list[int]:
    """How a scan of `length` batches is cut into chunks: at least 8, of one size but the last."""
    count = min(max(CHUNK_BYTES // batch_bytes, 1), -(-length // 8))
    # With a divisor there is one program to compile, and not a second one for what is left.
    count = next((c for c in range(count, count // 2, -1) if length % c == 0), count)
    whole, rest = divmod(length, count)
    return [count] * whole + [rest] * (rest > 0)


def _cut(whole: Fetched, count: int) -> list[Fetched]:
    """A chunk in `count` batches, of as many rows each."""
    leaves, structure = jax.tree.flatten(whole)
    sizes = [len(x) // count for x in leaves]
    return [
        jax.tree.unflatten(
            structure, [x[i * n : (i + 1) * n] for x, n in zip(leaves, sizes, strict=True)]
        )
        for i in range(count)
    ]


def _is_readable(x: np.ndarray, count: int = 1) -> bool:
    """Whether a program on a CPU reads each of `count` equal parts of the array in its place, or
    copies it in next to no time.
    """
    size = x.nbytes // count
    evenly = count == 1 or size % ALIGNMENT == 0
    return size < COPIED_FROM or (evenly and x.ctypes.data % ALIGNMENT == 0)


def _spread(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Rows put where `inside` is True, zero elsewhere."""
    wide = empty_rows(len(inside), x.shape[1:], x.dtype)
    wide[inside], wide[~inside] = x, 0
    return wide


def _kept(cache: dict[Any, Any], key: Any, make: Callable[[], Any], most: int = 4) -> Any:
    """The value of a key, made if need be; of older ones a few are kept."""
    if key not in cache:
        while len(cache) >= most:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]
