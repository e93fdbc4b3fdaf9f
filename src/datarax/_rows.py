"""From a cursor to the rows of a batch: where they stand, and what ends an epoch."""

import functools
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._order import Order, word
from ._types import Batch, Cursor, Mask, Offsets, Records, Turns, integer
from .errors import SeekError

LastBatch: TypeAlias = Literal["keep", "drop", "pad"]
"""What becomes of the rows left over at the end of an epoch (spec STEP, ITER)."""


class Rows(NamedTuple):
    """What the rows of one batch are; keys are counted from it.

    Unsigned integers and booleans, with one axis or, for several batches, two: in NumPy's arrays
    where the host has read the rows, in JAX's inside a program. The host leaves out what nobody
    asks for.
    """

    epoch: Any
    record: Any
    offset: Any
    mask: Any


def settle(cursor: Cursor, size: int, length: int | None, last_batch: LastBatch) -> Cursor:
    """The cursor from which a batch of `size` rows really starts.

    Only under "drop" another one: where no whole batch is left, the next epoch's first.
    """
    if length is None or last_batch != "drop":
        return cursor
    size, length = _like(cursor.offset, size), _like(cursor.offset, length)
    short = length - cursor.offset < size
    return Cursor(_where(short, cursor.epoch + 1, cursor.epoch), _where(short, 0, cursor.offset))


def advance(cursor: Cursor, size: int, length: int | None, last_batch: LastBatch) -> Cursor:
    """The cursor after a batch of `size` rows that started at the settled `cursor`."""
    rows = _like(cursor.offset, size)
    if length is None:
        return Cursor(cursor.epoch, cursor.offset + rows)
    if last_batch == "pad":
        left = _like(cursor.offset, length) - cursor.offset
        rows = _where(rows < left, rows, left)
    turn, offset = _onward(cursor.offset, rows, length)
    return settle(Cursor(cursor.epoch + turn, offset), size, length, last_batch)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """`jnp.where`, and for plain integers a plain one."""
    return (
        (yes if condition else no) if isinstance(condition, bool) else jnp.where(condition, yes, no)
    )


def _like(offset: Any, count: int) -> Any:
    """A count in the type of the offset: JAX would take a plain integer for a signed one."""
    return count if isinstance(offset, int) else offset.dtype.type(count)


class Cut(NamedTuple):
    """The shape of one batch: its rows, how many epochs they can touch, whether some are missing.

    With one epoch and no padding all rows are inside that epoch: whoever cuts so has seen to it.
    """

    size: int
    epochs: int
    padded: bool


def running_on(size: int, length: int | None, last_batch: LastBatch) -> Cut:
    """The cut of `step` and `scan`: always `size` rows, from whatever row they start."""
    if length is None or last_batch != "keep":
        return Cut(size, 1, last_batch == "pad")
    return Cut(size, 1 + -(-(size - 1) // length), False)


def touched(cut: Cut, count: int, length: int | None, last_batch: LastBatch) -> int:
    """How many epochs `count` batches in a row can touch."""
    if length is None or count == 1:
        return cut.epochs
    if last_batch == "keep":
        return running_on(cut.size * count, length, last_batch).epochs
    return 1 + -(-(count - 1) // batches_of(cut.size, length, last_batch))


def batches_of(size: Any, length: Any, last_batch: LastBatch) -> Any:
    """Batches of full size in an epoch that is cut anew; for a rest of one, at least a record."""
    return (length - 1) // size + 1 if last_batch == "pad" else length // size


def batches_of_loop(size: int, length: int, last_batch: LastBatch) -> int:
    """Batches in which `for` gives so many records: under "keep" the last may be shorter."""
    return length // size if last_batch == "drop" else -(-length // size)


def start_after(
    cursor: Cursor, size: int, count: Any, length: int | None, last_batch: LastBatch
) -> Cursor:
    """Where the batch after `count` others starts, the first of them at the settled `cursor`.

    `count` is a plain integer, as the cursor's are, or an array in the type of the cursor's.
    """
    size = _like(count, size)
    rows = count * size
    if length is None:
        return Cursor(cursor.epoch + 0 * count, cursor.offset + rows)
    if last_batch == "keep":
        turn, offset = _onward(cursor.offset, rows, length)
        return Cursor(cursor.epoch + turn, offset)
    length = _like(count, length)
    left, whole = (batches_of(size, x, last_batch) for x in (length - cursor.offset, length))
    here, later = count < left, count - left  # which is not taken where it left the word
    turn = _where(here, 0, later // whole + 1)
    return Cursor(cursor.epoch + turn, _where(here, cursor.offset + rows, later % whole * size))


def starts(
    cursor: Cursor, size: int, count: int, length: int | None, last_batch: LastBatch
) -> Cursor:
    """Where `count` batches in a row start, the first of them at the settled `cursor`."""
    each = jnp.arange(count, dtype=cursor.offset.dtype)
    return start_after(cursor, size, each, length, last_batch)


def starts_within(epoch: int, offset: int, size: int, count: int) -> list[Cursor]:
    """The same in plain integers, where all rows of the batches are in one epoch."""
    offsets = range(offset, offset + count * size, size)
    return list(map(_CURSOR, zip(repeat(epoch), offsets, strict=False)))


_CURSOR = functools.partial(tuple.__new__, Cursor)  # what `Cursor._make` comes down to, in C


def _onward(offset: Any, rows: Any, length: int) -> tuple[Any, Any]:
    """The place so many rows after `offset`, as epochs later and an offset there."""
    if isinstance(offset, int):
        return divmod(offset + rows, length)
    length = _like(rows, length)
    # What is left is compared, not what is reached: a sum could leave the word. Where it does, the
    # result is not taken; NumPy would warn.
    with np.errstate(over="ignore"):
        left = length - offset
        inside, past = rows < left, rows - left
        return (
            _where(inside, 0, past // length + 1),
            _where(inside, offset + rows, past % length),
        )


def locate(
    start: Cursor, cut: Cut, length: int | None
) -> tuple[Turns | None, Offsets, Mask | None]:
    """For each row of a batch how many epochs after its start it stands (None: in the same one),
    its offset there, and whether it exists.

    Rows past the end of a padded batch get offset 0, and False in the mask.
    """
    i = jnp.arange(cut.size, dtype=start.offset.dtype)
    if length is None or (cut.epochs == 1 and not cut.padded):
        return None, start.offset + i, jnp.ones(cut.size, bool) if cut.padded else None
    if cut.padded:
        inside = i < _like(i, length) - start.offset
        return None, jnp.where(inside, start.offset + i, 0), inside
    turn, offset = _onward(start.offset, i, length)
    return turn, offset, None


def rows_at(order: Order, starts: Cursor, cut: Cut) -> Rows:
    """The rows of batches that start there, one after the other.

    `order` is that of the epochs from the first batch's on.
    """

    def each(start: Cursor) -> tuple[Turns, Offsets, Mask | None]:
        turn, offset, mask = locate(start, cut, order.length)
        epoch = start.epoch if turn is None else start.epoch + turn
        return jnp.broadcast_to(epoch, offset.shape), offset, mask

    rows = jax.tree.map(lambda x: x.reshape(-1), jax.vmap(each)(starts))
    epoch, offset, mask = rows
    return Rows(epoch, order(offset, epoch - starts.epoch[0]), offset, mask)


def rows_from(order: Order, start: Cursor, count: int, masked: bool) -> Rows:
    """The same for `count` rows of which all are in the epoch of `start`."""
    offset = start.offset + jnp.arange(count, dtype=start.offset.dtype)
    epoch = jnp.broadcast_to(start.epoch, offset.shape)
    records = order.run(start.offset, count)
    return Rows(epoch, records, offset, jnp.ones(count, bool) if masked else None)


def take(data: Any, records: Records) -> Any:
    """The records of an array, or of every field, in the order asked for; they must exist."""

    def rows(x: Any) -> Any:
        return x.at[records].get(mode="promise_in_bounds", out_sharding=gathered_sharding(x))

    return jax.tree.map(rows, data)


def gathered_sharding(x: Any) -> NamedSharding | None:
    """How rows of an array lie that an explicit mesh axis splits by rows: on all of its devices.

    None for every other array; only with such axes JAX has to be told.
    """
    sharding = jax.typeof(x).sharding
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))


def zero_outside(batch: Batch, mask: Mask) -> Batch:
    """The batch with zero in the rows where `mask` is False."""
    return where_rows(mask, batch, jax.tree.map(jnp.zeros_like, batch))


def where_rows(mask: Mask, yes: Batch, no: Batch) -> Batch:
    """The rows of `yes` where `mask` is True, those of `no` elsewhere."""

    def one(x: Any, y: Any) -> Any:
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(one, yes, no)


def pack(cursor: Cursor, length: int | None) -> np.ndarray:
    """A cursor as the array that a pipeline keeps; read-only, since copies share it."""
    check_counted(cursor, length)
    packed = np.array(cursor, word(length or 1))
    packed.flags.writeable = False
    return packed


def pack_each(cursors: Sequence[Cursor], length: int | None) -> list[np.ndarray]:
    """Cursors, each behind the one before, as arrays."""
    check_counted(cursors[-1], length)
    numbers = chain.from_iterable(cursors)
    packed = np.fromiter(numbers, word(length or 1), 2 * len(cursors)).reshape(-1, 2)
    packed.flags.writeable = False
    return list(packed)


def check_counted(cursor: Cursor, length: int | None) -> None:
    """Raises for a cursor behind the last that a pipeline can keep."""
    epoch, offset = cursor
    if epoch >= 2**32 or (length is None and offset >= 2**32):
        raise SeekError(
            f"The stream ends before {(epoch, offset)}: no cursor counts further. "
            "Start again with `reset()`."
        )


def check_within(name: str, value: Any, end: int) -> None:
    """Raises for what is no integer in `[0, end)`."""
    if not 0 <= integer(value, -1) < end:
        raise SeekError(f"`{name}` must be an integer in [0, {end}), got {value!r}.")
