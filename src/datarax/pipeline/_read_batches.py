"""Batches read from a source on the host: what the threads of a `ReadAhead` do."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._host_memory import ALIGNMENT
from .._mesh import Own, assemble, own_rows
from .._order import Order, StoredOrder, word
from .._rows import Cut, LastBatch, Rows, advance, check_counted, starts_within
from .._settings import transferring
from .._types import Batch, Cursor, Spec
from .._xla import ONE_THREAD
from ..errors import EmptySourceError, ReadError
from ..sources._base import SourceBatch
from ..sources._buffers import empty_rows
from ..sources._conform import conform, stack
from ..sources._iterable import Stream, Windows
from ..sources._reader import Reader
from ._threads import Outcome

COPIED_FROM = 2**18
"""Bytes from which a program that copies an unaligned array costs more than `jax.device_put`."""

BLOCK = 2**15
"""How many records of an epoch have their order computed in one call."""

Failures: TypeAlias = Sequence[tuple[int, ReadError]]
"""The epoch of each masked row, and its error."""


class ReadBatch(NamedTuple):
    """The rows of a batch with the cursors before and after it.

    `fetched` is None at the end of a stream's pass. `first` is the cursor of its first row, which
    is not `start` if that was the end of a pass.
    """

    fetched: SourceBatch | None
    cut: Cut
    start: Cursor
    after: Cursor
    failures: Failures = ()
    first: Cursor | None = None

    @property
    def ends_inside(self) -> bool:
        """Whether no row of the next epoch is in it."""
        epoch = self.start.epoch
        return self.after.epoch == epoch or self.after == (epoch + 1, 0)

    def is_cut(self, cut: Cut) -> bool:
        """Whether it is what both `for` and `step` get for that cut: no pass ends within it."""
        return self.cut == cut and self.first in (None, self.start) and self.ends_inside


class Stack(NamedTuple):
    """Several batches stacked on a leading axis, with the cursors before and after each, for a
    compiled loop over them."""

    fetched: SourceBatch
    starts: Cursor
    ends: Cursor
    after: Cursor
    failures: Failures


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """Where rows come from, how they are cut, and where they go.

    `order(epoch)` serves a source with a length, and a stream that is shuffled in windows of
    `window` records. `bare` is True for a pipeline without stages, `on_cpu` if programs run on a
    CPU. `x64` and `device` are JAX settings of the consumer's thread, which the reading threads
    must adopt. With a `sharding`, rows are placed as it says, and this process reads only the rows
    that lie on its own devices.
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
    device: Any
    sharding: NamedSharding | None
    order: Callable[[int], Any]
    window: int | None = None


class Plan(NamedTuple):
    """The rows of some batches, and the cursors before each and after all.

    `inside` is False for padding. None means that all rows exist and none may be masked.
    """

    rows: Rows
    inside: np.ndarray | None
    starts: list[Cursor]
    after: Cursor


class PlannedRows:
    """Batches of a source with a length: their rows are planned before any is read."""

    def __init__(self, settings: ReadSettings):
        assert settings.length is not None
        self.settings, self._length = settings, settings.length
        self._records = _Records(settings.order, settings.length)

    def retry(self) -> None:
        """Does nothing: no error is remembered."""

    def plan(self, start: Cursor, cut: Cut, count: int, stacked: bool) -> Plan:
        """The rows of `count` batches from the settled `start` on: `_rows.locate` in NumPy."""
        within = start.offset + cut.size * count <= self._length
        if not within:
            return self._plan_across(start, cut, count)
        return self._plan_within(start, cut, count, stacked or not self.settings.bare)

    def _plan_within(self, start: Cursor, cut: Cut, count: int, wanted: bool) -> Plan:
        """A plan for batches inside one epoch, with epoch and offset of each row if `wanted`."""
        (epoch, offset), kind, rows_in_all = start, word(self._length), cut.size * count
        starts = starts_within(epoch, offset, cut.size, count)
        after = advance(starts[-1], cut.size, self._length, self.settings.last_batch)
        masked = self.settings.masks or cut.padded
        # Arrays that nobody asks for are not made: for each larger one NumPy releases the GIL, and
        # then waits for other threads to get it back.
        epochs, offsets = None, None
        if wanted or masked:
            epochs = np.full(rows_in_all, epoch, kind)
            offsets = np.arange(offset, offset + rows_in_all, dtype=kind)
        rows = Rows(epochs, self._records.at(epoch, offset, rows_in_all), offsets, None)
        return Plan(rows, np.ones(rows_in_all, bool) if masked else None, starts, after)

    def _plan_across(self, start: Cursor, cut: Cut, count: int) -> Plan:
        """A plan for batches that cross the end of an epoch, or are padded there."""
        length, kind, rows_in_all = self._length, word(self._length), cut.size * count
        starts, after = [], start
        for _ in range(count):
            starts.append(after)
            after = advance(after, cut.size, length, self.settings.last_batch)
        check_counted(after, length)
        rows = Rows(*(np.zeros(rows_in_all, kind) for _ in range(3)), mask=None)
        inside = np.ones(rows_in_all, bool)
        for i, (epoch, offset) in enumerate(starts):
            row, end = i * cut.size, (i + 1) * cut.size
            while row < end:
                n = min(end - row, length - offset)
                rows.epoch[row : row + n] = epoch
                rows.offset[row : row + n] = np.arange(offset, offset + n, dtype=kind)
                rows.record[row : row + n] = self._records.at(epoch, offset, n)
                row += n
                if cut.padded and row < end:
                    # Padded rows get the record that the compiled program gives them, so that
                    # their keys are the same.
                    rows.epoch[row:end], rows.record[row:end] = epoch, self._records.at(epoch, 0, 1)
                    inside[row:end], row = False, end
                epoch, offset = epoch + 1, 0
        masked = self.settings.masks or cut.padded
        return Plan(rows, inside if masked else None, starts, after)

    def read(self, plan: Plan, cut: Cut, stacked: bool) -> Any:
        """Reads the rows and places them on the device: a `Stack`, or a list of `ReadBatch`."""
        sharding, starts = self.settings.sharding, plan.starts
        own = None if sharding is None else own_rows(sharding, cut.size)
        whole, failures = self._read_rows(plan, cut, own)
        ends = [*starts[1:], plan.after]
        if stacked:
            broken = [x for some in failures for x in some]
            return _stack(self.settings, whole, own, starts, ends, broken)
        if self.settings.bare:
            whole = whole._replace(rows=whole.rows._replace(record=None))  # only stages use it
        batches = _placed(self.settings, _split_chunk(whole, len(starts)), own)
        return [ReadBatch(*x) for x in zip(batches, repeat(cut), starts, ends, failures)]

    def _read_rows(self, plan: Plan, cut: Cut, own: Own) -> tuple[SourceBatch, list[Failures]]:
        """The rows that this process reads, and for each batch the errors of its masked rows."""
        rows, inside, starts, _ = plan
        reader, spec = self.settings.reader, self.settings.spec
        assert isinstance(reader, Reader)
        failures: list[list[tuple[int, ReadError]]] = [[] for _ in starts]
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
        return SourceBatch(batch, rows), [*failures]

    def _masked_rows(
        self, records: np.ndarray, inside: np.ndarray
    ) -> tuple[Batch, np.ndarray, list[ReadError]]:
        """As `Reader.rows_and_holes`; rows not `inside` are zero and masked."""
        reader, spec, wanted = self.settings.reader, self.settings.spec, records[inside]
        assert isinstance(reader, Reader)
        if not len(wanted):  # all rows of this process are padding
            shapes = jax.tree.map(lambda x: empty_rows(0, x.shape, x.dtype), spec)
            batch, readable, errors = shapes, True, []
        elif self.settings.masks:
            batch, readable, errors = reader.rows_and_holes(wanted, spec)
        else:
            batch, readable, errors = reader.rows(wanted, spec), True, []
        if len(wanted) < len(inside):
            batch = jax.tree.map(lambda x: _scattered(x, inside), batch)
        mask = inside.copy()
        mask[inside] = readable
        return batch, mask, errors


class StreamRows:
    """Batches of a stream, which ends where reading finds no more. Only one thread may read."""

    def __init__(self, settings: ReadSettings):
        self.settings = settings
        self._failed: tuple[Cursor, BaseException] | None = None
        self._windows = None
        if isinstance(settings.reader, Stream) and settings.window is not None:
            self._windows = Windows(settings.reader, settings.window, settings.order)

    def retry(self) -> None:
        """Forgets the last error, so that the next request for that batch reads again."""
        self._failed = None

    def read(
        self,
        start: Cursor | None,
        earlier: Outcome | None,
        cut: Cut,
        count: int,
        loop: bool,
        stacked: bool,
        tell_part: Callable[[ReadBatch], None],
    ) -> Any:
        """Reads up to `count` batches. Stops at the end of a pass if a `loop` asks, and before a
        batch that fails; a failing first batch raises. Unless they are `stacked`, each is told as
        soon as it is read."""
        if earlier is not None:  # never waits: the same thread has read that chunk before
            done = earlier.result()
            start = done.after if isinstance(done, Stack) else done[-1].after
        assert start is not None
        batches: list[ReadBatch] = []
        at = start
        while len(batches) < count and not (loop and at.epoch > start.epoch):
            try:
                batches.append(self._next(at, cut, loop))
            except BaseException:
                if stacked or not batches:
                    raise
                break  # the batch that fails is read again when it is asked for
            at = batches[-1].after
            if not stacked:
                batches[-1] = self._placed(batches[-1])
                tell_part(batches[-1])
        if not stacked:
            return batches
        whole = jax.tree.map(lambda *x: np.concatenate(x), *(x.fetched for x in batches))
        starts, ends = [x.first or x.start for x in batches], [x.after for x in batches]
        return _stack(self.settings, whole, None, starts, ends, ())

    def _placed(self, batch: ReadBatch) -> ReadBatch:
        if batch.fetched is None:
            return batch
        (placed,) = _placed(self.settings, [batch.fetched])
        return batch._replace(fetched=placed)

    def _next(self, start: Cursor, cut: Cut, loop: bool) -> ReadBatch:
        """The batch at `start`. Its error is kept until the consumer has got it: a generator that
        has raised ends, and reading it again would silently lose the rest of the pass."""
        if self._failed is not None and self._failed[0] == start:
            raise self._failed[1]
        self._failed = None
        try:
            return self._read_batch(start, cut, loop)
        except BaseException as error:
            self._failed = start, error
            raise

    def _read_batch(self, start: Cursor, cut: Cut, loop: bool) -> ReadBatch:
        """Reads records until the batch is full or ends with the pass.

        In a `loop` it ends with the pass. Otherwise "keep" goes on into the next pass, "drop"
        discards the incomplete batch and starts there, and "pad" ends if it holds any record.
        """
        settings = self.settings
        stream, size, last_batch = settings.reader, settings.size, settings.last_batch
        assert isinstance(stream, Stream)
        at, found, places = start, [], []
        while len(found) < size:
            wanted = size - len(found)
            there = at.epoch, at.offset, wanted, settings.spec
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
                raise EmptySourceError(
                    text=f'Under last_batch="drop" a pass must hold at least one batch of {size}, '
                    f"but one over {stream.label} holds {at.offset} records. Choose a smaller "
                    "`batch_size`, or another `last_batch`."
                )
            at = Cursor(at.epoch + 1, 0)  # the pass has ended
            if last_batch == "drop":
                found, places = [], []
            if loop or (found and last_batch == "pad"):
                break
        if not found:
            return ReadBatch(None, cut._replace(size=0), start, at)
        # A window can hand out records whose numbers are larger than the offset reached.
        check_counted(Cursor(at.epoch, max(at.offset, *(n for _, n, _ in places))), None)
        epoch, record, offset = np.array(places, np.uint32).T
        batch = conform(stack(found), stream.stored_spec, settings.spec, record)
        rows = Rows(epoch, record, offset, None)
        if cut.padded:
            inside = np.arange(size) < len(found)
            batch = jax.tree.map(lambda x: _scattered(x, inside), batch)
            epoch, record, offset = (_scattered(x, inside) for x in (epoch, record, offset))
            rows = Rows(epoch, record, offset, inside)
        cut = cut._replace(size=len(rows.epoch))
        first = Cursor(places[0][0], places[0][2])
        return ReadBatch(SourceBatch(batch, rows), cut, start, at, first=first)


def _placed(
    settings: ReadSettings, fetched: Sequence[SourceBatch], own: Own = None, axis: int = 0
) -> list[SourceBatch]:
    """Batches on the device. On a CPU, arrays that a program can read in place stay in NumPy.

    Epochs, records and offsets stay in NumPy, too: a program that uses them transfers them.
    """
    wanted = [(batch, rows.mask) for batch, rows in fetched]
    if (sharding := settings.sharding) is not None:
        placed = jax.tree.map(lambda x: assemble(x, sharding, own, axis), wanted)
    elif settings.on_cpu:
        placed = jax.tree.map(lambda x: x if _is_readable(x) else jax.device_put(x), wanted)
    else:
        placed = jax.device_put(wanted)  # one call for all arrays is cheaper
    return [
        SourceBatch(batch, x.rows._replace(mask=mask))
        for x, (batch, mask) in zip(fetched, placed, strict=True)
    ]


def _stack(
    settings: ReadSettings,
    whole: SourceBatch,
    own: Own,
    starts: list[Cursor],
    ends: list[Cursor],
    failures: Failures,
) -> Stack:
    count = len(starts)  # `reshape(-1)` fails for fields without elements
    fetched = jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), whole)
    kind = whole.rows.epoch.dtype
    before, behind = (
        Cursor(*(np.array(x, kind) for x in zip(*cursors, strict=True)))
        for cursors in (starts, ends)
    )
    (placed,) = _placed(settings, [fetched], own, axis=1)
    return Stack(placed, before, behind, ends[-1], failures)


def as_asked(settings: ReadSettings, read: Callable[..., Any], *args: Any) -> Any:
    """Calls `read(*args)` under the consumer's JAX settings, which are local to its thread."""
    with jax.enable_x64(settings.x64), jax.default_device(settings.device), transferring():
        return read(*args)


class _Records:
    """The records at any offsets of an epoch; their order is computed block by block."""

    def __init__(self, order: Callable[[int], Order], length: int):
        self._order, self._length = order, length
        self._orders: dict[int, Order] = {}
        self._blocks: dict[tuple[int, int], tuple[int, Any]] = {}

    def at(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """The records at `count` offsets from `offset` on, which must be in the epoch."""
        order = _cached(self._orders, epoch, lambda: self._order(epoch))
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
        """The offset where a block begins, and its records, which XLA may still compute."""
        return _cached(self._blocks, (epoch, i), lambda: self._block(order, i))

    def _block(self, order: Order, i: int) -> tuple[int, Any]:
        kind = word(self._length)
        # The last block overlaps the one before, so that all have one length and share a program.
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
    """A context that computes on the CPU: a read must not wait for the queue of an accelerator."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was told to leave the CPU alone
        return contextlib.nullcontext()


def _split_chunk(whole: SourceBatch, count: int) -> list[SourceBatch]:
    """Splits a chunk into `count` batches of equal size."""

    def part(i: int, x: np.ndarray) -> np.ndarray:
        size = len(x) // count
        return x[i * size : (i + 1) * size]

    return [jax.tree.map(functools.partial(part, i), whole) for i in range(count)]


def _is_readable(x: np.ndarray) -> bool:
    """Whether a program on a CPU reads the array in place, or copies it at negligible cost."""
    return x.nbytes < COPIED_FROM or x.ctypes.data % ALIGNMENT == 0


def _scattered(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The rows of `x` at the places where `inside` is True, zero elsewhere."""
    wide = empty_rows(len(inside), x.shape[1:], x.dtype)
    wide[inside], wide[~inside] = x, 0
    return wide


def _cached(cache: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """The value of a key, made if missing; the last four are kept."""
    if key not in cache:
        while len(cache) >= 4:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]
