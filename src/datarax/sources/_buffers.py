"""Reused memory for rows that are read on the host."""

import collections
import functools
import math
from typing import Any

import numpy as np

from .._host_memory import aligned

SPARE_BYTES = 96 * 2**20
"""The most bytes of spare buffers for each size: enough for the batches that are read ahead and the
one that the consumer holds.
"""

SPARE_FROM = 2**17
"""Bytes from which a buffer is kept. glibc's malloc keeps smaller ones itself; from 128 KiB on it
returns freed memory to the system."""

SIZES = 8
"""How many sizes keep spare buffers."""


def empty_rows(rows: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array of shape `(rows, *shape)` that JAX on a CPU shares without a copy.

    It reuses memory where possible: a page fault on fresh memory costs more than to fill the page.
    """
    dtype = np.dtype(dtype)
    size = rows * math.prod(shape) * dtype.itemsize
    spare = _spare(size)
    try:
        buffer = spare.pop()
    except IndexError:
        buffer = aligned(size)
    if spare.maxlen:
        buffer = np.asarray(_Loan(buffer, spare))
    return buffer.view(dtype).reshape(rows, *shape)


class _Loan:
    """Memory lent to arrays of NumPy and JAX; returns to `spare` when the last of them is gone."""

    def __init__(self, buffer: np.ndarray, spare: collections.deque[np.ndarray]):
        self.__array_interface__ = buffer.__array_interface__
        self._buffer, self._spare = buffer, spare

    def __del__(self):
        self._spare.append(self._buffer)  # a full deque frees its oldest buffer


@functools.lru_cache(SIZES)
def _spare(size: int) -> collections.deque[np.ndarray]:
    """The unused buffers of `size` bytes. Stays empty for sizes under `SPARE_FROM`, or over
    `SPARE_BYTES`."""
    return collections.deque(maxlen=SPARE_BYTES // size if size >= SPARE_FROM else 0)
