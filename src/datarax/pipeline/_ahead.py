"""How far `for` and `step` compute ahead of what they hand out."""

import collections
import functools
import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np

from .._rows import Cut, advance, pack_each, starts_within
from .._types import Batch, Cursor
from ._binding import Changes
from ._program import Program
from ._reading import Fed

AHEAD = 64
"""The most batches that `for` and `step` compute ahead, and hand out one by one."""

AHEAD_BYTES = 5 * 2**20
"""The most that batches computed ahead may weigh together: a call costs little beside computing
that many bytes, caches do not hold many more, and a process takes three to four times as much (what
is handed over, what is computed meanwhile, and what the heap keeps)."""

AHEAD_COMPILE = 6.0
"""As many batches are compiled together as would take these seconds one by one: together they take
less, since much is the same for one and for many."""

PATIENCE = 2
"""Batches handed out one at a time before any is computed ahead, so that the first comes early."""


Ready: TypeAlias = tuple[tuple[Batch, Changes], np.ndarray | None, Cursor, Fed | None]
"""A batch that is computed and not yet handed over, with the values that are new once it is; the
cursor then, as an array (None: it is among the new values) and in numbers; and where the batch
comes from if the host has read its rows."""


class Ahead:
    """Batches that are computed and not yet handed over, and whether it is worth computing several.

    Those count only as long as nothing changes. Where a third was in vain, the next try waits.
    """

    def __init__(self):
        self.ready: collections.deque[Ready] = collections.deque()
        self.low = 0
        """It is filled up again when it holds no more than so many."""
        self._filled = 0  # how many it held when it was last filled
        self._used = 0  # how many that were computed ahead have been handed over since a change
        self.patience = self._next_patience = PATIENCE
        """As many batches come alone before one is computed ahead; less than none: several may."""

    def is_low(self) -> bool:
        return len(self.ready) <= self.low

    def before_filling(self) -> None:
        """Whoever has used as many as the last filling gave is trusted again."""
        if self._filled > 1:
            self._used += self._filled - len(self.ready)
            if self._used >= self._filled:
                self._next_patience = PATIENCE

    def after_filling(self) -> None:
        self._filled = len(self.ready)

    def clear(self) -> None:
        """Forgets what was computed, for no fault of whoever asked for it."""
        self.ready.clear()
        self._filled = self.low = 0

    def discard(self) -> None:
        """Forgets what was computed, since it holds no more."""
        vain = len(self.ready)
        self._used += self._filled - vain if self._filled > 1 else 0
        if 2 * vain > self._used:
            longer = 2 * max(self._next_patience, vain)
            self.patience = self._next_patience = min(longer, 4 * AHEAD)
        self.clear()
        self._used = 0


def fits(count: int, due: int, start: Cursor, cut: Cut, single: Program) -> bool:
    """Whether so many are computed from `start` on, if `due` are left of that cut.

    Near the end of an epoch, a few that were handed out before are computed once more.
    """
    missing = count - due
    return missing <= 0 or (
        missing < count // 2 and missing * cut.size <= start.offset and single.keeps_state is False
    )


def with_cursors(
    found: Sequence[Any], start: Cursor, size: int, length: int | None, last_batch: Any
) -> Iterable[Ready]:
    """Batches in a row from `start` on; all but the last end in the epoch of the first."""
    epoch, offset = start
    ends = starts_within(epoch, offset + size, size, len(found))
    ends[-1] = advance(Cursor(epoch, ends[-1].offset - size), size, length, last_batch)
    return zip(found, pack_each(ends, length), ends, repeat(None), strict=False)


def at_once(single: Program, sides: int, in_epoch: int | None = None) -> int:
    """How many batches are worth computing together, by what compiling one has taken.

    With several `sides`, one program serves them all, and makes a part of these batches.
    With a divisor of those `in_epoch`, none are left over at its end; else as few as can be.
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
