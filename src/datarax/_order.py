"""The order of the records in an epoch. No other module decides it.

An `Order` is built from the key of one epoch, or from the keys of the consecutive epochs that one
batch can span. It is a small pytree, and as a function it maps offsets to records.
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
"""The rounds of swap-or-not, frozen by SHUF-012."""

PIECE = 64
"""How many rows of a window `BlockShuffle.run` computes with one set of round words."""

FMIX32 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None))
"""The steps of murmur3's finaliser: `c ^= c >> shift`, then `c *= factor`."""

SPLITMIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))
"""The steps of splitmix64's finaliser."""

SpanWords: TypeAlias = UInt32[AnyArray, "span 2"]
"""The keys of `span` consecutive epochs."""

Shuffle: TypeAlias = Literal[False, True, "permutation", "blocks"]

UINT32, UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)


def word(length: int) -> np.dtype:
    """The dtype of offsets and records: `uint32` if `length < 2**32`, else `uint64`."""
    return UINT32 if length < 2**32 else UINT64


class Order(eqx.Module):
    """The order of `span` consecutive epochs: `order(offsets, turn) -> records`.

    For each of these epochs it is a bijection of `[0, length)`. A subclass declares `length: int =
    eqx.field(static=True)` and the fields that it computes with, and implements `__call__`.
    """

    length: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        """The records at these offsets, unsigned integers of shape `(b,)`. Must be traceable.

        `turn` gives the epoch of each row, counted from the first epoch of this order. None means
        the first epoch for all rows.
        """

    def run(self, start: Scalar, count: int) -> Records:
        """The records at `count` offsets from `start` on, all in the first epoch.

        Override it if consecutive rows can be computed faster than one by one.
        """
        return self(_consecutive(start, count))


class StoredOrder(Order):
    """The identity: records in stored order (SHUF-002)."""

    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords | None, length: int):
        del keys
        self.length = length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        del turn
        return offsets


class SwapOrNot(Order):
    """A keyed permutation that computes each record in O(1) time and memory.

    24 swap-or-not rounds (Hoang, Morris & Rogaway, CRYPTO 2012; SHUF-013). `keys` has one key per
    epoch. Lengths from 2**32 up need 64-bit words (SHUF-014), so `jax.enable_x64`.
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
        """The offset of each record in its epoch (SHUF-015)."""
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
    """`SwapOrNot(keys[i:i+1], lengths[i])(x[i:i+1])` for each row `i`.

    The words of a round are computed when it runs, not kept in a table. Rows along an axis on which
    `keys` and `lengths` have size 1 share them.
    """
    return _swap_or_not(x, lengths, lambda r: _round(keys, jnp.full_like(keys[..., 0], r), lengths))


def _round(keys: AnyArray, r: AnyArray, length: Any) -> tuple[AnyArray, AnyArray]:
    """The pivot and the mask of round `r` under each key (SHUF-012, SHUF-014)."""
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
    """Applies all rounds to `x`. `words(r)` gives the pivot and the mask of round `r`.

    They broadcast with `x`. With `reverse` the rounds run backwards, which is the inverse.
    """
    space = namespace(x)

    def one(i: Any, x: AnyArray) -> Any:
        pivot, mask = words(ROUNDS - 1 - i if reverse else i)
        # (pivot - x) mod length, without wrapping around.
        y = space.where(pivot >= x, pivot - x, pivot + (length - x))
        return space.where(_swaps(space.maximum(x, y) ^ mask), y, x)

    if space is np:
        return functools.reduce(lambda x, i: one(i, x), range(ROUNDS), x)
    # XLA's CPU compiler takes minutes if 24 unrolled rounds feed a gather, so there it gets a loop.
    # On a GPU that compiles fast, while each iteration of a loop would launch a kernel.
    x = jax.lax.fori_loop(0, ROUNDS, one, x, unroll=not on_cpu())
    # Without the barrier XLA fuses the rounds into the gather, and recomputes all of them for every
    # element that is gathered.
    return jax.lax.optimization_barrier(x)


class Permutation(Order):
    """`jax.random.permutation` under each epoch's key (SHUF-016); O(length) memory."""

    records: UInt[Array, "span n"]
    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, length: int):
        records = jax.vmap(lambda key: jax.random.permutation(key, length))(typed(keys))
        self.records = records.astype(word(length))
        self.length = length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        return self.records[0 if turn is None else turn, offsets]


class Stretch(Order):
    """An order of one epoch as a table of the `count` records from offset `start` on.

    An offset outside of the table gives an undefined record.
    """

    records: UInt[Array, " stretch"]
    start: Scalar
    length: int = eqx.field(static=True)

    def __init__(self, order: Order, start: Scalar, count: int):
        # The last table of an epoch begins before `start`, so that all have the same shape.
        self.start = jnp.minimum(start, start.dtype.type(order.length - count))
        self.records, self.length = order.run(self.start, count), order.length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        del turn
        return self.records.at[offsets - self.start].get(mode="promise_in_bounds")

    def run(self, start: Scalar, count: int) -> Records:
        return jax.lax.dynamic_slice_in_dim(self.records, start - self.start, count)


class BlockShuffle(Order):
    """Swap-or-not at two levels, so that rows that are read together are stored together.

    The records are cut into blocks of `size`; the last block may be shorter. The blocks are
    permuted and laid end to end. That sequence is cut into windows of `window * size` rows, and the
    rows of each window are permuted. So the rows of one window come from at most `window + 1`
    blocks. Other `window * size` consecutive rows cross a window boundary, and come from at most
    `2 * window + 2` blocks. A record can still stand anywhere in the epoch (SHUF-018 to SHUF-020).
    """

    blocks: SwapOrNot  # the permutation of the blocks
    windows: SpanWords  # per epoch, the key from which the keys of its windows are derived
    short: UInt[Array, " span"]  # per epoch, the place of the last block among the permuted ones
    length: int = eqx.field(static=True)
    size: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, length: int, size: int, window: int):
        self.length, self.size, self.window = length, min(size, length), window
        # `fold_in(key, 2**32)` and `fold_in(key, 2**33)`: no round and no epoch has these numbers.
        high, low = jnp.zeros_like(keys.T)
        self.blocks = SwapOrNot(threefry2x32(keys, high + 1, low), -(-length // size))
        self.windows = threefry2x32(keys, high + 2, low)
        last = jnp.full(keys.shape[0], self.blocks.length - 1, word(self.blocks.length))
        self.short = self.blocks.inverse(last, jnp.arange(keys.shape[0], dtype=jnp.uint32))

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        rows = offsets.dtype.type(self._window_rows)
        keys = self.windows[jnp.zeros_like(offsets) if turn is None else turn]
        x = self._within_windows(offsets // rows, (offsets % rows)[:, None], keys)[:, 0]
        return self._records(x, turn, lambda place: self.blocks(place, turn))

    def run(self, start: Scalar, count: int) -> Records:
        """As `Order.run`, but derives round words once per piece, and looks each block up once."""
        cast = start.dtype.type
        offsets, rows = _consecutive(start, count), cast(self._window_rows)
        piece = min(PIECE, self._window_rows)
        pieces = -(-self._window_rows // piece)  # per window; its last piece may be shorter
        windows = -(-(count - 1) // self._window_rows) + 1  # the most that `count` rows touch

        def piece_of(x: Array) -> Array:
            return x // rows * cast(pieces) + x % rows // cast(piece)

        # Compute every row of the pieces that our rows can touch, then pick our rows.
        first, touched = piece_of(start), -(-(count - 1) // piece) + windows
        numbers = _consecutive(first, min(touched, windows * pieces))
        begins = numbers % cast(pieces) * cast(piece)
        inside = begins[:, None] + _consecutive(cast(0), piece)[None]
        keys = jnp.broadcast_to(self.windows[:1], (numbers.size, 2))
        found = self._within_windows(numbers // cast(pieces), inside, keys)
        x = found[piece_of(offsets) - first, offsets % rows % cast(piece)]

        # Look the blocks up in a table, unless that would have more entries than there are rows.
        places = windows * self.window + 1
        if places >= count:
            return self._records(x, None, self.blocks)
        before = (start // rows).astype(word(self.blocks.length))
        before *= before.dtype.type(self.window)
        last = before.dtype.type(self.blocks.length - 1)
        blocks = self.blocks(jnp.minimum(_consecutive(before, places), last))
        return self._records(x, None, lambda place: blocks[place - before])

    @property
    def _window_rows(self) -> int:
        """The rows of a window; the last window may have fewer."""
        return min(self.size * self.window, self.length)

    def _within_windows(
        self, window: Offsets, inside: UInt[Array, "b rows"], keys: RowWords
    ) -> UInt[Array, "b rows"]:
        """Where in the sequence of permuted blocks each row stands.

        `inside[i]` holds offsets in the window numbered `window[i]`, and `keys[i]` is the key from
        which that window's is derived.
        """
        cast = window.dtype.type
        start = window * cast(self._window_rows)
        sizes = jnp.minimum(cast(self._window_rows), cast(self.length) - start)
        keys = threefry2x32(keys, *split_word(window))
        # The length of a window, not of the epoch, decides between 32-bit and 64-bit rounds.
        kind = word(self._window_rows)
        moved = swap_or_not_each(keys[:, None], sizes.astype(kind)[:, None], inside.astype(kind))
        return start[:, None] + moved.astype(window.dtype)

    def _records(
        self, x: Offsets, turn: Turns | None, block_at: Callable[[Array], Array]
    ) -> Records:
        """The records at positions `x` in the sequence of permuted blocks.

        `block_at` maps places among the permuted blocks to blocks.
        """
        cast, places = x.dtype.type, word(self.blocks.length)
        size, rest = cast(self.size), cast(self.length % self.size)
        place, inside = x // size, x % size
        if rest:
            # After the one short block, blocks begin `rest` rows past a multiple of `size`.
            short = self.short[0 if turn is None else turn].astype(x.dtype)
            behind = x >= short * size + rest
            y = jnp.where(behind, x - rest, x)
            place = jnp.where(behind, y // size + cast(1), place)
            inside = jnp.where(behind, y % size, inside)
        block = block_at(place.astype(places)).astype(x.dtype)
        return jax.lax.optimization_barrier(block * size + inside)  # as in `_swap_or_not`


def window_order(keys: UInt32[np.ndarray, "1 2"], number: int, size: int) -> np.ndarray:
    """The order of the `size` records of window `number` in an epoch with this key, in NumPy.

    `BlockShuffle` orders a window of that number and length in the same way (SRC-039).
    """
    windows = threefry2x32(keys, *np.array([[2], [0]], np.uint32))
    mine = threefry2x32(windows, *split_word(np.array([number], np.uint32)))
    return SwapOrNot(mine, size)._rounds(np.arange(size, dtype=np.uint32), None, reverse=False)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`shuffle="blocks"` with its sizes.

    Args:
        size: the number of records in a block; the blocks of an epoch are shuffled.
        window: the number of consecutive shuffled blocks whose records are shuffled together.
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
    """The keys of these epochs: `fold_in(order_key, epoch)` for each (KEYS-005)."""
    return threefry2x32(order_key[None], *split_word(epochs))


def _consecutive(start: Any, count: int) -> Array:
    """`start`, `start + 1`, ... in the dtype of `start`."""
    return start + jnp.arange(count, dtype=start.dtype)


def _swaps(c: UInt[AnyArray, "*rows"]) -> AnyArray:
    """Whether the finaliser of murmur3 (32-bit) or splitmix64 (64-bit) sets the top bit of `c`."""
    kind = c.dtype.type
    for shift, factor in FMIX32 if c.dtype.itemsize == 4 else SPLITMIX64:
        c = c ^ (c >> kind(shift))
        if factor is not None:
            c = c * kind(factor)
    return c >= kind(1 << (8 * c.dtype.itemsize - 1))
