"""Rows of a source on the host, read and made into batches: what the threads of a `Feed` do."""

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
from ..sources._base import Fetched
from ..sources._buffers import empty_rows
from ..sources._conform import conform, stack
from ..sources._iterable import Stream, Windows
from ..sources._reader import Reader
from ._threads import Outcome

COPIED_FROM = 2**18
"""Bytes from which it costs more to copy rows than to place them on the device."""

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

    @property
    def ends_inside(self) -> bool:
        """Whether no row of the next epoch is in it."""
        epoch = self.start.epoch
        return self.after.epoch == epoch or self.after == (epoch + 1, 0)

    def is_cut(self, cut: Cut) -> bool:
        """Whether `for` and `step` alike get it from that cut: no end of a pass is on the way."""
        return self.cut == cut and self.first in (None, self.start) and self.ends_inside


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
    a CPU; `x64` and `device` are settings of the thread that asks, and no other knows them. With a
    `sharding` the rows are placed as it says, and rows that lie on no device of this process are
    not read.
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
    """The rows of some batches, which of them exist (None: all, and each is read or an error), and
    the cursors before each and after all.
    """

    rows: Rows
    inside: np.ndarray | None
    starts: list[Cursor]
    after: Cursor


class PlannedRows:
    """Batches of a source with a length: which rows they have is known before any is read."""

    def __init__(self, supply: Supply):
        assert supply.length is not None
        self.supply, self._length = supply, supply.length
        self._records = _Records(supply.order, supply.length)

    def retry(self) -> None:
        """Nothing that has failed is known: whatever is asked for is read."""

    def plan(self, start: Cursor, cut: Cut, count: int, stacked: bool) -> Plan:
        """Which rows the batches from the settled `start` on have: `_rows.locate`, in numbers."""
        within = start.offset + cut.size * count <= self._length
        if not within:
            return self._plan_across(start, cut, count)
        return self._plan_within(start, cut, count, stacked or not self.supply.bare)

    def _plan_within(self, start: Cursor, cut: Cut, count: int, wanted: bool) -> Plan:
        """A plan for batches inside one epoch, with the place of each row if that is `wanted`."""
        (epoch, offset), kind, rows_in_all = start, word(self._length), cut.size * count
        starts = starts_within(epoch, offset, cut.size, count)
        after = advance(starts[-1], cut.size, self._length, self.supply.last_batch)
        masked = self.supply.masks or cut.padded
        # Only what somebody asks for is made: with each array of some size NumPy lets another
        # thread have the interpreter, and waits to get it back.
        epochs, offsets = None, None
        if wanted or masked:
            epochs = np.full(rows_in_all, epoch, kind)
            offsets = np.arange(offset, offset + rows_in_all, dtype=kind)
        rows = Rows(epochs, self._records.at(epoch, offset, rows_in_all), offsets, None)
        return Plan(rows, np.ones(rows_in_all, bool) if masked else None, starts, after)

    def _plan_across(self, start: Cursor, cut: Cut, count: int) -> Plan:
        """A plan for batches of which some pass the end of an epoch, or are filled up there."""
        length, kind, rows_in_all = self._length, word(self._length), cut.size * count
        starts, after = [], start
        for _ in range(count):
            starts.append(after)
            after = advance(after, cut.size, length, self.supply.last_batch)
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
                    # The keys of padded rows are those of the compiled program's.
                    rows.epoch[row:end], rows.record[row:end] = epoch, self._records.at(epoch, 0, 1)
                    inside[row:end], row = False, end
                epoch, offset = epoch + 1, 0
        masked = self.supply.masks or cut.padded
        return Plan(rows, inside if masked else None, starts, after)

    def read(self, plan: Plan, cut: Cut, stacked: bool) -> Any:
        """Reads, and places on the device."""
        sharding, starts = self.supply.sharding, plan.starts
        own = None if sharding is None else own_rows(sharding, cut.size)
        whole, failures = self._read_rows(plan, cut, own)
        ends = [*starts[1:], plan.after]
        if stacked:
            broken = [x for some in failures for x in some]
            return _stack(self.supply, whole, own, starts, ends, broken)
        if self.supply.bare:
            whole = whole._replace(rows=whole.rows._replace(record=None))  # no stage asks for them
        batches = _split_chunk(whole, len(starts))
        if not _stays(self.supply, whole, len(starts)):
            batches = _placed(self.supply, batches, own)
        return [Fed(*x) for x in zip(batches, repeat(cut), starts, ends, failures)]

    def _read_rows(self, plan: Plan, cut: Cut, own: Own) -> tuple[Fetched, list[Failures]]:
        """All rows that are this process's `own`, and what could not be read of each batch."""
        rows, inside, starts, _ = plan
        reader, spec = self.supply.reader, self.supply.spec
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
        return Fetched(batch, rows), [*failures]

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
            batch = jax.tree.map(lambda x: _scattered(x, inside), batch)
        mask = inside.copy()
        mask[inside] = readable
        return batch, mask, errors


class StreamRows:
    """Batches of a stream, whose end shows only when it is read. One thread may read."""

    def __init__(self, supply: Supply):
        self.supply = supply
        self._failed: tuple[Cursor, BaseException] | None = None
        self._windows = None
        if isinstance(supply.reader, Stream) and supply.window is not None:
            self._windows = Windows(supply.reader, supply.window, supply.order)

    def retry(self) -> None:
        """Reads again what has failed, if it is asked for again."""
        self._failed = None

    def read(
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
                fed.append(self._next(fed[-1].after if fed else start, cut, loop))
            except BaseException:
                if stacked or not fed:
                    raise
                break  # whoever wants what follows meets it again
        if not stacked:
            batches = [x.fetched for x in fed if x.fetched is not None]
            placed = iter(_placed(self.supply, batches))
            return [x._replace(fetched=x.fetched and next(placed)) for x in fed]
        whole = jax.tree.map(lambda *x: np.concatenate(x), *(x.fetched for x in fed))
        starts, ends = [x.first or x.start for x in fed], [x.after for x in fed]
        return _stack(self.supply, whole, None, starts, ends, ())

    def _next(self, start: Cursor, cut: Cut, loop: bool) -> Fed:
        """The batch from `start` on. Its error is kept until it is known to who wants the batch:
        what has raised may, if it is begun again, go on as if nothing was amiss."""
        if self._failed is not None and self._failed[0] == start:
            raise self._failed[1]
        self._failed = None
        try:
            return self._read_batch(start, cut, loop)
        except BaseException as error:
            self._failed = start, error
            raise

    def _read_batch(self, start: Cursor, cut: Cut, loop: bool) -> Fed:
        """Reads records until the batch is full, or a pass ends that the batch ends with.

        At the end of a pass a `loop` stops. Without one, "keep" goes on into the next pass, "drop"
        lets go of what was found and begins there, and "pad" stops if anything was found.
        """
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
                raise EmptySourceError(
                    text=f'Under last_batch="drop" a pass must hold at least one batch of {size}, '
                    f"but one over {stream.label} holds {at.offset} records. Choose a smaller "
                    "`batch_size`, or another `last_batch`."
                )
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
            batch = jax.tree.map(lambda x: _scattered(x, inside), batch)
            epoch, record, offset = (_scattered(x, inside) for x in (epoch, record, offset))
            rows = Rows(epoch, record, offset, inside)
        cut = cut._replace(size=len(rows.epoch))
        first = Cursor(places[0][0], places[0][2])
        return Fed(Fetched(batch, rows), cut, start, at, first=first)


def _stays(supply: Supply, fetched: Fetched, count: int) -> bool:
    """Whether all that a stage may ask for is left to who takes it, in `count` equal parts."""
    if supply.sharding is not None:
        return False
    wanted = jax.tree.leaves((fetched.batch, fetched.rows.mask))
    return supply.on_cpu and all(_is_readable(x, count) for x in wanted)


def _placed(
    supply: Supply, fetched: Sequence[Fetched], own: Own = None, axis: int = 0
) -> list[Fetched]:
    """Batches on the device. For a CPU, what can be read in place is left to who takes it.

    What says which rows they have goes to the device if a stage asks for it.
    """
    wanted = [(batch, rows.mask) for batch, rows in fetched]
    if (sharding := supply.sharding) is not None:
        placed = jax.tree.map(lambda x: assemble(x, sharding, own, axis), wanted)
    elif supply.on_cpu:
        placed = jax.tree.map(lambda x: x if _is_readable(x) else jax.device_put(x), wanted)
    else:
        placed = jax.device_put(wanted)  # in one call, which costs less than one for each
    return [
        Fetched(batch, x.rows._replace(mask=mask))
        for x, (batch, mask) in zip(fetched, placed, strict=True)
    ]


def _stack(
    supply: Supply,
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
    (placed,) = _placed(supply, [fetched], own, axis=1)
    return Stack(placed, before, behind, ends[-1], failures)


def as_asked(supply: Supply, read: Callable[..., Any], *args: Any) -> Any:
    """`read`, in whatever thread, under the settings of whoever wants the rows."""
    with jax.enable_x64(supply.x64), jax.default_device(supply.device), transferring():
        return read(*args)


class _Records:
    """Which records stand in any stretch of an epoch; their order is computed block by block."""

    def __init__(self, order: Callable[[int], Order], length: int):
        self._order, self._length = order, length
        self._orders: dict[int, Order] = {}
        self._blocks: dict[tuple[int, int], tuple[int, Any]] = {}

    def at(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """The records at `count` offsets from `offset` on, all of them in the epoch."""
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
        """Where a block begins, and its records, which XLA may still be computing."""
        return _cached(self._blocks, (epoch, i), lambda: self._block(order, i))

    def _block(self, order: Order, i: int) -> tuple[int, Any]:
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


def _split_chunk(whole: Fetched, count: int) -> list[Fetched]:
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


def _scattered(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Rows put where `inside` is True, zero elsewhere."""
    wide = empty_rows(len(inside), x.shape[1:], x.dtype)
    wide[inside], wide[~inside] = x, 0
    return wide


def _cached(cache: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """The value of a key, made if need be; of older ones a few are kept."""
    if key not in cache:
        while len(cache) >= 4:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]
