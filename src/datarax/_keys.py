"""Every random bit of a pipeline, as a function of (seed, node, epoch, record).

Keys are derived with threefry2x32 (Salmon et al., SC 2011), never drawn from a running state. The
cipher is implemented here in full, so that neither JAX's default PRNG nor a JAX release can change
a stream (spec KEYS).
"""

import zlib
from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key, UInt, UInt32

from ._types import AnyArray, Records, RowWords, Scalar, Words, namespace
from .errors import RngsError

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
"""Bits by which four rounds rotate; the first row is for even groups of rounds."""

PARITY = 0x1BD11BDA
"""The third word of the key schedule is this XOR both words of the key."""

SOURCE = "source"
"""The node name of the source: its keys are derived like those of any other node."""


class BaseKey(nnx.Variable):
    """The two words from which all keys of a pipeline, a source or an operator are derived."""


def rounds(
    first: UInt32[AnyArray, "*#batch"],
    second: UInt32[AnyArray, "*#batch"],
    high: UInt32[AnyArray, "*#batch"],
    low: UInt32[AnyArray, "*#batch"],
) -> tuple[UInt32[Any, "*batch"], UInt32[Any, "*batch"]]:
    """The block (two words) of the key `(first, second)` at the counter `(high, low)`.

    All four arguments broadcast.
    """
    schedule = (first, second, first ^ second ^ np.uint32(PARITY))
    x, y = high + first, low + second
    for block in range(5):
        for bits in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(bits)) | (y >> np.uint32(32 - bits)))
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def threefry2x32(
    key: UInt32[AnyArray, "*#batch 2"],
    high: UInt32[AnyArray, "*batch"],
    low: UInt32[AnyArray, "*batch"],
) -> UInt32[AnyArray, "*batch 2"]:
    """The 20-round block cipher on the counter `(high, low)`, elementwise; keys broadcast.

    If all arguments are NumPy arrays, so is the result, and JAX is not called.
    """
    if namespace(key, high, low) is np:
        with np.errstate(over="ignore"):  # NumPy warns of it for 0-d arrays
            return np.stack(rounds(key[..., 0], key[..., 1], high, low), axis=-1)
    return _threefry2x32(key, high, low)


@jax.jit  # traces the rounds once, not for every key that is derived
def _threefry2x32(key: AnyArray, high: AnyArray, low: AnyArray) -> Array:
    return jnp.stack(rounds(key[..., 0], key[..., 1], high, low), axis=-1)


def split_word(value: UInt[AnyArray, "*batch"]) -> tuple[AnyArray, AnyArray]:
    """The high and the low 32 bits of an unsigned integer of up to 64 bits."""
    space, low = namespace(value), value.astype(np.uint32)
    if value.dtype.itemsize <= 4:
        return space.zeros_like(low), low
    return space.asarray(value >> np.uint64(32)).astype(np.uint32), low


def fold_in(key: Words, value: UInt[AnyArray, ""]) -> Words:
    """Derives a key from `key` and `value`: `jax.random.fold_in` if `value < 2**32` (KEYS-003)."""
    return threefry2x32(key, *split_word(value))


def node_key(base: Words, name: str) -> Words:
    """The key of the node `name`. Nodes with the same base get unrelated keys (KEYS-004)."""
    return fold_in(base, np.asarray(node_number(name), np.uint32))


def node_number(name: str) -> int:
    """The number that `node_key` folds in for `name`."""
    return zlib.crc32(name.encode())


def record_keys(node: Words, epoch: Records, record: Records) -> Key[Array, " b"]:
    """One typed key per row, from the epoch and the record of that row alone (KEYS-006)."""
    per_epoch: RowWords = threefry2x32(jnp.asarray(node)[None], *split_word(epoch))
    return typed(threefry2x32(per_epoch, *split_word(record)))


def batch_key(node: Words, epoch: Scalar, offset: Scalar) -> Key[Array, ""]:
    """One typed key per batch, from the epoch and the offset of its first row (KEYS-007)."""
    return typed(fold_in(fold_in(node, epoch), offset))


def typed(words: UInt32[AnyArray, "*batch 2"]) -> Key[Array, "*batch"]:
    """Words as threefry keys for `jax.random`, whatever PRNG is the default."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def words(key: AnyArray) -> Words:
    """The two words of a typed key or of a raw `uint32[2]`.

    Of a key of another PRNG that is longer, the first two (KEYS-012). Raises `RngsError` for
    anything else, and for an array of keys.
    """
    data = key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data(key)
    if getattr(data, "dtype", None) != np.uint32 or data.shape[-1:] < (2,):
        array = isinstance(data, jax.Array | np.ndarray)
        got = f"{data.dtype}{[*data.shape]}" if array else type(key).__name__
        raise RngsError(
            f"A key must be that of `jax.random.key(seed)`, or its two words of type uint32, got "
            f"{got}."
        )
    if data.ndim != 1:
        raise RngsError(
            f"`rngs` must hold one key a stream, got {data.shape[:-1]} of them, as from a fork. "
            "Build it as nnx.Rngs(seed)."
        )
    return data[:2]


def base_words(rngs: Any, stream: str | None) -> Words:
    """The words of the stream `stream` of `rngs` if it has one, else of `default` (KEYS-010).

    The stream is read, not drawn from: its counter does not move (KEYS-011).
    """
    check_rngs(rngs)
    if (name := stream_of(rngs, stream)) is not None:
        return words(rngs[name].key.get_raw_value())
    raise RngsError(
        f"`rngs` must have a stream {stream or 'default'!r} or 'default', "
        f"got streams {[name for name, _ in rngs.items()]}. Build it as nnx.Rngs(seed)."
    )


def stream_of(streams: Container[str], wanted: str | None) -> str | None:
    """`wanted` if `streams` has it, else `default`; None if it has neither."""
    return next((x for x in (wanted, "default") if x is not None and x in streams), None)


def all_words(rngs: Any) -> dict[str, BaseKey]:
    """The words of every stream of `rngs`. No counter moves."""
    check_rngs(rngs)
    return {name: BaseKey(words(stream.key.get_raw_value())) for name, stream in rngs.items()}


def check_rngs(rngs: Any) -> None:
    """Raises `RngsError` unless `rngs` is an `nnx.Rngs`: a seed or a key alone is refused."""
    if not isinstance(rngs, nnx.Rngs):
        raise RngsError(
            f"`rngs` must be an nnx.Rngs, got {type(rngs).__name__}. Build it as nnx.Rngs(seed)."
        )
