"""Which record stands where in an epoch: the one place that decides order.

An `Order` is made from the keys of one epoch, or of a few in a row where one batch can span them: a
small pytree, then a pure function from offsets to records.
"""

import abc
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt32

from ._keys import split_word, threefry2x32, typed
from ._types import Offsets, Records, Scalar, Turns, Words

ROUNDS = 24
FMIX32 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None))
SPLITMIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None))

SpanWords: TypeAlias = UInt32[Array, "span 2"]

Shuffle: TypeAlias = Literal[False, True, "permutation"]


def word(length: int) -> np.dtype:
    """The unsigned type that holds an offset of `length` records: 32 bits below 2**32, else 64."""
    return np.dtype(np.uint32 if length < 2**32 else np.uint64)


class Order(eqx.Module):
    """The order of `span` epochs in a row: `order(offsets, turn) -> records`.

    For each of its epochs a bijection of `[0, length)`. `turn` says for every row which of the
    epochs it stands in, 0 for the first; None is 0 for all.
    """

    length: eqx.AbstractVar[int]

    @abc.abstractmethod
    def __call__(self, offsets: Offsets, turn: Turns | None = None) -> Records: ...


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
        counts = jnp.arange(ROUNDS, dtype=jnp.uint32)
        rounds = jnp.broadcast_to(counts[:, None], (ROUNDS, keys.shape[0]))
        words = threefry2x32(keys[None], jnp.zeros_like(rounds), rounds)
        a, b = words[..., 0], words[..., 1]
        if word(length).itemsize == 4:
            self.pivots, self.masks = a % np.uint32(length), b
        else:
            a, b, half = a.astype(jnp.uint64), b.astype(jnp.uint64), np.uint64(32)
            self.pivots, self.masks = (
                ((a << half) | b) % np.uint64(length),
                (b << half) | a,
            )
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
        length = x.dtype.type(self.length)
        rows = slice(1) if turn is None else turn
        pivots, masks = self.pivots[:, rows], self.masks[:, rows]

        def one(i: Any, x: Array) -> Array:
            r = ROUNDS - 1 - i if reverse else i
            pivot = pivots[r]
            # pivot - x mod length, without leaving the unsigned word.
            y = jnp.where(pivot >= x, pivot - x, pivot + (length - x))
            return jnp.where(_swaps(jnp.maximum(x, y) ^ masks[r]), y, x)

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


ORDERS: dict[Shuffle, Callable[[SpanWords, int], Order]] = {
    False: StoredOrder,
    True: SwapOrNot,
    "permutation": Permutation,
}


def epoch_keys(order_key: Words, epoch: Scalar, span: int) -> SpanWords:
    """The keys of the orders of `span` epochs from `epoch` on (spec SHUF)."""
    epochs = epoch + jnp.arange(span, dtype=epoch.dtype)
    return threefry2x32(jnp.asarray(order_key)[None], *split_word(epochs))


def _swaps(c: UInt[Array, " b"]) -> Array:
    """The top bit of the finaliser of murmur3 (32 bits) or of splitmix64 (64 bits)."""
    word = c.dtype.type
    for shift, factor in FMIX32 if c.dtype.itemsize == 4 else SPLITMIX64:
        c = c ^ (c >> word(shift))
        if factor is not None:
            c = c * word(factor)
    return c >= word(1 << (8 * c.dtype.itemsize - 1))
