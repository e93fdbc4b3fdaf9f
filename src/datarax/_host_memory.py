"""Memory of the host: how it is got, kept, and given to JAX without a copy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from ._settings import chosen_device, on_cpu, transferring

ALIGNMENT = 64
"""Bytes: XLA's CPU client shares memory that starts at a multiple of this, and copies any other."""


def aligned(count: int) -> np.ndarray:
    """So many uninitialised bytes that JAX can take over on a CPU without a copy."""
    memory = np.empty(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count]


@functools.cache
def keep_memory() -> None:
    """Lets the process keep up to 64 MiB of what it frees for what it allocates next.

    As soon as glibc has given a piece of memory back, it takes pieces of that size from the heap
    and leaves twice as much free at the heap's end. Until then whoever frees a few batches together
    gets the memory of the next ones page by page, which can take longer than to compute them. So it
    is shown at once a piece as large as it learns from.

    It is asked for where programs on a CPU make the batches. Rows that are read from files lie in
    memory of their own, which is kept anyway, and which is faster outside the heap.
    """
    if on_cpu():
        np.empty(LARGEST_PIECE, np.uint8)  # given back at once, and no page of it was touched


LARGEST_PIECE = 2**25 - 2**16
"""Bytes, just under the 32 MiB from which on glibc learns nothing."""


def to_device(tree: Any) -> Any:
    """Arrays of types that JAX holds on the default device, as `jax.device_put` places them.

    On a CPU that takes as long as to copy a hundred kilobytes, and no other thread can run Python
    meanwhile. So there, unless a device was chosen, it is only what `device_put` ends with.
    """
    plain = chosen_device() is None and on_cpu()
    put = _put_on_cpu(jax.local_devices()[0]) if plain else None
    if put is None:
        return jax.device_put(tree)
    with transferring():
        return jax.tree.map(lambda x: put(x) if isinstance(x, np.ndarray) else x, tree)


@functools.lru_cache(1)  # by device, since a backend that is cleared has others afterwards
def _put_on_cpu(device: Any) -> Callable[[np.ndarray], jax.Array] | None:
    """No public part of JAX: None where it is not what it was."""
    x = np.ones(2, np.float32)
    wanted = jax.device_put(x)
    where, devices = wanted.sharding, [device]

    @functools.lru_cache
    def shaped(shape: tuple[int, ...], dtype: np.dtype) -> ShapedArray:
        return ShapedArray(shape, dtype)

    try:
        from jaxlib.xla_client import batched_device_put

        def put(x: np.ndarray) -> jax.Array:
            return batched_device_put(shaped(x.shape, x.dtype), where, [x], devices, False)

        found = put(x)
    except Exception:
        return None
    return put if (found.aval, found.committed) == (wanted.aval, False) else None
