"""Host memory: allocates it, keeps it for reuse, and hands it to JAX without a copy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from ._settings import chosen_device, on_cpu, transferring

ALIGNMENT = 64
"""Bytes. XLA's CPU client shares an array that starts at a multiple of this, and copies others."""


def aligned(count: int) -> np.ndarray:
    """`count` uninitialised bytes that JAX can use on a CPU without a copy."""
    memory = np.empty(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count]


@functools.cache
def keep_memory() -> None:
    """Makes glibc keep up to 64 MiB of freed memory in the process, for the next allocations.

    By default glibc returns large pieces to the system. A consumer that frees a few batches
    together then pays a page fault for every page of the next batches, which can take longer than
    computing them. When glibc unmaps a piece, it raises its threshold for `mmap` to the size of
    that piece (M_MMAP_THRESHOLD), and keeps twice as much free at the top of the heap
    (M_TRIM_THRESHOLD). So we allocate and free one such piece now.

    Called where programs on a CPU compute the batches. Rows read from files do not need it:
    `sources/_buffers.py` reuses their memory, which is faster outside the heap.
    """
    if on_cpu():
        np.empty(LARGEST_PIECE, np.uint8)  # freed immediately; no page of it is touched


LARGEST_PIECE = 2**25 - 2**16
"""Bytes, just below 32 MiB: glibc adapts its thresholds to no larger piece."""


def to_device(tree: Any) -> Any:
    """Puts the NumPy arrays of a tree on the default device, as `jax.device_put` does.

    Their dtypes must be ones that JAX holds. On a CPU `device_put` takes as long as a copy of
    100 kB, and holds the GIL meanwhile. There, unless `jax.default_device` is set, we call the
    function that `device_put` itself calls last.
    """
    plain = chosen_device() is None and on_cpu()
    with transferring():
        put = _put_on_cpu(jax.local_devices()[0]) if plain else None
        if put is None:
            return jax.device_put(tree)
        return jax.tree.map(lambda x: put(x) if isinstance(x, np.ndarray) else x, tree)


@functools.lru_cache(1)  # keyed by device: JAX makes new ones after a backend is cleared
def _put_on_cpu(device: Any) -> Callable[[np.ndarray], jax.Array] | None:
    """The last step of `jax.device_put`, for one array.

    It is not public. None if this JAX does not have it, or if it gives another result.
    """
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
