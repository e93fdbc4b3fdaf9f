"""From a cursor to the rows of a batch: where they stand, and what ends an epoch."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ._order import Order, word
from ._types import Batch, Cursor, Mask, Offsets, Records, Turns
from .errors import SeekError

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
    cursor: Cursor, size: int, length: int | None, last_batch: LastBatch, where: Where = jnp.where
) -> Cursor:
    """The cursor from which a batch of `size` rows really starts.

    Only under "drop" another one: where no whole batch is left, the next epoch's first.
    """
    if length is None or last_batch != "drop":
        return cursor
    size, length = _like(cursor.offset, size), _like(cursor.offset, length)
    short = length - cursor.offset < size
    return Cursor(where(short, cursor.epoch + 1, cursor.epoch), where(short, 0, cursor.offset))


def advance(
    cursor: Cursor, size: int, length: int | None, last_batch: LastBatch, where: Where = jnp.where
) -> Cursor:
    """The cursor after a batch of `size` rows that started at the settled `cursor`."""
    rows = _like(cursor.offset, size)
    if length is None:
        return Cursor(cursor.epoch, cursor.offset + rows)
    # What is left is compared, not what is reached: a sum could leave the word.
    records = _like(cursor.offset, length)
    left = records - cursor.offset
    inside = rows < left
    beyond = 0 if last_batch == "pad" else where(inside, 0, rows - left)
    moved = Cursor(
        where(inside, cursor.epoch, cursor.epoch + 1 + beyond // records),
        where(inside, cursor.offset + rows, beyond % records),
    )
    return settle(moved, size, length, last_batch, where)


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


def locate(
    cursor: Cursor, cut: Cut, length: int | None
) -> tuple[Turns | None, Offsets, Mask | None]:
    """For each row which of the epochs it stands in, its offset there, and whether it exists.

    Rows past the end of a padded batch get offset 0, and False in the mask.
    """
    i = jnp.arange(cut.size, dtype=cursor.offset.dtype)
    if length is None or (cut.epochs == 1 and not cut.padded):
        return None, cursor.offset + i, jnp.ones(cut.size, bool) if cut.padded else None
    rest = _like(cursor.offset, length) - cursor.offset
    inside = i < rest
    if cut.padded:
        return None, jnp.where(inside, cursor.offset + i, 0), inside
    past = i - rest
    turn = jnp.where(inside, 0, past // _like(past, length) + 1)
    return turn, jnp.where(inside, cursor.offset + i, past % _like(past, length)), None


def rows_at(order: Order, cursor: Cursor, cut: Cut) -> Rows:
    """The rows of a batch under `order`, which is that of the epochs from the cursor's on."""
    turn, offset, mask = locate(cursor, cut, order.length)
    epoch = jnp.broadcast_to(cursor.epoch, (cut.size,)) if turn is None else cursor.epoch + turn
    return Rows(epoch, order(offset, turn), offset, mask)


def take(data: Any, records: Records) -> Any:
    """The records of an array, or of every field, in the order asked for; they must exist."""
    return jax.tree.map(lambda x: x.at[records].get(mode="promise_in_bounds"), data)


def zero_outside(batch: Batch, mask: Mask) -> Batch:
    """The batch with zero in the rows where `mask` is False."""
    b = mask.shape[0]
    return jax.tree.map(
        lambda x: jnp.where(mask.reshape((b,) + (1,) * (x.ndim - 1)), x, jnp.zeros_like(x)),
        batch,
    )


def pack(cursor: Cursor, length: int | None) -> np.ndarray:
    """A cursor as the array that a pipeline keeps; read-only, since copies share it."""
    if max(cursor) > np.iinfo(word(length or 1)).max or cursor.epoch >= 2**32:
        raise SeekError(
            f"The stream ends before {tuple(cursor)}: no cursor counts further. "
            "Start again with `reset()`."
        )
    packed = np.array(cursor, dtype=word(length or 1))
    packed.flags.writeable = False
    return packed
