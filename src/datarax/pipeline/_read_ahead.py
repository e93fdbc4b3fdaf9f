"""Threads that read the rows of a source on the host before they are asked for."""

import collections
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from itertools import islice, takewhile
from typing import Any

import jax

from .._rows import Cut
from .._settings import processors
from .._types import Cursor
from ..sources._iterable import Stream
from ..sources._reader import Reader
from ._read_batches import PlannedRows, ReadBatch, ReadSettings, Stack, StreamRows, as_asked
from ._threads import Outcome, Threads

BUFFER_BYTES = 64 * 2**20
"""The most bytes of rows that are read ahead, unless a single chunk has more."""

CHUNK_BYTES = 8 * 2**20
"""What a thread reads in one go: waking it costs as much as reading some hundred kilobytes."""

CHUNK_BATCHES, CHUNK_SECONDS = 8, 0.05
"""The most batches of a chunk for `for`, and the most seconds that reading them may take: so long
its first batch may wait for the last."""

FORGIVEN = 0.8
"""What a slow read still counts for at the next one: a stream that has paused may do so again."""

RESERVED, REST = 5e-3, 1e-3
"""Seconds for which a slot stays reserved for a consumer that has just read a chunk itself, and
seconds for which a thread without a slot sleeps before it looks again."""


class ReadAhead:
    """Reads the batches of a stream, in its order, before they are asked for.

    A request for another place than the end of the last batch restarts it there. A failed read
    raises when its batch is asked for, not earlier; asking again reads again.
    """

    def __init__(self, settings: ReadSettings, threads: int):
        self.settings = settings
        sequential = isinstance(settings.reader, Stream)
        self._at_once = 1 if sequential else threads
        self._lock, self._reading = threading.Lock(), 0  # guards the number of running reads
        # With as many threads as processors, a consumer that is woken waits for a processor as long
        # as a thread needs to copy a chunk. So it reads chunks itself while it waits, and one
        # thread pauses.
        copies = isinstance(settings.reader, Reader) and settings.reader.only_copies
        self._shares = copies and 1 < self._at_once >= processors()
        self._reserved_until = -math.inf
        self._pending: collections.deque[tuple[_Chunk, Callable[[], Any]]] = collections.deque()
        self._rows = StreamRows(settings) if settings.length is None else PlannedRows(settings)
        self._queue: collections.deque[_Chunk] = collections.deque()
        self._ready: collections.deque[ReadBatch] = collections.deque()
        self._asked: tuple[Cut, bool] | None = None
        self._singly = 1
        self._seconds = 0.0  # estimate of what reading one batch takes
        leaves = jax.tree.leaves(settings.spec)
        row = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
        self.batch_bytes = max(1, row * settings.size)
        self.count = min(max(CHUNK_BYTES // self.batch_bytes, 1), CHUNK_BATCHES)
        room = BUFFER_BYTES // (self.batch_bytes * self.count)
        self._depth = min(max(room, 1), 2 * threads + 2)
        self._threads = Threads(self._at_once, "datarax-read")

    def take(self, start: Cursor, cut: Cut, loop: bool, several: int) -> list[ReadBatch]:
        """The batch at `start`, with those read in the same chunk, at most `several` in all.

        With `loop`, what follows is cut as `for` cuts it. The batches that come along are cut alike
        in every mode. Call `handed_over` for each batch that is used.
        """
        if not (self._ready and self._is_next(start, cut, loop)):
            self._ready.clear()
            chunk = self._next_chunk(start, cut, loop)
            self._asked = chunk.cut, chunk.loop  # set before `_ready` holds batches of this cut
            try:
                self._ready.extend(self._batches(chunk))
            except BaseException as error:
                self.forget()
                self._rows.retry()  # the consumer knows the error now: asking again reads again
                # A KeyboardInterrupt is the consumer's own and is raised, unless a thread has
                # found it while reading for a consumer that does not read itself.
                read = not self._shares and chunk.outcome.known and error is chunk.outcome.error()
                if chunk.count == 1 or not (read or isinstance(error, Exception)):
                    raise
                self._singly = chunk.count  # hands out the batches before the broken one
                return self.take(start, cut, loop, several)
            self._singly = max(0, self._singly - chunk.count)
            self._top_up(chunk, loop)
        return [*islice(takewhile(self._is_inside, self._ready), several)] or [self._ready[0]]

    def _is_next(self, start: Cursor, cut: Cut, loop: bool) -> bool:
        """Whether the first batch that is ready is the one asked for."""
        first = self._ready[0]
        return first.start == start and (first.is_cut(cut) or self._asked == (cut, loop))

    def _is_inside(self, batch: ReadBatch) -> bool:
        """Whether it is a full batch inside one epoch, and not the last that a cursor can count."""
        whole = batch.cut.size == self.settings.size
        return whole and batch.ends_inside and batch.after.epoch < 2**32

    def handed_over(self) -> None:
        """Removes the first batch of the last `take`, which is used now."""
        if self._ready:  # else `forget` was called since
            self._ready.popleft()

    def stacks(
        self, start: Cursor, cut: Cut, counts: Sequence[int]
    ) -> Generator[Stack, None, None]:
        """Chunks of `counts` batches for `scan`; threads read the next while one is computed."""
        self.forget()
        room = BUFFER_BYTES // (self.batch_bytes * max(counts))
        depth = min(max(room, 2), self._at_once + 2)
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
            self._rows.retry()

    def forget(self) -> None:
        """Drops what was read ahead."""
        # In this order: an interrupt after clearing `_pending` first would leave chunks in the
        # queue that no thread will ever read.
        self._queue.clear()
        self._ready.clear()
        self._pending.clear()

    def close(self) -> None:
        """Tells the threads to end; does not wait for them."""
        self.forget()
        self._threads.close()

    def _batches(self, chunk: "_Chunk") -> list[ReadBatch]:
        """The batches of a chunk, which wait for each other no longer than CHUNK_SECONDS.

        A stream may pause for any time, or until the consumer has used what it has got. Its chunk
        then stays in the queue with the batches that are missing.
        """
        if isinstance(self._rows, PlannedRows):
            return self._result(chunk)
        self._threads.check_open()
        found = chunk.untaken()
        chunk.taken += len(found)
        if not chunk.is_used_up():
            self._queue.appendleft(chunk)
        return found

    def _result(self, chunk: "_Chunk") -> Any:
        """The content of a chunk. Waits for it, and reads chunks meanwhile if that is faster."""
        if chunk.outcome.known:
            return chunk.outcome.result()
        self._threads.check_open()
        try:
            while self._shares and not chunk.outcome.known:
                self._reserved_until = -math.inf  # the consumer uses its slot now
                if not self._read_next(self._at_once):
                    break
                self._reserved_until = time.monotonic() + RESERVED
            return chunk.outcome.result()
        finally:
            if self._shares:
                self._reserved_until = time.monotonic() + RESERVED

    def _read_in_thread(self) -> None:
        """Reads what is pending, but leaves a slot to a consumer that is about to wait."""
        while self._pending and not self._threads.closed:
            reserved = time.monotonic() < self._reserved_until
            try:
                rests = not self._read_next(self._at_once - reserved)
            except BaseException as error:
                if isinstance(error, Exception):
                    raise
                continue  # raised by the user's code, not a signal; the consumer has been told
            if rests:
                time.sleep(REST)

    def _read_next(self, places: int) -> bool:
        """Reads the next pending chunk, if fewer than `places` are being read."""
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
                counted = True  # Python handles no signal between these two lines
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
        while self._queue:
            if self._queue[0].begins(start, cut, loop):
                return self._queue.popleft()
            if not self._queue[0].is_used_up():
                break
            self._queue.popleft()
        self.forget()
        return self._submit(start, cut, 1, loop)

    def _top_up(self, last: "_Chunk", loop: bool) -> None:
        """Submits reads of what follows the chunk just taken, as far as there is room."""
        settings, taken = self.settings, last.start
        while sum(chunk.count for chunk in self._queue) < self._depth * self.count:
            last = self._queue[-1] if self._queue else last
            slow = self._seconds * self.count > CHUNK_SECONDS
            cut, count = last.cut, 1 if self._singly or slow else self.count
            start = last.after
            if start is not None and taken is not None and settings.length is not None:
                # At most one epoch ahead: the consumer may stop at the end of this one, and a
                # small source would be read many times over. And no further than a cursor counts:
                # that error would fail the whole chunk.
                is_far = bool(self._queue) and start.epoch > taken.epoch + 1
                ends = start.epoch + 1 + max(count, count * cut.size // settings.length)
                if is_far or ends >= 2**32:
                    break
            if start is not None and loop:
                assert settings.length is not None
                left = settings.length - start.offset
                keeps = settings.last_batch == "keep"
                cut = cut._replace(size=min(settings.size, left) if keeps else settings.size)
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
        if isinstance(self._rows, StreamRows):
            earlier, outcome = None if before is None else before.outcome, Outcome()
            job = self._rows.read, start, earlier, cut, count, loop, stacked, outcome.tell_part
            start, after = (start if earlier is None else None), None
        else:
            assert start is not None
            plan = self._rows.plan(start, cut, count, stacked)
            job, outcome = (self._rows.read, plan, cut, stacked), Outcome()
            start, after = plan.starts[0], plan.after
        read = functools.partial(as_asked, self.settings, *job)
        chunk = _Chunk(start, cut, count, loop, after, outcome)
        self._pending.append((chunk, read))
        self._threads.submit(self._read_in_thread)
        return chunk


@dataclasses.dataclass(eq=False)
class _Chunk:
    """Batches that are read in one go.

    Where a chunk of a stream ends is known once it is read, so its `after` is None, and `start` too
    if it follows another. `taken` is how many of its batches the consumer has got already.
    """

    start: Cursor | None
    cut: Cut
    count: int
    loop: bool
    after: Cursor | None
    outcome: Outcome
    taken: int = 0

    def begins(self, start: Cursor, cut: Cut, loop: bool) -> bool:
        """Whether its next batch is the one asked for; False if reading it failed."""
        if self.cut != cut:
            return False
        if self.start is not None and not self.taken:
            return self.start == start
        self.outcome.wait_for_part(self.taken, CHUNK_SECONDS)
        for first in self.outcome.parts[self.taken :]:
            return first.start == start and (first.is_cut(cut) or self.loop == loop)
        return False

    def untaken(self) -> list[ReadBatch]:
        """For a stream: its batches as far as they are read, or the error of the first."""
        self.outcome.wait_for_part(self.taken, CHUNK_SECONDS)
        return self.outcome.parts[self.taken :] or self.outcome.result()

    def is_used_up(self) -> bool:
        """For a stream: whether it is known to have no more batches."""
        outcome = self.outcome
        return outcome.known and outcome.error() is None and self.taken == len(outcome.parts)


def stack_counts(length: int, batch_bytes: int, threads: int) -> list[int]:
    """How many batches each chunk of a scan has: if `length` allows, about 8 chunks or more and two
    for each thread, all of one size but the last."""
    count = min(max(CHUNK_BYTES // batch_bytes, 1), -(-length // max(8, 2 * threads)))
    # A divisor of `length` needs no second program for the remainder.
    count = next((c for c in range(count, count // 2, -1) if length % c == 0), count)
    whole, rest = divmod(length, count)
    return [count] * whole + [rest] * (rest > 0)
