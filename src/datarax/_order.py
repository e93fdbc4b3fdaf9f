"""Which record stands where in an epoch: the one place that decides order.

An `Order` is made from the keys of one epoch, or of a few in a row where one batch can span them: a
small pytree, then a pure function from offsets to records.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt32

from ._keys import split_word, threefry2x32, typed
from ._types import Offsets, Records, RowWords, Scalar, Turns, Words

ROUNDS = 24
FMIX32 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None))
SPLITMIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))

SpanWords: TypeAlias = UInt32[Array, "span 2"]

Shuffle: TypeAlias = Literal[False, True, "permutation", "blocks"]


UINT32, UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)


def word(length: int) -> np.dtype:
    """The unsigned type that holds an offset of `length` records: 32 bits below 2**32, else 64."""
    return UINT32 if length < 2**32 else UINT64


class Order(eqx.Module):
    """The order of `span` epochs in a row: `order(offsets, turn) -> records`.

    For each of its epochs a bijection of `[0, length)`. `turn` says for every row which of the
    epochs it stands in, 0 for the first; None is 0 for all.
    """

    length: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records: ...

    def run(self, start: Scalar, count: int) -> Records:
        """The records at `count` offsets from `start` on, all of the first epoch."""
        return self(start + jnp.arange(count, dtype=start.dtype))


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

    pivots: UInt[Array, "rounds span"]
    masks: UInt[Array, "rounds span"]
    length: int = eqx.field(static=True)

    def __init__(self, keys: SpanWords, length: int):
        rounds = jnp.arange(ROUNDS, dtype=jnp.uint32)[:, None]
        rounds = jnp.broadcast_to(rounds, (ROUNDS, keys.shape[0]))
        self.pivots, self.masks = _round(keys[None], rounds, word(length).type(length))
        self.length = length

    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records:
        return self._rounds(offsets, turn, reverse=False)

    def inverse(self, records: Records, turn: Turns | None = None) -> Offsets:
        """Where each record stands in its epoch."""
        return self._rounds(records, turn, reverse=True)

    def _rounds(self, x: Offsets, turn: Turns | None, reverse: bool) -> Records:
        if x.dtype != word(self.length):
            raise TypeError(
                f"An order of {self.length} records takes offsets of type {word(self.length)}, "
                f"got {x.dtype}."
            )
        rows = slice(1) if turn is None or self.pivots.shape[1] == 1 else turn
        pivots, masks = self.pivots[:, rows], self.masks[:, rows]
        length = x.dtype.type(self.length)
        return _swap_or_not(x, length, lambda r: (pivots[r], masks[r]), reverse)


def swap_or_not_each(keys: RowWords, lengths: Offsets, x: Offsets) -> Records:
    """`SwapOrNot(keys[i:i+1], lengths[i])(x[i:i+1])` for every row, without a table of rounds."""
    return _swap_or_not(x, lengths, lambda r: _round(keys, jnp.full_like(keys[:, 0], r), lengths))


def _round(keys: Array, r: Array, length: Any) -> tuple[Array, Array]:
    """Pivot and mask of round `r` under each of the keys."""
    words = threefry2x32(keys, jnp.zeros_like(r), r)
    a, b = words[..., 0], words[..., 1]
    if length.dtype.itemsize == 4:
        return a % length, b
    a, b, half = a.astype(jnp.uint64), b.astype(jnp.uint64), np.uint64(32)
    return ((a << half) | b) % length, (b << half) | a


def _swap_or_not(
    x: Offsets, length: Any, words: Callable[[Array], tuple[Array, Array]], reverse: bool = False
) -> Records:
    """The rounds; `words(r)` gives the pivot and the mask of each row in round `r`."""

    def one(i: Any, x: Array) -> Array:
        pivot, mask = words(ROUNDS - 1 - i if reverse else i)
        # pivot - x mod length, without leaving the unsigned word.
        y = jnp.where(pivot >= x, pivot - x, pivot + (length - x))
        return jnp.where(_swaps(jnp.maximum(x, y) ^ mask), y, x)

    # The loop stays rolled: XLA's CPU compiler takes minutes over 24 rounds unrolled into a
    # gather. Its trip count is static, so a GPU never waits for the host.
    x = jax.lax.fori_loop(0, ROUNDS, one, x)
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
    """An order of one epoch of which the records from offset `start` on have been computed."""

    records: UInt[Array, " stretch"]
    start: Scalar
    length: int = eqx.field(static=True)

    def __init__(self, order: Order, start: Scalar, count: int):
        offsets = start + jnp.arange(count, dtype=start.dtype)
        # Beyond the end stand rows that nobody asks for, so that all stretches are of one shape.
        beyond = (offsets < start) | (offsets >= start.dtype.type(order.length))
        self.records = order(jnp.where(beyond, start, offsets))
        self.start, self.length = start, order.length

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
        keys = self.windows[jnp.zeros_like(offsets) if turn is None else turn]
        return self._block(self._within_window(offsets, keys), turn)

    def _within_window(self, x: Offsets, keys: RowWords) -> Offsets:
        number, most = x.dtype.type, min(self.size * self.window, self.length)
        window = x // number(most)
        start = window * number(most)
        sizes = jnp.minimum(number(most), number(self.length) - start)
        keys = threefry2x32(keys, *split_word(window))
        # Which rounds they are depends on the length of a window, not of the epoch.
        kind = word(most)
        inside = swap_or_not_each(keys, sizes.astype(kind), (x - start).astype(kind))
        return start + inside.astype(x.dtype)

    def _block(self, x: Offsets, turn: Turns | None) -> Records:
        """The record at place `x` of the blocks put in a row."""
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
        block = self.blocks(place.astype(places), turn).astype(x.dtype)
        return jax.lax.optimization_barrier(block * size + inside)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`shuffle="blocks"` with its two sizes: records in a block, blocks in a window."""

    size: int = 1024
    window: int = 16

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"`{field.name}` of a block shuffle is an integer of at least 1, got {value!r}."
                )

    def __call__(self, keys: SpanWords, length: int) -> Order:
        return BlockShuffle(keys, length, self.size, self.window)


ORDERS: dict[Shuffle, Callable[[SpanWords, int], Order]] = {
    False: StoredOrder,
    True: SwapOrNot,
    "permutation": Permutation,
    "blocks": Blocks(),
}


def epoch_keys(order_key: Words, epoch: Scalar, span: int) -> SpanWords:
    """The keys of the orders of `span` epochs from `epoch` on (spec SHUF)."""
    return keys_of(order_key, epoch + jnp.arange(span, dtype=epoch.dtype))


def keys_of(order_key: Words, epochs: Turns) -> SpanWords:
    """The keys of the orders of these epochs."""
    return threefry2x32(jnp.asarray(order_key)[None], *split_word(epochs))


def _swaps(c: UInt[Array, " b"]) -> Array:
    """The top bit of the finaliser of murmur3 (32 bits) or of splitmix64 (64 bits)."""
    word = c.dtype.type
    for shift, factor in FMIX32 if c.dtype.itemsize == 4 else SPLITMIX64:
        c = c ^ (c >> word(shift))
        if factor is not None:
            c = c * word(factor)
    return c >= word(1 << (8 * c.dtype.itemsize - 1))
