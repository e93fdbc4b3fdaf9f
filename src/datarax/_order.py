"""Which record stands where in an epoch: the one place that decides order.

An `Order` is made from the keys of one epoch, or of a few in a row where one batch can span them: a
small pytree, then a pure function from offsets to records.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt32

from ._keys import split_word, threefry2x32, typed
from ._settings import on_cpu
from ._types import AnyArray, Offsets, Records, RowWords, Scalar, Turns, Words, integer, namespace

ROUNDS = 24
PIECE = 64
"""Rows of a window whose rounds are computed with one key, which is read or made once for them."""

FMIX32 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None))
SPLITMIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))

SpanWords: TypeAlias = UInt32[AnyArray, "span 2"]

Shuffle: TypeAlias = Literal[False, True, "permutation", "blocks"]


UINT32, UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)


def word(length: int) -> np.dtype:
    """The unsigned type that holds an offset of `length` records: 32 bits below 2**32, else 64."""
    return UINT32 if length < 2**32 else UINT64


class Order(eqx.Module):
    """The order of `span` epochs in a row: `order(offsets, turn) -> records`.

    For each of its epochs a bijection of `[0, length)`. A subclass declares `length: int =
    eqx.field(static=True)`, holds in other fields what else it computes with, and has `__call__`.
    """

    length: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        """The records at these offsets, unsigned integers of shape `(b,)`. Must be traceable.

        `turn` says for every row which of the epochs it stands in, 0 for the first; None is 0 for
        all.
        """

    def run(self, start: Scalar, count: int) -> Records:
        """The records at `count` offsets from `start` on, all inside the first epoch.

        Override it if there is a faster way than one by one.
        """
        return self(_row(start, count))


class StoredOrder(Order):
    """Records in the order in which they are stored."""

    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords | None, length: int):
        del keys
        self.length = length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        del turn
        return offsets


class SwapOrNot(Order):
    """A keyed permutation computed record by record, in O(1) memory and O(1) time to the first.

    24 swap-or-not rounds (Hoang, Morris & Rogaway, CRYPTO 2012; spec SHUF). `keys` are those of
    the epochs. Lengths from 2**32 up need 64-bit words, that is `jax.enable_x64`.
    """

    pivots: UInt[AnyArray, "rounds span"]
    masks: UInt[AnyArray, "rounds span"]
    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, length: int):
        rounds = np.arange(ROUNDS, dtype=np.uint32)[:, None]
        rounds = np.broadcast_to(rounds, (ROUNDS, keys.shape[0]))
        self.pivots, self.masks = _round(keys[None], rounds, word(length).type(length))
        self.length = length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        return self._rounds(offsets, turn, reverse=False)

    def inverse(self, records: Records, turn: Turns | None = None) -> Offsets:
        """Where each record stands in its epoch."""
        return self._rounds(records, turn, reverse=True)

    def _rounds(self, x: UInt[AnyArray, " b"], turn: Turns | None, reverse: bool) -> Any:
        if x.dtype != word(self.length):
            raise TypeError(
                f"An order of {self.length} records takes offsets of type {word(self.length)}, "
                f"got {x.dtype}."
            )
        rows = slice(1) if turn is None or self.pivots.shape[1] == 1 else turn
        space = namespace(x, self.pivots, self.masks)
        pivots, masks = (space.asarray(each)[:, rows] for each in (self.pivots, self.masks))
        length = x.dtype.type(self.length)
        x = space.asarray(x)
        return _swap_or_not(x, length, lambda r: (pivots[r], masks[r]), reverse)


def swap_or_not_each(
    keys: UInt32[AnyArray, "*#rows 2"], lengths: UInt[Array, "*#rows"], x: UInt[Array, "*rows"]
) -> UInt[Array, "*rows"]:
    """`SwapOrNot(keys[i:i+1], lengths[i])(x[i:i+1])` for every row, without a table of rounds.

    Rows along an axis on which keys and lengths have size 1 share these, and their rounds.
    """
    return _swap_or_not(x, lengths, lambda r: _round(keys, jnp.full_like(keys[..., 0], r), lengths))


def _round(keys: AnyArray, r: AnyArray, length: Any) -> tuple[AnyArray, AnyArray]:
    """Pivot and mask of round `r` under each of the keys."""
    words = threefry2x32(keys, namespace(r).zeros_like(r), r)
    a, b = words[..., 0], words[..., 1]
    if length.dtype.itemsize == 4:
        return a % length, b
    a, b, half = a.astype(np.uint64), b.astype(np.uint64), np.uint64(32)
    return ((a << half) | b) % length, (b << half) | a


def _swap_or_not(
    x: UInt[AnyArray, "*rows"],
    length: Any,
    words: Callable[[Any], tuple[AnyArray, AnyArray]],
    reverse: bool = False,
) -> Any:
    """The rounds; `words(r)` gives the pivot and the mask of each row in round `r`."""
    space = namespace(x)

    def one(i: Any, x: AnyArray) -> Any:
        pivot, mask = words(ROUNDS - 1 - i if reverse else i)
        # pivot - x mod length, without leaving the unsigned word.
        y = space.where(pivot >= x, pivot - x, pivot + (length - x))
        return space.where(_swaps(space.maximum(x, y) ^ mask), y, x)

    if space is np:
        return functools.reduce(lambda x, i: one(i, x), range(ROUNDS), x)
    # XLA's CPU compiler takes minutes over 24 rounds unrolled into a gather. A GPU has no such
    # trouble, but starts a kernel for every turn of a loop.
    x = jax.lax.fori_loop(0, ROUNDS, one, x, unroll=not on_cpu())
    # Without the barrier the whole order is evaluated again for every gathered element.
    return jax.lax.optimization_barrier(x)


class Permutation(Order):
    """`jax.random.permutation` of each epoch's key: O(length) memory, as a cross-check."""

    records: UInt[Array, "span n"]
    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, length: int):
        records = jax.vmap(lambda key: jax.random.permutation(key, length))(typed(keys))
        self.records = records.astype(word(length))
        self.length = length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        return self.records[0 if turn is None else turn, offsets]


class Stretch(Order):
    """An order of one epoch of which `count` records from offset `start` on have been computed."""

    records: UInt[Array, " stretch"]
    start: Scalar
    length: int = eqx.field(static=True)

    def __init__(self, order: Order, start: Scalar, count: int):
        # So that all stretches are of one shape, the last begins earlier.
        self.start = jnp.minimum(start, start.dtype.type(order.length - count))
        self.records, self.length = order.run(self.start, count), order.length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        del turn
        return self.records.at[offsets - self.start].get(mode="promise_in_bounds")

    def run(self, start: Scalar, count: int) -> Records:
        return jax.lax.dynamic_slice_in_dim(self.records, start - self.start, count)


class BlockShuffle(Order):
    """Swap-or-not at two levels, so that rows read together are stored together.

    The records are cut into blocks of `size`, the last one shorter if need be. The blocks are
    permuted, and the permuted row is cut into windows of `window` blocks, each permuted within. So
    `window * size` rows in a row touch at most `window + 1` blocks (`2 * window + 2` across a
    boundary), and each record still stands anywhere in the epoch (spec SHUF).
    """

    blocks: SwapOrNot
    windows: SpanWords
    short: UInt[Array, " span"]
    length: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, length: int, size: int, window: int):
        self.length, self.size, self.window = length, min(size, length), window
        high, low = jnp.zeros_like(keys.T)
        self.blocks = SwapOrNot(threefry2x32(keys, high + 1, low), -(-length // size))
        self.windows = threefry2x32(keys, high + 2, low)
        last = jnp.full(keys.shape[0], self.blocks.length - 1, word(self.blocks.length))
        self.short = self.blocks.inverse(last, jnp.arange(keys.shape[0], dtype=jnp.uint32))

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        most = offsets.dtype.type(self._most)
        keys = self.windows[jnp.zeros_like(offsets) if turn is None else turn]
        x = self._within_windows(offsets // most, (offsets % most)[:, None], keys)[:, 0]
        return self._records(x, turn, lambda place: self.blocks(place, turn))

    def run(self, start: Scalar, count: int) -> Records:
        """Rows of one window share its rounds, and rows of one block its place."""
        number = start.dtype.type
        offsets, most = _row(start, count), number(self._most)
        piece = min(PIECE, self._most)
        pieces = -(-self._most // piece)  # of a window, the last one shorter if need be
        windows = -(-(count - 1) // self._most) + 1  # that so many rows can touch

        def piece_of(x: Array) -> Array:
            return x // most * number(pieces) + x % most // number(piece)

        # The rounds of the windows are computed on a grid of so many pieces by `piece` rows, and of
        # what is `found` there each of our rows picks its own.
        first, touched = piece_of(start), -(-(count - 1) // piece) + windows
        each = _row(first, min(touched, windows * pieces))
        inside = (each % number(pieces) * number(piece))[:, None] + _row(number(0), piece)[None]
        keys = jnp.broadcast_to(self.windows[:1], (each.size, 2))
        found = self._within_windows(each // number(pieces), inside, keys)
        x = found[piece_of(offsets) - first, offsets % most % number(piece)]

        places = windows * self.window + 1
        if places >= count:
            return self._records(x, None, self.blocks)
        before = (start // most).astype(word(self.blocks.length))
        before *= before.dtype.type(self.window)
        last = before.dtype.type(self.blocks.length - 1)
        blocks = self.blocks(jnp.minimum(_row(before, places), last))
        return self._records(x, None, lambda place: blocks[place - before])

    @property
    def _most(self) -> int:
        """Rows of a window; only the last has fewer."""
        return min(self.size * self.window, self.length)

    def _within_windows(
        self, window: Offsets, inside: UInt[Array, "b rows"], keys: RowWords
    ) -> UInt[Array, "b rows"]:
        """Where in the row of blocks the rows stand that are `inside` these windows."""
        number = window.dtype.type
        start = window * number(self._most)
        sizes = jnp.minimum(number(self._most), number(self.length) - start)
        keys = threefry2x32(keys, *split_word(window))
        # Which rounds they are depends on the length of a window, not of the epoch.
        kind = word(self._most)
        moved = swap_or_not_each(keys[:, None], sizes.astype(kind)[:, None], inside.astype(kind))
        return start[:, None] + moved.astype(window.dtype)

    def _records(
        self, x: Offsets, turn: Turns | None, block_at: Callable[[Array], Array]
    ) -> Records:
        """The records at the places `x` of the blocks put in a row."""
        number, places = x.dtype.type, word(self.blocks.length)
        size, rest = number(self.size), number(self.length % self.size)
        place, inside = x // size, x % size
        if rest:
            # Behind the one short block, blocks begin `rest` after a multiple of `size`.
            short = self.short[0 if turn is None else turn].astype(x.dtype)
            behind = x >= short * size + rest
            y = jnp.where(behind, x - rest, x)
            place = jnp.where(behind, y // size + number(1), place)
            inside = jnp.where(behind, y % size, inside)
        block = block_at(place.astype(places)).astype(x.dtype)
        return jax.lax.optimization_barrier(block * size + inside)


def window_order(keys: UInt32[np.ndarray, "1 2"], number: int, size: int) -> np.ndarray:
    """The order of `size` records in that window of an epoch with these keys, on the host.

    It is the order of such a window in an epoch shuffled by blocks.
    """
    windows = threefry2x32(keys, *np.array([[2], [0]], np.uint32))
    mine = threefry2x32(windows, *split_word(np.array([number], np.uint32)))
    return SwapOrNot(mine, size)._rounds(np.arange(size, dtype=np.uint32), None, reverse=False)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`shuffle="blocks"` with its sizes.

    Args:
        size: the records of a block; blocks come in random order.
        window: the number of consecutive blocks whose records are shuffled together.
    """

    size: int = 1024
    window: int = 16

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (number := integer(value, 0)) < 1:
                raise ValueError(
                    f"`{field.name}` of a block shuffle is an integer of at least 1, got {value!r}."
                )
            object.__setattr__(self, field.name, number)

    def __call__(self, keys: SpanWords, length: int) -> Order:
        return BlockShuffle(keys, length, self.size, self.window)


ORDERS: dict[Shuffle, Callable[[SpanWords, int], Order]] = {
    False: StoredOrder,
    True: SwapOrNot,
    "permutation": Permutation,
    "blocks": Blocks(),
}


def keys_of(order_key: Words, epochs: Turns) -> SpanWords:
    """The keys of the orders of these epochs (spec SHUF)."""
    return threefry2x32(order_key[None], *split_word(epochs))


def _row(start: Any, count: int) -> Array:
    """`start`, `start + 1`, ... in its own type."""
    return start + jnp.arange(count, dtype=start.dtype)


def _swaps(c: UInt[AnyArray, "*rows"]) -> AnyArray:
    """The top bit of the finaliser of murmur3 (32 bits) or of splitmix64 (64 bits)."""
    kind = c.dtype.type
    for shift, factor in FMIX32 if c.dtype.itemsize == 4 else SPLITMIX64:
        c = c ^ (c >> kind(shift))
        if factor is not None:
            c = c * kind(factor)
    return c >= kind(1 << (8 * c.dtype.itemsize - 1))
