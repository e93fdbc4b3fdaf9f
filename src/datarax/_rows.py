"""From a cursor to the rows of a batch, and what happens at the end of an epoch."""

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
"""What happens to the rows left over at the end of an epoch (spec STEP, ITER)."""


class Rows(NamedTuple):
    """The epoch, record and offset of each row, and whether it exists; keys are derived from these.

    Unsigned integers and booleans of shape `(rows,)`, or `(batches, rows)` for several batches.
    They are NumPy arrays if the host read the rows, else JAX arrays. `mask` is None if all rows
    exist. The host also leaves fields None that no stage needs.
    """

    epoch: Any
    record: Any
    offset: Any
    mask: Any


def settle(cursor: Cursor, size: int, length: int | None, last_batch: LastBatch) -> Cursor:
    """The cursor from which a batch of `size` rows starts.

    It differs from `cursor` only under "drop": if fewer than `size` rows are left in the epoch, it
    is the start of the next epoch. A cursor that this function leaves unchanged is settled.
    """
    if length is None or last_batch != "drop":
        return cursor
    size, length = _like(cursor.offset, size), _like(cursor.offset, length)
    short = length - cursor.offset < size
    return Cursor(_where(short, cursor.epoch + 1, cursor.epoch), _where(short, 0, cursor.offset))


def advance(cursor: Cursor, size: int, length: int | None, last_batch: LastBatch) -> Cursor:
    """The settled cursor after a batch of `size` rows that started at the settled `cursor`."""
    rows = _like(cursor.offset, size)
    if length is None:
        return Cursor(cursor.epoch, cursor.offset + rows)
    if last_batch == "pad":
        left = _like(cursor.offset, length) - cursor.offset
        rows = _where(rows < left, rows, left)
    turn, offset = _onward(cursor.offset, rows, length)
    return settle(Cursor(cursor.epoch + turn, offset), size, length, last_batch)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """`jnp.where`; for a Python `bool` a plain conditional."""
    if isinstance(condition, bool):
        return yes if condition else no
    return jnp.where(condition, yes, no)


def _like(offset: Any, count: int) -> Any:
    """`count` in the dtype of `offset`. JAX would convert it to `int32`, which can overflow."""
    return count if isinstance(offset, int) else offset.dtype.type(count)


class Cut(NamedTuple):
    """The shape of one batch: its rows, the most epochs they can touch, whether it can be padded.

    `Cut(n, 1, False)` promises that all `n` rows lie in one epoch; the caller must ensure it.
    """

    size: int
    epochs: int
    padded: bool


def running_on(size: int, length: int | None, last_batch: LastBatch) -> Cut:
    """The cut of `step` and `scan`: always `size` rows, from any settled cursor."""
    if length is None or last_batch != "keep":
        return Cut(size, 1, last_batch == "pad")
    return Cut(size, 1 + -(-(size - 1) // length), False)


def touched(cut: Cut, count: int, length: int | None, last_batch: LastBatch) -> int:
    """The most epochs that `count` consecutive batches can touch."""
    if length is None or count == 1:
        return cut.epochs
    if last_batch == "keep":
        return running_on(cut.size * count, length, last_batch).epochs
    return 1 + -(-(count - 1) // batches_of(cut.size, length, last_batch))


def batches_of(size: Any, length: Any, last_batch: LastBatch) -> Any:
    """How many batches of full shape `length` rows give: rounded up under "pad", else down.

    `length` must be at least 1: under "pad" an unsigned 0 would wrap around.
    """
    return (length - 1) // size + 1 if last_batch == "pad" else length // size


def batches_of_loop(size: int, length: int, last_batch: LastBatch) -> int:
    """How many batches `for` yields from `length` rows; under "keep" the last may be shorter."""
    return length // size if last_batch == "drop" else -(-length // size)


def start_after(
    cursor: Cursor, size: int, count: Any, length: int | None, last_batch: LastBatch
) -> Cursor:
    """The start of the batch that comes `count` batches after the one at the settled `cursor`.

    `count` is a Python integer if the cursor holds such, else an array of the cursor's dtype.
    """
    size = _like(count, size)
    rows = count * size
    if length is None:
        return Cursor(cursor.epoch + 0 * count, cursor.offset + rows)  # both of `count`'s shape
    if last_batch == "keep":
        turn, offset = _onward(cursor.offset, rows, length)
        return Cursor(cursor.epoch + turn, offset)
    length = _like(count, length)
    left, whole = (batches_of(size, x, last_batch) for x in (length - cursor.offset, length))
    here, later = count < left, count - left  # `later` wraps where `here`, and is not used there
    turn = _where(here, 0, later // whole + 1)
    return Cursor(cursor.epoch + turn, _where(here, cursor.offset + rows, later % whole * size))


def starts(
    cursor: Cursor, size: int, count: int, length: int | None, last_batch: LastBatch
) -> Cursor:
    """The starts of `count` consecutive batches, the first at the settled `cursor`."""
    each = jnp.arange(count, dtype=cursor.offset.dtype)
    return start_after(cursor, size, each, length, last_batch)


def starts_within(epoch: int, offset: int, size: int, count: int) -> list[Cursor]:
    """As `starts`, but as Python integers, for batches that all lie in one epoch."""
    offsets = range(offset, offset + count * size, size)
    return list(map(_CURSOR, zip(repeat(epoch), offsets, strict=False)))


_CURSOR = functools.partial(tuple.__new__, Cursor)  # as `Cursor._make`, without running Python


def _onward(offset: Any, rows: Any, length: int) -> tuple[Any, Any]:
    """The place `rows` rows after `offset`: how many epochs later, and the offset there."""
    if isinstance(offset, int):
        return divmod(offset + rows, length)
    length = _like(rows, length)
    # Compare `rows` with the rows left: `offset + rows` could wrap around. Each result below that
    # does is discarded; NumPy would warn of it.
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
    """For each row of a batch: its epoch, counted from that of `start`; its offset; its mask.

    The epochs are None if all are that of `start`, the mask is None if all rows exist. The padding
    rows of a padded batch get offset 0 and mask False.
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
    """The rows of the batches that start at `starts`, concatenated.

    `order` must begin with the epoch of the first batch, and span the epochs of all batches.
    """

    def each(start: Cursor) -> tuple[Turns, Offsets, Mask | None]:
        turn, offset, mask = locate(start, cut, order.length)
        epoch = start.epoch if turn is None else start.epoch + turn
        return jnp.broadcast_to(epoch, offset.shape), offset, mask

    rows = jax.tree.map(lambda x: x.reshape(-1), jax.vmap(each)(starts))
    epoch, offset, mask = rows
    return Rows(epoch, order(offset, epoch - starts.epoch[0]), offset, mask)


def rows_from(order: Order, start: Cursor, count: int, masked: bool) -> Rows:
    """As `rows_at`, for `count` consecutive rows that all lie in the epoch of `start`."""
    offset = start.offset + jnp.arange(count, dtype=start.offset.dtype)
    epoch = jnp.broadcast_to(start.epoch, offset.shape)
    records = order.run(start.offset, count)
    return Rows(epoch, records, offset, jnp.ones(count, bool) if masked else None)


def take(data: Any, records: Records) -> Any:
    """Gathers these records of every array of a tree. They must exist: nothing checks bounds."""

    def rows(x: Any) -> Any:
        return x.at[records].get(mode="promise_in_bounds", out_sharding=gathered_sharding(x))

    return jax.tree.map(rows, data)


def gathered_sharding(x: Any) -> NamedSharding | None:
    """The sharding of rows that are gathered from `x`: not split, so whole on each device.

    Only if an Explicit mesh axis splits the rows of `x`, as `.at[].get` must then be told. None for
    every other array.
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
    """The cursor as the array `[epoch, offset]` that a pipeline keeps.

    It is read-only, because copies of a pipeline share it. Raises as `check_counted`.
    """
    check_counted(cursor, length)
    packed = np.array(cursor, word(length or 1))
    packed.flags.writeable = False
    return packed


def pack_each(cursors: Sequence[Cursor], length: int | None) -> list[np.ndarray]:
    """`pack` for each of some cursors in ascending order."""
    check_counted(cursors[-1], length)
    numbers = chain.from_iterable(cursors)
    packed = np.fromiter(numbers, word(length or 1), 2 * len(cursors)).reshape(-1, 2)
    packed.flags.writeable = False
    return list(packed)


def check_counted(cursor: Cursor, length: int | None) -> None:
    """Raises `SeekError` if a pipeline cannot keep `cursor`.

    Its epoch must be below 2**32, and so must its offset if the source has no length.
    """
    epoch, offset = cursor
    if epoch >= 2**32 or (length is None and offset >= 2**32):
        raise SeekError(
            f"The stream ends before {(epoch, offset)}: no cursor counts further. "
            "Start again with `reset()`."
        )


def check_within(name: str, value: Any, end: int) -> None:
    """Raises `SeekError` unless `value` is an integer in `[0, end)`."""
    if not 0 <= integer(value, -1) < end:
        raise SeekError(f"`{name}` must be an integer in [0, {end}), got {value!r}.")
