"""From a cursor to the rows of a batch: where they stand, and what ends an epoch."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ._order import Order, word
from ._types import Batch, Cursor, Mask, Offsets, Records, Turns

LastBatch: TypeAlias = Literal["keep", "drop", "pad"]
"""What becomes of the rows left over at the end of an epoch (spec STEP, ITER)."""

Where: TypeAlias = Callable[[Any, Any, Any], Any]


class Rows(NamedTuple):
    """What the rows of one batch are; keys are counted from it."""

    epoch: Records
    record: Records
    offset: Offsets
    mask: Mask | None


def host_where(condition: bool, yes: int, no: int) -> int:
    """`where` for a cursor of plain integers."""
    return yes if condition else no


def settle(
    cursor: Cursor,
    size: int,
    length: int | None,
    last_batch: LastBatch,
    where: Where = jnp.where,
) -> Cursor:
    """The cursor from which a batch of `size` rows really starts.

    Only under "drop" another one: where no whole batch is left, the next epoch's first.
    """
    if length is None or last_batch != "drop":
        return cursor
    short = cursor.offset + size > length
    return Cursor(where(short, cursor.epoch + 1, cursor.epoch), where(short, 0, cursor.offset))


def advance(
    cursor: Cursor,
    size: int,
    length: int | None,
    last_batch: LastBatch,
    where: Where = jnp.where,
) -> Cursor:
    """The cursor after a batch of `size` rows that started at the settled `cursor`."""
    epoch, offset = cursor.epoch, cursor.offset + size
    if length is None:
        return Cursor(epoch, offset)
    if last_batch == "keep":
        return Cursor(epoch + offset // length, offset % length)
    ended = offset >= length
    moved = Cursor(where(ended, epoch + 1, epoch), where(ended, 0, offset))
    return settle(moved, size, length, last_batch, where)


def span(size: int, length: int | None, last_batch: LastBatch) -> int:
    """How many epochs a batch of `size` rows can touch, whatever row it starts from."""
    if length is None or last_batch != "keep":
        return 1
    return 1 + -(-(size - 1) // length)


def locate(
    cursor: Cursor, size: int, length: int | None, epochs: int
) -> tuple[Turns | None, Offsets, Mask | None]:
    """For each row which of the `epochs` it stands in, its offset there, and whether it exists.

    With one epoch, rows past its end do not exist: they get offset 0, and False in the mask.
    """
    i = jnp.arange(size, dtype=cursor.offset.dtype)
    if length is None:
        return None, cursor.offset + i, None
    rest = cursor.offset.dtype.type(length) - cursor.offset
    inside = i < rest
    if epochs == 1:
        return None, jnp.where(inside, cursor.offset + i, 0), inside
    past = i - rest
    turn = jnp.where(inside, 0, past // length + 1)
    return turn, jnp.where(inside, cursor.offset + i, past % length), None


def rows_at(order: Order, cursor: Cursor, size: int, epochs: int) -> Rows:
    """The rows of a batch under `order`, which is that of `epochs` epochs from the cursor's on."""
    turn, offset, mask = locate(cursor, size, order.length, epochs)
    epoch = jnp.broadcast_to(cursor.epoch, (size,)) if turn is None else cursor.epoch + turn
    return Rows(epoch, order(offset, turn), offset, mask)


def take(data: Batch, records: Records) -> Batch:
    """The records of every field, in the order asked for; `records` must exist."""
    return jax.tree.map(lambda x: x.at[records].get(mode="promise_in_bounds"), data)


def zero_outside(batch: Batch, mask: Mask) -> Batch:
    """The batch with zero in the rows where `mask` is False."""
    b = mask.shape[0]
    return jax.tree.map(
        lambda x: jnp.where(mask.reshape((b,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x)),
        batch,
    )


def pack(cursor: Cursor, length: int | None) -> np.ndarray:
    """A cursor as the array that a pipeline keeps."""
    return np.array(cursor, dtype=word(length or 1))
