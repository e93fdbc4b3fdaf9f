"""Batches that `for` and `step` compute before they are asked for, several in one call.

To dispatch a compiled program costs tens of microseconds, as much as to compute a small batch. So
one program computes several batches, which are handed over one by one. They count only as long as
nothing of the pipeline changes: a change discards them, and the next batch is computed anew.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import numpy as np

from .._host_memory import keep_memory, to_device
from .._keys import SOURCE
from .._mesh import spans_processes
from .._rows import Cut, advance, batches_of, pack, pack_each, starts_within
from .._settings import checks_values, processors
from .._types import Batch, Cursor, is_traced
from .._xla import SIDE_BY_SIDE, beside
from ..sources._base import SourceBatch, length_of
from ._binding import Binding, Changes, Values
from ._blame import blame, by_hand
from ._core import cutting, updated
from ._program import Program, batch_program
from ._read_batches import ReadBatch

if TYPE_CHECKING:
    from ._pipeline import Pipeline

AHEAD = 64
"""The most batches that are computed ahead."""

AHEAD_BYTES = 5 * 2**20
"""The most that batches computed ahead may weigh together. Beyond it nothing is gained: a dispatch
is cheap beside computing as many bytes, and they leave the caches of a CPU before they are used.
The process takes three to four times as much: what is handed over, what is computed meanwhile, and
what the heap keeps."""

AHEAD_COMPILE = 6.0
"""The most seconds that compiling the batches of one program may take, estimated as what one of
them took times their number. It takes less, since XLA compiles much of it once for all."""

PATIENCE = 2
"""Batches that are computed one by one before any is computed ahead, so that the first comes as
early as without."""


class Ready(NamedTuple):
    """A batch that is computed and not yet handed over.

    `changes` are the values that are new once it is. The cursor behind it is `end`; as an array it
    is `packed`, or among the changes where that is None. `read` is what the host read for it.
    """

    batch: Batch
    changes: Changes
    packed: np.ndarray | None
    end: Cursor
    read: ReadBatch | None


_READY = functools.partial(tuple.__new__, Ready)  # `Ready._make` without a call in Python


class Seen(NamedTuple):
    """A pipeline as of the last look at it, see `Runtime`."""

    binding: Binding
    values: Values
    start: Cursor
    traced: bool
    mutable: bool


Results: TypeAlias = list[tuple[Batch, Changes]]
"""Batches in a row, each with the values that have changed by then."""


class ComputedAhead:
    """The queue of such batches.

    If more than a third of those computed ahead were discarded, at least twice as many batches as
    before are computed one by one until the next try, but no more than `4 * AHEAD`.
    """

    def __init__(self):
        self.ready: collections.deque[Ready] = collections.deque()
        self.low = 0
        """It is filled up again when it holds no more than so many."""
        self._filled = 0  # how many it held when it was last filled
        self._used = 0  # how many computed ahead were handed over since the last change
        self._patience = self._next_patience = PATIENCE
        self._turn = 0  # the number of the last program that was called beside others

    def is_low(self) -> bool:
        return len(self.ready) <= self.low

    def clear(self) -> None:
        """Drops what is computed, without distrust of who asked for it."""
        self.ready.clear()
        self._filled = self.low = 0

    def discard(self) -> None:
        """Drops what is computed, since the pipeline has changed."""
        vain = len(self.ready)
        self._used += self._filled - vain if self._filled > 1 else 0
        if 2 * vain > self._used:
            longer = 2 * max(self._next_patience, vain)
            self._patience = self._next_patience = min(longer, 4 * AHEAD)
        self.clear()
        self._used = 0

    def fill(
        self,
        pipeline: "Pipeline",
        seen: Seen,
        order: Callable[[Cursor, Cut, int], Any],
        cut: Cut,
        following: int,
    ) -> None:
        """Computes the next batch, or several if that has proved worth it.

        `following` batches of that cut are left in the epoch. `order(start, cut, count)` gives the
        order of the epochs that so many batches from `start` on are in.
        """
        keep_memory()
        self._count_use()
        binding, values, start, *_ = seen
        cursor_index = binding.cursor_index if is_traced(start.epoch) else None
        single = batch_program(binding.structure, cut, 1, cursor_index, False)
        self._patience -= 1
        sides, most = _sides(single), 1
        if self._may_take_several(pipeline, seen, single):
            size, length, last_batch = cutting(pipeline)
            most = at_once(single, sides, length and batches_of(size, length, last_batch))
        several = max(1, most // sides)
        # While the last of the queue are handed over, a program that runs beside them computes the
        # next.
        self.low = most - several
        while self.is_low():
            due = max(1, following + 1) - len(self.ready)
            if self.ready:
                if due < 1:
                    break
                last = self.ready[-1]
                start, values = last.end, updated(values, {binding.cursor_index: last.packed})
            count = several if fits(several, due, start, cut, single) else 1
            first, again = start, max(0, count - due)
            if again:
                first = Cursor(start.epoch, start.offset - again * cut.size)
                packed = pack(first, length_of(pipeline.source))
                values = updated(values, {binding.cursor_index: packed})
            args = values, order(first, cut, count)
            side = self._next_side(sides) if most > 1 else None
            try:
                found = call(pipeline, binding, cut, count, cursor_index, side, args)[again:]
            except Exception:
                if not self.ready:
                    raise
                self.low = 0  # its turn comes later, and then it fails again
                break
            single.keeps_state = any(changes for _, changes in found)
            if cursor_index is None:
                self.ready.extend(with_cursors(found, start, cut.size, *cutting(pipeline)[1:]))
            else:
                self.ready.extend(Ready(*each, None, start, None) for each in found)
            if single.keeps_state:  # the next batch needs the values that this one leaves
                self.low = 0
        self._filled = len(self.ready)

    def fill_from(
        self, pipeline: "Pipeline", seen: Seen, reads: Sequence[ReadBatch], several: int
    ) -> None:
        """Computes the next batches from rows that the host has read: all of them, or the first.

        All only if they are `several`, as many as are read in one go, so that there are two
        programs to compile and no more.
        """
        self._count_use()
        binding, values = seen.binding, seen.values
        if pipeline._sink == SOURCE or reads[0].fetched is None:  # a program would only copy
            batches = to_device([_unstaged(x.fetched, pipeline.mask_name) for x in reads])
            self._append(pipeline, [(batch, {}) for batch in batches], reads)
            return
        cut = reads[0].cut
        single = batch_program(binding.structure, cut, 1, None, False)
        self._patience -= 1
        sides = _sides(single)
        full = len(reads) == several <= at_once(single, sides)
        if not (full and self._may_take_several(pipeline, seen, single)):
            reads = reads[:1]
        kind = values[binding.cursor_index].dtype.type
        given = [(x.fetched, Cursor(*map(kind, x.first or x.start))) for x in reads]
        count, results = max(1, len(reads) // sides), []
        for i in range(0, len(reads), count):
            part = given[i : i + count]
            side = self._next_side(sides) if len(reads) > 1 else None
            args = values, None, part
            results += call(pipeline, binding, cut, len(part), None, side, args)
        single.keeps_state = any(changes for _, changes in results)
        self._append(pipeline, results, reads)

    def _append(self, pipeline: "Pipeline", results: Results, reads: Sequence[ReadBatch]) -> None:
        packed = pack_each([x.after for x in reads], length_of(pipeline.source))
        for result, each, read in zip(results, packed, reads, strict=True):
            self.ready.append(Ready(*result, each, read.after, read))
        self._filled = len(self.ready)

    def _count_use(self) -> None:
        """Who has used as many as the last filling gave is trusted again."""
        if self._filled > 1:
            self._used += self._filled - len(self.ready)
            if self._used >= self._filled:
                self._next_patience = PATIENCE

    def _next_side(self, sides: int) -> int | None:
        """The number of the next program among those that run side by side, if any do."""
        if sides == 1:
            return None
        self._turn = self._turn % sides + 1
        return self._turn

    def _may_take_several(self, pipeline: "Pipeline", seen: Seen, single: Program) -> bool:
        """Whether batches may be computed before they are asked for."""
        return (
            self._patience < 0
            and not seen.traced
            and not seen.mutable
            and not single.host_nodes
            # With jax_debug_nans an error belongs to the batch that holds the NaN.
            and not checks_values()
            # The clock decides how many; all processes must run the same programs.
            and not spans_processes(pipeline.sharding)
            and seen.start.epoch < 2**32 - 1  # behind the very last batch comes an error
            # Until a first call has shown whether others can be computed beside it.
            and not (single.shared and single.keeps_state is None)
        )


def call(
    pipeline: "Pipeline",
    binding: Binding,
    cut: Cut,
    count: int,
    cursor_index: int | None,
    side: int | None,
    args: tuple[Any, ...],
) -> Results:
    """Calls the program for so many batches; an error names the stage."""
    alone = side is not None and count > 1
    program = batch_program(binding.structure, cut, count, cursor_index, alone)
    try:
        with nullcontext() if side is None else beside(side):
            return program(*args)
    except Exception as error:
        blame(pipeline, program, error, functools.partial(by_hand, binding, cut, *args))
        raise


def fits(count: int, due: int, start: Cursor, cut: Cut, single: Program) -> bool:
    """Whether `count` batches are computed together from `start` on, if `due` of them are left.

    The last program of an epoch begins earlier rather than being shorter, which would need another
    program: it computes a few batches again that were handed out before.
    """
    missing = count - due
    return missing <= 0 or (
        missing < count // 2 and missing * cut.size <= start.offset and single.keeps_state is False
    )


def with_cursors(
    found: Results, start: Cursor, size: int, length: int | None, last_batch: Any
) -> Iterable[Ready]:
    """Batches in a row from `start` on; all but the last end in the epoch of the first."""
    epoch, offset = start
    ends = starts_within(epoch, offset + size, size, len(found))
    ends[-1] = advance(Cursor(epoch, ends[-1].offset - size), size, length, last_batch)
    fields = *zip(*found, strict=True), pack_each(ends, length), ends, repeat(None)
    return map(_READY, zip(*fields, strict=False))


def at_once(single: Program, sides: int, in_epoch: int | None = None) -> int:
    """How many batches are worth computing together, by what compiling one of them has taken.

    With several `sides` this many are shared out among as many calls of one program. Among the
    possible numbers one is taken that divides those `in_epoch`, or leaves few over.
    """
    compiled = AHEAD_COMPILE / single.seconds * sides
    most = min(AHEAD, compiled, AHEAD_BYTES / max(single.bytes, 1))
    return _evenly(max(1, int(most)), in_epoch or 0)


@functools.lru_cache
def _evenly(most: int, in_epoch: int) -> int:
    if not in_epoch:
        return most
    even = math.ceil(in_epoch / math.ceil(in_epoch / most))
    return next((n for n in range(most, most // 3, -1) if in_epoch % n == 0), even)


def _sides(single: Program) -> int:
    """How many calls of such a program had better run side by side.

    XLA shares the kernels of a single call out among all processors. To give each processor a call
    of its own is faster, but then no batch may depend on the one before.
    """
    able = single.shared and SIDE_BY_SIDE and jax.local_device_count() == 1
    return processors() if able and single.keeps_state is False else 1


def _unstaged(fetched: SourceBatch | None, mask_name: str) -> Batch:
    """The batch of a pipeline without stages; no fields at the end of a pass."""
    if fetched is None:
        return {}
    batch, rows = fetched
    return batch if rows.mask is None else {**batch, mask_name: rows.mask}
